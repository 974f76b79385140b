"""How many threads torch works with: that hangs on the configuration and on shapes, never on the
load, so that a run repeats to the bit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tutelage.distill.models.student import Student

WORK = 1 << 23
"""Multiplications in a layer's matrix, on average over a model's, from which on a second thread
pays: 0.2 ms of one core. Below, threads mostly wait for each other, once an operator: on two quiet
cores a forward of eight tokens of the demo's student takes half as long with one thread, one of 128
a quarter longer, and beside a busy process both take half as long."""

READ = 16
"""A matrix takes at least as long as to multiply it by so many tokens: it must be read."""


def cores() -> int:
    """How many this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def matrix_size(student: Student) -> float:
    """Of a layer's matrices, on average, in numbers. On a GPU no thread does their work."""
    if student.device.type != "cpu":
        return math.inf
    found = student.hidden_matrices()
    return sum(p.numel() for p in found) / max(1, len(found))


@contextmanager
def fitting(size: float, tokens: int) -> Iterator[None]:
    """One thread, if a forward of so many tokens is small. size: see `matrix_size`."""
    threads = torch.get_num_threads()
    if threads == 1 or size * max(tokens, READ) >= WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
