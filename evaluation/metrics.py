"""Success rates and pass@k with the intervals that make them comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
"""Draws of a bootstrap: the interval's own error is then about 1 % of its width."""


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of pass@k of one problem, `num_correct` of `num_samples` being right.

    1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, equation 1), as a stable product.

    Raises:
        ValueError: k < 1, fewer samples than k, or a count out of range.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"num_correct={num_correct}: it must be between 0 and num_samples={num_samples}"
        )
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k}: it must be between 1 and num_samples={num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    # a product of ratios: the binomials themselves overflow a float for large n
    return 1.0 - math.prod(
        1.0 - k / j for j in range(num_samples - num_correct + 1, num_samples + 1)
    )


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): right at 0, at n, and for small n too.

    Raises:
        ValueError: n < 1, successes outside 0..n, or a confidence outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: it must be 0 <= successes <= n and n >= 1")
    z = _normal_quantile(confidence)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # exact at both ends, where rounding would leave a bound a little inside (0, 1)
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return Interval(low, high)


def mean_and_interval(
    values: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, Interval]:
    """The mean of one value per problem, and its percentile-bootstrap interval.

    A problem's value is the mean of its own samples: problems are resampled and keep their samples,
    so samples of one problem do not count as independent. The same values give the same interval.

    Raises:
        ValueError: no values, or a confidence outside (0, 1).
    """
    if not len(values):
        raise ValueError("mean_and_interval needs at least one value")
    _normal_quantile(confidence)  # for its check alone
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # one at a time: all draws at once would take RESAMPLES x n integers
    means = np.array(
        [array[rng.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(array.mean()), Interval(float(low), float(high))


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: it must be between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
