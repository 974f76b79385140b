"""TrOPD: which tokens are trusted, what each kind of token is taught, and by which draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage.distill.objectives import DenseStudent, TeacherScores, Tokens, build

N, V, K = 7, 11, 4
OUTLIERS = ("forward_kl", "mask", "clip", "forward_kl_pg")
Draw = Callable[..., torch.Tensor]
Scores = Callable[..., TeacherScores]
Gradient = Callable[..., torch.Tensor]


def _build(outlier: str, **options: Any) -> Any:
    return build("trust_region", **({"k": K, "outlier": outlier, "tau": -0.5} | options))


def _forward_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """sum over the teacher's top K of q log(q / pi), not renormalised [N]."""
    q_NK, ids_NK = teacher_NV.softmax(-1).topk(K)
    return (q_NK * (q_NK / student_NV.softmax(-1).gather(1, ids_NK)).log()).sum(-1)


@pytest.fixture
def example(
    draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TeacherScores]:
    """(student logits, teacher logits, log pi_old, scores): near, but off policy."""
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    old_NV = (student_NV + draw(N, V, scale=0.3)).log_softmax(-1)
    old_N = old_NV.gather(1, sampled_ids_N[:, None])[:, 0]
    return student_NV, teacher_NV, old_N, make_scores(teacher_NV, sampled_ids_N, k=K)


class TestTrust:
    def test_its_mean_is_one_minus_the_total_variation(
        self, draw: Draw, make_scores: Scores
    ) -> None:
        """Over every y, weighed by pi(y), and a grid of draws: speculative decoding's acceptance
        rate."""
        student_1V, teacher_1V, grid = draw(1, V), draw(1, V), 2000
        pi_V, q_V = student_1V[0].softmax(-1), teacher_1V[0].softmax(-1)
        ids_N = torch.arange(V).repeat_interleave(grid)
        _, metrics = _build("mask")(
            DenseStudent(student_1V.expand(V * grid, V)),
            make_scores(teacher_1V.expand(V * grid, V), ids_N, k=K),
            ids_N,
            pi_V.log()[ids_N],
            tokens=Tokens(uniforms_N=((torch.arange(grid) + 0.5) / grid).repeat(V)),
        )
        accepted_V = metrics["trust/share"].view(V, grid).double().mean(1)
        torch.testing.assert_close(accepted_V, (q_V / pi_V).clamp(max=1), rtol=0, atol=1 / grid)
        distance = (pi_V - q_V).abs().sum().item() / 2
        assert 0.1 < distance < 0.9
        assert (pi_V @ accepted_V).item() == pytest.approx(1 - distance, abs=1 / grid)

    @pytest.mark.parametrize("outlier", OUTLIERS)
    def test_a_teacher_that_is_the_student_is_trusted_always_and_teaches_nothing(
        self,
        outlier: str,
        draw: Draw,
        sampled_ids_N: torch.Tensor,
        make_scores: Scores,
        gradient: Gradient,
    ) -> None:
        """q = pi: R = 0, even under the largest draw that there is."""
        student_NV = draw(N, V)
        scores = make_scores(student_NV, sampled_ids_N, k=K)
        tokens = Tokens(uniforms_N=torch.full((N,), 1 - 2.0**-24))

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            loss_N, metrics = _build(outlier)(
                DenseStudent(logits_NV), scores, sampled_ids_N, scores.sampled_N, tokens=tokens
            )
            assert metrics["trust/share"].all()
            return loss_N

        assert (loss(student_NV) == 0).all()
        assert (gradient(loss, student_NV) == 0).all()

    def test_it_is_decided_against_the_policy_that_sampled(
        self, example: Any, sampled_ids_N: torch.Tensor, draw: Draw
    ) -> None:
        """However far the student has moved since: accepted just below q / pi_old, and not just
        above it."""
        student_NV, _, old_N, scores = example
        accepted_N = (scores.sampled_N - old_N).exp().clamp(max=1)
        below_N = torch.tensor([True, False] * 4)[:N]
        uniforms_N = torch.where(below_N, 0.99 * accepted_N, (1.01 * accepted_N).clamp(max=0.999))
        wanted_N = (below_N | (accepted_N == 1)).float()
        assert 0 < wanted_N.sum() < N and 0 < (accepted_N == 1).sum() < N
        for logits_NV in (student_NV, draw(N, V)):
            _, metrics = _build("mask")(
                DenseStudent(logits_NV),
                scores,
                sampled_ids_N,
                old_N,
                tokens=Tokens(uniforms_N=uniforms_N),
            )
            assert torch.equal(metrics["trust/share"], wanted_N)

    def test_a_static_threshold_needs_no_draw(
        self, example: Any, sampled_ids_N: torch.Tensor
    ) -> None:
        student_NV, _, old_N, scores = example
        wanted_N = (scores.sampled_N - old_N > -0.5).float()
        assert 0 < wanted_N.sum() < N
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        _, metrics = _build("mask", trust="static")(
            DenseStudent(student_NV), scores, sampled_ids_N, old_N, generator=generator
        )
        assert torch.equal(metrics["trust/share"], wanted_N)
        assert torch.equal(generator.get_state(), before)


class TestTokens:
    """What each kind of token is taught, by hand: rho = pi / pi_old is off 1 throughout."""

    @pytest.mark.parametrize("trust", ["ratio", "static"])
    @pytest.mark.parametrize("outlier", OUTLIERS)
    def test_values_and_gradients(
        self,
        trust: str,
        outlier: str,
        example: Any,
        sampled_ids_N: torch.Tensor,
        gradient: Gradient,
    ) -> None:
        """Trusted: -R rho, pushing y up where the teacher likes it better. Outliers: nothing; R
        floored at tau; the teacher's top K pulled up directly; or y pushed down by their KL."""
        student_NV, teacher_NV, old_N, scores = example
        tokens = Tokens(uniforms_N=torch.full((N,), 0.6))

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return _build(outlier, trust=trust)(
                DenseStudent(logits_NV), scores, sampled_ids_N, old_N, tokens=tokens
            )[0]

        forward_N = _forward_kl(student_NV, teacher_NV)
        forward_NV = gradient(lambda z: _forward_kl(z, teacher_NV), student_NV)
        values_N, gradient_NV, kinds = loss(student_NV), gradient(loss, student_NV), set()
        for n, y in enumerate(sampled_ids_N.tolist()):
            pi_V = student_NV[n].softmax(-1)
            rho = pi_V[y].item() / math.exp(old_N[n].item())
            reward = scores.sampled_N[n].item() - old_N[n].item()
            score_V = torch.eye(V, dtype=torch.float64)[y] - pi_V  # grad log pi(y)
            trusted = math.exp(reward) > 0.6 if trust == "ratio" else reward > -0.5
            kinds.add(trusted)
            advantage = {
                "forward_kl": 0.0,
                "mask": 0.0,
                "clip": max(reward, -0.5),
                "forward_kl_pg": -forward_N[n].item(),
            }[outlier]
            if trusted:
                advantage = reward
            value, wanted_V = -advantage * rho, -advantage * rho * score_V
            if outlier == "forward_kl" and not trusted:
                value, wanted_V = forward_N[n].item(), forward_NV[n]
            assert values_N[n].item() == pytest.approx(value, rel=1e-10)
            torch.testing.assert_close(gradient_NV[n], wanted_V)
        assert kinds == {True, False}

    def test_the_mean_gradient_over_tokens_and_draws(
        self, draw: Draw, make_scores: Scores, gradient: Gradient
    ) -> None:
        """sum_y pi(y) [ a (-R) grad log pi(y) + (1 - a) grad KL(q || pi) on the top K ], a =
        min(q/pi, 1): the trusted part teaches. Log(pi/q), differentiated directly, would leave
        sum_y pi a grad log pi alone."""
        student_1V, teacher_1V, grid = draw(1, V), draw(1, V), 1000
        pi_V, q_V = student_1V[0].softmax(-1), teacher_1V[0].softmax(-1)
        ids_N = torch.arange(V).repeat_interleave(grid)
        scores = make_scores(teacher_1V.expand(V * grid, V), ids_N, k=K)
        tokens = Tokens(uniforms_N=((torch.arange(grid) + 0.5) / grid).repeat(V))

        def mean(logits_1V: torch.Tensor) -> torch.Tensor:
            loss_N, _ = _build("forward_kl")(
                DenseStudent(logits_1V.expand(V * grid, V)),
                scores,
                ids_N,
                pi_V.log()[ids_N],
                tokens=tokens,
            )
            return pi_V @ loss_N.view(V, grid).mean(1)

        accepted_V, reward_V = (q_V / pi_V).clamp(max=1), (q_V / pi_V).log()
        forward_V = gradient(lambda z: _forward_kl(z, teacher_1V), student_1V)[0]
        outliers_V = (pi_V @ (1 - accepted_V)) * forward_V
        score_VV = torch.eye(V, dtype=torch.float64) - pi_V  # row y: grad log pi(y)
        trusted_V = -(pi_V * accepted_V * reward_V) @ score_VV
        assert trusted_V.abs().max() > 0.02
        torch.testing.assert_close(
            gradient(mean, student_1V)[0], trusted_V + outliers_V, rtol=0, atol=3 / grid
        )

    def test_given_tokens_are_imitated_weakly_and_they_alone_feel_beta(
        self, example: Any, sampled_ids_N: torch.Tensor, gradient: Gradient
    ) -> None:
        """A teacher's prefix (behavior NaN): -beta log pi(y), gradient beta (pi - onehot)."""
        student_NV, _, old_N, scores = example
        given_N = torch.tensor([True, True, False, False, False, True, False])
        mixed_N = old_N.masked_fill(given_N, torch.nan)
        tokens = Tokens(uniforms_N=torch.full((N,), 0.6))

        def loss(beta: float, behavior_logprobs_N: torch.Tensor) -> Callable[..., torch.Tensor]:
            return lambda z: _build("forward_kl", beta=beta)(
                DenseStudent(z), scores, sampled_ids_N, behavior_logprobs_N, tokens=tokens
            )[0]

        plain = gradient(loss(0.5, old_N), student_NV)
        for beta in (0.0, 0.001, 0.5):
            found = gradient(loss(beta, mixed_N), student_NV)
            assert torch.equal(found[~given_N], plain[~given_N])
            pi_NV = student_NV.softmax(-1)
            onehot_NV = torch.eye(V, dtype=torch.float64)[sampled_ids_N]
            torch.testing.assert_close(found[given_N], beta * (pi_NV - onehot_NV)[given_N])
            torch.testing.assert_close(
                loss(beta, mixed_N)(student_NV)[given_N],
                -beta * pi_NV.gather(1, sampled_ids_N[:, None])[given_N, 0].log(),
            )
        _, metrics = _build("mask")(
            DenseStudent(student_NV), scores, sampled_ids_N, mixed_N, tokens=Tokens()
        )
        assert torch.equal(metrics["trust/given"].bool(), given_N)
        assert not metrics["trust/share"][given_N].any()


class TestDraws:
    @staticmethod
    def _loss(
        example: Any, ids_N: torch.Tensor, seed: int, uniforms_N: torch.Tensor | None = None
    ) -> tuple[list[float], torch.Tensor]:
        student_NV, _, old_N, scores = example
        generator = torch.Generator().manual_seed(seed)
        loss_N, _ = _build("mask")(
            DenseStudent(student_NV.repeat(9, 1)),
            TeacherScores.join([scores] * 9),
            ids_N.repeat(9),
            old_N.repeat(9),
            generator=generator,
            tokens=Tokens(uniforms_N=uniforms_N),
        )
        return loss_N.tolist(), generator.get_state()

    def test_a_seed_draws_the_same_and_another_seed_does_not(
        self, example: Any, sampled_ids_N: torch.Tensor
    ) -> None:
        assert self._loss(example, sampled_ids_N, 1)[0] == self._loss(example, sampled_ids_N, 1)[0]
        assert self._loss(example, sampled_ids_N, 1)[0] != self._loss(example, sampled_ids_N, 2)[0]

    def test_a_tokens_own_draws_win_over_the_generator(
        self, example: Any, sampled_ids_N: torch.Tensor
    ) -> None:
        uniforms_N = torch.rand(9 * N, generator=torch.Generator().manual_seed(7))
        one, state = self._loss(example, sampled_ids_N, 1, uniforms_N)
        other, _ = self._loss(example, sampled_ids_N, 2, uniforms_N)
        assert one == other
        assert torch.equal(state, torch.Generator().manual_seed(1).get_state())
