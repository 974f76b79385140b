"""One HTTP exchange that ends: every wait, from the name server to the last byte, is up to one
deadline, and every byte that comes counts against one limit.

Python's own sockets time each piece: a server that sends a byte a second would be waited for
without end. No redirect is followed, so a key goes to no other host, and nothing is unpacked.
"""

from __future__ import annotations

import http.client
import io
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LOOK = 0.05
"""Seconds between two looks whether somebody hung up, while a name server is asked."""


class TooLong(Exception):
    """The server sends more than may be sent."""


class HungUp(ConnectionAbortedError):
    """Our own side wants no answer any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back. location: where a redirect points to. wait: seconds that the server asks for
    before it is asked again."""

    status: int
    body: bytearray
    location: str = ""
    wait: float = 0.0


class Lines:
    """The connections that are open, so that another thread may hang up on all of them."""

    def __init__(self) -> None:
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def hold(self, line: socket.socket) -> None:
        """Raises HungUp where it is too late."""
        with self._lock:
            if self.stopping.is_set():
                raise HungUp("another request failed")
            self._open.add(line)

    def drop(self, line: socket.socket) -> None:
        with self._lock:
            self._open.discard(line)

    def hang_up(self) -> None:
        """End every exchange, and any that begins before `stopping` is cleared."""
        self.stopping.set()
        with self._lock:
            for line in self._open:
                try:
                    line.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it ended by itself


class Deadline:
    """A point in time; what did not happen by then is a TimeoutError."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self, what: str) -> float:
        """Seconds until then; raises TimeoutError, with what was waited for, when none are left."""
        if (left := self._end - time.monotonic()) <= 0:
            raise self.passed(what)
        return left

    def passed(self, what: str) -> TimeoutError:
        return TimeoutError(f"{what} after {self.seconds:g} s")


def exchange(
    url: str,
    data: bytes | None,
    headers: Mapping[str, str],
    *,
    timeout: float,
    most: int,
    lines: Lines,
    tls: ssl.SSLContext | None,
) -> Reply:
    """Ask, and read the whole answer. data: posted; None: GET. timeout: seconds for all of it.
    most: bytes of the answer, its headers too.

    Raises:
        OSError: TimeoutError among them. http.client.HTTPException: what came is no HTTP.
        TooLong: more than `most` bytes.
    """
    where, deadline = urlsplit(url), Deadline(timeout)
    host = str(where.hostname)
    port = where.port or (443 if where.scheme == "https" else 80)
    line = _connected(host, port, deadline, lines)
    try:
        if where.scheme == "https":
            line = _encrypted(line, host, deadline, lines, tls)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _Line(line, deadline, most)
        method = "GET" if data is None else "POST"
        with closing(connection):
            connection.request(method, where.path, data, dict(headers))
            return _read(connection.getresponse(), most)
    finally:
        lines.drop(line)
        line.close()


def _read(response: http.client.HTTPResponse, most: int) -> Reply:
    if response.length is not None and response.length > most:
        raise TooLong
    coding = response.getheader("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity"):  # a few kilobytes might become gigabytes
        raise http.client.HTTPException(f"its answer is packed ({coding}), which nobody asked for")
    body = bytearray()  # grows in place: an answer may have 40 MB
    while part := response.read1(1 << 20):
        body += part
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    wait = (response.getheader("Retry-After") or "").strip()
    return Reply(
        status=response.status,
        body=body,
        location=response.getheader("Location") or "",
        wait=float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 9 else 0.0,
    )


class _Line:
    """What http.client takes for a socket."""

    def __init__(self, line: socket.socket, deadline: Deadline, most: int) -> None:
        self._socket, self._deadline, self._most = line, deadline, most

    def sendall(self, data: bytes) -> None:
        what = "it did not take the request"
        self._socket.settimeout(self._deadline.left(what))
        try:
            self._socket.sendall(data)  # a timeout of sendall's is of the whole
        except TimeoutError:
            raise self._deadline.passed(what) from None

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self._socket, self._deadline, self._most), 1 << 16)

    def close(self) -> None:
        """The socket is closed where it was opened."""


class _Incoming(io.RawIOBase):
    """Bytes as they come, up to a deadline and a number."""

    def __init__(self, line: socket.socket, deadline: Deadline, most: int) -> None:
        self._socket, self._deadline, self._room = line, deadline, most
        self._came = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        what = "its answer was not whole" if self._came else "there was no answer"
        self._socket.settimeout(self._deadline.left(what))
        try:
            count = self._socket.recv_into(buffer)
        except TimeoutError:
            raise self._deadline.passed(what) from None
        self._came = True
        self._room -= count
        if self._room < 0:
            raise TooLong
        return count


def _connected(host: str, port: int, deadline: Deadline, lines: Lines) -> socket.socket:
    """A connection to one of the host's addresses; `lines` holds it.

    Raises:
        OSError: why the last of them could not be reached.
    """
    fault: OSError = OSError(f"no address of {host} is known")
    what = f"{host} could not be reached"
    for family, kind, protocol, _, address in _addresses(host, port, deadline, lines):
        line = socket.socket(family, kind, protocol)
        try:
            line.settimeout(deadline.left(what))
            lines.hold(line)
            line.connect(address)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return line
        except OSError as error:
            lines.drop(line)
            line.close()
            fault = deadline.passed(what) if isinstance(error, TimeoutError) else error
            if lines.stopping.is_set():
                break
    raise fault


def _addresses(host: str, port: int, deadline: Deadline, lines: Lines) -> list[Any]:
    """What the name server says. It may take minutes, and nothing interrupts the C library: a
    thread of its own asks, and is left behind."""
    found: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.put(error)
        except ValueError as error:  # a label of more than 63 characters
            found.put(OSError(f"{host}: {error}"))

    threading.Thread(target=ask, daemon=True).start()
    what = f"no name server told the address of {host}"
    while True:
        if lines.stopping.is_set():
            raise HungUp("another request failed")
        try:
            answer = found.get(timeout=min(LOOK, deadline.left(what)))
        except queue.Empty:
            continue
        if isinstance(answer, OSError):
            raise answer
        return answer


def _encrypted(
    line: socket.socket, host: str, deadline: Deadline, lines: Lines, tls: ssl.SSLContext | None
) -> socket.socket:
    """The same connection under TLS; `lines` holds it in place of the plain one."""
    what = "there was no TLS handshake"
    lines.drop(line)
    line.settimeout(deadline.left(what))
    context = tls or ssl.create_default_context()
    secret = context.wrap_socket(line, server_hostname=host, do_handshake_on_connect=False)
    try:
        lines.hold(secret)
        secret.do_handshake()
    except TimeoutError:
        lines.drop(secret)
        secret.close()
        raise deadline.passed(what) from None
    except BaseException:
        lines.drop(secret)
        secret.close()
        raise
    return secret
