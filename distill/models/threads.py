"""How many threads torch uses. It depends on the configuration and on shapes, never on the
machine's load, so that a repeated run is bit-identical."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tutelage.distill.models.student import Student

WORK = 1 << 23
"""Multiplications in a matrix, on average over a model's, from which on a second thread pays: 0.2
ms of one core. Below, threads mostly wait for each other, once an operator. On two idle cores, one
thread instead of two halves the time of a forward of eight tokens of the demo's student and adds a
quarter to one of 128; beside a busy process it halves both."""

READ = 16
"""Fewer tokens than this take as long as this many: the matrix must be read from memory anyway."""


def cores() -> int:
    """How many cores this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def matrix_size(student: Student) -> float:
    """The mean number of weights in the student's hidden matrices; infinite on a GPU."""
    if student.device.type != "cpu":
        return math.inf  # `fitting` then leaves the threads alone: they do none of the work
    found = student.hidden_matrices()
    return sum(p.numel() for p in found) / max(1, len(found))


@contextmanager
def fitting(size: float, tokens: int) -> Iterator[None]:
    """Use one thread if a forward of so many tokens is small. size: see `matrix_size`."""
    threads = torch.get_num_threads()
    if threads == 1 or size * max(tokens, READ) >= WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
