"""One HTTP request and its answer, within one deadline and one limit of bytes.

httpcore, the transport of httpx, speaks HTTP; this file is the network under it. httpcore's own
timeouts each bound a single wait, so a server that sends a byte a second would be read for ever:
here one deadline covers everything, from the name server to the last byte.

httpcore follows no redirect, so a key never goes to another host; it uses no proxy, reads no netrc
and decompresses nothing.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpcore2

from tutelage.distill.config.credentials import hidden

T = TypeVar("T")

SHOWN = 80
"""Characters that a message quotes of an answer's first line, where the answer is not HTTP."""

LOOK = 0.05
"""While a name server is asked: seconds between two checks whether the exchange was cancelled."""

logging.getLogger("httpcore2").setLevel(logging.INFO)  # for DEBUG it logs what servers say


class AnswerTooLong(Exception):
    """The server's answer has more bytes than are allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The server's answer. location: where a redirect points to. retry_after: the seconds to wait
    that the server asks for."""

    status: int
    body: bytearray
    location: str
    retry_after: float


class Connections:
    """The open sockets, so that another thread can cancel all exchanges."""

    def __init__(self) -> None:
        # weak: a socket leaves the set with its exchange, however that ends
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.cancelled = threading.Event()

    def check(self) -> None:
        """Raises ConnectionAbortedError once the exchanges are cancelled."""
        if self.cancelled.is_set():
            raise ConnectionAbortedError("another request failed")

    def hold(self, opened: socket.socket) -> None:
        """Let `cancel` reach this socket. Raises as `check`."""
        with self._lock:
            self.check()  # under the lock: `cancel` comes before, or sees the socket
            self._open.add(opened)

    def cancel(self) -> None:
        """End every exchange, and any that begins before `cancelled` is cleared."""
        self.cancelled.set()
        with self._lock:
            for opened in self._open:
                with suppress(OSError):  # it is closed
                    opened.shutdown(socket.SHUT_RDWR)  # wakes a blocked recv; close() does not


def exchange(
    url: str,
    data: bytes | None,
    headers: Mapping[bytes | str, bytes | str],
    *,
    timeout: float,
    max_bytes: int,
    connections: Connections,
    tls: ssl.SSLContext | None,
) -> Reply:
    """Send a request over a new connection and read the whole answer. data: posted; None: GET.
    timeout: seconds for all of it. max_bytes: of the answer with its headers.

    Raises:
        OSError: such as TimeoutError; ConnectionError where the answer is not HTTP.
        AnswerTooLong: more than `max_bytes`.
    """
    network = _Network(timeout, max_bytes, connections)
    where = httpcore2.URL(url)
    method = "GET" if data is None else "POST"
    try:
        with (
            httpcore2.HTTPConnection(where.origin, tls, network_backend=network) as connection,
            connection.stream(method, where, headers=headers, content=data) as response,
        ):
            return _read(response, max_bytes)
    except httpcore2.RemoteProtocolError as error:
        # h11 quotes bytes of the answer as Python's repr does. A key in it must be spelled as it is
        # in the environment, or `hidden` does not find it.
        said = str(error).rstrip(".").replace(r"\\", "\\").replace(r"\'", "'")
        began = f", after '{hidden(network.first_line)[:SHOWN]}'" if network.first_line else ""
        raise ConnectionError(f"broken HTTP: {said}{began}") from None


def _read(response: httpcore2.Response, max_bytes: int) -> Reply:
    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    if int(headers.get(b"content-length", 0)) > max_bytes:  # do not wait until it has come
        raise AnswerTooLong
    coding = headers.get(b"content-encoding", "identity").lower()
    if coding not in ("", "identity"):  # a few kilobytes might become gigabytes
        raise ConnectionError(f"its answer is compressed ({coding}), which nobody asked for")
    body = bytearray()  # grows in place: an answer may have 40 MB
    for part in response.iter_stream():
        body += part
    seconds = headers.get(b"retry-after", "")
    return Reply(
        status=response.status,
        body=body,
        location=headers.get(b"location", ""),
        # HTTP also allows a date here: not worth reading, the usual pause will do
        retry_after=float(seconds) if re.fullmatch("[0-9]{1,8}", seconds) else 0.0,
    )


class _Network(httpcore2.NetworkBackend, httpcore2.NetworkStream):
    """httpcore's network, and the one connection that it opens. The timeouts that httpcore passes
    are ignored: the deadline covers them."""

    _socket: socket.socket

    def __init__(self, timeout: float, max_bytes: int, connections: Connections) -> None:
        self._timeout, self._end = timeout, time.monotonic() + timeout
        self._max_bytes, self._received = max_bytes, 0
        self._connections = connections
        self.first_line = ""

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> _Network:
        """Connects to the first of the host's addresses that answers.

        Raises:
            OSError: why the last of them could not be reached.
        """
        fault = OSError(f"no address of {host} is known")
        for family, kind, protocol, _, address in self._addresses(host, port):
            self._socket = socket.socket(family, kind, protocol)
            try:
                self._connections.hold(self._socket)
                self._within(f"{host} could not be reached", self._socket.connect, address)
                # the request leaves in several writes: none may wait for the one before
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return self
            except OSError as error:
                self.close()
                fault = error
        raise fault

    def _addresses(self, host: str, port: int) -> list[Any]:
        """What the name server says. That may take minutes, and nothing interrupts the C library's
        getaddrinfo: a daemon thread calls it, and is abandoned at the deadline."""
        found: Future[list[Any]] = Future()

        def ask() -> None:
            try:
                found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        while not found.done():
            self._connections.check()
            wait([found], min(LOOK, self._left(f"no name server told the address of {host}")))
        return found.result()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, *_: Any, **__: Any
    ) -> _Network:
        self._socket = secret = ssl_context.wrap_socket(
            # the handshake comes below, where the deadline holds
            self._socket,
            server_hostname=server_hostname,
            do_handshake_on_connect=False,
        )
        try:
            self._connections.hold(secret)  # wrap_socket detached the one that was held
            self._within("there was no TLS handshake", secret.do_handshake)
        except BaseException:
            self.close()
            raise
        return self

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        while view:  # not sendall: each send gets what is left of the deadline
            view = view[self._within("it did not take the request", self._socket.send, view) :]

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        what = "its answer was not whole" if self._received else "there was no answer"
        data = self._within(what, self._socket.recv, max_bytes)
        if not self._received:
            self.first_line = data.partition(b"\n")[0].decode("latin-1").strip()
        self._received += len(data)
        if self._received > self._max_bytes:
            raise AnswerTooLong
        return data

    def close(self) -> None:
        self._socket.close()

    def _within(self, what: str, operation: Callable[..., T], *arguments: Any) -> T:
        """What the socket's operation returns. It gets the time that is left; then a TimeoutError
        says `what` did not happen."""
        self._socket.settimeout(self._left(what))
        try:
            return operation(*arguments)
        except TimeoutError:
            raise self._passed(what) from None

    def _left(self, what: str) -> float:
        if (left := self._end - time.monotonic()) <= 0:
            raise self._passed(what)
        return left

    def _passed(self, what: str) -> TimeoutError:
        return TimeoutError(f"{what} after {self._timeout:g} s")
