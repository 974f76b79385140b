"""What is changed in vLLM, and what vLLM must not change in this process."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

QUIET_WORKERS = {
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TORCH_LOGS": "-torch._library.triton",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Environment of worker processes: else each says what `undisturbed` and `set_environment` keep
from being said here."""


def set_environment() -> None:
    """vLLM reads these when it is imported or started."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # the CPU has no Triton
    for name, value in (
        ("VLLM_NO_USAGE_STATS", "1"),  # it would report to its makers
        # a start says 40 lines, a failure all that was in flight; the error itself is raised
        ("VLLM_LOGGING_LEVEL", "CRITICAL"),
        ("VLLM_LOGGING_STREAM", "ext://sys.stderr"),
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),  # the learner has threads, and may have CUDA
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),  # the learner computes on the same cores
    ):
        os.environ.setdefault(name, value)


def keep_unpacked() -> None:
    """From here on, linear layers of this process's engines compute with the weights as loaded."""
    from vllm.model_executor.layers import utils

    if utils.dispatch_cpu_unquantized_gemm is not _plain:
        _plain.replaced = utils.dispatch_cpu_unquantized_gemm  # type: ignore[attr-defined]
        utils.dispatch_cpu_unquantized_gemm = _plain


def _plain(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


@contextmanager
def undisturbed() -> Iterator[None]:
    """A start seeds every global generator, forbids torch.set_num_threads and preloads libraries
    into every later child process: not here, where the learner lives."""
    python, numbers, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, count = torch.set_num_threads, torch.get_num_threads()
    names = ("LD_PRELOAD", "OMP_NUM_THREADS", *QUIET_WORKERS)
    told = {name: os.environ.get(name) for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what vLLM itself calls
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(tensors)
        torch.set_num_threads = threads
        if torch.get_num_threads() != count:
            threads(count)
        for name, value in told.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
