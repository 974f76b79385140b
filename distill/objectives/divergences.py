"""Divergences between rows of log-probabilities, over the whole vocabulary or over some columns.

Letters: N tokens, K columns (a support, or the whole vocabulary).
"""

from __future__ import annotations

import math

import torch

from tutelage.distill.objectives.tokens import IMPOSSIBLE, Case
from tutelage.envs.names import unknown

DIRECTIONS = ("reverse", "forward", "jsd")


def check_direction(objective: str, direction: str) -> None:
    """Raises ValueError for an unknown direction, naming the nearest."""
    if direction not in DIRECTIONS:
        raise ValueError(unknown(f"{objective} direction", direction, DIRECTIONS))


def check_k(objective: str, k: int) -> None:
    """Raises ValueError for a support of no token."""
    if k < 1:
        raise ValueError(f"{objective}: k={k}: it must be at least 1")


def divergence(
    student_NK: torch.Tensor, teacher_NK: torch.Tensor, *, direction: str, beta: float = 0.5
) -> torch.Tensor:
    """The divergence [N] of natural log-probabilities, all finite (IMPOSSIBLE stands for log 0).

    reverse: KL(student || teacher); forward: KL(teacher || student);
    jsd: beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student,
    and its limits by TRL's convention: beta = 0 is forward, beta = 1 is reverse (GKD, Agarwal et
    al. 2023, arXiv:2306.13649).
    """
    # At beta 0 and 1 the mixture m is one of the two sides, and both KLs to it would be 0 (and
    # math.log(0) raises): TRL takes the plain KLs instead.
    if direction == "reverse" or (direction == "jsd" and beta == 1):
        return kl(student_NK, teacher_NK)
    if direction == "forward" or beta == 0:
        return kl(teacher_NK, student_NK)
    # In logarithms: in a masked column both sides are IMPOSSIBLE, whose exponentials are 0. The log
    # of their sum would be -inf, and the KLs NaN.
    middle_NK = torch.logaddexp(teacher_NK + math.log(beta), student_NK + math.log1p(-beta))
    return beta * kl(teacher_NK, middle_NK) + (1 - beta) * kl(student_NK, middle_NK)


def kl(left_NK: torch.Tensor, right_NK: torch.Tensor) -> torch.Tensor:
    """sum_K left (log left - log right) [N]."""
    return (left_NK.exp() * (left_NK - right_NK)).sum(-1)


def forward_kl(case: Case, k: int, *, renormalize: bool = False) -> torch.Tensor:
    """sum_{TopK q} q log(q / pi) [N] of full-vocabulary log-probabilities. `renormalize` makes the
    teacher's sum to 1 on its top K; the student's stay as they are."""
    scores = case.teacher
    teacher_NK = scores.logprobs_NK[:, :k].clamp(min=IMPOSSIBLE)
    if renormalize:
        teacher_NK = teacher_NK.log_softmax(-1)
    # A sum over part of the vocabulary may be negative: where pi has more mass on it than q.
    return kl(teacher_NK, case.student.logprobs_at(scores.ids_NK[:, :k]))
