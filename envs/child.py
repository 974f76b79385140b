"""Runs a function in a Python process beside this one, with which it exchanges messages.

    child = Child("package.module:function", plain=True)
    child.connection.send(question, timeout=60)
    answer = child.connection.receive(timeout=60)
    child.kill()

`function` is called there with its end of the connection. A keeper (keeper.py) between the two
processes sees to it that whatever the child started ends with it, and that it ends with us. The
child is a new interpreter (no fork: torch and Ray live here) in a session of its own (a Ctrl-C at
the terminal is ours to handle), without a stdin; what it prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from tutelage.envs.keeper import GRACE, PATIENCE, die_with_parent, keep

MARK = b"tutelage"  # begins every message: bytes that another library writes into our socket do not
HEADER = struct.Struct("!8sQ")  # the mark, and the length of the pickle that follows, in bytes
MAX_MESSAGE = 64 * 2**20  # bytes of plain data: a thousand times the largest step of a household


class Disconnected(ConnectionError):
    """The other side hung up."""


class InvalidMessage(ValueError):
    """What came is no message of ours. Its text is a predicate: "sent a message that ..."."""


class _PlainUnpickler(pickle.Unpickler):
    """Built-in data only: nothing that is sent here may run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


class Connection:
    """Messages over a socket. Each side's first message is its process id.

    plain: the other side may send built-in data only, of at most MAX_MESSAGE bytes.

    Attributes:
        peer: the other side's process id, once it has come.
        fault: why nothing more will come (Disconnected or InvalidMessage), once that is so.
    """

    def __init__(self, connection: socket.socket, *, plain: bool = False) -> None:
        connection.setblocking(False)
        self._socket, self._plain = connection, plain
        self._outgoing, self._incoming = bytearray(), bytearray()
        self._arrived: deque[Any] = deque()
        self._unsent: OSError | None = None
        self.peer: int | None = None
        self.fault: Exception | None = None
        self.post(os.getpid())

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def events(self) -> int:
        """What `select.poll` should wait for."""
        return (0 if self.fault else select.POLLIN) | (select.POLLOUT if self._outgoing else 0)

    def post(self, message: Any) -> None:
        """Queue a message and send what the socket takes, without waiting. Where the other side is
        gone, receiving finds out.
        """
        self._queue(packed(message))

    def send(self, message: Any, *, timeout: float | None = None) -> None:
        """timeout: seconds; None: as long as it takes.

        Raises:
            Disconnected: the other side is gone. TimeoutError: it did not read in time.
        """
        self.send_packed(packed(message), timeout=timeout)

    def send_packed(self, payload: bytes, *, timeout: float | None = None) -> None:
        """As `send`, for a caller that packed the message itself, to see how long it is."""
        self._queue(payload)
        deadline = _deadline(timeout)
        while self._outgoing:
            self._wait(deadline)
        if self._unsent is not None:
            raise Disconnected(str(self._unsent)) from self._unsent

    def receive(self, *, timeout: float | None = None) -> Any:
        """The next message.

        Raises:
            Disconnected, InvalidMessage: none will come. TimeoutError: none came in time.
        """
        deadline = _deadline(timeout)
        while not self._arrived:
            if self.fault is not None:
                raise self.fault
            self._wait(deadline)
        return self._arrived.popleft()

    def __iter__(self) -> Iterator[Any]:
        """What the other side sends until it hangs up."""
        with contextlib.suppress(Disconnected):
            while True:
                yield self.receive()

    def arrived(self) -> list[Any]:
        """The messages that are here already. Also sends what the socket takes, without waiting."""
        self._flush()
        self._pull()
        messages = list(self._arrived)
        self._arrived.clear()
        return messages

    @property
    def ready(self) -> bool:
        """`receive` would not wait."""
        self._pull()
        return bool(self._arrived or self.fault)

    def hang_up(self) -> None:
        """Tell the other side that nothing more comes. What it still sends can be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.fault = self.fault or Disconnected("closed")
        self._socket.close()

    def _queue(self, payload: bytes) -> None:
        self._outgoing += HEADER.pack(MARK, len(payload))
        self._outgoing += payload
        self._flush()

    def _wait(self, deadline: float) -> None:
        """Until bytes have moved, either way; TimeoutError at the deadline."""
        poll = select.poll()
        poll.register(self._socket, self.events)
        left = deadline - time.monotonic()
        if not poll.poll(None if left == float("inf") else 1000 * max(0.0, left)):
            raise TimeoutError("no answer in time")
        self._flush()
        self._pull()

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._outgoing.clear()
            self._unsent = error

    def _pull(self) -> None:
        try:
            while self.fault is None:
                chunk = self._socket.recv(1 << 18)
                if not chunk:
                    raise ConnectionError("the other side hung up")
                self._incoming += chunk
                while (payload := self._payload()) is not None:
                    self._note(self._unpacked(payload))
        except BlockingIOError:
            pass
        except InvalidMessage as error:
            self.fault = error
        except OSError as error:
            self.fault = Disconnected(str(error))

    def _payload(self) -> bytes | None:
        """A message that has come whole. InvalidMessage as soon as what has come can be none."""
        if not self._incoming.startswith(MARK[: len(self._incoming)]):
            raise InvalidMessage(f"wrote {bytes(self._incoming[:20])!r} into the connection")
        if len(self._incoming) < HEADER.size:
            return None
        length = HEADER.unpack_from(self._incoming)[1]
        if self._plain and length > MAX_MESSAGE:
            raise InvalidMessage(f"sent a message of {length} bytes, more than {MAX_MESSAGE}")
        end = HEADER.size + length
        if len(self._incoming) < end:
            return None
        payload = bytes(memoryview(self._incoming)[HEADER.size : end])
        del self._incoming[:end]
        return payload

    def _unpacked(self, payload: bytes) -> Any:
        try:
            if self._plain:
                return _PlainUnpickler(io.BytesIO(payload)).load()
            return pickle.loads(payload)
        except Exception as error:  # whatever such bytes lead to
            raise InvalidMessage(f"sent a message that cannot be read: {error}") from error

    def _note(self, message: Any) -> None:
        if self.peer is None:
            self.peer = message
        else:
            self._arrived.append(message)


def packed(message: Any) -> bytes:
    return pickle.dumps(message, protocol=5)


def _deadline(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


class Child:
    """A process that runs `call` ("package.module:function") with its end of the connection.

    environment: its variables, PYTHONPATH aside: it finds modules where we do. plain: see
    Connection. stderr, cwd: as for subprocess.
    """

    def __init__(
        self,
        call: str,
        *,
        environment: Mapping[str, str] = os.environ,
        plain: bool = False,
        stderr: int | None = None,
        cwd: str | None = None,
    ) -> None:
        # Linux ties the death signal to the starting thread, so a thread that may end before the
        # process must not ask for it; the hang-up of the socket serves every case.
        in_main = threading.current_thread() is threading.main_thread()
        ours, theirs = socket.socketpair()
        begin = "from tutelage.envs.child import main; main()"  # by -m it would be two modules
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", begin, call, str(theirs.fileno()), str(int(in_main))],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                cwd=cwd,
                env={**environment, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x)},
                start_new_session=True,
            )
        self.connection = Connection(ours, plain=plain)

    @property
    def pid(self) -> int:
        """The child's process id; its keeper's, until the child has sent its own."""
        return self.connection.peer or self._process.pid

    def exit_code(self, wait: float) -> int | None:
        """As subprocess has it, negative for a signal; None: it has not ended in `wait` seconds."""
        try:
            return self._process.wait(wait)
        except subprocess.TimeoutExpired:
            return None

    def ending(self, wait: float = GRACE) -> str | None:
        """How it ended, in words."""
        code = self.exit_code(wait)
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def kill(self, *, grace: float = 0.0) -> None:
        """Hang up, wait up to `grace` seconds for it to end by itself, then have its keeper end it
        and all that it started.
        """
        self.connection.hang_up()
        self._hear_out(grace)
        for number in (signal.SIGTERM, signal.SIGCONT):
            self._process.send_signal(number)
        self._hear_out(PATIENCE)
        if self.exit_code(PATIENCE) is None:  # not even its keeper can: it dies with that
            self._process.kill()
            self._process.wait()
        self.connection.close()

    def _hear_out(self, seconds: float) -> None:
        """Receive until it hangs up, which comes at once; Popen.wait would look every 50 ms."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Disconnected, InvalidMessage, TimeoutError):
            while (left := deadline - time.monotonic()) > 0:
                self.connection.receive(timeout=left)


def main() -> None:
    """Runs in the child. Its arguments: what to call, a socket, and whether to end with the thread
    that started it.
    """
    faulthandler.enable()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a print must not end up in our stdout
    call, descriptor, in_main = sys.argv[1:4]
    connection = socket.socket(fileno=int(descriptor))
    connection.set_inheritable(False)  # what the function starts must not keep it open
    if in_main == "1":
        die_with_parent(signal.SIGTERM)
    keep(connection)
    module, _, function = call.partition(":")
    with contextlib.suppress(Disconnected):
        getattr(importlib.import_module(module), function)(Connection(connection))
