"""Suggests GPUs that have the memory that a plan needs."""

from __future__ import annotations

SIZES = (24, 48, 80, 141, 192, 288)
"""GB of memory that GPUs are sold with (RTX 4090 and L4; L40S; A100 and H100; H200; MI300X; B300).
They have some 6 % more bytes, which the driver's context and fragmentation take."""

SPLIT = (80, 141)
"""GB of the GPUs that are usually rented eight to a machine."""


def suggestion(needed: int) -> str:
    """The smallest single GPU for so many bytes, or how many GPUs would share them."""
    fitting = [size for size in SIZES if needed <= size * 10**9]
    if fitting:
        return f"one GPU of {fitting[0]} GB"
    counts = [f"{-(-needed // (size * 10**9))} of {size} GB" for size in SPLIT]
    return f"{' or '.join(counts)}, split evenly: more than any one GPU holds"
