"""Local support matching: the KL divergence restricted to a small set of tokens per position."""

from __future__ import annotations

import math

import torch

from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.students import Student
from tutelage.envs.names import unknown

DIRECTIONS = ("reverse", "forward", "jsd")


class LocalSupport:
    """KL on the teacher's top-K tokens, both sides renormalised there (Revisiting-OPD,
    arXiv:2603.25562, "Ours", which is the reverse direction):

        S(c) = TopK_q(c);  pi^(v) = pi(v) / sum_S pi,  q^(v) = q(v) / sum_S q
        reverse: sum_S pi^ log( pi^ / q^ )        seeks the teacher's modes
        forward: sum_S q^ log( q^ / pi^ )         covers them: it pulls up what the student neglects
        jsd:     half of each against m = (q^ + pi^) / 2 (generalised JSD of GKD, beta = 0.5)

    A direct, differentiable loss: the gradient flows through pi^ in both places, the teacher is
    constant, and logits outside S get none. The normaliser over the vocabulary cancels, so only K
    logits per position are needed.

    Args:
        k: the support's size.
        direction: reverse (the paper's), forward or jsd.
        support, renormalize, tail: this version has the paper's form only.
    """

    name = "local_support"
    needs_teacher = True

    def __init__(
        self,
        k: int = 32,
        support: str = "teacher",
        renormalize: bool = True,
        direction: str = "reverse",
        tail: bool | str = False,
    ) -> None:
        built = {"support": "teacher", "renormalize": True, "tail": False}
        given = {"support": support, "renormalize": renormalize, "tail": tail}
        for option, value in given.items():
            if value != built[option]:
                raise ValueError(
                    f"local_support: {option}={value!r} is not built yet: use {built[option]!r}"
                )
        if direction not in DIRECTIONS:
            raise ValueError(unknown("local_support direction", direction, DIRECTIONS))
        if k < 1:
            raise ValueError(f"local_support: k={k}: it must be at least 1")
        self.k, self.direction = k, direction

    def __call__(
        self,
        student: Student,
        scores: TeacherScores | None,
        sampled_ids_N: torch.Tensor,
        behaviour_logprobs_N: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert scores is not None
        if self.k > scores.ids_NK.shape[1]:
            raise ValueError(
                f"local_support: k={self.k}, but the teacher's scores hold"
                f" {scores.ids_NK.shape[1]} ids a token"
            )
        support_NK = scores.ids_NK[:, : self.k]
        teacher_NK = scores.logprobs_NK[:, : self.k].log_softmax(-1)
        student_NK = student.logits_at(support_NK).log_softmax(-1)
        if self.direction == "reverse" and (teacher_NK == -torch.inf).any():
            raise ValueError(
                f"local_support: the teacher gives probability 0 inside its top {self.k}: reverse"
                " KL is infinite there; lower objective.k"
            )
        if self.direction == "reverse":
            loss_N = _kl(student_NK, teacher_NK)
        elif self.direction == "forward":
            loss_N = _kl(teacher_NK, student_NK)
        else:
            middle_NK = torch.logaddexp(teacher_NK, student_NK) - math.log(2.0)
            loss_N = (_kl(teacher_NK, middle_NK) + _kl(student_NK, middle_NK)) / 2
        with torch.no_grad():
            inside_N = (support_NK == sampled_ids_N[:, None]).any(-1)
        return loss_N, {
            "support/teacher_mass": scores.logprobs_NK[:, : self.k].exp().sum(-1),
            "support/sampled_outside": (~inside_N).float(),
        }


def _kl(left_NK: torch.Tensor, right_NK: torch.Tensor) -> torch.Tensor:
    """KL(left || right) of log-probabilities; where left is zero its term is zero, not NaN."""
    zero_NK = left_NK == -torch.inf
    gap_NK = torch.where(zero_NK, 0.0, left_NK - right_NK)
    return (left_NK.exp() * gap_NK).sum(-1)
