"""The student's side of a step: lessons in, one optimizer update, numbers out.

Masks and averages are applied here and nowhere else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.batches import Batch, pack
from tutelage.distill.config import OptimizerConfig
from tutelage.distill.objectives import DenseStudent, Objective, TeacherScores
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


class Learner:
    """Owns the student's weights and the optimizer's state.

    Args:
        model: a causal LM, trained in place.
        vocabulary: ids that take probability.
        config: the optimizer section. steps: of the whole run, for the learning rate's schedule.
    """

    def __init__(self, model: Any, *, vocabulary: int, config: OptimizerConfig, steps: int) -> None:
        self.model, self.vocabulary, self._config, self._steps = model, vocabulary, config, steps
        self.version = 0
        self._micro_tokens = config.micro_tokens or (2048 if model.device.type == "cpu" else 16_384)
        self.optimizer = Optimizer(model, config)

    def update(
        self, lessons: Sequence[Lesson], objective: Objective, *, weight: float, seed: int
    ) -> dict[str, float]:
        """One optimizer step on the weighted mean loss, accumulated over micro-batches.

        Raises:
            ValueError: the mask is empty.
            FloatingPointError: the loss or the gradient is not finite; the weights stay.
        """
        masks = [torch.from_numpy(lesson.mask_T[lesson.row.chosen_T]) for lesson in lessons]
        total = int(sum(mask.sum() for mask in masks))
        if not total:
            tasks = ", ".join(sorted({lesson.task for lesson in lessons})) or "none"
            raise ValueError(
                f"no token takes loss in {len(lessons)} rows (tasks: {tasks}):"
                " objective.mask_tokens masks all that the student said, or every episode was"
                " dropped"
            )
        device = self.model.device
        generator = torch.Generator(device=device).manual_seed(seed)
        sums: dict[str, float] = defaultdict(float)
        self.optimizer.zero_grad()
        rows = [lesson.row for lesson in lessons]
        for batch in pack(rows, max_tokens=self._micro_tokens, device=device):
            weights_N = self._weights([masks[i] for i in batch.members], total, len(lessons)).to(
                device
            )
            loss, found = self._loss(batch, lessons, objective, weights_N, generator)
            (weight * loss).backward()
            for name, value in found.items():
                sums[name] += value
        norm = torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, self._config.clip)
        if not math.isfinite(sums["loss/mean"]) or not torch.isfinite(norm):
            raise FloatingPointError(
                f"loss {sums['loss/mean']}, gradient norm {norm.item()} at update {self.version}:"
                " the weights are as they were; lower optimizer.lr, or look at the step's episodes"
            )
        rate = self.learning_rate(self.version)
        self.optimizer.step(rate)
        self.version += 1
        sums |= {
            "optimizer/grad_norm": norm.item(),
            "optimizer/lr": rate,
            "tokens/trained": float(total),
        }
        return dict(sums)

    def _weights(self, masks: Sequence[torch.Tensor], total: int, count: int) -> torch.Tensor:
        """Each token's share of the mean: over the step's tokens, or over rows and their tokens."""
        if self._config.aggregate == "token":
            return torch.cat([mask.float() / total for mask in masks])
        return torch.cat([mask.float() / mask.sum().clamp(min=1) / count for mask in masks])

    def _loss(
        self,
        batch: Batch,
        lessons: Sequence[Lesson],
        objective: Objective,
        weights_N: torch.Tensor,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        scores = None
        if objective.needs_teacher:
            scores = _joined([lessons[i] for i in batch.members]).to(self.model.device)
        head = self.model.get_output_embeddings()
        student = DenseStudent(head(batch.hidden(self.model))[:, : self.vocabulary])
        loss_N, metrics = objective(
            student, scores, batch.targets_N, batch.behaviour_N, generator=generator
        )
        # Where the weight is 0 the loss must not count even if it is infinite: 0 * inf is NaN.
        loss = (torch.where(weights_N > 0, loss_N, 0.0) * weights_N).sum()
        with torch.no_grad():
            logprobs_N = student.logprobs_at(batch.targets_N[:, None])[:, 0]
            entropy_N = -(student.logprobs().exp() * student.logprobs()).sum(-1)
            shown = {"student/entropy": entropy_N, "student/logprob": logprobs_N, **metrics}
            if scores is not None:
                gap_N = scores.sampled_N - logprobs_N
                shown["gap/mean"] = gap_N
            if batch.behaviour_N.isfinite().all():
                shown["gap/engine"] = (logprobs_N - batch.behaviour_N).abs()
            found = {
                name: float((torch.where(weights_N > 0, value, 0.0) * weights_N).sum())
                for name, value in shown.items()
            }
        return loss, {"loss/mean": float(loss.detach()), **found}

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


def _joined(lessons: Sequence[Lesson]) -> TeacherScores:
    parts = []
    for lesson in lessons:
        if lesson.scores is None:
            raise ValueError(
                f"task {lesson.task!r}: a lesson without scores reached a teacher's objective"
            )
        parts.append(lesson.scores)
    return TeacherScores.join(parts)
