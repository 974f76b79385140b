"""The student's side of a step: lessons in, one optimizer update, numbers out.

Masks and averages are applied here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.config.sections import OptimizerConfig
from tutelage.distill.models.batches import Batch, pack
from tutelage.distill.models.loading import recomputing
from tutelage.distill.objectives import (
    DenseStudent,
    Objective,
    SparseStudent,
    StudentView,
    TeacherScores,
    Tokens,
)
from tutelage.distill.student import diagnostics
from tutelage.distill.student.diagnostics import Meter
from tutelage.distill.student.lessons import (
    Course,
    Drawn,
    Lesson,
    joined_scores,
    refuse_empty_masks,
)
from tutelage.distill.student.muon import orthogonalized
from tutelage.distill.student.optimizers import Optimizer
from tutelage.scheduler.episodes import Row, SamplingLaw

T = TypeVar("T")

DENSE_VOCABULARY = 8192
"""Up to this many ids whole logits are faster than gathered ones, and small."""


class Learner:
    """Owns the student's weights and the optimizer's state.

    What several ranks do together (sharded.py) is a small method here: `_sums`,
    `_gathered`, `_each`, `_inside`, `_clip`, `_orthogonalized`.

    Args:
        model: a causal LM, trained in place.
        vocabulary: ids that take probability.
        config: the optimizer section. steps: of the whole run, for the learning rate's schedule.
        dense_vocabulary: up to this size of vocabulary, whole logits; above it, gathered ones.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocabulary: int,
        config: OptimizerConfig,
        steps: int,
        dense_vocabulary: int = DENSE_VOCABULARY,
    ) -> None:
        self.model, self.vocabulary, self._config, self._steps = model, vocabulary, config, steps
        self._dense = vocabulary <= dense_vocabulary
        self.version = 0
        self.whole = True  # False: an update failed after some of its optimizer steps
        self._fault = ""  # the first token of an optimizer step whose loss is no number
        self._micro_tokens = config.micro_tokens_on(model.device.type)
        self.optimizer = Optimizer(model, config, self._orthogonalized)
        self._layers = recomputing(model) if config.recompute else []

    @property
    def copy(self) -> Any:
        """A model with the student's weights, whole: to generate with and to save."""
        return self.model

    def update(
        self,
        lessons: Sequence[Lesson],
        courses: Mapping[str, Course],
        *,
        seed: int,
        progress: Mapping[str, float] | float = 0.0,
        diagnose: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Descend on the sum of the tasks' weighted mean losses: in one optimizer step, or in one
        for every `minibatch` rows, accumulated over micro-batches. Returns each task's metrics.

        courses: by task. progress: the share of its steps that a task has had, by task, or of all.
        diagnose: also the costly diagnostics.

        Raises:
            ValueError: the mask of a task is empty.
            FloatingPointError: the loss or the gradient is not finite; the weights stay as they
            were before that optimizer step.
        """
        if not lessons:
            raise ValueError("there are no lessons to learn from: every episode was dropped")
        refuse_empty_masks(lessons)
        rng = np.random.default_rng(seed)
        drawn = [
            (lesson, rng.random(len(lesson.row.ids_T), dtype=np.float32)) for lesson in lessons
        ]
        count = -(-len(lessons) // (self._config.minibatch or len(lessons)))
        parts = [[pair for pair in drawn[i::count] if pair[0].mask_T.any()] for i in range(count)]
        own = {lesson.task: courses[lesson.task] for lesson in lessons}
        at = progress if isinstance(progress, Mapping) else dict.fromkeys(own, progress)
        meters, norm = self._learn([part for part in parts if part], own, at, diagnose)
        shared = {
            "optimizer/grad_norm": norm,
            "optimizer/lr": self.learning_rate(self.version),
        }
        self.version += 1
        self.whole = True
        return {
            task: meter.means()
            | {"tokens/trained": float(sum(x.mask_T.sum() for x in lessons if x.task == task))}
            | shared
            for task, meter in meters.items()
        }

    def student(self, hidden_ND: torch.Tensor) -> StudentView:
        """The student at the positions of `hidden_ND`, for an objective."""
        head = self.model.get_output_embeddings()
        if self._dense:
            return DenseStudent(head(hidden_ND)[:, : self.vocabulary])
        return SparseStudent(hidden_ND, head, vocabulary=self.vocabulary)

    @torch.no_grad()
    def own_support(self, rows: Sequence[Row], k: int) -> list[npt.NDArray[np.int32]]:
        """The student's K most probable ids of each row's chosen tokens [N, K]: what a teacher is
        asked for when the support is the student's."""
        found: dict[int, npt.NDArray[np.int32]] = {}

        def ask(batch: Batch) -> None:
            ids_NK = self._inside(lambda: self.student(batch.hidden(self.model)).top_k(k))
            counts = [int(rows[i].chosen_T.sum()) for i in batch.members]
            parts = (part.numpy() for part in ids_NK.int().cpu().split(counts))
            found.update(zip(batch.members, parts, strict=True))

        self._each(self._packed(rows), ask)
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()
    def law_logprobs(self, rows: Sequence[Row], law: SamplingLaw) -> list[torch.Tensor]:
        """Of each row's chosen tokens, the log-probability [N] that these weights give it under a
        sampling law, on the CPU: for engines that do not say."""
        found: dict[int, torch.Tensor] = {}

        def ask(batch: Batch) -> None:
            said_N = self._inside(
                lambda: self.student(batch.hidden(self.model)).law_logprobs_at(
                    batch.targets_N, temperature=law.temperature, top_p=law.top_p
                )
            ).cpu()
            counts = [int(rows[i].chosen_T.sum()) for i in batch.members]
            found.update(zip(batch.members, said_N.split(counts), strict=True))

        self._each(self._packed(rows), ask)
        return [found[i] for i in range(len(rows))]

    def optimizer_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return self.optimizer.state_dict()

    def restore(self, optimizer_state: dict[str, Any], *, version: int) -> None:
        """Go on from a checkpoint whose weights are in `copy`."""
        self.optimizer.load_state_dict(optimizer_state)
        self.version = version

    def close(self) -> None:
        """Stop what was started."""

    def _learn(
        self,
        parts: Sequence[Sequence[Drawn]],
        courses: Mapping[str, Course],
        progress: Mapping[str, float],
        diagnose: bool,
    ) -> tuple[dict[str, Meter], float]:
        """An optimizer step for each part; every task's meter, and the mean of the norms."""
        meters = {task: Meter() for task in courses}
        for layer in self._layers:
            layer.training = True
        try:
            norms = [self._descend(part, courses, meters, progress, diagnose) for part in parts]
        finally:
            for layer in self._layers:
                layer.training = False
        return meters, sum(norms) / len(norms)

    def _descend(
        self,
        drawn: Sequence[Drawn],
        courses: Mapping[str, Course],
        meters: Mapping[str, Meter],
        progress: Mapping[str, float],
        diagnose: bool,
    ) -> float:
        """One optimizer step; the gradient's norm before clipping."""
        by_task = {task: [pair for pair in drawn if pair[0].task == task] for task in courses}
        own = [self._size([lesson for lesson, _ in pairs]) for pairs in by_task.values()]
        sizes = dict(zip(by_task, self._sums(own), strict=True))
        total = sum(sizes.values())
        floors = {
            task: self._entropy_floor(courses[task].objective, [lesson for lesson, _ in pairs])
            for task, pairs in by_task.items()
            if sizes[task] and courses[task].objective.compares_entropies(progress[task])
        }
        passes = [
            (task, batch, [pairs[i] for i in batch.members])
            for task, pairs in by_task.items()
            for batch in self._packed([lesson.row for lesson, _ in pairs])
        ]

        def accumulate(one: tuple[str, Batch, list[Drawn]]) -> None:
            task, batch, members = one
            share = 1.0 if self._config.normalize == "task" else sizes[task] / total
            self._accumulate(
                batch,
                members,
                courses[task].objective,
                meters[task],
                size=sizes[task],
                scale=share * courses[task].weight,
                progress=progress[task],
                entropy_floor=floors.get(task),
                diagnose=diagnose,
            )

        self.optimizer.zero_grad()
        self._fault = ""
        self._each(passes, accumulate)
        norm = self._clip()
        for task in (task for task in meters if sizes[task]):
            value, weight = self._sums(meters[task].sums("loss/mean"))
            if not math.isfinite(value) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"task {task!r}: loss {value / weight}, gradient norm {norm} at update"
                    f" {self.version}{self._fault}: the weights are as they were; lower"
                    " optimizer.lr, or look at the step's episodes"
                )
        self.whole = False
        self.optimizer.step(self.learning_rate(self.version))
        return norm

    @torch.no_grad()
    def _entropy_floor(self, objective: Objective, lessons: Sequence[Lesson]) -> float:
        """What the objective makes of the student's entropies at all of the task's tokens that take
        loss in this optimizer step, on every rank. It takes a forward pass of its own: a floor of
        each micro-batch would be another objective with every other `micro_tokens`."""
        found: list[torch.Tensor] = []

        def look(batch: Batch) -> None:
            entropy_N = self._inside(lambda: self.student(batch.hidden(self.model)).entropy())
            masks = [lessons[i].mask_T[lessons[i].row.chosen_T] for i in batch.members]
            found.append(entropy_N.cpu()[torch.from_numpy(np.concatenate(masks))])

        self._each(self._packed([lesson.row for lesson in lessons]), look)
        own = torch.cat(found).tolist() if found else []
        return objective.entropy_floor(torch.tensor(self._gathered(own), dtype=torch.float64))

    def _packed(self, rows: Sequence[Row]) -> list[Batch]:
        return pack(rows, max_tokens=self._micro_tokens, device=self.model.device)

    def _sums(self, values: Sequence[float]) -> Sequence[float]:
        """Of all ranks."""
        return values

    def _gathered(self, values: Sequence[float]) -> Sequence[float]:
        """Those of all ranks, one after the other."""
        return values

    def _each(self, items: Sequence[T], work: Callable[[T], None]) -> None:
        """Do `work`, which is one pass through the model, on each item."""
        for item in items:
            work(item)

    def _inside(self, function: Callable[[], T]) -> T:
        """Call what uses the model's weights."""
        return function()

    def _clip(self) -> float:
        """Clip the gradient; its norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, self._config.clip))

    def _orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        """For Muon."""
        return list(orthogonalized(matrices))

    def _size(self, lessons: Sequence[Lesson]) -> float:
        """What a task's mean is over: its tokens that take loss, or its rows that have any."""
        if self._config.aggregate == "token":
            return float(sum(lesson.mask_T.sum() for lesson in lessons))
        return float(sum(bool(lesson.mask_T.any()) for lesson in lessons))

    def _accumulate(
        self,
        batch: Batch,
        members: Sequence[Drawn],
        objective: Objective,
        meter: Meter,
        *,
        size: float,
        scale: float,
        progress: float,
        entropy_floor: float | None,
        diagnose: bool,
    ) -> None:
        """Add a batch's part of the gradient of `scale` times one task's mean loss, and its
        metrics."""
        device = self.model.device
        masks = [torch.from_numpy(x.mask_T[x.row.chosen_T]) for x, _ in members]
        weights_N = torch.cat([self._weights(mask, size) for mask in masks]).to(device)
        uniforms = [uniforms_T[x.row.chosen_T] for x, uniforms_T in members]
        tokens = Tokens(
            segments_N=batch.segments_N,
            mask_N=weights_N > 0,
            uniforms_N=torch.from_numpy(np.concatenate(uniforms)).to(device),
            law_N=batch.law_N,
            advantage_N=batch.advantage_N,
            entropy_floor=entropy_floor,
            progress=progress,
        )
        scores = None
        if objective.needs.teacher:
            scores = joined_scores([x for x, _ in members]).to(device)

        def forward() -> tuple[torch.Tensor, StudentView, torch.Tensor, dict[str, torch.Tensor]]:
            student = self.student(batch.hidden(self.model))
            loss_N, metrics = objective(
                student, scores, batch.targets_N, batch.behaviour_N, tokens=tokens
            )
            # Where the weight is 0 the loss must not count even if it is infinite: 0 * inf is NaN.
            loss = (torch.where(weights_N > 0, loss_N, 0.0) * weights_N).sum()
            return scale * loss, student, loss_N.detach(), metrics

        loss, student, loss_N, metrics = self._inside(forward)
        if not self._fault and not loss.isfinite():
            self._fault = _named(batch, student, scores, torch.where(weights_N > 0, loss_N, 0.0))
        loss.backward()
        with torch.no_grad():
            meter.add({"loss/mean": loss_N, **metrics}, weights_N)
            self._diagnose(meter, batch, student, scores, weights_N, costly=diagnose)

    def _weights(self, mask_N: torch.Tensor, size: float) -> torch.Tensor:
        """Each token's share of the mean: over the task's tokens, or over rows and their tokens."""
        if self._config.aggregate == "token":
            return mask_N.float() / size
        return mask_N.float() / mask_N.sum().clamp(min=1) / size

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
        sampled_N = batch.behaviour_N.isfinite()
        if scores is not None:
            found = diagnostics.recorded(scores, batch.behaviour_N)
            meter.add(found, weights_N, sampled_N)
            where_N = torch.where(sampled_N, weights_N, 0.0)
            diagnostics.add_by_place(meter, found["gap/mean"], batch.places_N, where_N)
        if costly:
            meter.add(diagnostics.examined(student, scores, batch.targets_N), weights_N)
            drift = diagnostics.drift(student, batch.targets_N, batch.behaviour_N)
            meter.add(drift, weights_N, sampled_N)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or cosine down to the floor."""
        config = self._config
        if step < config.warmup:
            return config.lr * (step + 1) / config.warmup
        if config.decay == "constant":
            return config.lr
        progress = (step - config.warmup) / max(1, self._steps - config.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.lr * (config.floor + (1 - config.floor) * cosine)


@torch.no_grad()
def _named(
    batch: Batch, student: StudentView, scores: TeacherScores | None, loss_N: torch.Tensor
) -> str:
    """The first token whose loss is no number, and whose numbers are none either."""
    bad_N = ~loss_N.isfinite()
    if not bad_N.any():
        return ""
    n = int(bad_N.nonzero()[0])
    _, before = batch.locate(n)
    own_N = student.logprobs_at(batch.targets_N[:, None])[:, 0]
    teachers = "" if scores is None else f", the teacher's {float(scores.sampled_N[n]):.4g}"
    return (
        f" (first at the chosen token {before} of a row, id {int(batch.targets_N[n])}: the"
        f" student's log-probability is {float(own_N[n]):.4g}{teachers})"
    )
