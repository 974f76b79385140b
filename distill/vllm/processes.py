"""An engine's worker processes, where tensor_parallel_size is above 1: none outlives its engine, and
one that dies takes it down at once.

vLLM's own monitor asks the others to end and gives them nine seconds, in which the caller waits for
an answer: a worker cannot hear it while it waits for the dead one inside a collective. `watch` kills
them, so the caller's error comes at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

SHARED = Path("/dev/shm")

PATIENCE = 10.0
"""Seconds that a killed process has to be gone."""


def has_workers(engine: Any) -> bool:
    """Whether this LLMEngine computes in processes of its own."""
    return int(engine.vllm_config.parallel_config.world_size) > 1


def watch(engine: Any) -> None:
    """From here on, the death of one worker ends all of the engine's."""
    executor = _executor(engine)
    workers = [one.proc for one in executor.workers]
    mapped = {name for names in engine.collective_rpc("shared_memory") for name in names}
    own = executor.rpc_broadcast_mq.buffer.shared_memory.name
    executor.tutelage_memory = sorted(mapped - {own})
    executor.tutelage_dead = None

    def look() -> None:
        dead = wait([one.sentinel for one in workers])
        if getattr(executor, "shutting_down", False) and not executor.is_failed:
            return
        executor.tutelage_dead = next(one for one in workers if one.sentinel in dead)
        for one in workers:
            one.kill()

    Thread(target=look, daemon=True, name="WorkerWatch").start()


def end(engine: Any) -> None:
    """Shut the workers down. Those that did not end by themselves left files in /dev/shm: they are
    removed."""
    if not has_workers(engine):
        return
    executor = _executor(engine)
    executor.shutdown()
    for one in executor.workers:
        one.proc.join(PATIENCE)
    for name in executor.tutelage_memory:
        try:
            (SHARED / name).unlink()
        except FileNotFoundError:
            continue
        if name.startswith("psm_"):  # Python's: it would miss the file at its exit, and say so
            resource_tracker.unregister(f"/{name}", "shared_memory")


def death(engine: Any) -> str | None:
    """What became of the first worker that died, in words; None: they are well."""
    if not has_workers(engine):
        return None
    one: BaseProcess | None = _executor(engine).tutelage_dead
    if one is None:
        return None
    one.join(PATIENCE)
    code = one.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    return f"its worker process {one.name} (pid {one.pid}) is dead: {how}"


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """Where a start fails, the workers that it had started are ended."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for one in set(multiprocessing.active_children()) - before:
            if one.name.startswith("VllmWorker"):
                one.kill()
                one.join(PATIENCE)
        raise


def _executor(engine: Any) -> Any:
    return engine.engine_core.engine_core.model_executor
