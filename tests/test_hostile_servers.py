"""Servers that misbehave: within the deadline and the size limit each ends in one line that names
the teacher, the address, what happened and the cure, and nothing that they say is taken for scores.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hostile_server import GARBAGE, SOUND, TRANSPORT, Act, Caller, HostileServer, listing
from tests.stand_in_server import StandIn
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.resolved import support_of
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.objectives import Needs
from tutelage.distill.teachers import http_client
from tutelage.distill.teachers.fingerprint import scored_row
from tutelage.distill.teachers.http_client import ClientError, ServerError
from tutelage.distill.teachers.server import ServerTeacher, check_server, read_candidates
from tutelage.scheduler.episodes import Row

pytestmark = pytest.mark.runs

KEY = "sk-livesecretofthehostileservertest"
VOCABULARY, K = 101, 4


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "PAUSE", 0.01)
    monkeypatch.setattr(http_client, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("HOSTILE_KEY", KEY)


@pytest.fixture(scope="module")
def sound(make_model: Callable[..., Any]) -> Iterator[Callable[[Any], Any]]:
    """The right answer to a completion."""
    model = StandIn(make_model(seed=9))
    yield model._scored
    model.close()


@pytest.fixture
def serve(sound: Callable[[Any], Any]) -> Iterator[Callable[..., HostileServer]]:
    servers = []

    def serve(act: Act, **options: Any) -> HostileServer:
        servers.append(HostileServer(act, sound, **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


Serve = Callable[..., HostileServer]


def _row() -> Row:
    row = scored_row(np.arange(3, 15))
    turns_T = row.turns_T.copy()
    turns_T[:3] = -1  # token 3 is the first that counts
    return Row(
        ids_T=row.ids_T,
        turns_T=turns_T,
        behavior_logprobs_T=row.behavior_logprobs_T,
        branches_T=row.branches_T,
    )


def _teacher(url: str, **options: Any) -> ServerTeacher:
    settings = {"timeout": 0.3, "attempts": 2, "max_answer_mib": 4.0} | options
    config = TeacherConfig(
        engine="server", url=url, model="m", api_key_env="HOSTILE_KEY", **settings
    )
    return ServerTeacher("one", config, vocabulary=VOCABULARY)


def _said(url: str, **options: Any) -> str:
    """What is raised of a server, after it has been checked for what every message must be."""
    with pytest.raises((ServerError, ConfigError)) as raised:
        _teacher(url, **options).score([_row()], Needs(k=K))
    text = str(raised.value)
    assert text.startswith("teachers.one") and url in text, text
    assert KEY not in text and "secretword" not in text
    assert len(text) < 1500 and text.isprintable() and text.encode()
    assert re.search(
        r"same command|correct|choose|raise|set teachers|see its log|url must name|no key is sent",
        text,
    ), text
    return text


@pytest.mark.parametrize("kind", TRANSPORT)
def test_what_is_no_answer_is_told_in_one_line(
    serve: Serve, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    act, says = TRANSPORT[kind]
    # Short where the deadline is what ends it; a slow machine must not make it end the others.
    text = _said(serve(act).url, timeout=0.3 if " after" in says else 20.0)
    assert re.search(says, text), text
    told = capfd.readouterr().err
    assert told.count("\n") <= 1 and KEY not in told


@pytest.mark.parametrize("kind", GARBAGE)
def test_an_answer_that_is_none_is_refused_by_name(serve: Serve, kind: str) -> None:
    act, says = GARBAGE[kind]
    text = _said(serve(act).url, timeout=5.0)
    assert re.search(says, text, re.DOTALL), text


@pytest.mark.parametrize("kind", SOUND)
def test_unusual_answers_that_are_right_are_taken(serve: Serve, kind: str) -> None:
    exact = _teacher(serve(SOUND["plain"]).url, timeout=5.0).score([_row()], Needs(k=K))[0]
    (found,) = _teacher(serve(SOUND[kind]).url, timeout=5.0, attempts=1).score([_row()], Needs(k=K))
    assert (found.ids_NK == exact.ids_NK).all() and (found.sampled_N == exact.sampled_N).all()


@pytest.mark.parametrize("kind", ["closes without a word", "status 503", "drips the body", "cut"])
def test_what_passes_is_asked_again(serve: Serve, kind: str) -> None:
    act, _ = (TRANSPORT | GARBAGE)[kind]
    acts = iter([act])

    def at_first(caller: Caller) -> None:
        next(acts, SOUND["plain"])(caller)

    teacher = _teacher(serve(at_first).url, attempts=3)
    assert len(teacher.score([_row()], Needs(k=K))) == 1 and teacher.retries == 1


@pytest.mark.parametrize("kind", ["status 301", "status 400", "endless body", "status 501"])
def test_what_would_be_the_same_again_is_not_asked_again(serve: Serve, kind: str) -> None:
    server = serve(TRANSPORT[kind][0])
    _said(server.url, attempts=5, timeout=20.0)
    assert server.asked == 1


@pytest.mark.parametrize("where", ["{}", "HTTP/1.1 200 OK\r\n{}", "HTTP/1.1 200 OK\r\nX '{}"])
def test_a_key_in_what_is_no_http_is_hidden(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """h11 quotes such a line as Python would, so that some keys look otherwise."""
    monkeypatch.setenv("HOSTILE_KEY", r"""k'7x"q2\w9z""")
    server = serve(lambda caller: caller.send(f"{where.format(caller.key)}\r\n\r\n".encode()))
    text = _said(server.url, timeout=20.0)
    assert "[hidden]" in text and "7x" not in text and "q2" not in text and "w9z" not in text


def test_no_log_holds_what_a_server_says(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server = serve(lambda caller: caller.reply(caller.sound, X_Key=caller.key))
    assert _teacher(server.url, timeout=20.0).score([_row()], Needs(k=K))
    assert KEY not in caplog.text


def test_a_redirect_takes_no_key_anywhere(serve: Serve) -> None:
    there = serve(SOUND["plain"])
    here = serve(lambda c: c.reply(b"", status="307 Moved", Location=f"{there.url}/v1/completions"))
    assert there.url in _said(here.url)
    assert there.asked == 0


def test_a_server_that_asks_for_time_gets_it_up_to_a_bound(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "LONGEST_PAUSE", 30.0)
    waits: list[float] = []
    for asked in ("7", "99999", "soon", "-3"):
        server = serve(partial(Caller.reply, body=b"", status="429 No", Retry_After=asked))
        teacher = _teacher(server.url)
        monkeypatch.setattr(teacher._client._connections.cancelled, "wait", waits.append)
        with pytest.raises(ServerError, match="HTTP 429"):
            teacher.score([_row()], Needs(k=K))
    assert waits == [7.0, 30.0, 0.01, 0.01]


class TestAddresses:
    def test_a_name_that_nobody_knows(self) -> None:
        text = _said("http://no-such-host.invalid:8000")
        assert "is it running there?" in text

    def test_a_name_server_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        released = threading.Event()

        def silent(*_: Any, **__: Any) -> Any:
            released.wait(20)
            raise socket.gaierror("at last")

        monkeypatch.setattr(socket, "getaddrinfo", silent)
        assert "no name server told the address of host" in _said("http://host:8000")
        released.set()

    def test_whoever_hangs_up_does_not_wait_for_a_name_server(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asking, released, answered = threading.Event(), threading.Event(), threading.Event()

        def silent(*_: Any, **__: Any) -> Any:
            asking.set()
            if not released.wait(20):
                answered.set()
            raise socket.gaierror("at last")

        def refused() -> None:
            assert asking.wait(10)
            raise ClientError(400, "no")

        monkeypatch.setattr(socket, "getaddrinfo", silent)
        client = _teacher("http://host:8000", timeout=60.0, concurrency=2)._client
        with pytest.raises(ClientError):
            client.map_concurrently([refused, lambda: client.ask("/x", {}, read=lambda _: None)])
        assert not answered.is_set()
        released.set()

    def test_whoever_hangs_up_does_not_wait_for_a_connection(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            address = full.getsockname()
            waiting = [socket.socket() for _ in range(8)]
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(address)
            client = _teacher(f"http://127.0.0.1:{address[1]}", timeout=60.0)._client

            def refused() -> None:
                while not client._connections._open:
                    time.sleep(0.01)
                time.sleep(0.2)  # until it connects
                raise ClientError(400, "no")

            begun = time.monotonic()
            with pytest.raises(ClientError):
                client.map_concurrently(
                    [refused, lambda: client.ask("/x", {}, read=lambda _: None)]
                )
            assert time.monotonic() - begun < 30
            for one in waiting:
                one.close()

    def test_an_address_of_ip_version_6(self) -> None:
        assert "is it running there?" in _said("http://[::1]:9")

    def test_a_host_that_does_not_take_the_call(self) -> None:
        """Its queue of connections is full."""
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            address = full.getsockname()
            waiting = [socket.socket() for _ in range(8)]
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(address)
            time.sleep(0.1)
            text = _said(f"http://127.0.0.1:{address[1]}")
            assert re.search(r"could not be reached after 0\.3 s|no answer after 0\.3 s", text)
            for one in waiting:
                one.close()

    def test_a_server_without_tls_behind_https(self, serve: Serve) -> None:
        url = serve(Caller.wait).url.replace("http:", "https:")
        assert "there was no TLS handshake after 0.3 s" in _said(url)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
class TestUnderTls:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> tuple[Path, Path]:
        """Signed by itself, for 127.0.0.1; and its key."""
        certificate, key = tmp_path / "certificate", tmp_path / "key"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=here"]
        names = ["-addext", "subjectAltName=IP:127.0.0.1"]
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*command, *names, *files], check=True, capture_output=True)
        return certificate, key

    @pytest.fixture
    def encrypted(self, serve: Serve, certificate: tuple[Path, Path]) -> Serve:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        return partial(serve, tls=context)

    @pytest.fixture
    def trusted(self, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    @pytest.mark.usefixtures("trusted")
    def test_an_answer_is_taken(self, serve: Serve, encrypted: Serve) -> None:
        exact = _teacher(serve(SOUND["plain"]).url, timeout=5.0).score([_row()], Needs(k=K))[0]
        found = _teacher(encrypted(SOUND["in chunks"]).url, timeout=5.0).score(
            [_row()], Needs(k=K)
        )[0]
        assert (found.ids_NK == exact.ids_NK).all() and (found.sampled_N == exact.sampled_N).all()

    @pytest.mark.usefixtures("trusted")
    @pytest.mark.parametrize("kind", ["says nothing", "drips headers", "drips the body"])
    def test_the_deadline_is_of_the_whole_answer(self, encrypted: Serve, kind: str) -> None:
        begun = time.monotonic()
        assert re.search(TRANSPORT[kind][1], _said(encrypted(TRANSPORT[kind][0]).url))
        assert time.monotonic() - begun < 4

    @pytest.mark.usefixtures("trusted")
    def test_whoever_cancels_does_not_wait_for_an_answer(self, encrypted: Serve) -> None:
        waiting = threading.Event()

        def silent(caller: Caller) -> None:
            waiting.set()
            caller.wait()

        def refused() -> None:
            assert waiting.wait(10)
            raise ClientError(400, "no")

        client = _teacher(encrypted(silent).url, timeout=60.0, concurrency=2)._client
        begun = time.monotonic()
        with pytest.raises(ClientError):
            client.map_concurrently([refused, lambda: client.ask("/x", {}, read=lambda _: None)])
        assert time.monotonic() - begun < 7

    def test_a_certificate_that_nobody_signed(self, encrypted: Serve) -> None:
        """It would be no better a second time."""
        server = encrypted(SOUND["plain"])
        text = _said(server.url, timeout=5.0, attempts=4)
        assert "certificate is not to be trusted" in text and "SSL_CERT_FILE" in text
        assert server.asked == 1


def _config(url: str, model: str = "m") -> RunConfig:
    data = {
        "run": "runs/none",
        "steps": 1,
        "student": {"model": "builtin:start"},
        "teachers": {
            "one": {
                "engine": "server",
                "url": url,
                "model": model,
                "attempts": 1,
                "timeout": 5.0,
                "api_key_env": "HOSTILE_KEY",
            }
        },
        "tasks": {"math": {"env": "tutelage/Math-v0", "teacher": "one"}},
    }
    return parse_config(data, "test")


LISTINGS = {
    "no object": (b"[]", "lists no models|no OpenAI"),
    "nothing": (b"null", "lists no models|no OpenAI"),
    "no data": (b"{}", "lists no models|no OpenAI"),
    "data is null": (b'{"data": null}', "lists no models|no OpenAI"),
    "data is a text": (b'{"data": "m"}', "lists no models|no OpenAI"),
    "texts": (b'{"data": ["m"]}', "lists no models|no OpenAI"),
    "no ids": (b'{"data": [{}]}', "lists no models|no OpenAI"),
    "ids of another kind": (b'{"data": [{"id": null}, {"id": 7}]}', "serves 'None', '7', not 'm'"),
    "no model": (b'{"data": []}', "serves no model, not 'm'"),
    "others": (b'{"data": [{"id": "n"}]}', "serves 'n', not 'm'"),
    "too many": (
        b'{"data": [' + b",".join(b'{"id": "x%d"}' % i for i in range(9999)) + b"]}",
        r"serves 'x0', .*'x7', \.\.\., not 'm'",
    ),
    "long ones": (b'{"data": [{"id": "' + b"y" * 99_999 + b'"}]}', "serves 'yyy"),
    "half characters": (rb'{"data": [{"id": "\ud800\u001b[2J"}]}', r"serves '.{0,3}\\ud800"),
    "deep": (b"[" * 200_000, "no JSON"),
    "no JSON": (b"<html>", "no JSON"),
    "the key": (f'{{"data": [{{"id": "{KEY}"}}]}}'.encode(), r"serves '\[hidden\]'"),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_list_of_models_that_is_none(serve: Serve, tokenizer: Any, kind: str) -> None:
    found, says = LISTINGS[kind]
    with pytest.raises((ServerError, ConfigError)) as raised:
        config = _config(serve(listing(found)).url)
        k = support_of("one", config.resolve())
        check_server("one", config.teachers["one"], tokenizer, k=k)
    text = str(raised.value)
    assert re.search(says, text) and text.startswith("teachers.one"), text
    assert KEY not in text and len(text) < 1500 and text.isprintable()


PIECES = [
    *(b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\", b"\x00", b"\xff", b"-", b"e9", b"NaN"),
    *(b"null", b"true", b'"-1.5"', b"1e999", b"-" + b"9" * 400, rb"\ud800", b'"7": 1, '),
]


def _mutated(body: bytes, rng: np.random.Generator) -> bytes:
    """The answer with up to three random cuts, repetitions, insertions and changed bytes."""
    for _ in range(rng.integers(1, 4)):
        at, end = sorted(rng.integers(len(body), size=2).tolist())
        end = min(end, at + 200)
        piece = PIECES[rng.integers(len(PIECES))]
        body = [
            body[:at] + body[end:],
            body[:end] + body[at:],
            body[:at] + piece + body[at:],
            body[:at] + piece + body[at + len(piece) :],
        ][rng.integers(4)]
    return body


@pytest.mark.parametrize("seed", range(4))
def test_a_random_change_gives_scores_or_a_refusal_and_nothing_else(
    sound: Callable[[Any], Any], seed: int
) -> None:
    """Scores that are taken are a distribution's: a digit that changed leaves one, too."""
    row, rng = _row(), np.random.default_rng(seed)
    asked = {"model": "m", "prompt": row.ids_T.tolist(), "prompt_logprobs": K, "max_tokens": 1}
    body = json.dumps(sound(asked)).encode()
    taken = 0
    for _ in range(150):
        try:
            candidates = read_candidates(_mutated(body, rng), tokens=len(row.ids_T), model="m")
            scores = candidates.scores(row, k=K, vocabulary=VOCABULARY)
        except ValueError:  # InvalidResponse, BadCandidates and ids outside are some
            continue
        taken += 1
        assert scores.ids_NK.shape == (int(row.action_mask_T.sum()), K)
        assert int(scores.ids_NK.min()) >= 0 and int(scores.ids_NK.max()) < VOCABULARY
        assert all(len(set(ids)) == K for ids in scores.ids_NK.tolist())
        assert float(scores.logprobs_NK.exp().sum(1).max()) <= 1.01
        assert bool((scores.logprobs_NK.diff(dim=1) <= 0).all())
        assert float(scores.sampled_N.max()) <= 0.01
    assert 0 < taken < 150
