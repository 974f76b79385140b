"""The divergences over the whole vocabulary, against TRL's generalised JSD written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tutelage.distill.objectives import DenseStudent, TeacherScores, build

N, V = 7, 11
Draw = Callable[..., torch.Tensor]
Scores = Callable[..., TeacherScores]
Gradient = Callable[..., torch.Tensor]


def _trl(student_NV: torch.Tensor, teacher_NV: torch.Tensor, beta: float) -> torch.Tensor:
    """GKDTrainer.generalized_jsd_loss, per token; `kl_div(of, target)` is KL(target || of)."""
    student, teacher = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)

    def kl_div(of: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(of, target, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        return kl_div(student, teacher)
    if beta == 1:
        return kl_div(teacher, student)
    mixture = torch.logsumexp(
        torch.stack([student + math.log1p(-beta), teacher + math.log(beta)]), dim=0
    )
    return beta * kl_div(mixture, teacher) + (1 - beta) * kl_div(mixture, student)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_generalised_jsd_is_trls_for_every_beta(
    beta: float,
    draw: Draw,
    sampled_ids_N: torch.Tensor,
    make_scores: Scores,
    gradient: Gradient,
) -> None:
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    scores = make_scores(teacher_NV, sampled_ids_N, k=1)
    objective = build("full_vocabulary", direction="jsd", beta=beta)

    def loss(logits_NV: torch.Tensor) -> torch.Tensor:
        return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

    torch.testing.assert_close(loss(student_NV), _trl(student_NV, teacher_NV, beta))
    torch.testing.assert_close(
        gradient(loss, student_NV), gradient(lambda z: _trl(z, teacher_NV, beta), student_NV)
    )


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_directions_by_hand_and_zero_at_the_teacher_alone(
    direction: str,
    draw: Draw,
    sampled_ids_N: torch.Tensor,
    make_scores: Scores,
    gradient: Gradient,
) -> None:
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    scores = make_scores(teacher_NV, sampled_ids_N, k=1)
    objective = build("full_vocabulary", direction=direction)

    def loss(logits_NV: torch.Tensor) -> torch.Tensor:
        return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

    def kl(left: list[float], right: list[float]) -> float:
        return sum(p * math.log(p / r) for p, r in zip(left, right, strict=True))

    values_N = loss(student_NV)
    for n in range(N):
        pi, q = student_NV[n].softmax(-1).tolist(), teacher_NV[n].softmax(-1).tolist()
        middle = [(a + b) / 2 for a, b in zip(pi, q, strict=True)]
        wanted = {
            "reverse": kl(pi, q),
            "forward": kl(q, pi),
            "jsd": (kl(q, middle) + kl(pi, middle)) / 2,
        }[direction]
        assert values_N[n].item() == pytest.approx(wanted, rel=1e-10)
        assert wanted > 0.01
    at_teacher_NV = teacher_NV + 5.0
    torch.testing.assert_close(loss(at_teacher_NV), torch.zeros_like(values_N))
    torch.testing.assert_close(gradient(loss, at_teacher_NV), torch.zeros_like(teacher_NV))


def test_scores_of_the_top_k_alone_are_refused_by_name(
    draw: Draw, sampled_ids_N: torch.Tensor
) -> None:
    scores = TeacherScores.from_logits(draw(N, V), sampled_ids_N, k=3, keep_full=False)
    with pytest.raises(ValueError, match=r"top 3 of 11 log-probabilities.*needs all of them"):
        build("full_vocabulary")(DenseStudent(draw(N, V)), scores, sampled_ids_N, sampled_ids_N)
