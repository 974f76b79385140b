"""The student's side of a step: lessons in, one optimizer update, numbers out.

Masks and averages are applied here and nowhere else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill import diagnostics
from tutelage.distill.batches import Batch, pack
from tutelage.distill.config import OptimizerConfig
from tutelage.distill.diagnostics import Meter
from tutelage.distill.objectives import (
    DenseStudent,
    Objective,
    SparseStudent,
    Student,
    TeacherScores,
    Tokens,
)
from tutelage.distill.optimizers import Optimizer
from tutelage.scheduler.episodes import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A row, what its teacher says of it (None: its tokens are the lesson), where the loss falls.

    mask_T: a part of the row's chosen tokens.
    """

    task: str
    row: Row
    scores: TeacherScores | None
    mask_T: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if len(self.mask_T) != len(self.row.ids_T) or (self.mask_T & ~self.row.chosen_T).any():
            raise ValueError(f"task {self.task!r}: the loss mask covers tokens that nobody chose")
        if self.scores is not None and len(self.scores) != int(self.row.chosen_T.sum()):
            raise ValueError(
                f"task {self.task!r}: {len(self.scores)} teacher scores for"
                f" {int(self.row.chosen_T.sum())} tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a task is taught: by which objective, and how much its loss weighs."""

    objective: Objective
    weight: float = 1.0


_Drawn = tuple[Lesson, npt.NDArray[np.float32]]
"""A lesson and a uniform draw for each of its row's tokens."""

DENSE_VOCABULARY = 8192
"""Up to this many ids whole logits are faster than gathered ones, and small."""


class Learner:
    """Owns the student's weights and the optimizer's state.

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
        self._micro_tokens = config.micro_tokens or (2048 if model.device.type == "cpu" else 16_384)
        self.optimizer = Optimizer(model, config)

    def update(
        self,
        lessons: Sequence[Lesson],
        courses: Mapping[str, Course],
        *,
        seed: int,
        progress: float = 0.0,
        diagnose: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Descend on the sum of the tasks' weighted mean losses: in one optimizer step, or in one
        for every `minibatch` rows, accumulated over micro-batches. Returns each task's metrics.

        courses: by task. progress: share of the run done. diagnose: also the costly diagnostics.

        Raises:
            ValueError: the mask of a task is empty.
            FloatingPointError: the loss or the gradient is not finite; the weights stay as they
            were before that optimizer step.
        """
        if not lessons:
            raise ValueError("there are no lessons to learn from: every episode was dropped")
        _refuse_empty_masks(lessons)
        rng = np.random.default_rng(seed)
        drawn = [
            (lesson, rng.random(len(lesson.row.ids_T), dtype=np.float32)) for lesson in lessons
        ]
        meters = {lesson.task: Meter() for lesson in lessons}
        parts = -(-len(lessons) // (self._config.minibatch or len(lessons)))
        norms = []
        for part in range(parts):
            some = [pair for pair in drawn[part::parts] if pair[0].mask_T.any()]
            if some:
                norms.append(self._descend(some, courses, meters, progress, diagnose))
        shared = {
            "optimizer/grad_norm": sum(norms) / len(norms),
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

    def student(self, hidden_ND: torch.Tensor) -> Student:
        """The student at the positions of `hidden_ND`, for an objective."""
        head = self.model.get_output_embeddings()
        if self._dense:
            return DenseStudent(head(hidden_ND)[:, : self.vocabulary])
        return SparseStudent(hidden_ND, head, vocabulary=self.vocabulary)

    @torch.no_grad()
    def own_support(self, rows: Sequence[Row], k: int) -> list[torch.Tensor]:
        """The student's K most probable ids of each row's chosen tokens [N, K], on the CPU: what a
        teacher is asked for when the support is the student's."""
        found: dict[int, torch.Tensor] = {}
        for batch in pack(rows, max_tokens=self._micro_tokens, device=self.model.device):
            ids_NK = self.student(batch.hidden(self.model)).top_k(k).cpu()
            counts = [int(rows[i].chosen_T.sum()) for i in batch.members]
            found |= dict(zip(batch.members, ids_NK.split(counts), strict=True))
        return [found[i] for i in range(len(rows))]

    def _descend(
        self,
        drawn: Sequence[_Drawn],
        courses: Mapping[str, Course],
        meters: Mapping[str, Meter],
        progress: float,
        diagnose: bool,
    ) -> float:
        """One optimizer step; the gradient's norm before clipping."""
        by_task: dict[str, list[_Drawn]] = defaultdict(list)
        for pair in drawn:
            by_task[pair[0].task].append(pair)
        sizes = {task: self._size([lesson for lesson, _ in own]) for task, own in by_task.items()}
        total = sum(sizes.values())
        self.optimizer.zero_grad()
        for task, own in by_task.items():
            course = courses[task]
            share = 1.0 if self._config.normalize == "task" else sizes[task] / total
            self._accumulate(
                own,
                course.objective,
                meters[task],
                size=sizes[task],
                scale=share * course.weight,
                progress=progress,
                diagnose=diagnose,
            )
        norm = torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, self._config.clip)
        for task in by_task:
            loss = meters[task].means()["loss/mean"]
            if not math.isfinite(loss) or not torch.isfinite(norm):
                raise FloatingPointError(
                    f"task {task!r}: loss {loss}, gradient norm {norm.item()} at update"
                    f" {self.version}: the weights are as they were; lower optimizer.lr, or look at"
                    " the step's episodes"
                )
        self.whole = False
        self.optimizer.step(self.learning_rate(self.version))
        return float(norm)

    def _size(self, lessons: Sequence[Lesson]) -> float:
        """What a task's mean is over: its tokens that take loss, or its rows that have any."""
        if self._config.aggregate == "token":
            return float(sum(lesson.mask_T.sum() for lesson in lessons))
        return float(sum(bool(lesson.mask_T.any()) for lesson in lessons))

    def _accumulate(
        self,
        drawn: Sequence[_Drawn],
        objective: Objective,
        meter: Meter,
        *,
        size: float,
        scale: float,
        progress: float,
        diagnose: bool,
    ) -> None:
        """Add the gradient of `scale` times one task's mean loss, and its metrics."""
        device, rows = self.model.device, [lesson.row for lesson, _ in drawn]
        for batch in pack(rows, max_tokens=self._micro_tokens, device=device):
            members = [drawn[i] for i in batch.members]
            masks = [torch.from_numpy(x.mask_T[x.row.chosen_T]) for x, _ in members]
            weights_N = torch.cat([self._weights(mask, size) for mask in masks]).to(device)
            uniforms = [uniforms_T[x.row.chosen_T] for x, uniforms_T in members]
            tokens = Tokens(
                segments_N=batch.segments_N,
                mask_N=weights_N > 0,
                uniforms_N=torch.from_numpy(np.concatenate(uniforms)).to(device),
                progress=progress,
            )
            scores = None
            if objective.needs_teacher:
                scores = _joined([x for x, _ in members]).to(device)
            student = self.student(batch.hidden(self.model))
            loss_N, metrics = objective(
                student, scores, batch.targets_N, batch.behaviour_N, tokens=tokens
            )
            # Where the weight is 0 the loss must not count even if it is infinite: 0 * inf is NaN.
            loss = (torch.where(weights_N > 0, loss_N, 0.0) * weights_N).sum()
            (scale * loss).backward()
            with torch.no_grad():
                meter.add({"loss/mean": loss_N.detach(), **metrics}, weights_N)
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
        student: Student,
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


def _refuse_empty_masks(lessons: Sequence[Lesson]) -> None:
    for task in dict.fromkeys(lesson.task for lesson in lessons):
        own = [lesson for lesson in lessons if lesson.task == task]
        if not any(lesson.mask_T.any() for lesson in own):
            raise ValueError(
                f"task {task!r}: no token takes loss in {len(own)} rows: objective.mask_tokens"
                " masks all that the student said, or every episode was dropped"
            )


def _joined(lessons: Sequence[Lesson]) -> TeacherScores:
    parts = []
    for lesson in lessons:
        if lesson.scores is None:
            raise ValueError(
                f"task {lesson.task!r}: a lesson without scores reached a teacher's objective"
            )
        parts.append(lesson.scores)
    return TeacherScores.join(parts)
