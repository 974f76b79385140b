"""Questions to an OpenAI-compatible server: every wait has a deadline, every failure is tried again
a few times, and what is left is an error that names the server and the cure.

Each request has a connection of its own: beside the scoring of a row it costs nothing, and none is
ever stale.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tutelage.distill.config.credentials import hidden
from tutelage.distill.teachers.exchange import AnswerTooLong, Connections, Reply, exchange

T = TypeVar("T")

PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second attempt, doubled before each further one, up to the longest."""

TRANSIENT = (408, 425, 429)
"""Statuses of which another attempt may be rid; all from 500 on, too."""

PERMANENT = (501, 505)
"""But these: the server was not made for the request."""

SHOWN = 400
"""Characters of a server's own words in a message."""

MIB = 1 << 20


class ServerError(RuntimeError):
    """The server did not answer, whatever was tried."""


class InvalidResponse(ValueError):
    """What the server sent does not answer the question."""


class ClientError(Exception):
    """The server refuses the request, and would again. status: HTTP's. text: the server's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text


class _TransientError(Exception):
    """The server says that it cannot answer now. retry_after: seconds that it asks for."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class ServerClient:
    """A server, as many threads may ask it.

    Args:
        subject: whose it is, such as `teachers.NAME`. url: with or without a last `/v1`.
        key: for the Authorization header, or None.
        timeout: seconds of one answer, from the name server's to the last byte.
        attempts: at one answer. concurrency: requests in flight (`map_concurrently`).
        max_answer_mib: of one answer.
    """

    def __init__(
        self,
        subject: str,
        url: str,
        *,
        timeout: float,
        attempts: int,
        concurrency: int,
        max_answer_mib: float,
        key: str | None = None,
    ) -> None:
        self.subject, self.url = subject, url.rstrip("/").removesuffix("/v1")
        self._timeout, self._attempts, self._concurrency = timeout, attempts, concurrency
        self._max_answer_mib = max_answer_mib
        self._headers: dict[bytes | str, bytes | str] = {
            "Host": urlsplit(self.url).netloc,
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "Connection": "close",
        }
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._tls = ssl.create_default_context() if url.startswith("https:") else None
        self._connections = Connections()
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one answer is unpacked at a time: it may take 100 MB
        self.retries = 0
        self._waiting = False  # since an attempt that failed, with no answer yet

    def ask(self, path: str, body: Any = None, *, read: Callable[[bytearray], T]) -> T:
        """What `read` makes of the answer. body: posted as JSON; None: GET.

        Raises:
            ServerError: no answer, or for `read` an InvalidResponse, at the last attempt too.
            ClientError: a 4xx.
        """
        data = None if body is None else json.dumps(body).encode()
        begun, pause = time.monotonic(), 0.0
        fault: Exception
        for attempt in range(self._attempts):
            if attempt:
                with self._lock:
                    self.retries += 1
                self._connections.cancelled.wait(max(_pause(attempt), pause))
            if self._connections.cancelled.is_set():
                raise ServerError(f"{self.subject}: {self.url}: another request failed")
            try:
                reply = exchange(
                    self.url + path,
                    data,
                    self._headers,
                    timeout=self._timeout,
                    max_bytes=int(self._max_answer_mib * MIB),
                    connections=self._connections,
                    tls=self._tls,
                )
                answer = _accepted(reply)
                with self._reading:
                    found = read(answer)
                self._waiting = False
                return found
            except AnswerTooLong:
                raise self._too_long(path) from None
            except ssl.SSLCertVerificationError as error:  # it would be the same again
                raise ServerError(
                    f"{self.subject}: {self.url}: its certificate is not to be trusted"
                    f" ({_described(error)}): correct {self.subject}.url, or set SSL_CERT_FILE to"
                    " your own authority's"
                ) from None
            except _TransientError as error:
                fault, pause = error, min(error.retry_after, LONGEST_PAUSE)
            except (OSError, InvalidResponse) as error:
                fault, pause = error, 0.0
            if attempt + 1 < self._attempts:
                self._say_so(path, fault)
        seconds = time.monotonic() - begun
        raise ServerError(
            f"{self.subject}: {self.url}{path} gave no answer in {self._attempts} attempts and"
            f" {seconds:.0f} s, at last: {_described(fault)}: {self._cure(fault)}"
        ) from None  # the fault may hold what the server said at length

    def map_concurrently(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
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
                self._connections.cancel()
                raise
            finally:
                pool.shutdown()
                self._connections.cancelled.clear()

    def _too_long(self, path: str) -> ServerError:
        key = f"{self.subject}.max_answer_mib"
        return ServerError(
            f"{self.subject}: {self.url}{path} answers with more than {key} ="
            f" {self._max_answer_mib:g}: raise it, lower objective.k or shorten the episodes"
            " (rollout.max_new_tokens, rollout.max_turns); the same command goes on from what is"
            " saved"
        )

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

    def _cure(self, fault: Exception) -> str:
        again = "; the same command goes on from what is saved"
        if isinstance(fault, TimeoutError):
            return f"raise {self.subject}.timeout or lower its concurrency" + again
        if isinstance(fault, InvalidResponse | _TransientError):
            return "see the server's own log" + again
        return f"is it running there? Start it, or correct {self.subject}.url" + again


def _pause(attempt: int) -> float:
    """Seconds before an attempt after the first, which is 0."""
    return min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def read_json(body: bytearray) -> Any:
    """Raises InvalidResponse for what is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidResponse(f"its answer is no JSON ({_described(error)})") from None


def _accepted(reply: Reply) -> bytearray:
    status = reply.status
    if 200 <= status < 300:
        return reply.body
    text = _message(reply.body)
    if 300 <= status < 400:
        there = hidden(reply.location)[:SHOWN] or "nowhere"
        raise ClientError(
            status, f"it redirects to {there}, where no key is sent: url must name it"
        )
    if status not in PERMANENT and (status < 200 or status >= 500 or status in TRANSIENT):
        raise _TransientError(f"HTTP {status}: {text}", reply.retry_after)
    raise ClientError(status, text)


def _message(body: bytearray) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found["message"]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        text = body[: 100 * SHOWN].decode(errors="replace")
    return _line(text)


def _described(error: Exception) -> str:
    return _line(error) or type(error).__name__


def _line(said: object) -> str:
    """In one line, not too long; a key that the server repeats is not shown."""
    return hidden(" ".join(str(said)[: 100 * SHOWN].split()))[:SHOWN]
