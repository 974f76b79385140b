"""Processes that work beside this one: started, talked to, missed when they die, never left behind.

A message is a length-prefixed pickle on a socket pair. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

from tutelage.envs.keeper import die_with_parent

HEADER = struct.Struct("!Q")  # the length of the pickle that follows, in bytes
GRACE = 5.0
"""Seconds in which a process that failed has ended, or has said why."""


class Lost(Exception):
    """The other side hung up."""


class Line:
    """Messages over a socket. timeout: seconds for one message; None: as long as it takes.

    Raises:
        Lost: the other side is gone.
        TimeoutError: it is there, and did not read or answer in time.
    """

    def __init__(self, connection: socket.socket, *, timeout: float | None) -> None:
        self._socket, self._timeout = connection, timeout

    def send(self, message: Any) -> None:
        payload = pickle.dumps(message, protocol=5)
        self._socket.settimeout(self._timeout)
        try:
            self._socket.sendall(HEADER.pack(len(payload)) + payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Lost from error

    def receive(self, *, timeout: float | None = None) -> Any:
        """timeout: another one than usual."""
        self._socket.settimeout(timeout or self._timeout)
        (size,) = HEADER.unpack(self._read(HEADER.size))
        return pickle.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            try:
                part = self._socket.recv(min(size - len(found), 1 << 20))
            except ConnectionResetError as error:
                raise Lost from error
            if not part:
                raise Lost
            found += part
        return bytes(found)

    def close(self) -> None:
        self._socket.close()


class Rank:
    """A child process in which `call` ("package.module:function") is given its end of the line."""

    def __init__(self, number: int, call: str, *, timeout: float) -> None:
        self.number = number
        ours, theirs = socket.socketpair()
        self.line = Line(ours, timeout=timeout)
        # Linux ties the death signal to the starting thread, so a thread that may end before the
        # process must not ask for it; the hang-up of the socket serves every case.
        in_main = threading.current_thread() is threading.main_thread()
        given = f"{call!r}, {theirs.fileno()}, {in_main}"
        code = f"from tutelage.scheduler.processes import serve; serve({given})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(x for x in sys.path if x)},
            start_new_session=True,  # Ctrl-C is for the run, which ends us
        )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def death(self) -> str | None:
        """How it ended; None: it did not."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return None
        return f"exit code {code}" + (f", {signal.Signals(-code).name}" if code < 0 else "")

    def end(self) -> None:
        """Kill it: it holds nothing that must be put in order."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self.line.close()


def serve(call: str, descriptor: int, in_main: bool) -> None:
    """A child's life: it ends when its parent does, whatever it is in the midst of."""
    if in_main:
        die_with_parent()
    connection = socket.socket(fileno=descriptor)
    threading.Thread(target=_watch, args=(connection,), daemon=True).start()
    module, _, function = call.partition(":")
    import importlib

    with contextlib.suppress(Lost):
        getattr(importlib.import_module(module), function)(Line(connection, timeout=None))


def _watch(connection: socket.socket) -> None:
    """When the parent hangs up: the end."""
    poll = select.poll()
    poll.register(connection, getattr(select, "POLLRDHUP", 0) | select.POLLHUP)
    while not poll.poll():
        pass
    os.killpg(0, signal.SIGKILL)
