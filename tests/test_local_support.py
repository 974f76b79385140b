"""Local support matching: on its support, outside it, without renormalisation, with its tail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage.distill.objectives import DenseStudent, TeacherScores, build

N, V = 7, 11
Draw = Callable[..., torch.Tensor]
Scores = Callable[..., TeacherScores]
Gradient = Callable[..., torch.Tensor]


def _reverse_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """sum_v pi log(pi / q), term by term."""
    pi_NV, q_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)
    return (pi_NV * (pi_NV / q_NV).log()).sum(-1)


class TestLocalSupport:
    def test_value_and_gradient_are_the_papers_formula(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores, gradient: Gradient
    ) -> None:
        """The loss by loops over probabilities; the gradient as ALGORITHMS.md section 3 derives it:
        dL/dz_v = pi^(v) [log(pi^(v)/q^(v)) - KL] on the support."""
        student_NV, teacher_NV, k = draw(N, V), draw(N, V), 4
        objective, scores = build("local_support", k=k), make_scores(teacher_NV, sampled_ids_N, k=k)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

        values_N, gradient_NV = loss(student_NV), gradient(loss, student_NV)
        for n in range(N):
            pi, q = student_NV[n].softmax(-1).tolist(), teacher_NV[n].softmax(-1).tolist()
            support = sorted(range(V), key=lambda v: -q[v])[:k]
            pi_hat = {v: pi[v] / sum(pi[u] for u in support) for v in support}
            q_hat = {v: q[v] / sum(q[u] for u in support) for v in support}
            kl = sum(pi_hat[v] * math.log(pi_hat[v] / q_hat[v]) for v in support)
            assert values_N[n].item() == pytest.approx(kl, rel=1e-10)
            for v in range(V):
                expected = pi_hat[v] * (math.log(pi_hat[v] / q_hat[v]) - kl) if v in support else 0
                assert gradient_NV[n, v].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)

    def test_the_whole_vocabulary_as_support_is_the_full_reverse_kl(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores, gradient: Gradient
    ) -> None:
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        objective, scores = build("local_support", k=V), make_scores(teacher_NV, sampled_ids_N, k=V)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

        torch.testing.assert_close(loss(student_NV), _reverse_kl(student_NV, teacher_NV))
        torch.testing.assert_close(
            gradient(loss, student_NV),
            gradient(lambda z: _reverse_kl(z, teacher_NV), student_NV),
        )
        forward_N = _reverse_kl(teacher_NV, student_NV)  # the other direction is another number
        assert (loss(student_NV) - forward_N).abs().min() > 1e-3

    def test_a_constant_on_the_support_changes_nothing(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores, gradient: Gradient
    ) -> None:
        """Student = teacher + c on S, anything outside S: loss and gradient are zero."""
        teacher_NV, k = draw(N, V), 5
        scores = make_scores(teacher_NV, sampled_ids_N, k=k)
        student_NV = draw(N, V)
        student_NV.scatter_(1, scores.ids_NK, teacher_NV.gather(1, scores.ids_NK) + 7.5)
        objective = build("local_support", k=k)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

        torch.testing.assert_close(loss(student_NV), torch.zeros(N, dtype=torch.float64))
        gradient_NV = gradient(loss, student_NV)
        torch.testing.assert_close(gradient_NV, torch.zeros_like(gradient_NV))
        student_NV[0, scores.ids_NK[0, 0]] += 1.0  # one logit on the support moves: no longer zero
        assert loss(student_NV)[0] > 1e-3

    def test_gradient_is_exactly_zero_outside_the_support(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores, gradient: Gradient
    ) -> None:
        teacher_NV, k = draw(N, V), 3
        scores, objective = make_scores(teacher_NV, sampled_ids_N, k=k), build("local_support", k=k)
        gradient_NV = gradient(
            lambda z: objective(DenseStudent(z), scores, sampled_ids_N, sampled_ids_N)[0],
            draw(N, V),
        )
        inside_NV = torch.zeros(N, V, dtype=torch.bool).scatter_(1, scores.ids_NK, True)
        assert (gradient_NV[~inside_NV] == 0).all()
        assert (gradient_NV[inside_NV] != 0).all()

    @pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
    def test_directions_by_hand(
        self,
        direction: str,
        draw: Draw,
        sampled_ids_N: torch.Tensor,
        make_scores: Scores,
        gradient: Gradient,
    ) -> None:
        """KL of the renormalised distributions by loops; zero, with no gradient, at the teacher."""

        def kl(left: list[float], right: list[float]) -> float:
            return sum(p * math.log(p / q) for p, q in zip(left, right, strict=True))

        student_NV, teacher_NV, k = draw(N, V), draw(N, V), 4
        scores = make_scores(teacher_NV, sampled_ids_N, k=k)
        objective = build("local_support", k=k, direction=direction)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

        values_N = loss(student_NV)
        for n in range(N):
            support = scores.ids_NK[n]
            pi = student_NV[n, support].softmax(-1).tolist()
            q = teacher_NV[n, support].softmax(-1).tolist()
            middle = [(a + b) / 2 for a, b in zip(pi, q, strict=True)]
            expected = {
                "reverse": kl(pi, q),
                "forward": kl(q, pi),
                "jsd": (kl(q, middle) + kl(pi, middle)) / 2,
            }[direction]
            assert values_N[n].item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(loss(teacher_NV + 3.0), torch.zeros_like(values_N))
        gradient_NV = gradient(loss, teacher_NV + 3.0)
        torch.testing.assert_close(gradient_NV, torch.zeros_like(gradient_NV))

    @pytest.mark.parametrize("direction", ["forward", "jsd"])
    def test_a_teachers_impossible_token_is_finite_where_the_formula_is(
        self, direction: str
    ) -> None:
        """q = (1/2, 1/2, 0) against a uniform student: log(3/2), and the JSD by hand."""
        teacher_NV = torch.tensor([[0.0, 0.0, -torch.inf]])
        scores = TeacherScores.from_logits(teacher_NV, torch.tensor([0]), k=3)
        logits_NV = torch.zeros(1, 3, requires_grad=True)
        loss_N, _ = build("local_support", k=3, direction=direction)(
            DenseStudent(logits_NV), scores, torch.tensor([0]), torch.zeros(1)
        )
        (gradient_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
        middle = [5 / 12, 5 / 12, 1 / 6]
        teachers = sum(0.5 * math.log(0.5 / m) for m in middle[:2])
        students = sum(math.log(1 / 3 / m) / 3 for m in middle)
        expected = {"forward": math.log(1.5), "jsd": (teachers + students) / 2}[direction]
        assert loss_N.item() == pytest.approx(expected, rel=1e-6)
        assert gradient_NV.isfinite().all()
        assert gradient_NV[0, 2] > 0 > gradient_NV[0, 0]  # down goes what the teacher rules out

    def test_takes_the_first_k_of_longermake_scores(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        student, teacher_NV = DenseStudent(draw(N, V)), draw(N, V)
        objective = build("local_support", k=3)
        long, _ = objective(
            student, make_scores(teacher_NV, sampled_ids_N, k=9), sampled_ids_N, sampled_ids_N
        )
        short, _ = objective(
            student, make_scores(teacher_NV, sampled_ids_N, k=3), sampled_ids_N, sampled_ids_N
        )
        assert torch.equal(long, short)
        with pytest.raises(ValueError, match=r"k=3.*hold 2 ids"):
            objective(
                student, make_scores(teacher_NV, sampled_ids_N, k=2), sampled_ids_N, sampled_ids_N
            )

    def test_diagnostics_say_what_the_support_holds(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        teacher_NV, k = draw(N, V), 4
        _, metrics = build("local_support", k=k)(
            DenseStudent(draw(N, V)),
            make_scores(teacher_NV, sampled_ids_N, k=k),
            sampled_ids_N,
            sampled_ids_N,
        )
        for n in range(N):
            q = teacher_NV[n].softmax(-1)
            support = q.argsort(descending=True)[:k].tolist()
            assert metrics["support/teacher_mass"][n].item() == pytest.approx(
                q[support].sum().item()
            )
            outside = sampled_ids_N[n].item() not in support
            assert metrics["support/sampled_outside"][n].item() == float(outside)
        assert 0 < metrics["support/sampled_outside"].sum() < N  # both cases occur above

    def test_reverse_pushes_off_a_teachers_impossible_token_with_a_finitegradient(
        self, gradient: Gradient
    ) -> None:
        """The exact loss is infinite there."""
        teacher_NV = torch.tensor([[0.0, 1.0, -torch.inf]])
        scores = TeacherScores.from_logits(teacher_NV, torch.tensor([0]), k=3)
        logits_NV = torch.zeros(1, 3, requires_grad=True)
        loss_N, _ = build("local_support", k=3)(
            DenseStudent(logits_NV), scores, torch.tensor([0]), torch.zeros(1)
        )
        (gradient_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
        assert loss_N.item() > 1000 and gradient_NV.isfinite().all()
        assert gradient_NV[0, 2] > 0 > gradient_NV[0, 0]


@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_local_support_directions_equal_their_definitions_over_the_support(direction: str) -> None:
    torch.manual_seed(5)
    teacher_NV = torch.randn(6, 9, dtype=torch.float64)
    student_NV = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    sampled_N = torch.zeros(6, dtype=torch.long)
    scores = TeacherScores.from_logits(teacher_NV, sampled_N, k=4)
    loss_N, _ = build("local_support", k=4, direction=direction)(
        DenseStudent(student_NV), scores, sampled_N, torch.zeros(6)
    )
    q_NK = teacher_NV.softmax(-1).gather(1, scores.ids_NK)
    p_NK = student_NV.softmax(-1).gather(1, scores.ids_NK)
    q_NK, p_NK = q_NK / q_NK.sum(-1, keepdim=True), p_NK / p_NK.sum(-1, keepdim=True)
    m_NK = (p_NK + q_NK) / 2
    wanted_N = {
        "forward": (q_NK * (q_NK / p_NK).log()).sum(-1),
        "jsd": ((q_NK * (q_NK / m_NK).log()).sum(-1) + (p_NK * (p_NK / m_NK).log()).sum(-1)) / 2,
    }[direction]
    torch.testing.assert_close(loss_N.double(), wanted_N, rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(wanted_N.sum(), student_NV, retain_graph=True)
    (got,) = torch.autograd.grad(loss_N.sum(), student_NV)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


class TestSupports:
    """The paper's variants: whose top K, and whether the sampled token joins it."""

    @staticmethod
    def _losses(
        support: str,
        student_NV: torch.Tensor,
        scores: TeacherScores,
        ids_N: torch.Tensor,
        **options: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        objective = build("local_support", k=4, support=support, **options)
        return objective(DenseStudent(student_NV), scores, ids_N, torch.zeros(len(ids_N)))

    @pytest.mark.parametrize("by", ["teacher", "student"])
    @pytest.mark.parametrize("renormalize", [True, False])
    def test_the_sampled_token_joins_only_where_it_is_outside(
        self,
        by: str,
        renormalize: bool,
        draw: Draw,
        sampled_ids_N: torch.Tensor,
        make_scores: Scores,
    ) -> None:
        """V3 = V1 (and V2 = the student's top K) where y is inside; elsewhere K + 1 tokens, by a
        loop over probabilities."""
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        scores = make_scores(teacher_NV, sampled_ids_N, k=4)
        plain_N, metrics = self._losses(
            by, student_NV, scores, sampled_ids_N, renormalize=renormalize
        )
        joined_N, joined = self._losses(
            f"{by}+sampled", student_NV, scores, sampled_ids_N, renormalize=renormalize
        )
        outside_N = metrics["support/sampled_outside"].bool()
        assert 0 < outside_N.sum() < N
        torch.testing.assert_close(joined_N[~outside_N], plain_N[~outside_N], rtol=1e-12, atol=0)
        assert joined["support/size"].tolist() == [5.0 if out else 4.0 for out in outside_N]
        source_NV = teacher_NV if by == "teacher" else student_NV
        for n, y in enumerate(sampled_ids_N.tolist()):
            pi, q = student_NV[n].softmax(-1).tolist(), teacher_NV[n].softmax(-1).tolist()
            support = {*source_NV[n].topk(4).indices.tolist(), y}
            pi_mass = sum(pi[v] for v in support) if renormalize else 1.0
            q_mass = sum(q[v] for v in support) if renormalize else 1.0
            wanted = sum(
                pi[v] / pi_mass * math.log((pi[v] / pi_mass) / (q[v] / q_mass)) for v in support
            )
            assert joined_N[n].item() == pytest.approx(wanted, rel=1e-10)

    def test_a_students_support_is_the_same_asked_for_or_looked_up(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        """A teacher that was asked at the student's top K, and one whose whole distribution is at
        hand."""
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        own_NK = student_NV.topk(4).indices
        looked, _ = self._losses(
            "student", student_NV, make_scores(teacher_NV, sampled_ids_N, k=1), sampled_ids_N
        )
        asked = TeacherScores.from_logits(
            teacher_NV, sampled_ids_N, k=1, keep_full=False, query_ids_NJ=own_NK
        )
        found, _ = self._losses("student", student_NV, asked, sampled_ids_N)
        torch.testing.assert_close(found, looked, rtol=1e-5, atol=1e-6, check_dtype=False)
        of_teacher, _ = self._losses(
            "teacher", student_NV, make_scores(teacher_NV, sampled_ids_N, k=4), sampled_ids_N
        )
        assert (looked - of_teacher).abs().min() > 1e-3  # another support, another loss

    def test_scores_that_cannot_give_a_students_support_are_refused_by_name(
        self, draw: Draw, sampled_ids_N: torch.Tensor
    ) -> None:
        teacher_NV, student_NV = draw(N, V), draw(N, V)
        short = TeacherScores.from_logits(teacher_NV, sampled_ids_N, k=4, keep_full=False)
        with pytest.raises(ValueError, match=r"own top 4 ids.*choose support='teacher'"):
            self._losses("student", student_NV, short, sampled_ids_N)
        few = TeacherScores.from_logits(
            teacher_NV,
            sampled_ids_N,
            k=4,
            keep_full=False,
            query_ids_NJ=student_NV.topk(3).indices,
        )
        with pytest.raises(ValueError, match=r"k=4, but the teacher was asked at 3 ids"):
            self._losses("student+sampled", student_NV, few, sampled_ids_N)

    @pytest.mark.parametrize("mass", [0.6, 0.8, 1.0])
    @pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
    def test_an_adaptive_support_is_the_smallest_that_holds_the_mass(
        self,
        mass: float,
        direction: str,
        draw: Draw,
        sampled_ids_N: torch.Tensor,
        make_scores: Scores,
        gradient: Gradient,
    ) -> None:
        """Token by token the objective of the fixed size that a loop over the teacher's sorted
        probabilities finds, in value and gradient; at most k."""
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        scores = make_scores(teacher_NV, sampled_ids_N, k=6)
        adaptive = build("local_support", k=6, mass=mass, direction=direction)
        sizes = []
        for n in range(N):
            found, size = 0.0, 0
            for p in sorted(teacher_NV[n].softmax(-1).tolist(), reverse=True)[:6]:
                if found < mass:
                    found, size = found + p, size + 1
            sizes.append(size)
        assert len(set(sizes)) > 1 or mass == 1.0

        def loss(objective: Any) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda z: objective(DenseStudent(z), scores, sampled_ids_N, sampled_ids_N)[0]

        _, metrics = adaptive(DenseStudent(student_NV), scores, sampled_ids_N, sampled_ids_N)
        assert metrics["support/size"].tolist() == sizes
        for n, size in enumerate(sizes):
            fixed = build("local_support", k=size, direction=direction)
            torch.testing.assert_close(
                loss(adaptive)(student_NV)[n], loss(fixed)(student_NV)[n], rtol=1e-9, atol=1e-12
            )
            torch.testing.assert_close(
                gradient(loss(adaptive), student_NV)[n],
                gradient(loss(fixed), student_NV)[n],
                rtol=1e-9,
                atol=1e-12,
            )


def test_a_sampled_token_that_an_adaptive_support_left_out_joins_it(
    draw: Draw, make_scores: Scores
) -> None:
    """y is the teacher's fourth of k = 4, the mass is had with the first: outside, and then in."""
    student_1V, teacher_1V = draw(1, V), draw(1, V)
    first, *_, y = teacher_1V[0].topk(4).indices.tolist()
    ids_N = torch.tensor([y])
    scores = make_scores(teacher_1V, ids_N, k=4)
    objective = build("local_support", k=4, mass=0.01, support="teacher+sampled")
    loss_N, metrics = objective(DenseStudent(student_1V), scores, ids_N, torch.zeros(1))
    assert metrics["support/sampled_outside"].item() == 1.0
    assert metrics["support/size"].item() == 2.0
    pair_12 = torch.tensor([[first, y]])
    wanted_N = _reverse_kl(student_1V.gather(1, pair_12), teacher_1V.gather(1, pair_12))
    torch.testing.assert_close(loss_N, wanted_N)


class TestWithoutRenormalisation:
    """Why the paper renormalises (section 3.2), and the tail that mends the sum otherwise."""

    @pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
    def test_the_sum_by_hand_over_full_vocabulary_probabilities(
        self, direction: str, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        objective = build("local_support", k=4, renormalize=False, direction=direction)
        values_N, _ = objective(
            DenseStudent(student_NV),
            make_scores(teacher_NV, sampled_ids_N, k=4),
            sampled_ids_N,
            sampled_ids_N,
        )
        for n in range(N):
            support = teacher_NV[n].topk(4).indices
            pi = student_NV[n].softmax(-1)[support].tolist()
            q = teacher_NV[n].softmax(-1)[support].tolist()
            middle = [(a + b) / 2 for a, b in zip(pi, q, strict=True)]

            def kl(left: list[float], right: list[float]) -> float:
                return sum(p * math.log(p / r) for p, r in zip(left, right, strict=True))

            wanted = {
                "reverse": kl(pi, q),
                "forward": kl(q, pi),
                "jsd": (kl(q, middle) + kl(pi, middle)) / 2,
            }[direction]
            assert values_N[n].item() == pytest.approx(wanted, rel=1e-10)

    def test_its_minimum_is_away_from_the_teacher(self, draw: Draw, make_scores: Scores) -> None:
        """The collapse. Started at the teacher, descent moves the mass off the support until
        pi(S) = q(S) / e and loss = -q(S) / e; the renormalised loss stays at the teacher."""
        teacher_1V = draw(1, V)
        ids_N = torch.zeros(1, dtype=torch.long)
        scores = make_scores(teacher_1V, ids_N, k=4)
        mass = scores.logprobs_NK.exp().sum().item()
        ends = {}
        for renormalize in (False, True):
            objective = build("local_support", k=4, renormalize=renormalize)
            point = teacher_1V.clone().requires_grad_()
            descent = torch.optim.Adam([point], lr=0.05)
            for _ in range(400):
                loss_N, _ = objective(DenseStudent(point), scores, ids_N, ids_N)
                descent.zero_grad()
                loss_N.sum().backward()
                descent.step()
            on_support = point.detach().softmax(-1).gather(1, scores.ids_NK).sum().item()
            ends[renormalize] = on_support, loss_N.item()
        assert ends[False] == pytest.approx((mass / math.e, -mass / math.e), rel=1e-2)
        assert ends[True] == pytest.approx((mass, 0.0), rel=1e-6, abs=1e-9)


class TestTail:
    """Head on the support plus one sampled token: right in the mean over y ~ pi, by enumeration."""

    @staticmethod
    def _mean(
        gradient: Gradient,
        make_scores: Scores,
        student_1V: torch.Tensor,
        teacher_1V: torch.Tensor,
        old_1V: torch.Tensor,
        support: str,
        **options: Any,
    ) -> tuple[float, torch.Tensor]:
        """The mean over y ~ old of the loss and of its gradient."""
        ids_V = torch.arange(V)
        scores = make_scores(teacher_1V.expand(V, V), ids_V, k=4)
        objective = build(
            "local_support", k=4, support=support, renormalize=False, tail="sampled", **options
        )
        old_V = old_1V[0].log_softmax(-1)

        def loss(logits_VV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_VV), scores, ids_V, old_V)[0]

        at_VV = student_1V.expand(V, V)
        weights_V = old_V.exp()
        return (weights_V @ loss(at_VV)).item(), weights_V @ gradient(loss, at_VV)

    @pytest.mark.parametrize("support", ["teacher", "student"])
    @pytest.mark.parametrize("stale", [False, True], ids=["on-policy", "off-policy"])
    def test_its_mean_value_and_gradient_are_those_of_the_full_reverse_kl(
        self, support: str, stale: bool, draw: Draw, make_scores: Scores, gradient: Gradient
    ) -> None:
        """V4 and V5; off-policy by the importance weight."""
        student_1V, teacher_1V = draw(1, V), draw(1, V)
        old_1V = student_1V + draw(1, V, scale=0.5) if stale else student_1V
        value, mean_V = self._mean(gradient, make_scores, student_1V, teacher_1V, old_1V, support)
        assert value == pytest.approx(_reverse_kl(student_1V, teacher_1V).item(), rel=1e-10)
        torch.testing.assert_close(
            mean_V, gradient(lambda z: _reverse_kl(z, teacher_1V), student_1V)[0]
        )

    def test_a_constant_logarithm_would_be_off_by_the_supports_mass(
        self, draw: Draw, make_scores: Scores, gradient: Gradient
    ) -> None:
        """EMA-PG's formula with sg(log ratio), written out: its mean gradient lacks the gradient of
        the student's mass outside S, minus that of pi(S)."""
        student_1V, teacher_1V = draw(1, V), draw(1, V)
        _, ours_V = self._mean(gradient, make_scores, student_1V, teacher_1V, student_1V, "teacher")
        inside_V = torch.zeros(V, dtype=torch.bool)
        inside_V[teacher_1V[0].topk(4).indices] = True

        def constant(z_1V: torch.Tensor) -> torch.Tensor:
            log_V, q_V = z_1V[0].log_softmax(-1), teacher_1V[0].log_softmax(-1)
            head = (log_V.exp() * (log_V - q_V))[inside_V].sum()
            rho_V = (log_V - log_V.detach()).exp()
            tail_V = log_V.detach().exp() * rho_V * (log_V - q_V).detach()
            return head + tail_V[~inside_V].sum()

        mass_V = gradient(lambda z: z[0].softmax(-1)[inside_V].sum(), student_1V)[0]
        assert mass_V.abs().max() > 0.01
        torch.testing.assert_close(gradient(constant, student_1V)[0], ours_V + mass_V)

    def test_the_importance_weight_is_cut_at_its_clip(
        self, draw: Draw, make_scores: Scores, gradient: Gradient
    ) -> None:
        """One token outside the support, twice as probable now as when it was drawn; the tail's
        gradient is s (log(pi/q) + 1) grad log pi(y)."""
        student_1V, teacher_1V = draw(1, V), draw(1, V)
        y = torch.tensor([int(teacher_1V.argmin())])
        log_pi, log_q = (x.log_softmax(-1)[0, y].item() for x in (student_1V, teacher_1V))
        scores = make_scores(teacher_1V, y, k=4)
        old_N = torch.tensor([log_pi - math.log(2)], dtype=torch.float64)
        score_V = torch.eye(V, dtype=torch.float64)[y[0]] - student_1V[0].softmax(-1)

        def loss(tail: bool | str, clip: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
            objective = build(
                "local_support", k=4, renormalize=False, tail=tail, importance_clip=clip
            )
            return lambda z: objective(DenseStudent(z), scores, y, old_N)[0]

        head = loss(False, None)
        for clip, weight in ((None, 2.0), (1.5, 1.5)):
            whole = loss("sampled", clip)
            added = (whole(student_1V) - head(student_1V)).item()
            assert added == pytest.approx(weight * (log_pi - log_q))
            added_V = (gradient(whole, student_1V) - gradient(head, student_1V))[0]
            torch.testing.assert_close(added_V, weight * (log_pi - log_q + 1) * score_V)

    def test_a_sampled_token_on_the_support_adds_nothing(
        self, draw: Draw, make_scores: Scores
    ) -> None:
        student_1V, teacher_1V = draw(1, V), draw(1, V)
        y = torch.tensor([int(teacher_1V.argmax())])
        scores, old_N = make_scores(teacher_1V, y, k=4), torch.tensor([-9.0])
        losses = [
            build("local_support", k=4, renormalize=False, tail=tail)(
                DenseStudent(student_1V), scores, y, old_N
            )[0].item()
            for tail in (False, "sampled")
        ]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("support", ["teacher", "student", "teacher+sampled"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_whole_vocabulary_as_support_is_the_whole_divergence(
    direction: str,
    support: str,
    renormalize: bool,
    draw: Draw,
    sampled_ids_N: torch.Tensor,
    make_scores: Scores,
    gradient: Gradient,
) -> None:
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    scores = make_scores(teacher_NV, sampled_ids_N, k=V)

    def loss(objective: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda z: objective(DenseStudent(z), scores, sampled_ids_N, sampled_ids_N)[0]

    local = loss(
        build("local_support", k=V, support=support, renormalize=renormalize, direction=direction)
    )
    full = loss(build("full_vocabulary", direction=direction))
    torch.testing.assert_close(local(student_NV), full(student_NV))
    torch.testing.assert_close(gradient(local, student_NV), gradient(full, student_NV))


@pytest.mark.parametrize("support", ["student", "teacher+sampled", "student+sampled"])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_no_loss_at_the_teacher_and_no_gradient_outside_whatever_the_support(
    support: str,
    direction: str,
    draw: Draw,
    sampled_ids_N: torch.Tensor,
    make_scores: Scores,
    gradient: Gradient,
) -> None:
    """Renormalised. At teacher + c the loss and its gradient vanish; elsewhere the gradient is
    exactly zero outside the support and nowhere zero inside."""
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    scores = make_scores(teacher_NV, sampled_ids_N, k=4)
    objective = build("local_support", k=4, support=support, direction=direction)

    def loss(logits_NV: torch.Tensor) -> torch.Tensor:
        return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

    zero_N = torch.zeros(N, dtype=torch.float64)
    torch.testing.assert_close(loss(teacher_NV - 4.0), zero_N)
    torch.testing.assert_close(gradient(loss, teacher_NV - 4.0), torch.zeros_like(teacher_NV))
    source_NV = student_NV if support.startswith("student") else teacher_NV
    inside_NV = torch.zeros(N, V, dtype=torch.bool)
    inside_NV.scatter_(1, source_NV.topk(4).indices, True)
    if support.endswith("sampled"):
        inside_NV.scatter_(1, sampled_ids_N[:, None], True)
    at_student_NV = gradient(loss, student_NV)
    assert (at_student_NV[~inside_NV] == 0).all()
    assert (at_student_NV[inside_NV] != 0).all()
