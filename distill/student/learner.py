"""The student's side of a step: training examples in, one optimizer update, metrics out.

Masks and averages are applied here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map_only

from tutelage.distill.config.sections import OptimizerConfig
from tutelage.distill.models.batches import Batch, pack
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import (
    Objective,
    StudentView,
    TeacherScores,
    Tokens,
)
from tutelage.distill.student import diagnostics
from tutelage.distill.student.diagnostics import Meter
from tutelage.distill.student.examples import (
    Example,
    NoisyExample,
    TaskObjective,
    grouped,
    joined_scores,
)
from tutelage.distill.student.optimizers import Optimizer
from tutelage.distill.student.ranks import Alone, Ranks, split
from tutelage.scheduler.episodes import Row, SamplingParams

Question = Callable[[StudentView, Batch], torch.Tensor]
"""A value of each of a batch's tokens [N, ...]. It is pickled for other ranks: no lambdas."""


class Learner:
    """Owns the optimizer's state and trains the student's weights.

    A run calls rank 0's, which calls `learn`, `answer`, `state` and `resume` on every rank.

    Args:
        student: what trains, in place.
        config: the optimizer section.
        steps: of the whole run, for the learning rate's schedule.
        ranks: the processes that share the work; None: this one alone.
    """

    def __init__(
        self,
        student: Student,
        *,
        config: OptimizerConfig,
        steps: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._student, self._config, self._steps = student, config, steps
        self._ranks = ranks or Alone(student)
        self.version = 0
        self._cut_off = False  # an update failed after some of its optimizer steps
        self._fault = ""  # names the first token of an optimizer step whose loss is not finite
        self._micro_tokens = config.micro_tokens_on(student.device.type)
        self.optimizer = Optimizer(student, config, self._ranks.orthogonalized)
        self._layers = student.recomputing() if config.recompute else []

    @property
    def student(self) -> Student:
        """The student in one piece: to generate with and to save."""
        return self._ranks.whole

    @property
    def intact(self) -> bool:
        """Whether the weights can be saved: no update was cut off, and all ranks are alive."""
        return not self._cut_off and self._ranks.alive

    def update(
        self,
        examples: Sequence[Example],
        task_objectives: Mapping[str, TaskObjective],
        *,
        seed: int,
        progress: Mapping[str, float] | float = 0.0,
        diagnose: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Descend on the sum of the tasks' weighted mean losses: in one optimizer step, or in one
        for every `minibatch` rows, accumulated over micro-batches. Returns each task's metrics.

        progress: the share of its steps that a task has had; one number counts for every task.
        diagnose: whether to compute the costly diagnostics too.

        Raises:
            ValueError: the mask of a task is empty.
            FloatingPointError: the loss or the gradient is not finite; the weights stay as they
            were before that optimizer step.
        """
        if not examples:
            raise ValueError("there are no training examples: every episode was dropped")
        tasks = grouped(examples)
        # A draw for every token of every row, before anything is split: a token's draw then depends
        # on neither micro-batches nor ranks.
        rng = np.random.default_rng(seed)
        drawn = [
            (example, rng.random(len(example.row.ids_T), dtype=np.float32)) for example in examples
        ]
        count = -(-len(examples) // (self._config.minibatch or len(examples)))
        # Every count-th row: rows come task by task, and each minibatch is to hold some of all.
        parts = [[pair for pair in drawn[i::count] if pair[0].mask_T.any()] for i in range(count)]
        own = {task: task_objectives[task] for task in tasks}
        at = progress if isinstance(progress, Mapping) else dict.fromkeys(own, progress)
        meters, norm = self._shared([part for part in parts if part], own, at, diagnose)
        # of the whole update: the same in every task's metrics
        shared = {
            "optimizer/grad_norm": norm,
            "optimizer/lr": self.learning_rate(self.version),
        }
        # One for an update, however many optimizer steps it has: `Record.save_rest` compares it
        # with the number of the run's steps.
        self.version += 1
        self._cut_off = False
        return {
            task: meter.means()
            | {"tokens/trained": float(sum(x.mask_T.sum() for x in tasks[task]))}
            | shared
            for task, meter in meters.items()
        }

    def own_support(self, rows: Sequence[Row], k: int) -> list[npt.NDArray[np.int32]]:
        """The student's K most probable ids at each row's action tokens [N, K]: the query ids of a
        teacher when the support is the student's."""
        return [ids_NK.numpy() for ids_NK in self._answers(rows, partial(_top_k, k=k))]

    def sampling_logprobs(
        self, rows: Sequence[Row], sampling: SamplingParams
    ) -> list[torch.Tensor]:
        """The log-probability [N] of each row's action tokens under these weights and the sampling
        parameters, on the CPU: for engines that do not tell it."""
        return self._answers(rows, partial(_under_sampling, sampling=sampling))

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state in one piece, which a checkpoint keeps beside the weights."""
        state: dict[str, Any] = self._ranks.call(self, "state", [()] * self._ranks.count)[0]
        return state

    def restore(self, optimizer_state: dict[str, Any], *, version: int) -> None:
        """Resume from a checkpoint whose weights `student` has loaded already."""
        # Other ranks get shapes alone: the values reach them in a collective (`Ranks.adopted`),
        # not pickled once more for each rank.
        shapes = tree_map_only(
            torch.Tensor, lambda x: x.to("meta") if x.ndim else x, optimizer_state
        )
        states = [optimizer_state, *[shapes] * (self._ranks.count - 1)]
        self._ranks.call(self, "resume", [(state, version) for state in states])

    def close(self) -> None:
        """End the other ranks."""
        self._ranks.close()

    def _shared(
        self,
        parts: Sequence[Sequence[NoisyExample]],
        task_objectives: Mapping[str, TaskObjective],
        progress: Mapping[str, float],
        diagnose: bool,
    ) -> tuple[dict[str, Meter], float]:
        """Let every rank learn from its share of each part: every task's meter, merged, and the
        gradient's norm, which is the same on all ranks."""
        shares: list[list[list[NoisyExample]]] = [[] for _ in range(self._ranks.count)]
        for part in parts:
            own = split([len(example.row.ids_T) for example, _ in part], self._ranks.count)
            for share, indices in zip(shares, own, strict=True):
                share.append([part[i] for i in indices])
        (meters, norm), *others = self._ranks.call(
            self,
            "learn",
            [(self.version, share, task_objectives, progress, diagnose) for share in shares],
        )
        for theirs, _ in others:
            for task, meter in theirs.items():
                meters[task].merge(meter)
        return meters, norm

    def _answers(self, rows: Sequence[Row], question: Question) -> list[torch.Tensor]:
        """The question's values at each row's action tokens, shared among the ranks."""
        shares = split([len(row.ids_T) for row in rows], self._ranks.count)
        parts = self._ranks.call(
            self, "answer", [([rows[i] for i in share], question) for share in shares]
        )
        found = {
            i: values_N
            for share, part in zip(shares, parts, strict=True)
            for i, values_N in zip(share, part, strict=True)
        }
        return [found[i] for i in range(len(rows))]

    def learn(
        self,
        version: int,
        parts: Sequence[Sequence[NoisyExample]],
        task_objectives: Mapping[str, TaskObjective],
        progress: Mapping[str, float],
        diagnose: bool,
    ) -> tuple[dict[str, Meter], float]:
        """On every rank: an optimizer step for each part. Returns every task's meter of this rank's
        share, and the mean of the gradient's norms."""
        self.version = version
        meters = {task: Meter() for task in task_objectives}
        # transformers recomputes a layer only where its own `training` is set; what is inside the
        # layer stays in evaluation mode, so that no dropout comes with it.
        for layer in self._layers:
            layer.training = True
        try:
            norms = [
                self._descend(part, task_objectives, meters, progress, diagnose) for part in parts
            ]
        finally:
            for layer in self._layers:
                layer.training = False
        self._ranks.publish()
        return meters, sum(norms) / len(norms)

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], question: Question) -> list[torch.Tensor]:
        """On every rank: the question's values at each row's action tokens [N, ...], on the CPU."""
        found: dict[int, torch.Tensor] = {}

        def ask(batch: Batch) -> None:
            values_N = self._ranks.inside(lambda: question(self._student.view(batch), batch))
            found.update(batch.by_row(values_N.cpu()))

        self._ranks.each(self._packed(rows), ask)
        return [found[i] for i in range(len(rows))]

    def state(self) -> dict[str, Any]:
        """On every rank: the optimizer's state in one piece, on rank 0."""
        return self._ranks.joined(self.optimizer.state_dict())

    def resume(self, optimizer_state: dict[str, Any], version: int) -> None:
        """On every rank: take its part of what `restore` was given."""
        self.optimizer.load_state_dict(self._ranks.adopted(optimizer_state))
        self.version = version

    def _descend(
        self,
        drawn: Sequence[NoisyExample],
        task_objectives: Mapping[str, TaskObjective],
        meters: Mapping[str, Meter],
        progress: Mapping[str, float],
        diagnose: bool,
    ) -> float:
        """Take one optimizer step. Returns the gradient's norm before clipping."""
        by_task = {
            task: [pair for pair in drawn if pair[0].task == task] for task in task_objectives
        }
        # Denominators are those of all ranks and micro-batches together: a mean per micro-batch
        # would weigh a token by what shares its batch.
        own = [self._size([example for example, _ in pairs]) for pairs in by_task.values()]
        sizes = dict(zip(by_task, self._ranks.sums(own), strict=True))
        total = sum(sizes.values())
        floors = {
            task: self._entropy_floor(
                task_objectives[task].objective, [example for example, _ in pairs]
            )
            for task, pairs in by_task.items()
            if sizes[task] and task_objectives[task].objective.compares_entropies(progress[task])
        }
        passes = [
            (task, batch, [pairs[i] for i in batch.members])
            for task, pairs in by_task.items()
            for batch in self._packed([example.row for example, _ in pairs])
        ]

        def accumulate(one: tuple[str, Batch, list[NoisyExample]]) -> None:
            task, batch, members = one
            # "task": every task's mean weighs alike, however many tokens it has
            share = 1.0 if self._config.normalize == "task" else sizes[task] / total
            self._accumulate(
                batch,
                members,
                task_objectives[task].objective,
                meters[task],
                size=sizes[task],
                scale=share * task_objectives[task].weight,
                progress=progress[task],
                entropy_floor=floors.get(task),
                diagnose=diagnose,
            )

        self.optimizer.zero_grad()
        self._fault = ""
        self._ranks.each(passes, accumulate)
        norm = self._ranks.clip(self.optimizer.parameters, self._config.clip)
        # Every rank sees the same sums and the same norm, so all of them raise, or none does.
        for task in (task for task in meters if sizes[task]):
            value, weight = self._ranks.sums(meters[task].sums("loss/mean"))
            if not math.isfinite(value) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"task {task!r}: loss {value / weight}, gradient norm {norm} at update"
                    f" {self.version}{self._fault}: the weights are as they were; lower"
                    " optimizer.lr, or look at the step's episodes"
                )
        # From here on the weights move: until `update` ends, they are those of no whole update.
        self._cut_off = True
        self.optimizer.step(self.learning_rate(self.version))
        return norm

    def _entropy_floor(self, objective: Objective, examples: Sequence[Example]) -> float:
        """`Objective.entropy_floor` of all of the task's tokens that take loss in this optimizer
        step, on every rank. It needs a forward pass of its own: a floor of each micro-batch would
        make the objective depend on `micro_tokens`."""
        entropies = self.answer([example.row for example in examples], _entropy)
        own: list[float] = []
        for example, entropy_N in zip(examples, entropies, strict=True):
            own += entropy_N[torch.from_numpy(example.mask_T[example.row.action_mask_T])].tolist()
        everyone = self._ranks.gathered(own)
        return objective.entropy_floor(torch.tensor(everyone, dtype=torch.float64))

    def _packed(self, rows: Sequence[Row]) -> list[Batch]:
        return pack(rows, max_tokens=self._micro_tokens, device=self._student.device)

    def _size(self, examples: Sequence[Example]) -> float:
        """What a task's mean divides by: its tokens that take loss, or its rows that have any."""
        # token is Revisiting-OPD's formula, 1 / sum |o_i|. Its code amounts to a mean over rows: it
        # averages micro-batches of one row each.
        if self._config.aggregate == "token":
            return float(sum(example.mask_T.sum() for example in examples))
        return float(sum(bool(example.mask_T.any()) for example in examples))

    def _accumulate(
        self,
        batch: Batch,
        members: Sequence[NoisyExample],
        objective: Objective,
        meter: Meter,
        *,
        size: float,
        scale: float,
        progress: float,
        entropy_floor: float | None,
        diagnose: bool,
    ) -> None:
        """Add a batch's part of the gradient of `scale` times one task's mean loss, and of its
        metrics."""
        device = self._student.device
        weights = [self._weights(x.mask_T[x.row.action_mask_T], size) for x, _ in members]
        weights_N = torch.from_numpy(np.concatenate(weights)).to(device)
        uniforms = [uniforms_T[x.row.action_mask_T] for x, uniforms_T in members]
        tokens = Tokens(
            segments_N=batch.segments_N,
            mask_N=weights_N > 0,
            uniforms_N=torch.from_numpy(np.concatenate(uniforms)).to(device),
            sampling_logprobs_N=batch.sampling_logprobs_N,
            advantage_N=batch.advantage_N,
            entropy_floor=entropy_floor,
            progress=progress,
        )
        scores = None
        if objective.needs.teacher:
            scores = joined_scores([x for x, _ in members]).to(device)

        def forward() -> tuple[torch.Tensor, StudentView, torch.Tensor, dict[str, torch.Tensor]]:
            student = self._student.view(batch)
            loss_N, metrics = objective(
                student, scores, batch.targets_N, batch.behavior_logprobs_N, tokens=tokens
            )
            # 0 * inf is NaN: an infinite loss of a token without weight must not reach the sum.
            loss = (torch.where(weights_N > 0, loss_N, 0.0) * weights_N).sum()
            return scale * loss, student, loss_N.detach(), metrics

        loss, student, loss_N, metrics = self._ranks.inside(forward)
        # Looked at before the backward, while it is still known which token it was; the error is
        # raised later, in step with the other ranks.
        if not self._fault and not loss.isfinite():
            self._fault = _named(batch, student, scores, torch.where(weights_N > 0, loss_N, 0.0))
        # In every micro-batch: gradients accumulate, and only one batch's activations are kept.
        loss.backward()
        with torch.no_grad():
            meter.add({"loss/mean": loss_N, **metrics}, weights_N)
            self._diagnose(meter, batch, student, scores, weights_N, costly=diagnose)

    def _weights(self, mask_N: npt.NDArray[np.bool_], size: float) -> npt.NDArray[np.float32]:
        """Each token's share of the mean: over the task's tokens, or over rows and their tokens."""
        shares_N = mask_N.astype(np.float32)
        if self._config.aggregate == "sequence":
            shares_N /= max(1, int(mask_N.sum()))  # a row without loss: 0 / 1
        return shares_N / np.float32(size)

    @staticmethod
    def _diagnose(
        meter: Meter,
        batch: Batch,
        student: StudentView,
        scores: TeacherScores | None,
        weights_N: torch.Tensor,
        *,
        costly: bool,
    ) -> None:
        sampled_N = batch.behavior_logprobs_N.isfinite()
        if scores is not None:
            found = diagnostics.recorded(scores, batch.behavior_logprobs_N)
            meter.add(found, weights_N, sampled_N)
            where_N = torch.where(sampled_N, weights_N, 0.0)
            diagnostics.add_by_position(meter, found["gap/mean"], batch.positions_N, where_N)
        if costly:
            meter.add(diagnostics.examined(student, scores, batch.targets_N), weights_N)
            mismatch = diagnostics.mismatch(student, batch.targets_N, batch.behavior_logprobs_N)
            meter.add(mismatch, weights_N, sampled_N)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or cosine down to the floor."""
        config = self._config
        if step < config.warmup:
            # + 1: at rate 0 the first update would change nothing
            return config.lr * (step + 1) / config.warmup
        if config.decay == "constant":
            return config.lr
        progress = (step - config.warmup) / max(1, self._steps - config.warmup)
        # min: a run that is extended beyond its steps stays at the floor
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.lr * (config.floor + (1 - config.floor) * cosine)


@torch.no_grad()
def _named(
    batch: Batch, student: StudentView, scores: TeacherScores | None, loss_N: torch.Tensor
) -> str:
    """The first token whose loss is not finite, with the log-probabilities that it came from."""
    bad_N = ~loss_N.isfinite()
    if not bad_N.any():
        return ""
    n = int(bad_N.nonzero()[0])
    _, before = batch.locate(n)
    own_N = student.logprobs_at(batch.targets_N[:, None])[:, 0]
    teachers = "" if scores is None else f", the teacher's {float(scores.sampled_N[n]):.4g}"
    return (
        f" (first at action token {before} of a row, id {int(batch.targets_N[n])}: the"
        f" student's log-probability is {float(own_N[n]):.4g}{teachers})"
    )


def _top_k(student: StudentView, batch: Batch, *, k: int) -> torch.Tensor:
    return student.top_k(k).int()


def _entropy(student: StudentView, batch: Batch) -> torch.Tensor:
    return student.entropy()


def _under_sampling(
    student: StudentView, batch: Batch, *, sampling: SamplingParams
) -> torch.Tensor:
    return student.sampling_logprobs_at(
        batch.targets_N, temperature=sampling.temperature, top_p=sampling.top_p
    )
