"""The process above a child's: whatever ends the child, what it started ends with it.

A process whose parent has ended becomes init's child, perhaps in a session of its own, where nobody
finds it again. Under a keeper it becomes the keeper's (Linux's child subreaper). The keeper kills
all that it has once the worker below it has ended, its owner has hung up, or it is told to
(SIGTERM). Its own end is the worker's: the same exit code or signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

GRACE = 2.0  # seconds that a worker gets to put things in order once its owner has hung up
PATIENCE = 5.0  # seconds in which everything killed should have ended
_PDEATHSIG, _CHILD_SUBREAPER = 1, 36  # prctl's


def die_with_parent(by: int = signal.SIGKILL) -> None:
    """Have Linux send us `by`, stopped or not, when the thread that started us ends. So only a
    process that a main thread started may call this.
    """
    _prctl(_PDEATHSIG, by)


def keep(connection: socket.socket) -> None:
    """Fork this process: the child is the worker, in which the call returns; the parent becomes its
    keeper and never returns. connection: its other end is the owner's.
    """
    _prctl(_CHILD_SUBREAPER, 1)
    signals, wakeup = os.pipe()  # to poll for signals and for the connection at once
    for end in (signals, wakeup):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only signals with a handler are written
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    keeper = os.getpid()
    worker = os.fork()
    if worker:
        _keep(connection, worker, signals)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for end in (signals, wakeup):
        os.close(end)
    os.setpgid(0, 0)  # an environment that signals its process group does not mean its keeper
    die_with_parent()
    if os.getppid() != keeper:  # it ended before the line above: no signal will come
        os._exit(1)


def _keep(connection: socket.socket, worker: int, signals: int) -> NoReturn:
    status = 0
    try:
        status = _outlive(connection, worker, signals)
    finally:
        _end_as(status)


def _outlive(connection: socket.socket, worker: int, signals: int) -> int:
    """Wait for the worker's end, or end it; end whatever else there is; the worker's status."""
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    poll.register(connection, getattr(select, "POLLRDHUP", 0) | select.POLLHUP)
    deadline, found = float("inf"), None
    while found is None and (left := deadline - time.monotonic()) > 0:
        events = dict(poll.poll(None if left == float("inf") else 1000 * left))
        if signals in events and signal.SIGTERM in os.read(signals, 4096):  # a byte a signal
            break
        if connection.fileno() in events:
            poll.unregister(connection)
            deadline = time.monotonic() + GRACE
        found = _reap(worker)
    return _end_all(worker, found)


def _reap(worker: int) -> int | None:
    """Reap all children that have ended, adopted orphans too; the worker's status, if it has."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                found = ended[1]
    return found


def _end_all(worker: int, status: int | None) -> int:
    """Kill our children, and the orphans that we adopt by that, until none is left."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for child in _children(worker):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            ended, how = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if ended == worker:
            status = how
        elif not ended:
            time.sleep(0.001)
    return signal.SIGKILL if status is None else status


def _children(worker: int) -> list[int]:
    try:
        return [
            int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        ]
    except OSError:  # another system's, or a kernel's without it
        return [worker]


def _end_as(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core dump is enough
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
