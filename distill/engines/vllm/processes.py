"""An engine's worker processes, where tensor_parallel_size is above 1: none outlives its engine,
and when one dies, the engine fails at once.

When a worker dies, vLLM's own monitor asks the others to end and waits nine seconds for them, and
the caller waits as long: a worker that is waiting for the dead one inside a collective does not
react. `watch` kills the others, so that the caller's error comes at once.
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
"""How the names of Python's shared memory begin."""

PATIENCE = 10.0
"""Seconds to wait for the end of a killed process."""


def has_workers(engine: Any) -> bool:
    """Whether this LLMEngine computes in processes of its own."""
    return int(engine.vllm_config.parallel_config.world_size) > 1


def watch(engine: Any) -> None:
    """From here on the death of one worker kills all of the engine's. However they end, they leave
    nothing in /dev/shm: each process has mapped its files by now, so their names can go at once."""
    executor = _executor(engine)
    workers = [one.proc for one in executor.workers]
    # Else this process would remove the name too, at its end, and complain that it is gone.
    executor.rpc_broadcast_mq.buffer.is_creator = False
    remove({name for one in workers for name in memory_of(one.pid)})
    executor.tutelage_dead = None

    def look() -> None:
        dead = wait([one.sentinel for one in workers])
        if getattr(executor, "shutting_down", False) and not executor.is_failed:
            return  # an orderly end, not a death
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
    """The names of the files in /dev/shm that vLLM made and a process maps: Python's shared memory,
    and that of the CPU's collectives. By name, because a user's checkpoints may be there too."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    except OSError:  # the process is gone
        return set()
    return set(
        re.findall(rf" {SHARED}/((?:{PYTHONS}|vllm_dist_)[^/\n]+)(?<! \(deleted\))$", maps, re.M)
    )


def remove(names: set[str]) -> None:
    """Remove files in /dev/shm."""
    for name in names:
        (SHARED / name).unlink(missing_ok=True)
        if name.startswith(PYTHONS):  # else the tracker warns at exit that the file is gone
            resource_tracker.unregister(f"/{name}", "shared_memory")


def death(engine: Any) -> str | None:
    """How the first worker that died ended, in words; None: none has."""
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
    """If a start fails inside, kill the workers that it had started."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        new = set(multiprocessing.active_children()) - before
        # By name: another thread may have started children of its own meanwhile.
        workers = [one for one in new if one.name.startswith("VllmWorker")]
        memory = {name for one in workers for name in memory_of(one.pid)}
        for one in workers:
            one.kill()
            one.join(PATIENCE)
        remove({name for name in memory if not name.startswith(PYTHONS)})  # Python removes its own
        raise


def _executor(engine: Any) -> Any:
    return engine.engine_core.engine_core.model_executor
