"""Objectives: small functions from (student, teacher scores, tokens) to a loss per token.

    objective = build("local_support", k=32)
    scores = TeacherScores.from_logits(teacher_logits_NV, sampled_ids_N, k=32)
    student = DenseStudent(student_logits_NV)
    loss_N, metrics = objective(student, scores, sampled_ids_N, behaviour_logprobs_N)

loss_N is unreduced and minimised; masks and averages are applied outside, in one place
(distill/learner.py). Every log-probability is a natural log over the full vocabulary at temperature
1. `metrics` holds per-token diagnostics [N], detached.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol, get_args, get_type_hints

import torch

from tutelage.distill.objectives.imitation import Imitation
from tutelage.distill.objectives.local_support import LocalSupport
from tutelage.distill.objectives.sampled_token import SampledToken
from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.students import DenseStudent, Student
from tutelage.envs.names import unknown

__all__ = ["DenseStudent", "Objective", "Student", "TeacherScores", "build"]


class Objective(Protocol):
    """A loss per token. `k`: how many teacher ids it needs; `needs_teacher`: any at all."""

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
        ValueError: an unknown name or option (the nearest known one is named), or a value out of
        range.
    """
    if name not in _OBJECTIVES:
        raise ValueError(unknown("objective", name, _OBJECTIVES))
    cls = _OBJECTIVES[name]
    known = inspect.signature(cls).parameters
    kinds = get_type_hints(cls.__init__)  # type: ignore[misc]
    for option, value in options.items():
        if option not in known:
            raise ValueError(unknown(f"option of objective {name!r}:", option, known))
        if not _fits(value, kinds[option]):
            wanted = known[option].annotation
            raise ValueError(f"{name}: {option}={value!r}: it must be of type {wanted}")
    objective: Objective = cls(**options)
    return objective


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type. An int is a float too; a bool is no number."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))
