"""Which usual GPUs hold what a plan needs."""

from __future__ import annotations

SIZES = (24, 48, 80, 141, 192, 288)
"""GB that GPUs are sold with (RTX 4090 and L4; L40S; A100 and H100; H200; MI300X; B300). They have
some 6 % more bytes, which the driver's context and fragments take."""

SPLIT = (80, 141)
"""GB of those that are to be had by the eight."""


def suggestion(needed: int) -> str:
    """The smallest single GPU for so many bytes, or how many would share them."""
    fitting = [size for size in SIZES if needed <= size * 10**9]
    if fitting:
        return f"one GPU of {fitting[0]} GB"
    counts = [f"{-(-needed // (size * 10**9))} of {size} GB" for size in SPLIT]
    return f"{' or '.join(counts)}, split evenly: more than any one GPU holds"
