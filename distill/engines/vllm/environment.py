"""What vLLM reads from the environment, and what it must not change in this process."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

QUIET_WORKERS = {
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TORCH_LOGS": "-torch._library.triton",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Environment of worker processes: silences in each of them the warnings that `undisturbed` and
`set_environment` silence in this process."""


def set_environment() -> None:
    """Set what vLLM reads when it is imported or started; what the user has set stays."""
    # Not the user's to choose: with an engine in another process, weights could not be handed over.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # the CPU has no Triton
    for name, value in (
        ("VLLM_NO_USAGE_STATS", "1"),  # it would report usage to its makers
        # a start logs 40 lines, a failure every request in flight; the error itself is raised
        ("VLLM_LOGGING_LEVEL", "CRITICAL"),
        ("VLLM_LOGGING_STREAM", "ext://sys.stderr"),
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),  # the learner has threads, and may have CUDA
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),  # the learner computes on the same cores
    ):
        os.environ.setdefault(name, value)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what vLLM's start does to this process, in which the learner lives: it seeds every
    global generator, disables torch.set_num_threads, and sets LD_PRELOAD for later children."""
    python, numbers, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, count = torch.set_num_threads, torch.get_num_threads()
    names = ("LD_PRELOAD", "OMP_NUM_THREADS", *QUIET_WORKERS)
    before = {name: os.environ.get(name) for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own calls cause them
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(tensors)
        torch.set_num_threads = threads  # vLLM's CPU worker replaces it with a function that warns
        if torch.get_num_threads() != count:
            threads(count)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
