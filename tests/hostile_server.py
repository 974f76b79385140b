"""A server on a bare socket that does to each request what a function says: every way of being
wrong that HTTP, JSON and a model's numbers allow. The sound answer it starts from is given."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

END = 8.0
"""Seconds after which even an endless answer ends: a client that waits for it fails its test."""

Answer = dict[str, Any]
Act = Callable[["Caller"], None]


class Gone(Exception):
    """The client hung up."""


class Caller:
    """One connection: what was asked, and means of answering."""

    def __init__(self, line: socket.socket, head: str, body: bytes, sound: Answer) -> None:
        self.line, self.head, self.sound = line, head, sound
        self.path = head.split(" ", 2)[1]
        self.asked: Answer = json.loads(body) if body else {}
        self._end = time.monotonic() + END

    def send(self, data: bytes) -> None:
        if time.monotonic() > self._end:
            raise Gone
        try:
            self.line.sendall(data)
        except OSError:
            raise Gone from None

    def drip(self, data: bytes, each: float = 0.05) -> None:
        for at in range(len(data)):
            self.send(data[at : at + 1])
            time.sleep(each)

    def wait(self) -> None:
        """Keep the line open and say nothing, until the client goes."""
        self.line.settimeout(END)
        with contextlib.suppress(OSError):
            while self.line.recv(4096):
                pass

    def reply(
        self, body: bytes | Any, *, status: str = "200 OK", length: Any = None, **headers: str
    ) -> None:
        """A whole answer. length: what Content-Length says; False: none."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status}"]
        if length is not False:
            lines.append(f"Content-Length: {len(body) if length is None else length}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def chunks(self, data: bytes) -> None:
        """The head of a chunked answer, and then these bytes as they are."""
        self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data)

    @property
    def key(self) -> str:
        """What the client sent as its key."""
        (found,) = [x for x in self.head.split("\r\n") if x.lower().startswith("authorization:")]
        return found.partition("Bearer ")[2]


class HostileServer:
    """Does `act` to every request; `sound` makes the right answer to what is asked. tls: to talk
    under it. asked: how many connections came."""

    def __init__(
        self, act: Act, sound: Callable[[Answer], Answer], tls: ssl.SSLContext | None = None
    ) -> None:
        self._act, self._sound, self._tls, self.asked = act, sound, tls, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = self._listening.accept()
                self.asked += 1
                threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with contextlib.suppress(Gone, OSError, IndexError), self._encrypted(line) as line:
            data = bytearray()
            line.settimeout(END)
            while b"\r\n\r\n" not in data:
                if not (part := line.recv(65536)):
                    return
                data += part
            head, _, body = bytes(data).partition(b"\r\n\r\n")
            text = head.decode("latin-1")
            lengths = [x for x in text.split("\r\n") if x.lower().startswith("content-length:")]
            while lengths and len(body) < int(lengths[0].partition(":")[2]):
                body += line.recv(65536)
            asked = json.loads(body) if body else {}
            self._act(Caller(line, text, body, self._sound(asked) if "prompt" in asked else {}))

    def _encrypted(self, line: socket.socket) -> socket.socket:
        return self._tls.wrap_socket(line, server_side=True) if self._tls else line


def _spoiled(change: Callable[[list[Any]], Any]) -> Act:
    """The sound answer with its list of candidates changed; a list that is returned replaces it."""

    def act(caller: Caller) -> None:
        answer = copy.deepcopy(caller.sound)
        choice = answer["choices"][0]
        found = change(choice["prompt_logprobs"])
        if found is not None:
            choice["prompt_logprobs"] = found
        caller.reply(answer)

    return act


def _token(change: Callable[[Answer], Any]) -> Act:
    """The fourth token's candidates changed."""

    def whole(parts: list[Any]) -> None:
        found = change(parts[3])
        if found is not None:
            parts[3] = found

    return _spoiled(whole)


def _number(text: str) -> Act:
    """Every log-probability of the fourth token is this JSON."""

    def act(caller: Caller) -> None:
        answer = copy.deepcopy(caller.sound)
        for one in answer["choices"][0]["prompt_logprobs"][3].values():
            one["logprob"] = "@"
        caller.reply(json.dumps(answer).replace('"@"', text).encode())

    return act


def _id(change: Callable[[str], str]) -> Act:
    """The last candidate of the fourth token under another id."""

    def renamed(part: Answer) -> None:
        last = [*part][-1]
        part[change(last)] = part.pop(last)

    return _token(renamed)


def _body(data: bytes, status: str = "200 OK", **headers: str) -> Act:
    return lambda caller: caller.reply(data, status=status, **headers)


def _raw(data: bytes) -> Act:
    return lambda caller: caller.send(data)


def _forever(first: bytes, piece: bytes) -> Act:
    def act(caller: Caller) -> None:
        caller.send(first)
        while True:
            caller.send(piece)

    return act


def _reset(caller: Caller) -> None:
    caller.line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _half(caller: Caller) -> bytes:
    return json.dumps(caller.sound).encode()[:200]


def _then(first: bytes, last: Callable[[Caller], None]) -> Act:
    def act(caller: Caller) -> None:
        caller.send(first)
        last(caller)

    return act


def _packed(caller: Caller) -> None:
    caller.reply(gzip.compress(json.dumps(caller.sound).encode()), Content_Encoding="gzip")


def _bomb(caller: Caller) -> None:
    packer = zlib.compressobj(9, wbits=31)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    caller.reply(data, Content_Encoding="gzip")


def _moved(status: str, where: str) -> Act:
    return lambda caller: caller.reply(
        b"", status=status, Location=where.replace("KEY", caller.key)
    )


def _echo(status: str) -> Act:
    return lambda caller: caller.reply(
        {"error": {"message": f"no: \x1b[2J{caller.key} \ud800 [/bold]"}}, status=status
    )


def _tail(caller: Caller, extra: bytes) -> None:
    caller.reply(json.dumps(caller.sound).encode() + extra)


def _twice(part: Answer) -> None:
    """One candidate, once more in another's place."""
    *_, before, last = [*part]
    del part[last]
    part[f"0{before}"] = part[before]


def _own_first(part: Answer) -> None:
    """The token itself more probable than its most probable candidates."""
    first = next(iter(part))
    for name, one in part.items():
        one["logprob"] = -0.5 if name == first else -3.0


def _extra(part: Answer) -> None:
    for name in ("97", "98", "99"):
        part.setdefault(name, {"logprob": -30.0})


def _fewer(part: Answer) -> None:
    for name in [*part][1:3]:
        del part[name]


def _model(caller: Caller) -> None:
    caller.reply({**caller.sound, "model": "another"})


def _choices(change: Callable[[list[Any]], Any]) -> Act:
    return lambda caller: caller.reply({"choices": change(caller.sound["choices"])})


OK = b"HTTP/1.1 200 OK\r\n"
DRIP = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n"

TRANSPORT: dict[str, tuple[Act, str]] = {
    "resets the connection": (_reset, "reset by peer"),
    "closes without a word": (lambda _: None, "without sending a response"),
    "closes in the status line": (_raw(b"HTTP/1.1 2"), "HTTP/1.1 2"),
    "closes in the headers": (_raw(OK + b"Content-Le"), "without sending a response"),
    "closes in the body": (
        lambda c: c.send(OK + b"Content-Length: 4000\r\n\r\n" + _half(c)),
        "without sending complete message body",
    ),
    "says nothing": (Caller.wait, "no answer after"),
    "says nothing after the status line": (_then(OK, Caller.wait), "(not whole|no answer) after"),
    "says nothing after the headers": (_then(DRIP, Caller.wait), "(not whole|no answer) after"),
    "says nothing in the body": (_then(DRIP + b"{", Caller.wait), "(not whole|no answer) after"),
    "drips the status line": (lambda c: c.drip(OK * 9), "(not whole|no answer) after"),
    "drips headers": (
        lambda c: c.drip(OK + b"X: " + b"y" * 200 + b"\r\n\r\n"),
        "(not whole|no answer) after",
    ),
    "drips the body": (_then(DRIP, lambda c: c.drip(b" " * 200)), "(not whole|no answer) after"),
    "drips chunks": (
        lambda c: (c.chunks(b""), c.drip(b"1\r\n \r\n" * 40))[0],
        "(not whole|no answer) after",
    ),
    "endless status line": (_forever(b"HTTP/1.1 200 ", b"x" * 9999), "buffer too long"),
    "endless header": (_forever(OK + b"X: ", b"x" * 9999), "buffer too long"),
    "endless headers": (_forever(OK, b"X: y\r\n" * 99), "buffer too long"),
    "continues for ever": (_forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999), "max_answer_mib"),
    "endless body": (_forever(OK + b"\r\n", b"[" * 65536), "max_answer_mib"),
    "endless chunks": (
        _forever(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"4000\r\n" + b" " * 0x4000 + b"\r\n",
        ),
        "max_answer_mib",
    ),
    "endless trailers": (
        _forever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 999),
        "buffer too long",
    ),
    "announces too much": (
        _then(OK + b"Content-Length: 9" + b"0" * 15 + b"\r\n\r\n", Caller.wait),
        "max_answer_mib",
    ),
    "announces more than it sends": (
        lambda c: c.reply(c.sound, length=10**6),
        r"without sending complete message body \(received \d+ bytes, expected 1000000\)",
    ),
    "announces less than it sends": (lambda c: c.reply(c.sound, length=100), "no completion"),
    "chunk size is no number": (
        lambda c: c.chunks(b"zz\r\n{}\r\n0\r\n\r\n"),
        "illegal chunk header.*zz",
    ),
    "chunk size is negative": (
        lambda c: c.chunks(b"-5\r\n{}\r\n0\r\n\r\n"),
        "illegal chunk header.*-5",
    ),
    "chunk ends early": (lambda c: c.chunks(b"ff\r\n" + _half(c)[:99]), "incomplete chunked read"),
    "chunks are none": (lambda c: c.chunks(_half(c)), "closed connection"),
    "packed though not asked for": (_packed, r"compressed \(gzip\)"),
    "a bomb": (_bomb, r"compressed \(gzip\)"),
    "packed by what nobody knows": (
        lambda c: c.reply(c.sound, Content_Encoding="zstd, br"),
        r"compressed \(zstd, br\)",
    ),
    "another protocol": (_raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "SSH-2.0"),
    "TLS where none was asked": (_raw(b"\x15\x03\x01\x00\x02\x02\x46"), r"\\x15"),
    "status without a number": (_raw(b"HTTP/1.1 OK\r\n\r\n"), "HTTP/1.1 OK"),
    "status 99": (_body(b"{}", "99 Low"), "HTTP/1.1 99|HTTP 99"),
    "status 101": (_body(b"", "101 Switching Protocols"), "HTTP/1.1 101"),
    "status 204": (_body(b"", "204 No Content"), "no completion"),
    "status 206": (lambda c: c.reply(_half(c), status="206 Partial Content"), "no completion"),
    "status 304": (_body(b"", "304 Not Modified"), "redirects to nowhere"),
    "status 301": (_moved("301 Moved", "http://127.0.0.1:9/v1"), "redirects to http://127"),
    "status 302 with a password": (
        _moved("302 Found", "http://me:secretword@h/?api_key=KEY"),
        r"redirects to http://\[hidden\]@h/",
    ),
    "status 307 to itself": (_moved("307 Temporary", "/v1/completions"), "redirects to /v1"),
    "status 308": (_moved("308 Permanent", "https://elsewhere"), "redirects to https://else"),
    "status 400": (_body(b"<html><h1>Bad</h1>", "400 Bad Request"), "HTTP 400: <html>"),
    "status 401": (_echo("401 Unauthorized"), "refuses the key"),
    "status 403": (_echo("403 Forbidden"), "refuses the key"),
    "status 404": (_body(b"<html>" * 9999, "404 Not Found"), "no OpenAI-compatible server"),
    "status 413": (_echo("413 Too Large"), "HTTP 413"),
    "status 418": (_body(b"\xff\xfe\x00", "418 Teapot"), "HTTP 418"),
    "status 422": (_body(b'{"error": {"message": ["x"]}}', "422 No"), "HTTP 422"),
    "status 429": (_body(b"slow", "429 Too Many"), "HTTP 429: slow"),
    "status 429, soon": (_body(b"{}", "429 Too Many", Retry_After="0"), "HTTP 429"),
    "status 429, never": (_body(b"x", "429 No", Retry_After="99999999999"), "HTTP 429"),
    "status 429, some day": (_body(b"x", "429 No", Retry_After="-1; \u00b2"), "HTTP 429"),
    "status 500": (_echo("500 Broken"), r"HTTP 500: no: \\x1b\[2J\[hidden\]"),
    "status 500, packed": (_body(b"\x1f\x8b", "500 No", Content_Encoding="gzip"), "compressed"),
    "status 500, deep": (_body(b"[" * 99_999, "500 No"), "HTTP 500"),
    "status 501": (_body(b"no", "501 Not Implemented"), "HTTP 501"),
    "status 502": (_body(b"<html>nginx</html>", "502 Bad Gateway"), "HTTP 502: <html>nginx"),
    "status 503": (_body(b'{"error": null}', "503 Busy"), "HTTP 503"),
    "status 504": (_body(b"null", "504 Timeout"), "HTTP 504"),
    "status 599": (_body(b"", "599 Odd"), "HTTP 599"),
}
"""What is done to every completion, and what must be said of it."""

GARBAGE: dict[str, tuple[Act, str]] = {
    "nothing": (_body(b""), "no completion"),
    "a page": (_body(b"<!doctype html><html></html>"), "no completion"),
    "a stream of events": (_body(b'data: {"choices": []}\n\ndata: [DONE]\n'), "no completion"),
    "no text": (_body(b"\xff\xfe\xfd\x80"), "no completion"),
    "cut": (lambda c: c.reply(_half(c)), "no completion"),
    "two answers": (lambda c: _tail(c, b"\n{}"), "no completion"),
    "null": (_body(b"null"), "no completion"),
    "a list": (_body(b"[]"), "no completion"),
    "a number": (_body(b"7"), "no completion"),
    "a text": (_body(b'"choices"'), "no completion"),
    "deep lists": (_body(b"[" * 200_000 + b"]" * 200_000), "no completion"),
    "deep objects": (_body(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "no completion"),
    "deep candidates": (_body(b'{"7":' * 200_000 + b"1" + b"}" * 200_000), "no completion"),
    "a number of 5,000 digits": (_body(b'{"choices": ' + b"7" * 5000 + b"}"), "no completion"),
    "an error with status 200": (
        _body(b'{"error": {"message": "the engine is dead"}}'),
        "answers with an error.*engine is dead",
    ),
    "another model's": (_model, "of model 'another', not 'm'"),
    "no choices": (_body(b'{"object": "text_completion"}'), "no completion"),
    "choices that are none": (_choices(lambda _: []), "no completion"),
    "choices that are two": (_choices(lambda found: found * 2), "no completion"),
    "choices in an object": (_choices(lambda found: {"0": found[0]}), "no completion"),
    "a choice that is a text": (_choices(lambda _: ["x"]), "no completion"),
    "no prompt_logprobs": (_choices(lambda _: [{"text": "x"}]), "is it vLLM's server"),
    "prompt_logprobs as a text": (_spoiled(lambda _: "x"), "no completion"),
    "prompt_logprobs as an object": (_spoiled(lambda parts: {"0": parts}), "no completion"),
    "prompt_logprobs as a number": (_spoiled(lambda _: 5), "no completion"),
    "candidates as lists": (
        _spoiled(lambda parts: [part and [*part] for part in parts]),
        "no completion",
    ),
    "candidates as texts": (_spoiled(lambda parts: ["xy" for _ in parts]), "no completion"),
    "none at all": (_spoiled(lambda parts: [None] * len(parts)), "token 3 has 0 candidates"),
    "none of a token's": (_token(lambda _: {}), "token 3 has 0 candidates"),
    "too few of a token's": (_token(_fewer), r"token 3 has \d candidates"),
    "too many of a token's": (_token(_extra), r"token 3 has \d candidates"),
    "a token too few": (_spoiled(lambda parts: parts[:-1]), r"\d+ positions for \d+ tokens"),
    "a token too many": (
        _spoiled(lambda parts: [*parts, parts[-1]]),
        r"\d+ positions for \d+ tokens",
    ),
    "the tokens backwards": (_spoiled(lambda parts: parts[::-1]), r"token \d+ "),
    "the tokens one later": (_spoiled(lambda parts: [None, *parts[:-1]]), "token 3 itself"),
    "the token itself left out": (
        _token(lambda part: {str(96 + i): {"logprob": -3.0 - i} for i in range(len(part))}),
        "token 3 itself",
    ),
    "a candidate twice": (_token(_twice), "token 3 names one candidate twice"),
    "the token before the first": (_token(_own_first), "token 3 itself has a log-prob"),
    "NaN": (_number("NaN"), "token 3 has a log-probability of nan"),
    "Infinity": (_number("Infinity"), "token 3 has a log-probability of inf"),
    "-Infinity": (_number("-Infinity"), "token 3 has a log-probability of -inf"),
    "positive": (_number("0.25"), "token 3 has a log-probability of 0.25"),
    "all certain": (_number("0.0"), r"token 3 has .* probability among its candidates"),
    "as unlikely as nothing": (_number("-700.5"), "token 3 has a log-probability of -700"),
    "1e400": (_number("1e400"), "token 3 has a log-probability of inf"),
    "-1e300": (_number("-1e300"), "token 3 has a log-probability of -inf"),
    "a huge integer": (_number("-" + "9" * 400), "no completion|-inf"),
    "numbers as texts": (_number('"-1.5"'), "that is no number"),
    "numbers as truth": (_number("true"), "that is no number"),
    "numbers as null": (_number("null"), "that is no number"),
    "numbers as lists": (_number("[-1.5]"), "that is no number"),
    "numbers as objects": (_number('{"value": -1.5}'), "that is no number"),
    "numbers as surrogates": (_number(r'"\ud800"'), "that is no number"),
    "an id beyond the vocabulary": (_id(lambda _: "4711"), "outside the vocabulary of 101"),
    "an id beyond 32 bits": (_id(lambda _: "4" * 12), "no completion"),
    "an id of 5,000 digits": (_id(lambda _: "4" * 5000), "no completion"),
    "an id below 0": (_id(lambda i: f"-{i}"), "outside the vocabulary|no completion"),
    "an id that is a text": (_id(lambda _: "cat"), "no completion"),
    "an id that is a fraction": (_id(lambda i: f"{i}.5"), "no completion"),
}
"""Answers of status 200 that are none."""


def _framed(caller: Caller) -> None:
    body = json.dumps(caller.sound).encode()
    pieces = [body[at : at + 999] for at in range(0, len(body), 999)]
    data = b"".join(b"%x;x=y\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    caller.chunks(data + b"0\r\nX: y\r\n\r\n")


def _told_first(caller: Caller) -> None:
    caller.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    caller.reply(caller.sound)


def _surrogates(caller: Caller) -> None:
    answer = copy.deepcopy(caller.sound)
    for part in answer["choices"][0]["prompt_logprobs"][1:]:
        for one in part.values():
            one["decoded_token"] = "\ud83d \x00"
    caller.reply(answer)


SOUND: dict[str, Act] = {
    "plain": lambda c: c.reply(c.sound),
    "in chunks": _framed,
    "until the line closes": lambda c: c.reply(c.sound, length=False),
    "by HTTP/1.0": lambda c: c.send(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(c.sound).encode()),
    "after 100 Continue": _told_first,
    "with a byte order mark": lambda c: c.reply(b"\xef\xbb\xbf" + json.dumps(c.sound).encode()),
    "with half characters": _surrogates,
    "with its model's name": lambda c: c.reply({**c.sound, "model": "m"}),
    "with a line end": lambda c: _tail(c, b"\r\n"),
    "and more than was announced": lambda c: c.reply(
        json.dumps(c.sound).encode() + b"x" * 9, length=len(json.dumps(c.sound))
    ),
}
"""Unusual, and right."""


def listing(found: bytes | Any) -> Act:
    """/v1/models says this; completions are sound."""

    def act(caller: Caller) -> None:
        caller.reply(found if caller.path == "/v1/models" else caller.sound)

    return act
