"""Computes bias and variance of every estimator exactly, as sums over all sequences of a small
vocabulary.

Student and teacher are tables of logits, one row for each prefix, so that the parameters are the
student's logits and every expectation over y ~ student is a finite sum. An estimator is compared
with two true gradients (Revisiting-OPD, arXiv:2603.25562):

    sequence:  grad KL( pi(y) || q(y) )                    what on-policy distillation minimises
    token:     E_y sum_t grad KL( pi(.|y_<t) || q(.|y_<t) )      with the prefixes held fixed

The second ignores that a token changes which prefixes come after it; local losses estimate it.

Each estimate is the gradient of an objective's loss, summed over the tokens of one on-policy
sequence. A token's gradient lies in the row of its prefix. So the gradients of a sequence's tokens
are orthogonal, and the sum over TrOPD's random choice is taken token by token.

Tokens may be sampled with a temperature and top-p: `sampling_shift` measures what that does to an
estimator's mean.

Letters: Y sequences, T tokens of each, N = Y T tokens, C prefixes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tutelage.distill.objectives import DenseStudent, Objective, TeacherScores, Tokens, build
from tutelage.distill.objectives.tokens import BEHAVIORS
from tutelage.scheduler.episodes import SamplingParams

# 6^5 = 7,776 sequences, and every expectation is a sum over all of them.
VOCABULARY = 6
LENGTH = 5
WORLDS = 8
"""Random pairs of student and teacher that the study averages over."""
TAU = -2.0
"""The static threshold of TrOPD's plain variants, a log-ratio; the paper gives none."""
NEVER = -100.0
"""Stands for the log-probability of a token outside the nucleus."""
WHOLE = SamplingParams()
SAMPLING_PARAMS = (
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_p=0.8),
)
SAMPLING_VOCABULARY = 60
"""Of the worlds, one token long, in which SAMPLING_PARAMS are compared: large enough for a nucleus
to be a small part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A student, a teacher, and every sequence.

    student_CV, teacher_CV: logits, float64. ids_YT: every sequence. prefixes_YT: the row of each
    token's prefix.
    """

    student_CV: torch.Tensor
    teacher_CV: torch.Tensor
    ids_YT: torch.Tensor
    prefixes_YT: torch.Tensor

    @classmethod
    def random(cls, seed: int, vocabulary: int = VOCABULARY, length: int = LENGTH) -> World:
        """A teacher with normal logits, and a student that half agrees with it."""
        generator = torch.Generator().manual_seed(seed)
        ids_YT = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)
        prefixes_YT, row_Y = torch.empty_like(ids_YT), torch.zeros(len(ids_YT), dtype=torch.long)
        for t in range(length):
            prefixes_YT[:, t] = row_Y
            row_Y = row_Y * vocabulary + ids_YT[:, t] + 1  # as in a heap: row r's are r V + 1 ...
        shape = (int(prefixes_YT.max()) + 1, vocabulary)
        teacher_CV = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        own_CV = torch.randn(shape, generator=generator, dtype=torch.float64)
        return cls(
            student_CV=0.5 * teacher_CV + own_CV,
            teacher_CV=teacher_CV,
            ids_YT=ids_YT,
            prefixes_YT=prefixes_YT,
        )

    def logprobs(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Of each token given its prefix [Y, T]."""
        return logits_CV.log_softmax(-1)[self.prefixes_YT, self.ids_YT]

    def behavior_logprobs(self, params: SamplingParams) -> torch.Tensor:
        """The behavior log-probability of each token [Y, T]; -inf outside the nucleus."""
        return behavior_logprobs(self.student_CV, params)[self.prefixes_YT, self.ids_YT]

    def probabilities(self, params: SamplingParams = WHOLE) -> torch.Tensor:
        """How probable it is that the student samples each sequence [Y]."""
        return self.behavior_logprobs(params).sum(1).exp()

    def reach(self, params: SamplingParams) -> torch.Tensor:
        """How probable it is that a sampled sequence begins with each prefix [C]."""
        reach_C = torch.zeros(len(self.student_CV), dtype=torch.float64)
        for prefixes_Y in self.prefixes_YT.T:
            reach_C.index_add_(0, prefixes_Y, self.probabilities(params))
        return reach_C


def behavior_logprobs(logits_CV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Behavior log-probabilities [C, V]: of softmax(logits / temperature) the fewest most probable
    tokens with mass >= top_p, renormalised."""
    if params.whole:
        return logits_CV.log_softmax(-1)
    probs_CV = (logits_CV / (params.temperature or 1.0)).softmax(-1)
    sorted_CV, order_CV = probs_CV.sort(dim=-1, descending=True)
    # By the mass before a token: the one that crosses top_p stays.
    cut_CV = sorted_CV.cumsum(-1) - sorted_CV >= (params.top_p if params.temperature else 0.0)
    cut_CV[:, 0] = False  # the likeliest token always stays; at temperature 0, it alone
    kept_CV = torch.zeros_like(probs_CV).scatter(1, order_CV, sorted_CV.masked_fill(cut_CV, 0.0))
    return (kept_CV / kept_CV.sum(-1, keepdim=True)).log()


def sequence_gradient(world: World) -> torch.Tensor:
    """grad KL(pi(y) || q(y)) [C, V]."""
    student_CV = world.student_CV.clone().requires_grad_()
    student_Y = world.logprobs(student_CV).sum(1)
    teacher_Y = world.logprobs(world.teacher_CV).sum(1)
    (student_Y.exp() * (student_Y - teacher_Y)).sum().backward()
    return _gradient(student_CV)


def token_gradient(world: World) -> torch.Tensor:
    """E_y sum_t grad KL(pi(.|y_<t) || q(.|y_<t)) [C, V], the prefixes' distribution held fixed."""
    student_CV = world.student_CV.clone().requires_grad_()
    student_lp_CV, teacher_lp_CV = student_CV.log_softmax(-1), world.teacher_CV.log_softmax(-1)
    kl_C = (student_lp_CV.exp() * (student_lp_CV - teacher_lp_CV)).sum(-1)
    (world.probabilities()[:, None] * kl_C[world.prefixes_YT]).sum().backward()
    return _gradient(student_CV)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimator's expected gradient [C, V] and its total variance, of one sequence."""

    mean_CV: torch.Tensor
    variance: float


def estimate(objective: Objective, world: World, params: SamplingParams = WHOLE) -> Estimate:
    """The moments of the objective's gradient over the sequences that the student samples (and over
    TrOPD's random choice)."""
    length, (rows, vocabulary) = world.ids_YT.shape[1], world.student_CV.shape
    weight_N = world.probabilities(params).repeat_interleave(length)
    mean_CV, second = torch.zeros(rows, vocabulary, dtype=torch.float64), 0.0
    for chance_N, uniforms_N in _outcomes(objective, world):
        gradient_NV = _token_gradients(objective, world, uniforms_N, params)
        weighted_NV = (weight_N * chance_N)[:, None] * gradient_NV
        mean_CV.index_add_(0, world.prefixes_YT.flatten(), weighted_NV)
        # A sequence's tokens lie in different rows: its squared norm is the sum of theirs.
        second += (weighted_NV * gradient_NV).sum().item()
    return Estimate(mean_CV=mean_CV, variance=second - mean_CV.square().sum().item())


def _outcomes(objective: Objective, world: World) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The outcomes of the objective's random choice: (probability, uniform draw with that outcome),
    both [N].

    TrOPD trusts a token with probability min(q/pi, 1); no other objective chooses at random.
    """
    gap_N = (world.logprobs(world.teacher_CV) - world.logprobs(world.student_CV)).flatten()
    # Not 1, which no draw from [0, 1) is.
    low_N, high_N = torch.zeros_like(gap_N), torch.full_like(gap_N, 1 - 1e-9)
    if objective.name != "trust_region":
        return [(torch.ones_like(gap_N), low_N)]
    trusted_N = gap_N.exp().clamp(max=1)
    return [(trusted_N, low_N), (1 - trusted_N, high_N)]


def sampling_shift(objective: Objective, world: World, params: SamplingParams) -> float:
    """How far the sampling parameters move the objective's mean gradient, relative to the gradient
    with tokens drawn from the whole policy after the same prefixes."""
    reach_C = world.reach(params) / world.reach(WHOLE)
    wanted_CV = reach_C[:, None] * estimate(objective, world).mean_CV
    found_CV = estimate(objective, world, params).mean_CV
    return float((found_CV - wanted_CV).norm() / wanted_CV.norm())


def _token_gradients(
    objective: Objective, world: World, uniforms_N: torch.Tensor, params: SamplingParams = WHOLE
) -> torch.Tensor:
    """The gradient of a sequence's loss with respect to its tokens' logits [N, V]."""
    count, length = world.ids_YT.shape
    prefixes_N, ids_N = world.prefixes_YT.flatten(), world.ids_YT.flatten()
    student_NV = world.student_CV[prefixes_N].requires_grad_()
    loss_N, _ = objective(
        DenseStudent(student_NV),
        _scores(world.teacher_CV[prefixes_N].log_softmax(-1), ids_N, objective.needs.k),
        ids_N,
        world.logprobs(world.student_CV).flatten(),  # on-policy: pi_old is pi
        tokens=Tokens(
            # a segment for each sequence: no return-to-go reaches into the next
            segments_N=torch.arange(count).repeat_interleave(length),
            uniforms_N=uniforms_N,
            # a token that is never drawn has weight 0, and 0 times infinity would be NaN
            sampling_logprobs_N=world.behavior_logprobs(params).flatten().clamp(min=NEVER),
        ),
    )
    loss_N.sum().backward()
    return _gradient(student_NV)


def _scores(full_NV: torch.Tensor, ids_N: torch.Tensor, k: int) -> TeacherScores:
    """`TeacherScores.from_logits` in float64, so that an unbiased estimator's bias is zero."""
    top = full_NV.topk(k, dim=-1)
    return TeacherScores(
        ids_NK=top.indices,
        logprobs_NK=top.values,
        sampled_N=full_NV.gather(1, ids_N[:, None])[:, 0],
        vocabulary=full_NV.shape[1],
        entropy_N=-(full_NV.exp() * full_NV).sum(-1),
        full_NV=full_NV,
    )


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """An objective of the study. `label` tells apart those of one `name`."""

    name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)


def estimators(gammas: Sequence[float], vocabulary: int = VOCABULARY) -> list[Estimator]:
    """Every estimator that the study compares. PPO's clips never act: all is on-policy."""
    few, many = max(2, vocabulary // 3), max(2, 2 * vocabulary // 3)

    def local(label: str, k: int, **options: Any) -> Estimator:
        return Estimator(name="local_support", label=label, options={"k": k, **options})

    def trust(label: str, k: int, **options: Any) -> Estimator:
        return Estimator(name="trust_region", label=label, options={"k": k, **options})

    return [
        *(
            Estimator(name="sampled_token", label=f"γ={gamma:g}", options={"gamma": float(gamma)})
            for gamma in gammas
        ),
        *(local(f"top-{k}", k) for k in (few, many, vocabulary)),
        local(f"student top-{many}", many, support="student"),
        local(f"top-{few} + sampled", few, support="teacher+sampled"),
        local(f"top-{few}, forward", few, direction="forward"),
        *(local(f"top-{k}, unnormalised", k, renormalize=False) for k in (few, many)),
        *(
            local(f"top-{k}, sampled tail", k, renormalize=False, tail="sampled")
            for k in (few, many)
        ),
        trust("forward KL", many),
        trust("mask", many, outlier="mask"),
        trust(f"clip at {TAU:g}", many, outlier="clip", tau=TAU),
        trust("forward KL, reward", many, outlier="forward_kl_pg"),
        *(
            Estimator(name="full_vocabulary", label=way, options={"direction": way})
            for way in ("reverse", "forward", "jsd")
        ),
        Estimator(name="entropy_aware", label="EOPD", options={"k": many}),
        Estimator(name="reward_clipped", label="REOPOLD, exploring"),
        Estimator(name="advantage_gated", label="AOPD", options={"k": many}),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """An estimator in units of the sequence gradient's norm, averaged over worlds.

    sequence_bias, token_bias: root mean square of || E g - truth || / || sequence gradient ||.
    variance: mean of the total variance of one sequence's estimate / || sequence gradient ||^2.
    cosine: mean cosine of E g with the sequence gradient.
    """

    name: str
    label: str
    sequence_bias: float
    token_bias: float
    variance: float
    cosine: float

    def error(self, sequences: int) -> float:
        """Root mean square error of the mean over that many sequences."""
        return float((self.sequence_bias**2 + self.variance / sequences) ** 0.5)


def run_enumeration(
    gammas: Sequence[float],
    worlds: int = WORLDS,
    progress: Callable[[str, int, int], None] | None = None,
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
) -> list[Quality]:
    """Every estimator on every world."""
    chosen = estimators(gammas, vocabulary)
    found: list[list[tuple[float, float, float, float]]] = [[] for _ in chosen]
    for seed in range(worlds):
        world = World.random(seed, vocabulary, length)
        truth_CV, token_CV = sequence_gradient(world), token_gradient(world)
        for rows, each in zip(found, chosen, strict=True):
            rows.append(_compare(build(each.name, **each.options), world, truth_CV, token_CV))
        if progress is not None:
            progress("enumeration", seed + 1, worlds)
    qualities = []
    for rows, each in zip(found, chosen, strict=True):
        # of squared biases: their roots follow below
        sequence_bias, token_bias, variance, cosine = torch.tensor(rows).mean(0).tolist()
        qualities.append(
            Quality(
                name=each.name,
                label=each.label,
                sequence_bias=sequence_bias**0.5,
                token_bias=token_bias**0.5,
                variance=variance,
                cosine=cosine,
            )
        )
    return qualities


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingShift:
    """An objective with sampling parameters: `sampling_shift`, root mean square over worlds, with
    behavior full and sampling."""

    name: str
    label: str
    temperature: float
    top_p: float
    full: float
    sampling: float


def run_sampling_shifts(
    worlds: int = WORLDS, vocabulary: int = SAMPLING_VOCABULARY
) -> list[SamplingShift]:
    """Every objective whose tokens must be samples, with each of SAMPLING_PARAMS."""
    compared = [World.random(seed, vocabulary, 1) for seed in range(worlds)]
    found = []
    for each in estimators([0.0], vocabulary):
        if not build(each.name, **each.options).needs.draws:
            continue
        for params in SAMPLING_PARAMS:
            errors = {}
            for behavior in BEHAVIORS:
                objective = build(each.name, **each.options, behavior=behavior)
                squares = [sampling_shift(objective, world, params) ** 2 for world in compared]
                errors[behavior] = (sum(squares) / len(squares)) ** 0.5
            found.append(
                SamplingShift(
                    name=each.name,
                    label=each.label,
                    temperature=params.temperature,
                    top_p=params.top_p,
                    **errors,
                )
            )
    return found


def _compare(
    objective: Objective, world: World, truth_CV: torch.Tensor, token_CV: torch.Tensor
) -> tuple[float, float, float, float]:
    """(squared sequence bias, squared token bias, variance) over the truth's square; cosine."""
    found = estimate(objective, world)
    unit = truth_CV.square().sum()
    return (
        ((found.mean_CV - truth_CV).square().sum() / unit).item(),
        ((found.mean_CV - token_CV).square().sum() / unit).item(),
        found.variance / unit.item(),
        torch.cosine_similarity(found.mean_CV.flatten(), truth_CV.flatten(), dim=0).item(),
    )
