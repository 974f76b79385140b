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
    """Linux sends us `by`, stopped or not, when the thread that started us ends; so this is asked
    for in a main thread only.
    """
    _prctl(_PDEATHSIG, by)


def keep(connection: socket.socket) -> None:
    """Make two of this process: in the one below the call returns, and it is the worker; the one
    above never comes back. connection: whose other end is the owner's.
    """
    _prctl(_CHILD_SUBREAPER, 1)
    told, tell = os.pipe()
    for end in (told, tell):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that they wake it
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    keeper = os.getpid()
    worker = os.fork()
    if worker:
        _keep(connection, worker, told)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for end in (told, tell):
        os.close(end)
    os.setpgid(0, 0)  # an environment that signals its process group does not mean its keeper
    die_with_parent()
    if os.getppid() != keeper:  # too late to be told
        os._exit(1)


def _keep(connection: socket.socket, worker: int, told: int) -> NoReturn:
    status = 0
    try:
        status = _outlive(connection, worker, told)
    finally:
        _end_as(status)


def _outlive(connection: socket.socket, worker: int, told: int) -> int:
    """Wait for the worker's end, or make it; end whatever else there is; the worker's status."""
    poll = select.poll()
    poll.register(told, select.POLLIN)
    poll.register(connection, getattr(select, "POLLRDHUP", 0) | select.POLLHUP)
    deadline, found = float("inf"), None
    while found is None and (left := deadline - time.monotonic()) > 0:
        events = dict(poll.poll(None if left == float("inf") else 1000 * left))
        if told in events and signal.SIGTERM in os.read(told, 4096):
            break
        if connection.fileno() in events:
            poll.unregister(connection)
            deadline = time.monotonic() + GRACE
        found = _reap(worker)
    return _end_all(worker, found)


def _reap(worker: int) -> int | None:
    """Take note of those who have ended, orphans among them; the worker's status, if it has."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                found = ended[1]
    return found


def _end_all(worker: int, status: int | None) -> int:
    """Kill our children, and those that their end makes ours, until none is left."""
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
