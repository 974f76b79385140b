"""Runs the symbolic tier in worker processes: starts them when needed, keeps them warm, replaces
them, ends them at exit.

There are two limits. An answer has a number of processor seconds, which its worker counts: when
they are used up, the answer is to blame, and the reason is `timeout`. A caller has a deadline on
the clock: when it passes first, the machine is to blame, and the reason is one of UNDECIDED, which
says nothing of the answer. A worker that was killed, stopped, or is slow to start costs no verdict:
a fresh worker gets its request, as long as the caller can wait.

Any thread may call. A request holds one worker; requests beyond the number of workers wait.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tutelage.envs.child import Child

WORKERS = max(1, min(4, (os.cpu_count() or 1)))
GRADES_PER_WORKER = 1000  # then a fresh one: sympy's caches only grow
TRIES = 3  # of a request whose worker ends without an answer
SILENCE = 1.0  # seconds after which a worker that says nothing is looked at
REAPED = 0.5  # seconds, at least, for the exit status of one that hung up
CPU_SHARE = 0.9  # of a caller's time that the answer may compute; the rest is the machine's
UNDECIDED = frozenset({"starting", "late", "lost"})
"""Reasons that lie in the machine: no worker was ready in time, none had time to answer, or it was
killed from outside. Judge again."""

# Signals that a computation may bring on its own process. Any other came from outside.
_OWN = {-s for s in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)}


class Late(Exception):
    """The deadline passed."""


class Stalled(Exception):
    """The worker makes no progress, and not for want of a processor."""


class Broken(Exception):
    """math-verify cannot be used as it is installed."""


@dataclass(slots=True, kw_only=True)
class Allowance:
    """What one judgement may take: `seconds` of a worker's processor, which its requests use up,
    and the `deadline` until when its caller waits (time.monotonic seconds).
    """

    seconds: float
    deadline: float

    @classmethod
    def within(cls, timeout: float, wait: float | None = None) -> Allowance:
        """`timeout` processor seconds, to be had in `wait` seconds on the clock; without `wait`, as
        much as fits into `timeout` seconds on the clock.
        """
        if wait is None:
            return cls(seconds=CPU_SHARE * timeout, deadline=time.monotonic() + timeout)
        return cls(seconds=timeout, deadline=time.monotonic() + wait)


class _Worker:
    """One process, one request at a time. A worker whose request failed is never used again."""

    def __init__(self) -> None:
        path = os.environ.get("PATH", "")
        self.child = Child(
            "tutelage.envs.grading.worker:main",
            # A fixed hash seed: sympy goes through sets, and so does the same in every process.
            environment={"PATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            plain=True,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
        )
        self._born = time.monotonic()
        self.ready = False
        self.started = math.nan, math.nan  # seconds that took, on the clock and of the processor
        self.grades = 0

    @property
    def answers(self) -> bool:
        """It is ready, or has just said so."""
        return self.ready or self.child.connection.ready

    def wait_ready(self, deadline: float) -> None:
        if self.ready:
            return
        said = self._answer(deadline)
        if "broken" in said:
            raise Broken(said["broken"])
        self.ready = True
        self.started = time.monotonic() - self._born, said["seconds"]

    def ask(self, answer: str, gold: str, allowance: Allowance) -> tuple[bool, str]:
        request = {"answer": answer, "gold": gold, "seconds": allowance.seconds}
        self.child.connection.post(request)
        reply = self._answer(allowance.deadline)
        self.grades += 1
        correct, reason, used = reply["correct"], reply["reason"], reply["seconds"]
        if type(correct) is not bool or type(reason) is not str or type(used) is not float:
            raise ValueError(f"not a verdict: {reply}")
        allowance.seconds -= used
        return correct, reason

    def _answer(self, deadline: float) -> Any:
        before = self._work()
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                return self.child.connection.receive(timeout=min(left, SILENCE))
            if left > SILENCE and self._stands_still(before):
                raise Stalled
            before = self._work()
        raise Late

    def _work(self) -> tuple[str, list[str]] | None:
        """Its state and the processor time that it has used, as the kernel writes them; None on
        systems without /proc.
        """
        try:
            fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return fields[0], fields[11:13]

    def _stands_still(self, before: tuple[str, list[str]] | None) -> bool:
        """Whether it was stopped, sleeps instead of computing, or has ended below a keeper that was
        stopped (Z). A worker that waits for a processor (R) or for the disk (D) does not count:
        another process would be no faster. While it starts, neither does a sleeping one: imports
        may sleep.
        """
        now = self._work()
        return now is not None and now == before and now[0] in ("TtZS" if self.ready else "TtZ")

    def cause(self, deadline: float) -> str:
        """The reason that fits how it ended, once it has hung up."""
        code = self.child.exit_code(max(REAPED, deadline - time.monotonic()))
        if code is None:
            return "crash"
        if not self.ready:
            return "lost"
        if code == -signal.SIGPROF:
            return "timeout"
        return "crash" if code >= 0 or code in _OWN else "lost"


class _Pool:
    def __init__(self) -> None:
        self._free: list[_Worker] = []
        self._count = 0
        self._changed = threading.Condition()

    def ask(self, answer: str, gold: str, allowance: Allowance) -> tuple[bool, str]:
        ends: list[str] = []  # how its workers ended
        while len(ends) < TRIES:
            correct, reason = self._try(answer, gold, allowance)
            if reason in ("crash", "lost"):
                ends.append(reason)
            elif reason != "stalled":  # the deadline bounds how often
                return correct, reason
        return False, "lost" if "lost" in ends else "crash"

    def _try(self, answer: str, gold: str, allowance: Allowance) -> tuple[bool, str]:
        if allowance.seconds <= 0:
            return False, "timeout"
        try:
            worker = self._take(allowance.deadline)
        except Late:
            return False, "late"
        except OSError:  # no process could be started
            return False, "lost"
        try:
            worker.wait_ready(allowance.deadline)
            verdict = worker.ask(answer, gold, allowance)
        except Late:
            if not worker.ready:  # it may be by the next request
                self._keep(worker)
                return False, "starting"
            self._replace(worker)
            return False, "late"
        except Stalled:
            self._replace(worker)
            return False, "stalled"
        except OSError:
            reason = worker.cause(allowance.deadline)
            self._replace(worker)
            return False, reason
        except (ValueError, KeyError, TypeError):
            self._replace(worker)
            return False, "crash"
        except BaseException:  # Ctrl-C in the middle of an exchange, or Broken: no successor
            self._end(worker)
            raise
        if worker.grades < GRADES_PER_WORKER:
            self._keep(worker)
        else:
            self._replace(worker)
        return verdict

    def start(self, deadline: float) -> tuple[float, float]:
        worker = self._take(deadline)
        try:
            worker.wait_ready(deadline)
        except BaseException:
            self._end(worker)
            raise
        self._keep(worker)
        return worker.started

    def _take(self, deadline: float) -> _Worker:
        with self._changed:
            while True:
                self._bury()
                if self._free:
                    warm = [worker for worker in self._free if worker.answers]
                    worker = (warm or self._free)[-1]
                    self._free.remove(worker)
                    return worker
                if self._count < WORKERS:
                    break
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise Late
            self._count += 1
        return self._started()

    def _bury(self) -> None:
        """Remove idle workers that somebody killed, before a request gets one."""
        for worker in [worker for worker in self._free if worker.child.exit_code(0) is not None]:
            self._free.remove(worker)
            self._count -= 1
            worker.child.kill()

    def _started(self) -> _Worker:
        """A new process, which is counted already."""
        try:
            return _Worker()
        except BaseException:
            self._uncount()
            raise

    def _keep(self, worker: _Worker) -> None:
        with self._changed:
            self._free.append(worker)
            self._changed.notify()

    def _replace(self, worker: _Worker) -> None:
        """End it and start its successor now, so that the next request finds that one warm."""
        worker.child.kill()
        with contextlib.suppress(OSError):
            self._keep(self._started())

    def _end(self, worker: _Worker) -> None:
        worker.child.kill()
        self._uncount()

    def _uncount(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify()

    def pids(self) -> list[int]:
        with self._changed:
            return [worker.child.pid for worker in self._free]

    def close(self) -> None:
        with self._changed:
            workers, self._free = self._free, []
            self._count -= len(workers)
        for worker in workers:
            worker.child.kill()


_pool = _Pool()


def _forget() -> None:
    """In a forked child: the workers and their pipes are the parent's."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _pool.close())


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether math-verify is installed; warns once, with the cure, if it is not."""
    if importlib.util.find_spec("math_verify") is not None:
        return True
    _warn("is not installed")
    return False


_broken: list[str] = []  # what math-verify said when it could not be used: once is enough


def _warn(what: str) -> None:
    warnings.warn(
        f"math-verify {what}: answers that are not plain numbers or equal texts count as wrong."
        " Cure: pip install 'tutelage[math]'; `tutelage doctor` says more",
        stacklevel=2,
    )


def symbolic(answer: str, gold: str, allowance: Allowance) -> tuple[bool, str]:
    """(correct, reason) by math-verify, before the allowance's deadline."""
    if _broken or not available():
        return False, "unavailable"
    try:
        return _pool.ask(answer, gold, allowance)
    except Broken as error:
        if not _broken:
            _warn(f"does not work here ({error})")
        _broken.append(str(error))
        return False, "unavailable"


def start(wait: float) -> tuple[float, float]:
    """Have a fresh worker ready; how long that took, in seconds (on the clock, of its processor).

    Raises:
        Broken: math-verify does not work as it is installed. Late: not within `wait` seconds.
        Stalled, OSError: its process was stopped, could not be started, or was ended.
    """
    _pool.close()
    return _pool.start(time.monotonic() + wait)


def close() -> None:
    """End the workers that are idle; the next request starts new ones."""
    _pool.close()


def worker_pids() -> list[int]:
    """Process ids of the idle workers."""
    return _pool.pids()
