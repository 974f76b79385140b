"""Trains the two-task control toy, in which the effect of discounting on distillation can be seen.

Revisiting-OPD (arXiv:2603.25562), appendix C: a point on a line. The left task starts at +2 and
should end at -3, the right one starts at -2 and should end at +3. One student learns both tasks,
each has its teacher, and iterations alternate between them. A step's cost is
r_t = log pi - log q of the move that the student sampled, and the estimator is

    g_gamma = sum_t ( sum_{t' >= t} gamma^(t'-t) r_t' ) grad log pi(delta_t | s_t)

gamma = 0 is the token-level form, gamma = 1 the causal sequence-level one.

The paper leaves open: widths (here 3 -> 62 -> 62 -> 2, 4,280 parameters), activation (tanh), the
bounds of sigma, the optimizer (Adam, no clipping), the teachers' reward, and the loss's scale (sum
over time, mean over trajectories). Its "B=64 trajectories in M=8 micro-batches" is read as 8
micro-batches of 8 that together are the update's batch.

Every student of the study (gammas x seeds) trains at once: one batched network, and the gradient at
its output, advantage times score, is known in closed form, so that all gammas' variances are
measured on all students.

Letters: R runs, B trajectories, T steps, F input features, H hidden units, O outputs (mean, raw
sigma), M micro-batches, G gammas, C = G O columns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

STARTS = (2.0, -2.0)
TARGETS = (-3.0, 3.0)
"""By task: 0 left, 1 right."""
TASKS = ("left", "right")
HORIZON = 20
TRAJECTORIES = 64
MICRO_BATCHES = 8
HIDDEN = 62
# The score has 1 / sigma in it: without a bound its variance would have none.
SIGMA_MIN = 0.1
TEACHER_ITERATIONS = 300
EVALUATED = 256
"""Trajectories of each task that are played after training."""
REACHED = 0.5
"""A target counts as reached when trajectories end this close to it on average."""

Progress = Callable[[str, int, int], None]
"""Called with (what runs, how many iterations are done, of how many)."""


class Policies:
    """R Gaussian policies over a move, each an MLP of (task, position, time), run side by side."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        def layer(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
            drawn = [torch.randn(inputs, outputs, generator=each) for each in generators]
            weight = torch.stack(drawn) / math.sqrt(inputs)
            bias = torch.zeros(len(drawn), 1, outputs)
            return weight.requires_grad_(), bias.requires_grad_()

        self.layers = [layer(3, HIDDEN), layer(HIDDEN, HIDDEN), layer(HIDDEN, 2)]

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers for tensor in layer]

    def hidden(self, features_RNF: torch.Tensor) -> torch.Tensor:
        """The last hidden layer [R, N, H]."""
        hidden_RNH = features_RNF
        for weight, bias in self.layers[:-1]:
            hidden_RNH = torch.tanh(torch.baddbmm(bias, hidden_RNH, weight))
        return hidden_RNH

    def head(self, hidden_RNH: torch.Tensor) -> torch.Tensor:
        """Mean and raw sigma [R, N, O]."""
        weight, bias = self.layers[-1]
        return torch.baddbmm(bias, hidden_RNH, weight)

    def pick(self, index: torch.Tensor) -> Policies:
        """Copies of the policies at `index`: the same policy may occur several times."""
        made = copy.copy(self)
        made.layers = [
            (weight.detach()[index].requires_grad_(), bias.detach()[index].requires_grad_())
            for weight, bias in self.layers
        ]
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """What R policies did with B trajectories each on one task.

    features_RBTF: what the policy saw. moves_RBT. positions_RBT: after each move.
    """

    features_RBTF: torch.Tensor
    moves_RBT: torch.Tensor
    positions_RBT: torch.Tensor


def gaussian(head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sigma of a head's last dimension."""
    return head[..., 0], SIGMA_MIN + torch.nn.functional.softplus(head[..., 1])


def log_density(head: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    mean, sigma = gaussian(head)
    return -((moves - mean) / sigma).square() / 2 - sigma.log() - math.log(2 * math.pi) / 2


def score(head: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """The gradient of the log density with respect to the head [..., O]."""
    mean, sigma = gaussian(head)
    standard = (moves - mean) / sigma
    # d log p / d sigma, times the derivative of softplus
    raw = (standard.square() - 1) / sigma * head[..., 1].sigmoid()
    return torch.stack([standard / sigma, raw], dim=-1)


@torch.no_grad()
def play(policies: Policies, task: int, noise_RBT: torch.Tensor) -> Trajectories:
    """s_{t+1} = s_t + delta_t, delta_t = mean + sigma * noise."""
    runs, batch, horizon = noise_RBT.shape
    position_RB = torch.full((runs, batch), STARTS[task])
    sign_RB = torch.full((runs, batch), 2.0 * task - 1)  # names the task to the policy: -1 or 1
    features, moves, positions = [], [], []
    for t in range(horizon):
        time_RB = torch.full((runs, batch), t / horizon)
        features.append(torch.stack([sign_RB, position_RB, time_RB], dim=-1))
        mean_RB, sigma_RB = gaussian(policies.head(policies.hidden(features[-1])))
        moves.append(mean_RB + sigma_RB * noise_RBT[:, :, t])
        position_RB = position_RB + moves[-1]
        positions.append(position_RB)
    return Trajectories(
        features_RBTF=torch.stack(features, dim=2),
        moves_RBT=torch.stack(moves, dim=2),
        positions_RBT=torch.stack(positions, dim=2),
    )


def return_to_go(values_RBT: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """sum_{t' >= t} gamma^(t'-t) values_t'. `gamma`: one number, or one a run [R, 1]."""
    found, running = [], torch.zeros_like(values_RBT[..., 0])
    for t in reversed(range(values_RBT.shape[-1])):
        running = values_RBT[..., t] + gamma * running
        found.append(running)
    return torch.stack(found[::-1], dim=-1)


def noise(generators: Sequence[torch.Generator], batch: int = TRAJECTORIES) -> torch.Tensor:
    """Standard normal draws, one stream a generator [len(generators), B, T]."""
    return torch.stack([torch.randn(batch, HORIZON, generator=each) for each in generators])


def train_teachers(
    seeds: Sequence[int], task: int, iterations: int, progress: Progress | None = None
) -> Policies:
    """One teacher a seed, by REINFORCE.

    Reward: -(distance to the target)^2 - 2 (move)^2 after each move, so that a teacher walks and
    does not jump. Advantage: the return-to-go against the batch's mean and deviation at that time.
    """
    # 2 seed + task: the tasks' teachers share no random stream
    generators = [torch.Generator().manual_seed(2 * seed + task) for seed in seeds]
    policies = Policies(generators)
    optimizer = torch.optim.Adam(policies.parameters, lr=3e-3)
    for iteration in range(iterations):
        seen = play(policies, task, noise(generators))
        reward_RBT = -(seen.positions_RBT - TARGETS[task]).square() - 2 * seen.moves_RBT.square()
        return_RBT = return_to_go(reward_RBT, 1.0)
        advantage_RBT = (return_RBT - return_RBT.mean(1, keepdim=True)) / return_RBT.std(
            1, keepdim=True
        )
        head_RBTO = policies.head(policies.hidden(seen.features_RBTF.flatten(1, 2)))
        score_RNO = score(head_RBTO, seen.moves_RBT.flatten(1))
        optimizer.zero_grad()
        # Minus: a reward is to grow. (The students below have a cost, which is to fall.)
        head_RBTO.backward(-advantage_RBT.flatten(1)[..., None] * score_RNO / TRAJECTORIES)
        optimizer.step()
        if progress is not None:
            progress(f"{TASKS[task]} teachers", iteration + 1, iterations)
    return policies


def micro_batch_variance(
    hidden_RNH: torch.Tensor, score_RNO: torch.Tensor, cost_RGBT: torch.Tensor
) -> torch.Tensor:
    """Var = 1/M sum_m ||g_m - mean||^2 of the output layer's gradient (weight and bias) [R, G].

    cost_RGBT: the weight of each score, one for each estimator G.
    """
    runs, gammas, batch, horizon = cost_RGBT.shape
    each = batch // MICRO_BATCHES
    # The layer's bias counts as one more weight, of an input that is always 1.
    inputs_RNH = torch.cat([hidden_RNH, torch.ones_like(hidden_RNH[..., :1])], dim=-1)
    outward_RNGO = score_RNO[:, :, None] * cost_RGBT.view(runs, gammas, -1).mT[..., None]
    inputs_RMNH = inputs_RNH.unflatten(1, (MICRO_BATCHES, each * horizon))
    outward_RMNC = outward_RNGO.unflatten(1, (MICRO_BATCHES, each * horizon)).flatten(-2)
    gradient_RMHGO = (inputs_RMNH.mT @ outward_RMNC / each).unflatten(-1, (gammas, -1))
    centred_RMHGO = gradient_RMHGO - gradient_RMHGO.mean(1, keepdim=True)
    return centred_RMHGO.square().sum((2, 4)).mean(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyRun:
    """One student after training.

    distances: by task, the mean of |last position - target|.
    variance: of its gamma's estimator on itself, the median over the iterations.
    first_variance: the same in the first iteration, where all gammas have the same student.
    reference_variance: of its gamma's estimator on the student that the study's first gamma trained
        from the same seed, the median over the iterations: the estimator's effect alone.
    """

    gamma: float
    seed: int
    distances: tuple[float, float]
    variance: float
    first_variance: float
    reference_variance: float

    @property
    def reached(self) -> bool:
        """Both targets."""
        return all(distance < REACHED for distance in self.distances)

    @property
    def diverged(self) -> bool:
        """Farther from a target than at the start, or NaN."""
        begun = (abs(start - target) for start, target in zip(STARTS, TARGETS, strict=True))
        # `not d <= far`, not `d > far`: NaN counts as diverged
        return any(not d <= far for d, far in zip(self.distances, begun, strict=True))


def run_toy(
    gammas: Sequence[float],
    seeds: Sequence[int],
    iterations: int,
    progress: Progress | None = None,
) -> list[ToyRun]:
    """Train teachers, then a student for each gamma and seed. For one seed, all gammas begin with
    the same student and have the same noise."""
    index_R = torch.arange(len(seeds)).repeat(len(gammas))  # the seed of each run, gamma by gamma
    gamma_R1 = torch.tensor(gammas).repeat_interleave(len(seeds))[:, None]
    teachers = [
        train_teachers(seeds, task, TEACHER_ITERATIONS, progress).pick(index_R) for task in (0, 1)
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    students = Policies(generators).pick(index_R)
    optimizer = torch.optim.Adam(students.parameters, lr=1e-3)
    variances = []
    for iteration in range(iterations):
        task = iteration % 2
        seen = play(students, task, noise(generators)[index_R])  # one seed's runs share its noise
        optimizer.zero_grad()
        variances.append(_distil(students, teachers[task], seen, gamma_R1, gammas))
        optimizer.step()
        if progress is not None:
            progress("students", iteration + 1, iterations)
    ends = [
        play(students, task, noise(generators, EVALUATED)[index_R]).positions_RBT[..., -1]
        for task in (0, 1)
    ]
    distances_KR = [(end - at).abs().mean(1) for end, at in zip(ends, TARGETS, strict=True)]
    return _records(gammas, seeds, torch.stack(distances_KR), torch.stack(variances))


def _distil(
    students: Policies,
    teachers: Policies,
    seen: Trajectories,
    gamma_R1: torch.Tensor,
    gammas: Sequence[float],
) -> torch.Tensor:
    """Leave each run's gradient in its parameters; return the variances of all gammas' estimators
    on each run's student [R, G]."""
    features_RNF, moves_RN = seen.features_RBTF.flatten(1, 2), seen.moves_RBT.flatten(1)
    hidden_RNH = students.hidden(features_RNF)
    head_RNO = students.head(hidden_RNH)
    with torch.no_grad():
        teacher_RNO = teachers.head(teachers.hidden(features_RNF))
        cost_RN = log_density(head_RNO, moves_RN) - log_density(teacher_RNO, moves_RN)
        cost_RBT = cost_RN.view_as(seen.moves_RBT)
        score_RNO = score(head_RNO, moves_RN)
        cost_RGBT = torch.stack([return_to_go(cost_RBT, gamma) for gamma in gammas], dim=1)
        found_RG = micro_batch_variance(hidden_RNH, score_RNO, cost_RGBT)
    weight_RN = return_to_go(cost_RBT, gamma_R1).flatten(1)
    # autograd starts at the head, whose gradient is known: advantage times score
    head_RNO.backward(weight_RN[..., None] * score_RNO / seen.moves_RBT.shape[1])
    return found_RG


def _records(
    gammas: Sequence[float],
    seeds: Sequence[int],
    distances_KR: torch.Tensor,
    variances_IRG: torch.Tensor,
) -> list[ToyRun]:
    # Of an even number torch takes the lower of the two in the middle.
    median_RG = variances_IRG.median(dim=0).values
    return [
        ToyRun(
            gamma=gamma,
            seed=seed,
            distances=(distances_KR[0, run].item(), distances_KR[1, run].item()),
            variance=median_RG[run, g].item(),
            first_variance=variances_IRG[0, run, g].item(),
            # row s: runs stand gamma by gamma, so that the first gamma's come first
            reference_variance=median_RG[s, g].item(),
        )
        for g, gamma in enumerate(gammas)
        for s, seed in enumerate(seeds)
        for run in [g * len(seeds) + s]
    ]
