"""What the student learns from: training examples and each task's objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tutelage.distill.objectives import Objective, TeacherScores
from tutelage.scheduler.episodes import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row, its teacher's scores (None: its own tokens are imitated), and which tokens take loss.

    mask_T: True at tokens that take loss, all of them action tokens. number: of the row's episode
    among the task's in this step (`Order.number`).
    """

    task: str
    row: Row
    scores: TeacherScores | None
    mask_T: npt.NDArray[np.bool_]
    number: int = 0

    def __post_init__(self) -> None:
        if len(self.mask_T) != len(self.row.ids_T) or (self.mask_T & ~self.row.action_mask_T).any():
            raise ValueError(
                f"task {self.task!r}: the loss mask covers prompt or observation tokens"
            )
        # Of all action tokens, also those that the special-token mask takes out.
        if self.scores is not None and len(self.scores) != int(self.row.action_mask_T.sum()):
            raise ValueError(
                f"task {self.task!r}: {len(self.scores)} teacher scores for"
                f" {int(self.row.action_mask_T.sum())} action tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskObjective:
    """How a task is taught: by which objective, and how much its loss weighs."""

    objective: Objective
    weight: float


NoisyExample = tuple[Example, npt.NDArray[np.float32]]
"""A training example and a uniform draw for each of its row's tokens."""


def grouped(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The training examples of each task, in their order.

    Raises:
        ValueError: no token of a task takes loss.
    """
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.task, []).append(example)
    for task, own in found.items():
        if not any(example.mask_T.any() for example in own):
            raise ValueError(
                f"task {task!r}: no token takes loss in {len(own)} rows: objective.mask_tokens"
                " masks all that the student said, or every episode was dropped"
            )
    return found


def joined_scores(examples: Sequence[Example]) -> TeacherScores:
    """The scores of several training examples as one, in their order."""
    parts = []
    for example in examples:
        if example.scores is None:
            raise ValueError(
                f"task {example.task!r}: a training example without scores, and its objective needs"
                " a teacher's"
            )
        parts.append(example.scores)
    return TeacherScores.join(parts)
