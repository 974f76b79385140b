"""Scores against enumeration, published intervals and simulated coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tutelage.evaluation import metrics
from tutelage.evaluation.metrics import mean_and_interval, pass_at_k, wilson


class TestPassAtK:
    def test_equals_the_share_of_all_subsets_with_a_right_sample(self) -> None:
        """Brute force over every k-subset of n samples, c of them right."""
        for n in range(1, 8):
            for c, k in itertools.product(range(n + 1), range(1, n + 1)):
                subsets = [*itertools.combinations(range(n), k)]
                hits = sum(any(i < c for i in subset) for subset in subsets)
                assert pass_at_k(n, c, k) == pytest.approx(hits / len(subsets), abs=1e-12)

    def test_at_one_it_is_the_mean(self) -> None:
        assert [pass_at_k(32, c, 1) for c in range(33)] == pytest.approx(
            [c / 32 for c in range(33)]
        )

    def test_rises_with_k(self) -> None:
        values = [pass_at_k(64, 3, k) for k in range(1, 65)]
        assert all(a < b for a, b in itertools.pairwise(values[:61]))
        assert values[61:] == [1.0] * 3  # fewer than k are wrong

    def test_large_counts_stay_exact(self) -> None:
        """C(10^6, 500) has no float; 1 - prod (n-c-i)/(n-i) by logs agrees."""
        n, c, k = 1_000_000, 1000, 500
        expected = -np.expm1(np.log1p(-c / (n - np.arange(k))).sum())
        assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize(
        ("n", "c", "k", "named"),
        [
            (4, 5, 1, "num_correct=5"),
            (4, -1, 1, "num_correct=-1"),
            (4, 2, 5, "k=5"),
            (4, 2, 0, "k=0"),
        ],
    )
    def test_impossible_counts_are_refused(self, n: int, c: int, k: int, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            pass_at_k(n, c, k)


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        [
            # shared/reference/MATH.md, section 3, in per cent
            (410, 500, 78.4, 85.1),
            (10, 30, 19.2, 51.2),
            (25, 40, 47.0, 75.8),
            (100, 272, 31.3, 42.6),
            (300, 675, 40.7, 48.2),
            (137, 140, 93.9, 99.3),
            (16, 16, 80.6, 100.0),
        ],
    )
    def test_the_reference_tables_intervals(
        self, successes: int, n: int, low: float, high: float
    ) -> None:
        found = wilson(successes, n)
        assert (round(100 * found.low, 1), round(100 * found.high, 1)) == (low, high)

    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        [
            # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ],
    )
    def test_newcombes_published_intervals(
        self, successes: int, n: int, low: float, high: float
    ) -> None:
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)

    def test_bounds_solve_the_score_equation(self) -> None:
        """At each bound p the observed share lies z standard errors of p away."""
        for successes, n, confidence, z in ((7, 20, 0.90, 1.6449), (199, 200, 0.99, 2.5758)):
            share = successes / n
            for p in wilson(successes, n, confidence):
                assert abs(share - p) / np.sqrt(p * (1 - p) / n) == pytest.approx(z, abs=1e-3)

    def test_it_mirrors(self) -> None:
        low, high = wilson(3, 11)
        assert wilson(8, 11) == pytest.approx((1 - high, 1 - low))

    @pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
    def test_impossible_counts_are_refused(self, successes: int, n: int) -> None:
        with pytest.raises(ValueError, match=f"successes={successes}, n={n}"):
            wilson(successes, n)

    @pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
    def test_impossible_confidences_are_refused(self, confidence: float) -> None:
        with pytest.raises(ValueError, match=f"confidence={confidence}"):
            wilson(1, 2, confidence)
        with pytest.raises(ValueError, match=f"confidence={confidence}"):
            mean_and_interval([1.0], confidence)


class TestBootstrap:
    def test_the_same_values_give_the_same_interval(self) -> None:
        values = np.random.default_rng(0).normal(size=12).tolist()
        assert mean_and_interval(values) == mean_and_interval(values)
        assert mean_and_interval(values)[1] != mean_and_interval(values, seed=1)[1]

    def test_mean_and_width_for_many_values(self) -> None:
        """For a large sample it is the normal interval: mean +- 1.96 s / sqrt(n)."""
        values = np.random.default_rng(0).normal(3.0, 2.0, 400)
        mean, (low, high) = mean_and_interval(values.tolist())
        assert mean == pytest.approx(values.mean())
        half = 1.96 * values.std() / 20
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)

    def test_wider_confidence_is_a_wider_interval(self) -> None:
        values = [0.0, 1.0, 0.5, 0.25, 1.0, 0.0]
        narrow, wide = (mean_and_interval(values, c)[1] for c in (0.5, 0.99))
        assert wide.low < narrow.low < narrow.high < wide.high

    def test_it_covers_the_true_mean_about_as_often_as_it_says(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """300 samples of 40 problems, each the mean of 4 tries at a difficulty of its own. Treating
        the 160 tries as independent would cover far less than 95 %."""
        monkeypatch.setattr(metrics, "RESAMPLES", 400)
        rng = np.random.default_rng(1)
        covered = 0
        for _ in range(300):
            rates = rng.beta(0.3, 0.3, 40)
            values = rng.binomial(4, rates) / 4
            low, high = mean_and_interval(values.tolist())[1]
            covered += low <= 0.5 <= high
        assert 0.89 <= covered / 300 <= 0.98

    def test_one_value_and_none(self) -> None:
        assert mean_and_interval([0.5]) == (0.5, (0.5, 0.5))
        with pytest.raises(ValueError, match="at least one value"):
            mean_and_interval([])
