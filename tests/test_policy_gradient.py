"""Policy gradients on log q - log pi of the sampled token: by hand, and exact by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage.distill.objectives import DenseStudent, TeacherScores, Tokens, build
from tutelage.distill.objectives.policy_gradient import returns_to_go, surrogate
from tutelage.distill.objectives.tokens import Case

N, V = 7, 11
Draw = Callable[..., torch.Tensor]
Scores = Callable[..., TeacherScores]
Gradient = Callable[..., torch.Tensor]


def _reverse_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """sum_v pi log(pi / q), term by term."""
    pi_NV, q_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)
    return (pi_NV * (pi_NV / q_NV).log()).sum(-1)


class TestSampledToken:
    @staticmethod
    def _loss(
        objective: Any,
        student_NV: torch.Tensor,
        teacher_NV: torch.Tensor,
        ids_N: torch.Tensor,
        make_scores: Scores,
    ) -> torch.Tensor:
        """On-policy: the behavior policy is the student itself."""
        old_N = student_NV.detach().log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
        scores = make_scores(teacher_NV, ids_N, k=1)
        loss_N: torch.Tensor = objective(DenseStudent(student_NV), scores, ids_N, old_N)[0]
        return loss_N

    def test_on_policy_gradient_is_minus_advantage_times_score(
        self, draw: Draw, sampled_ids_N: torch.Tensor, gradient: Gradient, make_scores: Scores
    ) -> None:
        """grad = -A (onehot(y) - pi), A = log q(y) - log pi(y)."""
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        gradient_NV = gradient(
            lambda z: self._loss(build("sampled_token"), z, teacher_NV, sampled_ids_N, make_scores),
            student_NV,
        )
        for n, y in enumerate(sampled_ids_N.tolist()):
            pi, q = student_NV[n].softmax(-1), teacher_NV[n].softmax(-1)
            advantage = math.log(q[y].item()) - math.log(pi[y].item())
            expected = -advantage * (torch.eye(V, dtype=torch.float64)[y] - pi)
            torch.testing.assert_close(gradient_NV[n], expected)

    def test_expected_gradient_is_that_of_the_full_reverse_kl(
        self, draw: Draw, gradient: Gradient, make_scores: Scores
    ) -> None:
        """Exactly, over y ~ pi, by enumerating the vocabulary: each y weighs pi(y)."""
        student_1V, teacher_1V = draw(1, V), draw(1, V)
        ids_V = torch.arange(V)
        gradient_VV = gradient(
            lambda z: self._loss(
                build("sampled_token"), z, teacher_1V.expand(V, V), ids_V, make_scores
            ),
            student_1V.expand(V, V),
        )
        expected_V = student_1V[0].softmax(-1) @ gradient_VV
        torch.testing.assert_close(
            expected_V, gradient(lambda z: _reverse_kl(z, teacher_1V), student_1V)[0]
        )

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope"),
        [
            # clip 0.2, dual clip 3. slope: d loss / d log pi.
            (1.0, 0.5, -0.5, -0.5),
            (1.1, 0.5, -0.55, -0.55),
            (1.5, 0.5, -0.6, 0.0),  # gained enough: the clipped side, flat
            (0.5, 0.5, -0.25, -0.25),  # below 1 - clip a gain is never clipped
            (0.5, -2.0, 1.6, 0.0),  # pushed down enough: flat
            (1.5, -2.0, 3.0, 3.0),  # above 1 + clip a loss is not clipped ...
            (2.9, -2.0, 5.8, 5.8),
            (4.0, -2.0, 6.0, 0.0),  # ... up to the dual clip: 3 * 2
        ],
    )
    def test_clip_and_dual_clip_by_hand(
        self, ratio: float, advantage: float, loss: float, slope: float
    ) -> None:
        """One token of two, log pi(y) = log 0.1: the old policy and the teacher follow from the
        ratio and the advantage."""
        logits_1V = torch.tensor([[0.1, 0.9]], dtype=torch.float64).log().requires_grad_()
        old_N = torch.tensor([0.1 / ratio], dtype=torch.float64).log()
        scores = TeacherScores(
            ids_NK=torch.tensor([[0]]),
            logprobs_NK=(old_N + advantage)[:, None],
            sampled_N=old_N + advantage,
            vocabulary=2,
        )
        loss_N, metrics = build("sampled_token")(
            DenseStudent(logits_1V), scores, torch.tensor([0]), old_N
        )
        (gradient_1V,) = torch.autograd.grad(loss_N.sum(), logits_1V)
        assert loss_N.item() == pytest.approx(loss)
        # d log pi(0) / dz = (1 - pi(0), -pi(1))
        assert gradient_1V[0].tolist() == pytest.approx([slope * 0.9, -slope * 0.9], abs=1e-12)
        assert metrics["ppo/ratio"].item() == pytest.approx(ratio)
        assert metrics["ppo/clip_share"].item() == float(
            (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
        )

    def test_without_dual_clip_a_loss_grows_with_the_ratio(self) -> None:
        old_N = torch.tensor([math.log(0.01)])
        scores = TeacherScores(
            ids_NK=torch.tensor([[0]]),
            logprobs_NK=(old_N - 1)[:, None],
            sampled_N=old_N - 1,
            vocabulary=2,
        )
        student = DenseStudent(torch.tensor([[0.1, 0.9]]).log())
        found = {
            dual: build("sampled_token", dual_clip=dual)(student, scores, torch.tensor([0]), old_N)[
                0
            ].item()
            for dual in (None, 3.0)
        }
        assert found == pytest.approx({None: 10.0, 3.0: 3.0}, rel=1e-5)

    def test_reward_clip_bounds_the_advantage_on_both_sides(
        self, draw: Draw, make_scores: Scores
    ) -> None:
        logits_2V = torch.tensor([[0.5, 0.5], [0.001, 0.999]], dtype=torch.float64).log()
        teacher_2V = torch.tensor([[1e-6, 1 - 1e-6], [0.9, 0.1]], dtype=torch.float64).log()
        loss_N = self._loss(
            build("sampled_token", reward_clip=2.0),
            logits_2V,
            teacher_2V,
            torch.tensor([0, 0]),
            make_scores,
        )
        assert loss_N.tolist() == pytest.approx([2.0, -2.0])

    def test_a_token_that_the_teacher_finds_impossible_stays_finite(self) -> None:
        teacher_NV = torch.tensor([[0.0, -torch.inf]])
        scores = TeacherScores.from_logits(teacher_NV, torch.tensor([1]), k=1)
        logits_NV = torch.zeros(1, 2, requires_grad=True)
        loss_N, _ = build("sampled_token")(
            DenseStudent(logits_NV), scores, torch.tensor([1]), torch.tensor([math.log(0.5)])
        )
        (gradient_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
        assert loss_N.isfinite().all() and gradient_NV.isfinite().all()
        assert gradient_NV[0, 1] > 0  # gradient descent makes the token less likely


class TestSequences:
    """Every sequence of three tokens of three, with a table of logits for student and teacher:
    13 contexts (none, one and two tokens), all 27 sequences, exact expectations."""

    SIZE, LENGTH = 3, 3

    @pytest.fixture
    def tables(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        return draw(13, self.SIZE, scale=1.0), draw(13, self.SIZE, scale=1.0)

    def _sequences(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(context [27, 3], token [27, 3]) of every sequence: a context's row in the tables."""
        ids_ST = torch.cartesian_prod(*[torch.arange(self.SIZE)] * self.LENGTH)
        first, second = ids_ST[:, 0], ids_ST[:, 1]
        rows_ST = torch.stack(
            [torch.zeros_like(first), 1 + first, 4 + self.SIZE * first + second], dim=1
        )
        return rows_ST, ids_ST

    def _logprobs(self, table: torch.Tensor) -> torch.Tensor:
        """log p of each token of each sequence [27, 3]."""
        rows_ST, ids_ST = self._sequences()
        return table.log_softmax(-1)[rows_ST].gather(2, ids_ST[:, :, None])[:, :, 0]

    def _estimate(
        self, tables: tuple[torch.Tensor, torch.Tensor], gamma: float, make_scores: Scores
    ) -> torch.Tensor:
        """The mean over sequences, each by its probability, of the gradient of its summed loss."""
        student, teacher = tables
        rows_ST, ids_ST = self._sequences()
        rows_N, ids_N = rows_ST.flatten(), ids_ST.flatten()
        old_ST = self._logprobs(student)
        weights_S = old_ST.sum(1).exp()
        assert weights_S.sum().item() == pytest.approx(1)
        point = student.clone().requires_grad_()
        loss_N, _ = build("sampled_token", gamma=gamma)(
            DenseStudent(point[rows_N]),
            make_scores(teacher[rows_N], ids_N, k=1),
            ids_N,
            old_ST.flatten(),
            tokens=Tokens(segments_N=torch.arange(27).repeat_interleave(self.LENGTH)),
        )
        (found,) = torch.autograd.grad(weights_S @ loss_N.view(27, self.LENGTH).sum(1), point)
        return found

    def test_causal_returns_are_unbiased_for_the_kl_of_whole_sequences(
        self,
        tables: tuple[torch.Tensor, torch.Tensor],
        make_scores: Scores,
        gradient: Gradient,
    ) -> None:
        _, teacher = tables

        def kl(table: torch.Tensor) -> torch.Tensor:
            pi_S, q_S = (self._logprobs(x).sum(1) for x in (table, teacher))
            return pi_S.exp() @ (pi_S - q_S)

        exact = gradient(kl, tables[0])
        torch.testing.assert_close(self._estimate(tables, 1.0, make_scores), exact)
        assert (self._estimate(tables, 0.5, make_scores) - exact).abs().max() > 0.01

    @pytest.mark.parametrize("gamma", [0.0, 0.5])
    def test_a_discount_is_the_papers_estimator_and_zero_the_token_level_one(
        self,
        gamma: float,
        tables: tuple[torch.Tensor, torch.Tensor],
        make_scores: Scores,
        gradient: Gradient,
    ) -> None:
        """sum_t ( sum_{t' >= t} gamma^(t'-t) r_t' ) g_t, term by term; at 0, sum_t r_t g_t."""
        student, teacher = tables
        cost_ST = self._logprobs(student) - self._logprobs(teacher)
        weights_S = self._logprobs(student).sum(1).exp()

        def score(table: torch.Tensor) -> torch.Tensor:
            logprobs_ST, total = self._logprobs(table), torch.zeros((), dtype=torch.float64)
            for t in range(self.LENGTH):
                togo_S = sum(gamma ** (u - t) * cost_ST[:, u] for u in range(t, self.LENGTH))
                total = total + weights_S @ (togo_S * logprobs_ST[:, t])
            return total

        torch.testing.assert_close(
            self._estimate(tables, gamma, make_scores), gradient(score, student)
        )

    @pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
    def test_a_return_stays_inside_its_segment(self, gamma: float, draw: Draw) -> None:
        """Ragged segments, one of one token, whatever their numbers, against loops."""
        values_N = draw(10)
        segments = [4, 4, 4, 9, 2, 2, 2, 2, 7, 7]
        found_N = returns_to_go(values_N, torch.tensor(segments), gamma=gamma)
        for t in range(10):
            wanted = sum(
                gamma ** (u - t) * values_N[u].item()
                for u in range(t, 10)
                if segments[u] == segments[t]
            )
            assert found_N[t].item() == pytest.approx(wanted, rel=1e-12)
        together_N = returns_to_go(values_N, None, gamma=gamma)
        assert together_N[0].item() == pytest.approx(
            sum(gamma**u * values_N[u].item() for u in range(10))
        )

    @pytest.mark.parametrize("gamma", [0.0, 1.0])
    def test_a_masked_tokens_cost_does_not_flow(
        self, gamma: float, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        """Whatever the teacher thinks of the masked token, the others' losses stay; unmasked, the
        tokens before it in its segment feel it, where gamma carries it to them."""
        student = DenseStudent(draw(N, V))
        teacher_NV, old_N = draw(N, V), -draw(N).abs()
        worse_NV = teacher_NV.clone()
        worse_NV[3, sampled_ids_N[3]] -= 20.0
        segments_N = torch.tensor([0, 0, 1, 1, 1, 2, 2])
        mask_N = torch.ones(N, dtype=torch.bool)
        mask_N[3] = False
        objective = build("sampled_token", gamma=gamma)
        changed = {}
        for masked in (True, False):
            tokens = Tokens(segments_N=segments_N, mask_N=mask_N if masked else None)
            one_N, other_N = (
                objective(
                    student,
                    make_scores(logits_NV, sampled_ids_N, k=1),
                    sampled_ids_N,
                    old_N,
                    tokens=tokens,
                )[0]
                for logits_NV in (teacher_NV, worse_NV)
            )
            changed[masked] = (one_N != other_N).nonzero().flatten().tolist()
        assert changed == {True: [], False: [2, 3] if gamma else [3]}


def test_a_scalar_of_the_state_alone_teaches_nothing(
    draw: Draw, make_scores: Scores, gradient: Gradient
) -> None:
    """As an advantage a divergence of the state (the same whatever was sampled) has the mean
    gradient 0; log(pi/q) of the sampled token, differentiated instead, has too. The sampled token's
    reward as the advantage has that of the reverse KL."""
    student_1V, teacher_1V = draw(1, V), draw(1, V)
    ids_V, at_VV = torch.arange(V), student_1V.expand(V, V)
    pi_V = student_1V[0].softmax(-1)
    scores = make_scores(teacher_1V.expand(V, V), ids_V, k=1)

    def case(logits_VV: torch.Tensor) -> Case:
        return Case(
            student=DenseStudent(logits_VV),
            scores=scores,
            ids_N=ids_V,
            behavior_logprobs_N=pi_V.log(),
            tokens=Tokens(),
            generator=None,
        )

    divergence_V = -_reverse_kl(student_1V, teacher_1V).expand(V)

    def of_state(logits_VV: torch.Tensor) -> torch.Tensor:
        return surrogate(case(logits_VV), divergence_V, clip=0.2, dual_clip=3.0)[0]

    def direct(logits_VV: torch.Tensor) -> torch.Tensor:
        return case(logits_VV).student_logprobs() - scores.sampled_N

    def of_token(logits_VV: torch.Tensor) -> torch.Tensor:
        return surrogate(case(logits_VV), case(logits_VV).reward(), clip=0.2, dual_clip=3.0)[0]

    zero_V = torch.zeros(V, dtype=torch.float64)
    for nothing in (of_state, direct):
        each_VV = gradient(nothing, at_VV)
        assert each_VV.abs().max() > 0.1
        torch.testing.assert_close(pi_V @ each_VV, zero_V)
    torch.testing.assert_close(
        pi_V @ gradient(of_token, at_VV),
        gradient(lambda z: _reverse_kl(z, teacher_1V), student_1V)[0],
    )


@pytest.fixture
def example(draw: Draw, sampled_ids_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(student logits, teacher logits, log pi_old of the sampled ids): near, but off policy."""
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    old_NV = (student_NV + draw(N, V, scale=0.3)).log_softmax(-1)
    return student_NV, teacher_NV, old_NV.gather(1, sampled_ids_N[:, None])[:, 0]


def _forward_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor, n: int, k: int) -> float:
    """sum over the teacher's top K of q log(q / pi), not renormalised, by a loop."""
    pi, q = student_NV[n].softmax(-1).tolist(), teacher_NV[n].softmax(-1).tolist()
    return sum(q[v] * math.log(q[v] / pi[v]) for v in sorted(range(V), key=lambda v: -q[v])[:k])


class TestEntropyAware:
    def test_the_forward_kl_is_added_where_the_teacher_is_undecided(
        self, example: tuple[torch.Tensor, ...], sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        """And it replaces nothing: the clipped surrogate stands on every token."""
        student_NV, teacher_NV, old_N = example
        scores = make_scores(teacher_NV, sampled_ids_N, k=4)
        student, rest = DenseStudent(student_NV), (scores, sampled_ids_N, old_N)
        loss_N, metrics = build("entropy_aware", k=4, tau=1.2)(student, *rest)
        sampled_N, _ = build("sampled_token", dual_clip=None)(student, *rest)
        for n in range(N):
            q = teacher_NV[n].softmax(-1).tolist()
            undecided = -sum(p * math.log(p) for p in q) > 1.2
            added = _forward_kl(student_NV, teacher_NV, n, 4) if undecided else 0.0
            assert metrics["teacher/undecided"][n].item() == undecided
            assert loss_N[n].item() == pytest.approx(sampled_N[n].item() + added, rel=1e-10)
        assert 0 < metrics["teacher/undecided"].sum() < N

    def test_renormalised_the_teacher_sums_to_one_on_its_top_k(
        self, example: tuple[torch.Tensor, ...], sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        """sum_K q^ log(q^ / pi), q^ = q / q(K), pi over the whole vocabulary: by a loop, and by two
        tokens of four that are written out. Its gradient is 1 / q(K) times the plain one's."""
        student_NV, teacher_NV, old_N = example
        scores = make_scores(teacher_NV, sampled_ids_N, k=4)
        student, rest = DenseStudent(student_NV), (scores, sampled_ids_N, old_N)
        options: dict[str, Any] = {"k": 4, "tau": 1.2}
        plain_N, metrics = build("entropy_aware", **options)(student, *rest)
        loss_N, _ = build("entropy_aware", renormalize=True, **options)(student, *rest)
        for n in range(N):
            pi, q = student_NV[n].softmax(-1).tolist(), teacher_NV[n].softmax(-1).tolist()
            top = sorted(range(V), key=lambda v: -q[v])[:4]
            mass = sum(q[v] for v in top)
            wanted = sum(q[v] / mass * math.log(q[v] / mass / pi[v]) for v in top)
            wanted -= _forward_kl(student_NV, teacher_NV, n, 4)
            undecided = metrics["teacher/undecided"][n].item()
            assert (loss_N - plain_N)[n].item() == pytest.approx(undecided * wanted, abs=1e-12)

    def test_renormalised_by_hand(self, make_scores: Scores, gradient: Gradient) -> None:
        """q = 0.4, 0.2, 0.3, 0.1 at K = 2: 4/7 log(4/7 / 0.1) + 3/7 log(3/7 / 0.3); plain:
        0.4 log(0.4 / 0.1) + 0.3 log(0.3 / 0.3). The token itself has no advantage."""
        q = torch.tensor([[0.4, 0.2, 0.3, 0.1]], dtype=torch.float64)
        pi = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
        ids_N = torch.tensor([2])
        scores = make_scores(q.log(), ids_N, k=2)
        wanted = {True: 1.148843, False: 0.554518}
        slopes = {}
        for renormalize, value in wanted.items():
            objective = build("entropy_aware", k=2, tau=1.0, renormalize=renormalize)
            rest = (scores, ids_N, pi.log()[:, 2])
            loss_N, _ = objective(DenseStudent(pi.log()), *rest)
            assert loss_N.item() == pytest.approx(value, abs=1e-6)
            slopes[renormalize] = gradient(
                lambda z, o=objective, r=rest: o(DenseStudent(z), *r)[0], pi.log()
            )
        torch.testing.assert_close(0.7 * slopes[True], slopes[False])
        hand = torch.tensor([[0.1 - 4 / 7, 0.2, 0.3 - 3 / 7, 0.4]], dtype=torch.float64)
        torch.testing.assert_close(slopes[True], hand)

    def test_a_teacher_that_tells_no_entropy_is_refused(self) -> None:
        scores = TeacherScores(
            ids_NK=torch.tensor([[0]]),
            logprobs_NK=torch.zeros(1, 1),
            sampled_N=torch.zeros(1),
            vocabulary=V,
        )
        with pytest.raises(ValueError, match=r"no entropy.*engine: transformers"):
            build("entropy_aware", k=1)(
                DenseStudent(torch.zeros(1, V)), scores, torch.tensor([0]), torch.zeros(1)
            )


class TestAdvantageGated:
    def test_the_gate_closes_opens_and_splits_at_its_thresholds(
        self, example: tuple[torch.Tensor, ...], sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        """tau = -1: the sampled token's objective; 1: the forward KL; 0: the forward KL where
        q(y) <= pi_old(y)."""
        student_NV, teacher_NV, old_N = example
        scores = make_scores(teacher_NV, sampled_ids_N, k=4)
        student, rest = DenseStudent(student_NV), (scores, sampled_ids_N, old_N)
        sampled_N, _ = build("sampled_token")(student, *rest)
        forward_N = torch.tensor([_forward_kl(student_NV, teacher_NV, n, 4) for n in range(N)])
        worse_N = scores.sampled_N <= old_N
        assert 0 < worse_N.sum() < N
        wanted = {-1.0: sampled_N, 0.0: torch.where(worse_N, forward_N, sampled_N), 1.0: forward_N}
        for tau, wanted_N in wanted.items():
            loss_N, metrics = build("advantage_gated", k=4, tau=tau)(student, *rest)
            torch.testing.assert_close(loss_N, wanted_N.double())
            share = {-1.0: 0.0, 0.0: worse_N.double().mean().item(), 1.0: 1.0}[tau]
            assert metrics["gate/share"].mean().item() == pytest.approx(share)

    def test_at_minus_one_it_stays_shut_for_a_sure_student_that_the_teacher_excludes(self) -> None:
        """q(y) - pi_old(y) is -1 there, in float32."""
        scores = TeacherScores.from_logits(
            torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([1]), k=2
        )
        student = DenseStudent(torch.tensor([[-40.0, 40.0, -40.0]]))
        rest = (scores, torch.tensor([1]), torch.zeros(1))
        loss_N, _ = build("advantage_gated", k=2, tau=-1.0)(student, *rest)
        assert torch.equal(loss_N, build("sampled_token")(student, *rest)[0])


class TestRewardClipped:
    @pytest.mark.parametrize("options", [{}, {"lam": 0.5}, {"floor": -0.5}])
    def test_first_phase_by_hand(
        self,
        options: dict[str, float],
        example: tuple[torch.Tensor, ...],
        sampled_ids_N: torch.Tensor,
        make_scores: Scores,
    ) -> None:
        """-rho R where R >= c, else nothing; c = log(lam) / (1 - lam): -2.01 at 0.2."""
        student_NV, teacher_NV, old_N = example
        objective = build("reward_clipped", switch=0.5, **options)
        loss_N, metrics = objective(
            DenseStudent(student_NV),
            make_scores(teacher_NV, sampled_ids_N, k=1),
            sampled_ids_N,
            old_N,
            tokens=Tokens(progress=0.49),
        )
        floor = {"lam": 2 * math.log(0.5), "floor": -0.5}.get(next(iter(options), ""), -2.0118)
        for n, y in enumerate(sampled_ids_N.tolist()):
            pi, q = student_NV[n].softmax(-1)[y].item(), teacher_NV[n].softmax(-1)[y].item()
            reward, rho = math.log(q) - old_N[n].item(), pi / math.exp(old_N[n].item())
            kept = reward >= floor
            assert loss_N[n].item() == pytest.approx(-rho * reward if kept else 0.0, rel=1e-9)
            assert metrics["reward/kept"][n].item() == kept
        assert 0 < metrics["reward/kept"].sum() < N

    def test_second_phase_by_hand(
        self, example: tuple[torch.Tensor, ...], sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        """-rho max(R, c) on the tokens where the student is least decided, among those that take
        loss: the masked ones, however undecided, take no place."""
        student_NV, teacher_NV, old_N = example
        student_NV[:2] = 0.0  # uniform: the highest entropies, and masked
        mask_N = torch.tensor([False, False, True, True, True, True, True])
        loss_N, metrics = build("reward_clipped", floor=-0.5, share=0.5, switch=0.5)(
            DenseStudent(student_NV),
            make_scores(teacher_NV, sampled_ids_N, k=1),
            sampled_ids_N,
            old_N,
            tokens=Tokens(progress=0.5, mask_N=mask_N),
        )
        pi_NV = student_NV.softmax(-1)
        entropies = (-(pi_NV * pi_NV.log()).sum(-1)).tolist()
        kept = sorted(range(2, N), key=lambda n: -entropies[n])[:3]
        floored = 0
        for n in range(2, N):
            y = sampled_ids_N[n].item()
            reward = teacher_NV[n].log_softmax(-1)[y].item() - old_N[n].item()
            rho = pi_NV[n, y].item() / math.exp(old_N[n].item())
            wanted = -rho * max(reward, -0.5) if n in kept else 0.0
            floored += n in kept and reward < -0.5
            assert loss_N[n].item() == pytest.approx(wanted, rel=1e-9)
            assert metrics["reward/kept"][n].item() == (n in kept)
        assert floored

    def test_the_floor_of_the_whole_update_is_taken_where_there_is_one(
        self, example: tuple[torch.Tensor, ...], sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        student_NV, teacher_NV, old_N = example
        entropy_N = DenseStudent(student_NV).entropy()
        scores = make_scores(teacher_NV, sampled_ids_N, k=1)
        for floor in (0.0, float(entropy_N.sort().values[4]), 10.0):
            _, metrics = build("reward_clipped", switch=0.0)(
                DenseStudent(student_NV),
                scores,
                sampled_ids_N,
                old_N,
                tokens=Tokens(entropy_floor=floor),
            )
            assert torch.equal(metrics["reward/kept"].bool(), entropy_N >= floor)

    def test_tokens_of_one_state_stay_together_whatever_rounds_them(self) -> None:
        """Eight replies begin in one state: their first tokens' entropies are one number, but for
        what shared their batch."""
        rounding_N = 1e-6 * torch.randn(8, generator=torch.Generator().manual_seed(0))
        entropy_N = torch.cat([2.0 + rounding_N, torch.linspace(0.1, 1.5, 12)])
        floor = build("reward_clipped", share=0.2).entropy_floor(entropy_N)
        assert int((entropy_N >= floor).sum()) == 8


class TestBehavior:
    """Importance weights of the sampled tokens, by hand: w = pi_old / mu, outside PPO's clips."""

    @pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
    def test_the_weight_multiplies_what_the_clips_leave(
        self,
        weight: float,
        example: tuple[torch.Tensor, ...],
        sampled_ids_N: torch.Tensor,
        make_scores: Scores,
    ) -> None:
        student_NV, teacher_NV, old_N = example
        tokens = Tokens(
            sampling_logprobs_N=old_N - math.log(weight), uniforms_N=torch.linspace(0, 0.99, N)
        )
        scores = make_scores(teacher_NV, sampled_ids_N, k=4)
        student, rest = DenseStudent(student_NV), (scores, sampled_ids_N, old_N)
        for name, options in (
            ("sampled_token", {}),
            ("reward_clipped", {}),
            ("trust_region", {"k": 4}),
            ("advantage_gated", {"k": 4}),
        ):
            full_N, sampling_N = (
                build(name, behavior=behavior, **options)(student, *rest, tokens=tokens)[0]
                for behavior in ("full", "sampling")
            )
            torch.testing.assert_close(sampling_N, weight * full_N)

    @pytest.mark.parametrize("temperature", [0.6, 1.5])
    def test_off_policy_too_the_mean_is_that_of_the_whole_policy(
        self, temperature: float, draw: Draw, gradient: Gradient, make_scores: Scores
    ) -> None:
        """The student has moved since it drew: over y ~ mu the sampled tail is the full reverse KL
        of the student of now, and the policy gradient -sum grad pi (log q - log pi_old)."""
        now_1V, teacher_1V = draw(1, V), draw(1, V)
        old_1V = now_1V + 0.5 * draw(1, V)
        old_V, mu_V = old_1V[0].log_softmax(-1), (old_1V[0] / temperature).softmax(-1)
        ids_V, tokens = torch.arange(V), Tokens(sampling_logprobs_N=mu_V.log())
        scores = make_scores(teacher_1V.expand(V, V), ids_V, k=3)

        def mean(name: str, **options: Any) -> torch.Tensor:
            objective = build(name, **options)
            return mu_V @ gradient(
                lambda z: objective(DenseStudent(z), scores, ids_V, old_V, tokens=tokens)[0],
                now_1V.expand(V, V),
            )

        tail: dict[str, Any] = {"k": 3, "renormalize": False, "tail": "sampled"}
        whole_V = gradient(lambda z: _reverse_kl(z, teacher_1V), now_1V)[0]
        torch.testing.assert_close(mean("local_support", behavior="sampling", **tail), whole_V)
        assert (mean("local_support", **tail) - whole_V).norm() > 0.05 * whole_V.norm()
        reward_V = teacher_1V[0].log_softmax(-1) - old_V
        wanted_V = gradient(lambda z: -z.softmax(-1) @ reward_V, now_1V)[0]
        wide: dict[str, Any] = {"clip": 1e6, "dual_clip": None}
        found_V = mean("sampled_token", behavior="sampling", **wide)
        torch.testing.assert_close(found_V, wanted_V)
        assert (mean("sampled_token", **wide) - wanted_V).norm() > 0.05 * wanted_V.norm()

    def test_a_return_weighs_what_follows_decision_by_decision(self) -> None:
        """A_t = R_t + gamma w_{t+1} A_{t+1}, inside each reply."""
        values_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
        weights_N = torch.tensor([9.0, 0.5, 3.0, 7.0, 0.25], dtype=torch.float64)
        found_N = returns_to_go(
            values_N, torch.tensor([0, 0, 0, 1, 1]), gamma=0.5, weights_N=weights_N
        )
        third, last = 4.0, 16.0
        second = 2 + 0.5 * 3 * third
        assert found_N.tolist() == [1 + 0.25 * second, second, third, 8 + 0.125 * last, last]

    def test_given_tokens_have_no_law(
        self, example: tuple[torch.Tensor, ...], sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        """A teacher's prefix keeps -beta log pi(y)."""
        student_NV, teacher_NV, old_N = example
        old_N[:3] = torch.nan
        sampling_logprobs_N = old_N + 1.0
        loss_N, metrics = build("trust_region", k=4, beta=0.5, behavior="sampling")(
            DenseStudent(student_NV),
            make_scores(teacher_NV, sampled_ids_N, k=4),
            sampled_ids_N,
            old_N,
            tokens=Tokens(sampling_logprobs_N=sampling_logprobs_N),
        )
        logprobs_N = student_NV.log_softmax(-1).gather(1, sampled_ids_N[:, None])[:, 0]
        torch.testing.assert_close(loss_N[:3], -0.5 * logprobs_N[:3])
        torch.testing.assert_close(
            metrics["behavior/weight"][3:].log(), old_N[3:] - sampling_logprobs_N[3:]
        )

    def test_unrecorded_sampling_logprobs_are_refused(
        self, example: tuple[torch.Tensor, ...], sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        student_NV, teacher_NV, old_N = example
        objective = build("sampled_token", behavior="sampling")
        rest = (
            DenseStudent(student_NV),
            make_scores(teacher_NV, sampled_ids_N, k=1),
            sampled_ids_N,
            old_N,
        )
        with pytest.raises(ValueError, match=r"behavior='sampling' needs .* give tokens"):
            objective(*rest)
        sampling_logprobs_N = old_N.clone()
        sampling_logprobs_N[4] = torch.nan
        with pytest.raises(
            ValueError, match=r"log-probability of token 4 under the sampling .* is not known"
        ):
            objective(*rest, tokens=Tokens(sampling_logprobs_N=sampling_logprobs_N))
        with pytest.raises(
            ValueError, match="under the sampling parameters of 3 tokens for 7 positions"
        ):
            objective(*rest, tokens=Tokens(sampling_logprobs_N=sampling_logprobs_N[:3]))
        with pytest.raises(ValueError, match="did you mean 'sampling'"):
            build("sampled_token", behavior="sample")
