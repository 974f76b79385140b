"""Losses added: values, gradients and diagnostics by hand, and what no sum is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage.distill.objectives import (
    DenseStudent,
    Needs,
    Objective,
    TeacherScores,
    Tokens,
    build,
    weighted_sum,
)
from tutelage.distill.objectives.tokens import Case, Loss

N, V = 7, 11
Draw = Callable[..., torch.Tensor]
TOKENS = Tokens(uniforms_N=torch.linspace(0.05, 0.95, N), advantage_N=torch.arange(float(N)))
TERMS: list[tuple[float, Objective]] = [
    (0.7, build("local_support", k=4, support="student")),
    (1.0, build("trust_region", k=5)),
    (2.5, build("reward_clipped", switch=0.0, share=0.4)),
]


@pytest.fixture
def call(
    draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Callable[..., TeacherScores]
) -> Callable[[Objective], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """(loss, gradient of its sum, diagnostics) of an objective."""
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    old_N = (student_NV + 0.5 * draw(N, V)).log_softmax(-1).gather(1, sampled_ids_N[:, None])[:, 0]
    scores = make_scores(teacher_NV, sampled_ids_N, k=V)

    def call(objective: Objective) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        logits_NV = student_NV.clone().requires_grad_()
        loss_N, metrics = objective(
            DenseStudent(logits_NV), scores, sampled_ids_N, old_N, tokens=TOKENS
        )
        (gradient_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
        return loss_N.detach(), gradient_NV, metrics

    return call


def test_losses_and_gradients_are_added_with_their_weights(call: Callable[..., Any]) -> None:
    loss_N, gradient_NV, _ = call(weighted_sum(TERMS))
    alone = [(weight, *call(one)) for weight, one in TERMS]
    torch.testing.assert_close(loss_N, sum(weight * own_N for weight, own_N, _, _ in alone))
    torch.testing.assert_close(gradient_NV, sum(weight * own_NV for weight, _, own_NV, _ in alone))


def test_each_ones_diagnostics_are_under_its_name(call: Callable[..., Any]) -> None:
    _, _, metrics = call(weighted_sum(TERMS))
    expected = {}
    for _, one in TERMS:
        own_N, _, own = call(one)
        expected |= {f"{one.name}/{key}": value for key, value in own.items()}
        expected[f"loss/{one.name}"] = own_N
    assert metrics.keys() == expected.keys()
    assert all(torch.equal(metrics[key], value) for key, value in expected.items())
    assert not any(value.requires_grad for value in metrics.values())


def test_one_alone_is_itself(call: Callable[..., Any]) -> None:
    alone = build("local_support", k=4)
    assert weighted_sum([(1.0, alone)]) is alone
    own_N, own_NV, own = call(alone)
    loss_N, gradient_NV, metrics = call(weighted_sum([(0.25, alone)]))
    assert torch.equal(loss_N, 0.25 * own_N) and torch.equal(gradient_NV, 0.25 * own_NV)
    assert metrics.keys() == own.keys()


def test_it_needs_what_either_needs() -> None:
    found = weighted_sum(TERMS)
    assert found.name == "local_support + trust_region + reward_clipped"
    assert found.needs == Needs(k=5, student_k=4, draws=True, undecided=0.4)
    assert found.compares_entropies(0.0)
    assert found.entropy_floor(torch.arange(11.0)) == pytest.approx(6.0, abs=1e-3)


def test_a_token_that_one_of_them_does_not_take_is_refused(
    draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Callable[..., TeacherScores]
) -> None:
    """trust_region alone takes off-policy tokens, and beside another loss it does not."""
    logits_NV, old_N = draw(N, V), torch.full((N,), torch.nan)
    rest = (DenseStudent(logits_NV), make_scores(logits_NV, sampled_ids_N, k=V), sampled_ids_N)
    TERMS[1][1](*rest, old_N)
    with pytest.raises(ValueError, match="was not sampled by the student"):
        weighted_sum(TERMS[:2])(*rest, old_N)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "name at least one"),
        ([(0.0, TERMS[0][1])], "weight=0.0: it must be positive"),
        ([TERMS[0], (-1.0, TERMS[1][1])], "trust_region: weight=-1.0"),
        ([TERMS[0], (float("nan"), TERMS[1][1])], "weight=nan"),
        ([TERMS[0], (1.0, build("local_support", k=9))], "'local_support' is there twice"),
        ([TERMS[0], (1.0, build("imitation"))], "make several tasks of them"),
    ],
)
def test_no_sum(terms: list[tuple[float, Objective]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(terms)


class Advantage:
    """A policy gradient on the row's advantages: of this test alone."""

    name, needs = "advantage", Needs(advantage=True)

    def __call__(self, case: Case) -> Loss:
        advantage_N = case.tokens.advantage_N
        assert advantage_N is not None
        return -advantage_N * case.student_logprobs(), {}


def test_advantages_beside_a_teacher(call: Callable[..., Any]) -> None:
    own = Objective(Advantage())
    assert not own.needs.teacher
    loss_N, _, metrics = call(weighted_sum([TERMS[0], (0.5, own)]))
    expected_N = 0.7 * call(TERMS[0][1])[0] + 0.5 * call(own)[0]
    torch.testing.assert_close(loss_N, expected_N)
    assert metrics["loss/advantage"][0] == 0  # its advantage


def test_advantages_that_are_needed_and_not_there_are_named(
    draw: Draw, sampled_ids_N: torch.Tensor
) -> None:
    rest = (DenseStudent(draw(N, V)), None, sampled_ids_N, torch.zeros(N))
    with pytest.raises(ValueError, match="advantage: it needs an advantage of each token"):
        Objective(Advantage())(*rest)
    with pytest.raises(ValueError, match="advantages of 3 tokens for 7 positions"):
        Objective(Advantage())(*rest, tokens=Tokens(advantage_N=torch.zeros(3)))
