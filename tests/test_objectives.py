"""Objectives against formulas written out by hand, autograd, finite differences and enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage.distill.objectives import DenseStudent, TeacherScores, build

N, V = 7, 11


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 2.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal


@pytest.fixture
def sampled_ids_N() -> torch.Tensor:
    return torch.tensor([0, 3, 10, 3, 7, 1, 5])


def _scores(logits_NV: torch.Tensor, sampled_N: torch.Tensor, *, k: int) -> TeacherScores:
    """Scores in float64, so that finite differences mean something."""
    full_NV = logits_NV.log_softmax(-1)
    top = full_NV.topk(k, dim=-1)
    return TeacherScores(
        ids_NK=top.indices,
        logprobs_NK=top.values,
        sampled_N=full_NV.gather(1, sampled_N[:, None])[:, 0],
        vocabulary=logits_NV.shape[1],
    )


def _gradient(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    point = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point).sum(), point)
    return gradient


def _differences(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Central differences; a row's loss depends on its own logits alone, so rows move together."""
    step = 1e-5
    columns = []
    for v in range(at.shape[1]):
        up, down = at.clone(), at.clone()
        up[:, v] += step
        down[:, v] -= step
        columns.append((loss(up) - loss(down)) / (2 * step))
    return torch.stack(columns, dim=1)


def _reverse_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """sum_v pi log(pi / q), term by term."""
    pi_NV, q_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)
    return (pi_NV * (pi_NV / q_NV).log()).sum(-1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local_support", {"k": 4}),
        ("local_support", {"k": V}),
        ("local_support", {"k": 4, "direction": "forward"}),
        ("local_support", {"k": 4, "direction": "jsd"}),
        ("sampled_token", {}),
        ("sampled_token", {"clip": 0.05, "dual_clip": 1.5}),
        ("sampled_token", {"dual_clip": None, "reward_clip": 0.5}),
        ("imitation", {"beta": 0.3}),
    ],
)
def test_gradients_equal_float64_finite_differences(
    name: str,
    options: dict[str, Any],
    draw: Callable[..., torch.Tensor],
    sampled_ids_N: torch.Tensor,
) -> None:
    objective, teacher_NV, at_NV = build(name, **options), draw(N, V), draw(N, V)
    scores = _scores(teacher_NV, sampled_ids_N, k=max(1, objective.k))
    old_N = (
        (at_NV + 0.5 * draw(N, V)).log_softmax(-1).gather(1, sampled_ids_N[:, None])[:, 0].detach()
    )

    def loss(logits_NV: torch.Tensor) -> torch.Tensor:
        return objective(DenseStudent(logits_NV), scores, sampled_ids_N, old_N)[0]

    torch.testing.assert_close(
        _gradient(loss, at_NV), _differences(loss, at_NV), rtol=1e-6, atol=1e-8
    )


class TestLocalSupport:
    def test_value_and_gradient_are_the_papers_formula(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        """The loss by loops over probabilities; the gradient as ALGORITHMS.md section 3 derives it:
        dL/dz_v = pi^(v) [log(pi^(v)/q^(v)) - KL] on the support."""
        student_NV, teacher_NV, k = draw(N, V), draw(N, V), 4
        objective, scores = build("local_support", k=k), _scores(teacher_NV, sampled_ids_N, k=k)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

        values_N, gradient_NV = loss(student_NV), _gradient(loss, student_NV)
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
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        objective, scores = build("local_support", k=V), _scores(teacher_NV, sampled_ids_N, k=V)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

        torch.testing.assert_close(loss(student_NV), _reverse_kl(student_NV, teacher_NV))
        torch.testing.assert_close(
            _gradient(loss, student_NV),
            _gradient(lambda z: _reverse_kl(z, teacher_NV), student_NV),
        )
        forward_N = _reverse_kl(teacher_NV, student_NV)  # the other direction is another number
        assert (loss(student_NV) - forward_N).abs().min() > 1e-3

    def test_a_constant_on_the_support_changes_nothing(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        """Student = teacher + c on S, anything outside S: loss and gradient are zero."""
        teacher_NV, k = draw(N, V), 5
        scores = _scores(teacher_NV, sampled_ids_N, k=k)
        student_NV = draw(N, V)
        student_NV.scatter_(1, scores.ids_NK, teacher_NV.gather(1, scores.ids_NK) + 7.5)
        objective = build("local_support", k=k)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            return objective(DenseStudent(logits_NV), scores, sampled_ids_N, sampled_ids_N)[0]

        torch.testing.assert_close(loss(student_NV), torch.zeros(N, dtype=torch.float64))
        gradient_NV = _gradient(loss, student_NV)
        torch.testing.assert_close(gradient_NV, torch.zeros_like(gradient_NV))
        student_NV[0, scores.ids_NK[0, 0]] += 1.0  # one logit on the support moves: no longer zero
        assert loss(student_NV)[0] > 1e-3

    def test_gradient_is_exactly_zero_outside_the_support(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        teacher_NV, k = draw(N, V), 3
        scores, objective = _scores(teacher_NV, sampled_ids_N, k=k), build("local_support", k=k)
        gradient_NV = _gradient(
            lambda z: objective(DenseStudent(z), scores, sampled_ids_N, sampled_ids_N)[0],
            draw(N, V),
        )
        inside_NV = torch.zeros(N, V, dtype=torch.bool).scatter_(1, scores.ids_NK, True)
        assert (gradient_NV[~inside_NV] == 0).all()
        assert (gradient_NV[inside_NV] != 0).all()

    @pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
    def test_directions_by_hand(
        self, direction: str, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        """KL of the renormalised distributions by loops; zero, with no gradient, at the teacher."""

        def kl(left: list[float], right: list[float]) -> float:
            return sum(p * math.log(p / q) for p, q in zip(left, right, strict=True))

        student_NV, teacher_NV, k = draw(N, V), draw(N, V), 4
        scores = _scores(teacher_NV, sampled_ids_N, k=k)
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
        gradient_NV = _gradient(loss, teacher_NV + 3.0)
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

    def test_takes_the_first_k_of_longer_scores(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        student, teacher_NV = DenseStudent(draw(N, V)), draw(N, V)
        objective = build("local_support", k=3)
        long, _ = objective(
            student, _scores(teacher_NV, sampled_ids_N, k=9), sampled_ids_N, sampled_ids_N
        )
        short, _ = objective(
            student, _scores(teacher_NV, sampled_ids_N, k=3), sampled_ids_N, sampled_ids_N
        )
        assert torch.equal(long, short)
        with pytest.raises(ValueError, match=r"k=3.*hold 2 ids"):
            objective(
                student, _scores(teacher_NV, sampled_ids_N, k=2), sampled_ids_N, sampled_ids_N
            )

    def test_diagnostics_say_what_the_support_holds(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        teacher_NV, k = draw(N, V), 4
        _, metrics = build("local_support", k=k)(
            DenseStudent(draw(N, V)),
            _scores(teacher_NV, sampled_ids_N, k=k),
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

    def test_reverse_pushes_off_a_teachers_impossible_token_with_a_finite_gradient(self) -> None:
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


class TestSampledToken:
    @staticmethod
    def _loss(
        objective: Any, student_NV: torch.Tensor, teacher_NV: torch.Tensor, ids_N: torch.Tensor
    ) -> torch.Tensor:
        """On-policy: the behaviour is the student itself."""
        old_N = student_NV.detach().log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
        scores = _scores(teacher_NV, ids_N, k=1)
        loss_N: torch.Tensor = objective(DenseStudent(student_NV), scores, ids_N, old_N)[0]
        return loss_N

    def test_on_policy_gradient_is_minus_advantage_times_score(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        """grad = -A (onehot(y) - pi), A = log q(y) - log pi(y)."""
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        gradient_NV = _gradient(
            lambda z: self._loss(build("sampled_token"), z, teacher_NV, sampled_ids_N), student_NV
        )
        for n, y in enumerate(sampled_ids_N.tolist()):
            pi, q = student_NV[n].softmax(-1), teacher_NV[n].softmax(-1)
            advantage = math.log(q[y].item()) - math.log(pi[y].item())
            expected = -advantage * (torch.eye(V, dtype=torch.float64)[y] - pi)
            torch.testing.assert_close(gradient_NV[n], expected)

    def test_expected_gradient_is_that_of_the_full_reverse_kl(
        self, draw: Callable[..., torch.Tensor]
    ) -> None:
        """Exactly, over y ~ pi, by enumerating the vocabulary: each y weighs pi(y)."""
        student_1V, teacher_1V = draw(1, V), draw(1, V)
        ids_V = torch.arange(V)
        gradient_VV = _gradient(
            lambda z: self._loss(build("sampled_token"), z, teacher_1V.expand(V, V), ids_V),
            student_1V.expand(V, V),
        )
        expected_V = student_1V[0].softmax(-1) @ gradient_VV
        torch.testing.assert_close(
            expected_V, _gradient(lambda z: _reverse_kl(z, teacher_1V), student_1V)[0]
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
        self, draw: Callable[..., torch.Tensor]
    ) -> None:
        logits_2V = torch.tensor([[0.5, 0.5], [0.001, 0.999]], dtype=torch.float64).log()
        teacher_2V = torch.tensor([[1e-6, 1 - 1e-6], [0.9, 0.1]], dtype=torch.float64).log()
        loss_N = self._loss(
            build("sampled_token", reward_clip=2.0), logits_2V, teacher_2V, torch.tensor([0, 0])
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


class TestImitation:
    def test_value_and_gradient_are_the_scaled_negative_log_likelihood(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        student_NV, behaviour_N = draw(N, V), torch.full((N,), torch.nan)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            objective = build("imitation", beta=0.25)
            return objective(DenseStudent(logits_NV), None, sampled_ids_N, behaviour_N)[0]

        for n, y in enumerate(sampled_ids_N.tolist()):
            pi = student_NV[n].softmax(-1)
            assert loss(student_NV)[n].item() == pytest.approx(-0.25 * math.log(pi[y].item()))
            torch.testing.assert_close(
                _gradient(loss, student_NV)[n],
                0.25 * (pi - torch.eye(V, dtype=torch.float64)[y]),
            )


class TestTeacherScores:
    def test_top_ids_come_most_probable_first_with_full_vocabulary_logs(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        logits_NV = draw(N, V)
        scores = TeacherScores.from_logits(logits_NV, sampled_ids_N, k=4)
        for n in range(N):
            q = logits_NV[n].softmax(-1)
            order = sorted(range(V), key=lambda v: -q[v].item())[:4]
            assert scores.ids_NK[n].tolist() == order
            assert scores.logprobs_NK[n].tolist() == pytest.approx(
                [math.log(q[v].item()) for v in order], rel=1e-5
            )
            assert scores.sampled_N[n].item() == pytest.approx(
                math.log(q[sampled_ids_N[n]].item()), rel=1e-5
            )

    def test_joined_parts_and_taken_parts_keep_their_order(
        self, draw: Callable[..., torch.Tensor], sampled_ids_N: torch.Tensor
    ) -> None:
        logits_NV = draw(N, V)
        whole = TeacherScores.from_logits(logits_NV, sampled_ids_N, k=2)
        parts = [
            TeacherScores.from_logits(logits_NV[at], sampled_ids_N[at], k=2)
            for at in (slice(0, 3), slice(3, N))
        ]
        joined = TeacherScores.join(parts)
        index = torch.tensor([5, 0])
        for one, other in ((joined, whole), (joined.take(index), whole.take(index))):
            assert torch.equal(one.ids_NK, other.ids_NK)
            assert torch.equal(one.sampled_N, other.sampled_N)
            assert one.full_NV is not None and other.full_NV is not None
            assert torch.equal(one.full_NV, other.full_NV)
        assert whole.take(index).sampled_N[0] == whole.sampled_N[5]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_broken_teacher_numbers_are_refused_with_their_place(self, bad: float) -> None:
        with pytest.raises(ValueError, match=r"sampled_N at \[1\]"):
            TeacherScores(
                ids_NK=torch.zeros(2, 1, dtype=torch.long),
                logprobs_NK=torch.zeros(2, 1),
                sampled_N=torch.tensor([-1.0, bad]),
                vocabulary=3,
            )

    def test_an_id_beyond_the_vocabulary_is_refused(self) -> None:
        with pytest.raises(ValueError, match="outside the vocabulary of 3"):
            TeacherScores(
                ids_NK=torch.tensor([[3]]),
                logprobs_NK=torch.zeros(1, 1),
                sampled_N=torch.zeros(1),
                vocabulary=3,
            )

    @pytest.mark.parametrize("k", [0, V + 1])
    def test_k_beyond_the_vocabulary_is_refused(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"k={k}"):
            TeacherScores.from_logits(torch.zeros(1, V), torch.tensor([0]), k=k)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local_suport", {}, "local_support"),
        ("local_support", {"renormalise": True}, "'renormalize'"),
        ("local_support", {"direction": "foward"}, "'forward'"),
        ("local_support", {"k": 0}, "k=0"),
        ("local_support", {"k": 2.5}, "k=2.5"),
        ("local_support", {"k": "many"}, "k='many'"),
        ("local_support", {"k": True}, "k=True"),
        ("sampled_token", {"clip": 0}, "clip=0"),
        ("sampled_token", {"clip": None}, "clip=None: it must be of type float"),
        ("sampled_token", {"dual_clip": 1.0}, "dual_clip=1.0"),
        ("sampled_token", {"reward_clip": -1.0}, "reward_clip=-1.0"),
        ("imitation", {"beta": 0.0}, "beta=0.0"),
        ("imitation", {"beta": "x"}, "beta='x'"),
    ],
)
def test_unknown_names_options_and_values_are_refused_in_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        build(name, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


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


def test_local_support_refuses_an_unknown_direction_by_its_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'forward'"):
        build("local_support", direction="foward")
