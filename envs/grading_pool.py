"""The workers of the symbolic tier: started when needed, killed when late, replaced, gone at exit.

A worker that dies, answers nonsense or stops working costs its request another try, on a fresh one.
Any thread may ask. A request holds one worker; more requests than workers wait, within their own
deadline.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import lru_cache
from pathlib import Path

WORKERS = max(1, min(4, (os.cpu_count() or 1)))
GRADES_PER_WORKER = 1000  # then a fresh one: sympy's caches only grow
START_SECONDS = 60.0  # for the imports, on a machine under load
TRIES = 3  # of a request
SILENCE = 2.0  # seconds in which a worker that is not stopped gets some of the processor
INNER_MARGIN = 1.0  # seconds by which math-verify's own alarm comes before ours, if the time allows


class Late(Exception):
    """The deadline passed."""


class _Worker:
    """One process, one request at a time. A worker whose request failed is never used again."""

    def __init__(self) -> None:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        in_main = threading.current_thread() is threading.main_thread()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tutelage.envs.grading_worker", str(int(in_main))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
        self._born = time.monotonic()
        self._buffer = b""
        self.ready = False
        self.grades = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, deadline: float) -> None:
        if not self.ready:
            self._line(deadline)
            self.ready = True

    @property
    def overdue(self) -> bool:
        """It should long have been ready."""
        return not self.ready and time.monotonic() - self._born > START_SECONDS

    def ask(self, answer: str, gold: str, deadline: float) -> tuple[bool, str]:
        left = deadline - time.monotonic()
        request = {"answer": answer, "gold": gold, "seconds": max(1.0, left - INNER_MARGIN)}
        assert self._process.stdin is not None
        # At most 2 x MAX_ANSWER characters: it fits the pipe's buffer, so the write can't block.
        os.write(self._process.stdin.fileno(), json.dumps(request).encode() + b"\n")
        reply = json.loads(self._line(deadline))
        self.grades += 1
        correct, reason = reply["correct"], reply["reason"]
        if type(correct) is not bool or type(reason) is not str:
            raise ValueError(f"not a verdict: {reply}")
        return correct, reason

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        worked = self._worked()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Late
            if not poll.poll(1000 * min(left, SILENCE)):
                before, worked = worked, self._worked()
                if left > SILENCE and worked is not None and worked == before:
                    raise EOFError("the grading worker does nothing")
                continue
            chunk = os.read(descriptor, 65536)
            if not chunk:
                raise EOFError("the grading worker ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _worked(self) -> str | None:
        """The processor time that it has used, in the kernel's words; None where it has none."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return " ".join(fields[11:13])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()  # SIGKILL was sent: this only collects the exit status


class _Pool:
    def __init__(self) -> None:
        self._free: list[_Worker] = []
        self._count = 0
        self._changed = threading.Condition()

    def ask(self, answer: str, gold: str, deadline: float) -> tuple[bool, str]:
        for _ in range(TRIES):
            verdict = self._try(answer, gold, deadline)
            if verdict[1] != "crash":
                break
        return verdict

    def _try(self, answer: str, gold: str, deadline: float) -> tuple[bool, str]:
        try:
            worker = self._take(deadline)
        except Late:
            return False, "timeout"
        except OSError:  # no process could be started
            return False, "crash"
        try:
            worker.wait_ready(deadline)
            verdict = worker.ask(answer, gold, deadline)
        except Late:
            # One that is still importing is not to blame; one that was asked is lost.
            self._give(worker, keep=not worker.ready and not worker.overdue)
            return False, "timeout" if worker.ready else "starting"
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            self._give(worker, keep=False)
            return False, "crash"
        except BaseException:  # Ctrl-C in the middle of an exchange
            self._give(worker, keep=False)
            raise
        self._give(worker, keep=worker.grades < GRADES_PER_WORKER)
        return verdict

    def _take(self, deadline: float) -> _Worker:
        with self._changed:
            while not self._free and self._count >= WORKERS:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise Late
            if self._free:
                return self._free.pop()
            self._count += 1
        try:
            return _Worker()
        except BaseException:
            with self._changed:
                self._count -= 1
                self._changed.notify()
            raise

    def _give(self, worker: _Worker, *, keep: bool) -> None:
        if not keep:
            worker.kill()
        with self._changed:
            if keep:
                self._free.append(worker)
            else:
                self._count -= 1
            self._changed.notify()

    def pids(self) -> list[int]:
        with self._changed:
            return [worker.pid for worker in self._free]

    def close(self) -> None:
        with self._changed:
            workers, self._free = self._free, []
            self._count -= len(workers)
        for worker in workers:
            worker.kill()


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
    warnings.warn(
        "math-verify is not installed: answers that are not plain numbers or equal texts count as "
        "wrong. Cure: pip install 'tutelage[math]'",
        stacklevel=2,
    )
    return False


def symbolic(answer: str, gold: str, deadline: float) -> tuple[bool, str]:
    """(correct, reason) by math-verify, before `deadline` (time.monotonic seconds)."""
    if not available():
        return False, "unavailable"
    return _pool.ask(answer, gold, deadline)


def close() -> None:
    """End the workers that are idle; the next request starts new ones."""
    _pool.close()


def worker_pids() -> list[int]:
    """Process ids of the idle workers."""
    return _pool.pids()
