"""An engine's worker processes, where tensor_parallel_size is above 1: none outlives its engine,
and one that dies takes it down at once.

vLLM's own monitor asks the others to end and gives them nine seconds, while the caller waits for an
answer: a worker does not hear it as long as it waits for the dead one inside a collective. `watch`
kills them, so the caller's error comes at once.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

SHARED = Path("/dev/shm")

PYTHONS = "psm_"
"""So begin the names of Python's shared memory."""

PATIENCE = 10.0
"""Seconds that a killed process has to be gone."""


def has_workers(engine: Any) -> bool:
    """Whether this LLMEngine computes in processes of its own."""
    return int(engine.vllm_config.parallel_config.world_size) > 1


def watch(engine: Any) -> None:
    """From here on, the death of one worker ends all of the engine's, and whatever ends them, they
    leave nothing in /dev/shm: all that share it have it, so its names go at once."""
    executor = _executor(engine)
    workers = [one.proc for one in executor.workers]
    executor.rpc_broadcast_mq.buffer.is_creator = False  # it would remove its name, too
    remove({name for one in workers for name in memory_of(one.pid)})
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
    """Shut the workers down, if there are any."""
    if not has_workers(engine):
        return
    executor = _executor(engine)
    executor.shutdown()
    for one in executor.workers:
        one.proc.join(PATIENCE)


def memory_of(pid: int | None) -> set[str]:
    """The names of the files in /dev/shm that a process maps and that vLLM made there: Python's
    shared memory, and the CPU's for collectives. Checkpoints may stand there, too."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    except OSError:  # it is gone
        return set()
    return set(
        re.findall(rf" {SHARED}/((?:{PYTHONS}|vllm_dist_)[^/\n]+)(?<! \(deleted\))$", maps, re.M)
    )


def remove(names: set[str]) -> None:
    """Remove files in /dev/shm."""
    for name in names:
        (SHARED / name).unlink(missing_ok=True)
        if name.startswith(PYTHONS):  # it would miss the file at its exit, and say so
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


@contextmanager
def none_left() -> Iterator[None]:
    """Where a start fails, the workers that it had started are ended."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        new = set(multiprocessing.active_children()) - before
        workers = [one for one in new if one.name.startswith("VllmWorker")]
        memory = {name for one in workers for name in memory_of(one.pid)}
        for one in workers:
            one.kill()
            one.join(PATIENCE)
        remove({name for name in memory if not name.startswith(PYTHONS)})  # Python removes its own
        raise


def _executor(engine: Any) -> Any:
    return engine.engine_core.engine_core.model_executor
