"""How far two computations of one number may be apart, on any processor."""

from __future__ import annotations

FORWARD_SUMS = 64 * (2 * 7 + 2)
"""Additions in a row to an output of conftest's student: two layers of seven products and norms, a
norm and the head, of at most 64 terms each. A backward has twice as many, and an update both."""
UPDATE_SUMS = 3 * FORWARD_SUMS


def rounding(*, sums: int, size: float = 1.0) -> float:
    """In float32, of so many additions in a row of numbers up to `size`.

    Each processor, number of threads or cut into batches has an order of its own, and each addition
    rounds by up to 2^-24, up or down: a random walk, of whose spread this is eight times.
    """
    return 8 * sums**0.5 * 2.0**-24 * size
