"""Diagnostics by hand and, where they estimate, by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tutelage.distill.objectives import DenseStudent, SparseStudent, TeacherScores
from tutelage.distill.student import diagnostics
from tutelage.distill.student.diagnostics import Meter

N, V = 7, 11
Draw = Callable[..., torch.Tensor]
Scores = Callable[..., TeacherScores]


class TestMeter:
    def test_it_weighs_over_all_that_it_was_given(self) -> None:
        """(1*1 + 2*3 + 10*2) / (1 + 3 + 2), in two batches."""
        meter = Meter()
        meter.add({"x": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 3.0]))
        meter.add({"x": torch.tensor([10.0]), "y": torch.tensor([5.0])}, torch.tensor([2.0]))
        assert meter.means() == pytest.approx({"x": 27 / 6, "y": 5.0})

    def test_what_has_no_weight_does_not_count_even_if_it_is_not_finite(self) -> None:
        meter = Meter()
        values_N = torch.tensor([2.0, math.inf, math.nan, 7.0])
        weights_N = torch.tensor([1.0, 0.0, 1.0, 1.0])
        meter.add({"x": values_N}, weights_N, torch.tensor([True, True, False, True]))
        assert meter.means() == {"x": 4.5}

    def test_a_name_that_nothing_counted_for_is_not_reported(self) -> None:
        """Not as 0, which would be read as a measurement."""
        meter = Meter()
        meter.add({"x": torch.ones(2)}, torch.zeros(2))
        assert meter.means() == {}


class TestRecorded:
    def test_both_estimates_have_the_reverse_kl_as_their_mean(
        self, draw: Draw, make_scores: Scores
    ) -> None:
        """Over y ~ pi by enumeration; k3 is never negative, the gap is."""
        pi_V, teacher_V = draw(V).softmax(-1), draw(V)
        scores = make_scores(teacher_V.expand(V, V), torch.arange(V), k=1)
        found = diagnostics.recorded(scores, pi_V.log())
        kl = (pi_V * (pi_V / teacher_V.softmax(-1)).log()).sum().item()
        assert (pi_V @ found["gap/mean"]).item() == pytest.approx(-kl)
        assert (pi_V @ found["kl/k3"]).item() == pytest.approx(kl)
        assert (found["kl/k3"] >= 0).all() and (found["gap/mean"] < 0).any()

    def test_a_reward_is_negative_where_the_teacher_likes_the_token_less(self) -> None:
        scores = TeacherScores(
            ids_NK=torch.zeros(3, 1, dtype=torch.long),
            logprobs_NK=torch.zeros(3, 1),
            sampled_N=torch.tensor([-1.0, -3.0, -2.0]),
            vocabulary=V,
        )
        found = diagnostics.recorded(scores, torch.tensor([-2.0, -2.0, -2.0]))
        assert found["reward/negative_share"].tolist() == [0.0, 1.0, 0.0]
        assert found["gap/mean"].tolist() == [1.0, -1.0, 0.0]

    def test_one_token_that_the_teacher_rules_out_leaves_the_means_finite(self) -> None:
        scores = TeacherScores.from_logits(
            torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), k=1
        )
        found = diagnostics.recorded(scores, torch.tensor([-0.5]))
        assert all(value_N.isfinite().all() for value_N in found.values())
        assert found["gap/mean"].item() < -1000 and found["reward/negative_share"].item() == 1


def test_gaps_fall_into_the_bucket_of_their_position() -> None:
    """The first place of a bucket is in it, the last before the next one's is too; weights count;
    buckets without a token are not reported."""
    meter = Meter()
    positions_N = torch.tensor([0, 3, 4, 15, 16, 8192, 100_000])
    gap_N = torch.tensor([1.0, 4.0, 10.0, 20.0, 5.0, 7.0, 9.0])
    weights_N = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    diagnostics.add_by_position(meter, gap_N, positions_N, weights_N)
    assert meter.means() == pytest.approx(
        {"gap/place_0": 3.0, "gap/place_4": 10.0, "gap/place_16": 5.0, "gap/place_8192": 8.0}
    )


class TestExamined:
    def test_by_hand(self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores) -> None:
        """Student mass on the teacher's top 4, how many of them are the student's, both entropies,
        the sampled token's log-probability."""
        student_NV, teacher_NV = draw(N, V), draw(N, V)
        scores = make_scores(teacher_NV, sampled_ids_N, k=4)
        found = diagnostics.examined(DenseStudent(student_NV), scores, sampled_ids_N)
        for n, y in enumerate(sampled_ids_N.tolist()):
            pi, q = student_NV[n].softmax(-1).tolist(), teacher_NV[n].softmax(-1).tolist()
            of_teacher, of_student = (
                set(sorted(range(V), key=lambda v, p=p: -p[v])[:4]) for p in (q, pi)
            )
            wanted = {
                "student/logprob": math.log(pi[y]),
                "student/entropy": -sum(p * math.log(p) for p in pi),
                "teacher/entropy": -sum(p * math.log(p) for p in q),
                "support/student_mass": sum(pi[v] for v in of_teacher),
                "support/overlap": len(of_teacher & of_student) / 4,
            }
            assert {name: value[n].item() for name, value in found.items()} == pytest.approx(wanted)
        assert 0 < found["support/overlap"].mean() < 1

    def test_without_a_teacher_the_student_is_examined_alone(
        self, draw: Draw, sampled_ids_N: torch.Tensor
    ) -> None:
        found = diagnostics.examined(DenseStudent(draw(N, V)), None, sampled_ids_N)
        assert set(found) == {"student/logprob", "student/entropy"}

    def test_a_sparse_student_is_seen_the_same(
        self, draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
    ) -> None:
        head, hidden_ND = torch.nn.Linear(5, V, dtype=torch.float64), draw(N, 5)
        scores = make_scores(draw(N, V), sampled_ids_N, k=4)
        old_N = draw(N)
        with torch.no_grad():
            students = (
                DenseStudent(head(hidden_ND)),
                SparseStudent(hidden_ND, head, vocabulary=V),
            )
            dense, gathered = (
                diagnostics.examined(student, scores, sampled_ids_N)
                | diagnostics.mismatch(student, sampled_ids_N, old_N)
                for student in students
            )
        torch.testing.assert_close(gathered, dense)


def test_mismatch_is_the_distance_of_the_learners_log_probability_from_the_recorded_one() -> None:
    student = DenseStudent(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log())
    recorded_N = torch.tensor([0.5, 0.25]).log()
    found = diagnostics.mismatch(student, torch.tensor([0, 1]), recorded_N)
    assert found["gap/engine"].tolist() == pytest.approx([math.log(2)] * 2)


def test_nothing_is_read_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a look at a number waits for all that was begun: metrics are read all at once."""

    def look(*_: object) -> None:
        raise AssertionError("a look at a number")

    meter, ones_N = Meter(), torch.ones(2)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, look)
        meter.add({"x": ones_N, "y": 3 * ones_N}, ones_N, ones_N > 0)
        diagnostics.add_by_position(meter, ones_N, torch.tensor([0, 5]), ones_N)
    assert meter.means() == {"x": 1, "y": 3, "gap/place_0": 1, "gap/place_4": 1}
    assert meter.sums("x") == (2, 2)
