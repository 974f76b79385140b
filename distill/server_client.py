"""HTTP with an OpenAI-compatible server: every wait has a deadline, every failure is tried again a
few times, and what is left is an error that names the server and the cure.

Each request has a connection of its own: beside the scoring of a row it costs nothing, and none is
ever stale.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second attempt, doubled before each further one, up to the longest."""

TRY_AGAIN = (408, 425, 429)
"""And everything from 500 on: the server's trouble of the moment."""


class ServerError(RuntimeError):
    """The server did not answer, whatever was tried."""


class Garbage(ValueError):
    """What was sent is no answer to the question."""


class Refused(Exception):
    """The server understood, and said no: it would again. status: HTTP's. text: the server's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text


class _Trouble(Exception):
    """An answer that says that there is none now."""


class ServerClient:
    """A server, as many threads may ask it.

    Args:
        subject: whose it is, such as `teachers.NAME`. url: with or without a last `/v1`.
        key: for the Authorization header, or None.
        timeout: seconds of one answer, from the first byte out to the last one in.
        attempts: at one answer. concurrency: requests in flight (`together`).
    """

    def __init__(
        self,
        subject: str,
        url: str,
        *,
        timeout: float,
        attempts: int,
        concurrency: int,
        key: str | None = None,
    ) -> None:
        self.subject, self.url = subject, url.rstrip("/").removesuffix("/v1")
        self._timeout, self._attempts, self._concurrency = timeout, attempts, concurrency
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._stopping = threading.Event()
        self._live: set[socket.socket] = set()  # their connections forget them too soon
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one answer is unpacked at a time: it may take 100 MB
        self.retries = 0
        self._waiting = False  # since an attempt that failed, with no answer yet

    def ask(self, path: str, body: Any = None, *, read: Callable[[bytearray], T]) -> T:
        """What `read` makes of the answer. body: posted as JSON; None: GET.

        Raises:
            ServerError: no answer, or one of which `read` made Garbage, at the last attempt too.
            Refused: a 4xx.
        """
        data = None if body is None else json.dumps(body).encode()
        begun = time.monotonic()
        for attempt in range(self._attempts):
            if attempt:
                with self._lock:
                    self.retries += 1
                self._stopping.wait(_pause(attempt))
            if self._stopping.is_set():
                raise ServerError(f"{self.subject}: {self.url}: another request failed")
            try:
                answer = self._exchange(path, data)
                with self._reading:
                    found = read(answer)
                self._waiting = False
                return found
            except (OSError, http.client.HTTPException, Garbage, _Trouble) as error:
                fault: Exception = error
                if attempt + 1 < self._attempts:
                    self._say_so(path, fault)
        seconds = time.monotonic() - begun
        raise ServerError(
            f"{self.subject}: {self.url}{path} gave no answer in {self._attempts} attempts and"
            f" {seconds:.0f} s, at last: {_described(fault)}: {self._cure(fault)}"
        ) from fault

    def together(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """The jobs' results, in order; so many at a time as the server is asked at once. The first
        one that fails ends all."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                futures = [pool.submit(job) for job in jobs]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:  # Ctrl-C too: no thread may be left waiting for a server
                pool.shutdown(wait=False, cancel_futures=True)
                self._hang_up()
                raise
            finally:
                pool.shutdown()
                self._stopping.clear()

    def _exchange(self, path: str, data: bytes | None) -> bytearray:
        """One request and its whole answer."""
        where = urlsplit(self.url)
        https = where.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        deadline = time.monotonic() + self._timeout
        method = "GET" if data is None else "POST"
        with (
            closing(kind(str(where.hostname), where.port, timeout=self._timeout)) as connection,
            self._lined_up(connection),
        ):
            connection.request(method, where.path + path, data, self._headers)
            response = connection.getresponse()
            body = bytearray()  # grows in place: an answer may have 40 MB
            while part := response.read1(1 << 20):
                body += part
                if time.monotonic() > deadline:  # a socket's timeout is of each piece
                    raise TimeoutError(f"its answer was not whole after {self._timeout:g} s")
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        return _accepted(response.status, body)

    @contextmanager
    def _lined_up(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """Connected, and `_hang_up` reaches it."""
        connection.connect()
        line = connection.sock
        with self._lock:
            if self._stopping.is_set():  # too late to be reached
                raise ConnectionAbortedError("another request failed")
            self._live.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._live.discard(line)

    def _say_so(self, path: str, fault: Exception) -> None:
        """Nobody should wonder what a run waits for: one line an outage."""
        with self._lock:
            told, self._waiting = self._waiting, True
        if not told:
            longest = sum(_pause(attempt) for attempt in range(1, self._attempts))
            print(
                f"tutelage: {self.subject}: {self.url}{path} gave no answer: {_described(fault)};"
                f" asking again, {self._attempts - 1} times in {longest:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def _hang_up(self) -> None:
        """End every request in flight."""
        self._stopping.set()
        with self._lock:
            for line in self._live:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    def _cure(self, fault: Exception) -> str:
        again = "; the same command goes on from what is saved"
        if isinstance(fault, TimeoutError):
            return f"raise {self.subject}.timeout or lower its concurrency" + again
        if isinstance(fault, Garbage | _Trouble):
            return "see the server's own log" + again
        return f"is it running there? Start it, or correct {self.subject}.url" + again


def _pause(attempt: int) -> float:
    """Seconds before an attempt after the first, which is 0."""
    return min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def read_json(body: bytearray) -> Any:
    """Raises Garbage for what is no JSON."""
    try:
        return json.loads(body)
    except ValueError as error:
        raise Garbage(f"its answer is no JSON ({error})") from None


def _accepted(status: int, body: bytearray) -> bytearray:
    if 200 <= status < 300:
        return body
    text = _message(body)
    if status >= 500 or status in TRY_AGAIN:
        raise _Trouble(f"HTTP {status}: {text}")
    raise Refused(status, text)


def _message(body: bytearray) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found["message"]
    except (ValueError, AttributeError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:400]


def _described(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
