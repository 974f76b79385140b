"""Local support matching: the KL divergence restricted to a small set of tokens per position."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.students import Student


class LocalSupport:
    """Reverse KL on the teacher's top-K tokens, both sides renormalised there (Revisiting-OPD,
    arXiv:2603.25562, "Ours"):

        S(c) = TopK_q(c);  pi^(v) = pi(v) / sum_S pi,  q^(v) = q(v) / sum_S q
        loss(c) = sum_{v in S} pi^(v) log( pi^(v) / q^(v) )

    A direct, differentiable loss: the gradient flows through pi^ in both places, the teacher is
    constant, and logits outside S get none. The normaliser over the vocabulary cancels, so only K
    logits per position are needed.

    Args:
        k: the support's size.
        support, renormalize, direction, tail: this version has the paper's main form only.
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
        built = {"support": "teacher", "renormalize": True, "direction": "reverse", "tail": False}
        given = {
            "support": support,
            "renormalize": renormalize,
            "direction": direction,
            "tail": tail,
        }
        for option, value in given.items():
            if value != built[option]:
                raise ValueError(
                    f"local_support: {option}={value!r} is not built yet: use {built[option]!r}"
                )
        if k < 1:
            raise ValueError(f"local_support: k={k}: it must be at least 1")
        self.k = k

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
        gap_NK = torch.where(teacher_NK == -torch.inf, 0.0, student_NK - teacher_NK)
        if (teacher_NK == -torch.inf).any():
            raise ValueError(
                f"local_support: the teacher gives probability 0 inside its top {self.k}: reverse"
                " KL is infinite there; lower objective.k"
            )
        loss_N = (student_NK.exp() * gap_NK).sum(-1)
        with torch.no_grad():
            inside_N = (support_NK == sampled_ids_N[:, None]).any(-1)
        return loss_N, {
            "support/teacher_mass": scores.logprobs_NK[:, : self.k].exp().sum(-1),
            "support/sampled_outside": (~inside_N).float(),
        }
