"""A client of OpenAI-compatible servers. Every request has a deadline and is repeated a few times
when it fails; what fails at last is an error that names the server and the cure.

Each request opens a connection of its own. That costs nothing beside the scoring of a row, and no
connection is ever stale.
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
"""Statuses after which another attempt may succeed; so may it after those from 500 on."""

PERMANENT = (501, 505)
"""Except after these: the server does not implement the request."""

SHOWN = 400
"""Characters that a message quotes of a server's own words."""

MIB = 1 << 20

RESUMES = "; the same command resumes the run from what is saved"


class ServerError(RuntimeError):
    """The server gave no usable answer in all attempts."""


class InvalidResponse(ValueError):
    """The server's answer is not what was asked for. Another attempt may get a valid one."""


class ClientError(Exception):
    """The server refuses the request, and would do so again. status: HTTP's. text: its reason."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text


class _TransientError(Exception):
    """The server cannot answer now. retry_after: the seconds to wait that it asks for."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class ServerClient:
    """One server's client; many threads may use it at once.

    Args:
        subject: the config's section, such as `teachers.NAME`. url: with or without a last `/v1`.
        key: for the Authorization header, or None.
        timeout: seconds for one attempt, from asking the name server to the last byte.
        attempts: how often a request is sent before it fails.
        concurrency: requests in flight at once (`map_concurrently`).
        max_answer_mib: the largest answer that is read.
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
            "Accept-Encoding": "identity",  # compressed, a few kilobytes might become gigabytes
            "Content-Type": "application/json",
            "Connection": "close",
        }
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._tls = ssl.create_default_context() if url.startswith("https:") else None
        self._connections = Connections()
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one answer is parsed at a time: it may take 100 MB
        self.retries = 0
        self._waiting = False  # an attempt failed, and no answer has come since

    def ask(self, path: str, body: Any = None, *, read: Callable[[bytearray], T]) -> T:
        """What `read` makes of the answer. body: posted as JSON; None: GET.

        Raises:
            ServerError: the last attempt failed too, or `read` found its answer invalid.
            ClientError: a 4xx or a redirect.
        """
        data = None if body is None else json.dumps(body).encode()
        begun, pause = time.monotonic(), 0.0
        fault: Exception
        for attempt in range(self._attempts):
            if attempt:
                with self._lock:
                    self.retries += 1
                # a sleep that `map_concurrently` can end
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
            except (
                ssl.SSLCertVerificationError
            ) as error:  # an OSError, but no attempt would cure it
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
        """The jobs' results, in order, `concurrency` at a time. The first that fails cancels all
        others."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                futures = [pool.submit(job) for job in jobs]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()  # raises the failure itself, not a cancelled request's
                return [future.result() for future in futures]
            except BaseException:  # Ctrl-C too: no thread may be left waiting for a server
                pool.shutdown(wait=False, cancel_futures=True)
                self._connections.cancel()
                raise
            finally:
                pool.shutdown()  # all threads have seen `cancelled` before it is cleared
                self._connections.cancelled.clear()

    def _too_long(self, path: str) -> ServerError:
        key = f"{self.subject}.max_answer_mib"
        return ServerError(
            f"{self.subject}: {self.url}{path} answers with more than {key} ="
            f" {self._max_answer_mib:g}: raise it, lower objective.k or shorten the episodes"
            f" (rollout.max_new_tokens, rollout.max_turns){RESUMES}"
        )

    def _say_so(self, path: str, fault: Exception) -> None:
        """Print what the run waits for, once for each outage."""
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
        if isinstance(fault, TimeoutError):
            return f"raise {self.subject}.timeout or lower its concurrency{RESUMES}"
        if isinstance(fault, InvalidResponse | _TransientError):
            return f"see the server's own log{RESUMES}"
        return f"is it running there? Start it, or correct {self.subject}.url{RESUMES}"


def _pause(attempt: int) -> float:
    """Seconds to wait before an attempt; the first one is attempt 0 and does not wait."""
    return min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def read_json(body: bytearray) -> Any:
    """The body as JSON. Raises InvalidResponse where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: it nests a thousand deep
        raise InvalidResponse(f"its answer is no JSON ({_described(error)})") from None


def _accepted(reply: Reply) -> bytearray:
    """The body of a 2xx; raises what its status means otherwise."""
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
        found = found.get("error", found)  # OpenAI: {"error": {"message"}}; older vLLM: {"message"}
        text = found if isinstance(found, str) else found["message"]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        text = body[: 100 * SHOWN].decode(errors="replace")
    return _line(text)


def _described(error: Exception) -> str:
    return _line(error) or type(error).__name__


def _line(said: object) -> str:
    """In one line, not too long; a key that the server repeats is not shown."""
    # hidden before it is cut to size: half a key would not be recognised
    return hidden(" ".join(str(said)[: 100 * SHOWN].split()))[:SHOWN]
