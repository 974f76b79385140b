"""Objectives: small functions from (student, teacher scores, tokens) to a loss per token, unreduced.

    objective = build("local_support", k=32)
    scores = TeacherScores.from_logits(teacher_logits_NV, sampled_ids_N, k=32)
    loss_N, metrics = objective(DenseStudent(student_logits_NV), scores, sampled_ids_N, behaviour_logprobs_N)

loss_N is minimised; masks and averages are applied outside, in one place (distill/learner.py). Every log-probability is
a natural log over the full vocabulary at temperature 1. `metrics` holds per-token diagnostics [N], detached.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch

from tutelage.distill.objectives.imitation import Imitation
from tutelage.distill.objectives.local_support import LocalSupport
from tutelage.distill.objectives.sampled_token import SampledToken
from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.students import DenseStudent, Student
from tutelage.envs.names import unknown

__all__ = ["DenseStudent", "Objective", "Student", "TeacherScores", "build"]


class Objective(Protocol):
    """A loss per token. `k`: how many teacher ids it needs; `needs_teacher`: whether it needs a teacher at all."""

    name: str
    needs_teacher: bool
    k: int

    def __call__(
        self,
        student: Student,
        scores: TeacherScores | None,
        sampled_ids_N: torch.Tensor,
        behaviour_logprobs_N: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


_OBJECTIVES: dict[str, type] = {cls.name: cls for cls in (SampledToken, LocalSupport, Imitation)}


def build(name: str, **options: Any) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: an unknown name or option (the nearest known one is named), or a value out of range.
    """
    if name not in _OBJECTIVES:
        raise ValueError(unknown("objective", name, _OBJECTIVES))
    cls = _OBJECTIVES[name]
    known = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of objective {name!r}:", option, known))
    objective: Objective = cls(**options)
    return objective
