"""A teacher behind a server: what it says is what the network says, or it is no score at all."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import runs
from tests.runs import metrics, train
from tests.settings import serving
from tests.stand_in_server import StandIn
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.resolved import support_of
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.training import Run
from tutelage.distill.teachers import http_client
from tutelage.distill.teachers.http_client import ClientError, InvalidResponse, ServerError
from tutelage.distill.teachers.server import ServerTeacher, check_server, read_candidates
from tutelage.distill.teachers.service import TeacherService
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.scheduler.episodes import Row

pytestmark = pytest.mark.runs

VOCABULARY = 101
Serve = Callable[..., StandIn]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "PAUSE", 0.01)


@pytest.fixture
def serve(make_model: Callable[..., Any]) -> Iterator[Serve]:
    """A stand-in server; it ends with the test."""
    servers = []

    def serve(model: Any = None, **options: Any) -> StandIn:
        servers.append(StandIn(model or make_model(seed=9), **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


@pytest.fixture
def rows(make_row: Callable[..., Row]) -> list[Row]:
    """Of unequal lengths, with gaps, and with an end that nobody chose."""
    lengths = (9, 2, 30, 5)
    plain = [make_row([("prompt", [1, 2, 3]), ("said", range(4, 4 + n))], seed=n) for n in lengths]
    turns = [("prompt", [7, 8]), ("said", [9, 10, 11]), ("prompt", [12]), ("said", [13, 5])]
    return [*plain, make_row([*turns, ("prompt", [3, 3, 3])])]


def _teacher(server: StandIn, **options: Any) -> ServerTeacher:
    settings = {"timeout": 5.0, "attempts": 3} | options
    config = TeacherConfig(engine="server", url=server.url, model="m", **settings)
    return ServerTeacher("one", config, vocabulary=VOCABULARY)


def _assert_same(found: Sequence[TeacherScores], exact: Sequence[TeacherScores]) -> None:
    """The same ids in the same order (no two are equally probable here), the same numbers."""
    for one, other in zip(found, exact, strict=True):
        assert torch.equal(one.ids_NK, other.ids_NK)
        assert torch.allclose(one.logprobs_NK, other.logprobs_NK, atol=1e-5, rtol=0)
        assert torch.allclose(one.sampled_N, other.sampled_N, atol=1e-5, rtol=0)
        assert one.vocabulary == other.vocabulary


class TestScores:
    def test_they_are_the_networks(
        self, serve: Serve, rows: list[Row], make_model: Callable[..., Any]
    ) -> None:
        own = TransformersTeacher(make_model(seed=9), vocabulary=VOCABULARY)
        teacher = _teacher(serve())
        for k in (1, 4, 20):
            _assert_same(teacher.score(rows, Needs(k=k)), own.score(rows, Needs(k=k)))
        assert teacher.retries == 0

    def test_a_token_counts_among_the_top_k_only_where_it_is_one_of_them(self) -> None:
        """By hand: token 5 is second of two, token 6 is none of two; -9999 is vLLM's -inf."""
        parts = [None, {"5": -1.0, "7": -0.5}, {"6": -9999.0, "3": -0.2, "4": -2.0}]
        answer = _answer(parts)
        row = _row([2, 5, 6])
        scores = read_candidates(answer, tokens=3).scores(row, k=2, vocabulary=8)
        assert scores.ids_NK.tolist() == [[7, 5], [3, 4]]
        assert np.allclose(scores.logprobs_NK, [[-0.5, -1.0], [-0.2, -2.0]])
        assert scores.sampled_N.tolist() == [-1.0, -math.inf]
        assert scores.entropy_N is None

    def test_padding_rows_that_take_probability_are_refused(
        self, serve: Serve, rows: list[Row], make_model: Callable[..., Any]
    ) -> None:
        """A random model's padding is as probable as any other id."""
        teacher = _teacher(serve(make_model(seed=9, padding=40)))
        with pytest.raises(ConfigError, match=r"one: http.*outside the vocabulary of 101"):
            teacher.score(rows, Needs(k=10))

    def test_what_a_top_k_does_not_tell_is_refused(
        self, serve: Serve, rows: list[Row], make_row: Callable[..., Row]
    ) -> None:
        teacher = _teacher(serve())
        with pytest.raises(ValueError, match="engine to transformers"):
            teacher.score(rows, Needs(k=4, full=True))
        with pytest.raises(ValueError, match="engine to transformers"):
            teacher.score(rows, Needs(k=4, student_k=1), [torch.zeros(1, 1)])
        branched = make_row([("prompt", [5, 6]), ("branch", [7]), ("said", [9])])
        with pytest.raises(ValueError, match=r"teachers\.one: a row with an expert's branches"):
            teacher.score([*rows, branched], Needs(k=4))

    def test_so_many_rows_are_in_flight_as_may_be(self, serve: Serve, rows: list[Row]) -> None:
        server = serve()
        _teacher(server, concurrency=3).score(rows * 4, Needs(k=4))
        assert 2 <= server.most <= 3

    def test_long_answers_are_packed_as_they_are_read(self) -> None:
        """33 candidates a token: as Python objects they would take five times the JSON's size."""
        logprobs = -np.random.default_rng(0).exponential(size=(500, 33))
        parts = [{str(i): float(x) for i, x in enumerate(one)} for one in logprobs]
        answer = _answer([None, *parts])
        tracemalloc.start()
        read_candidates(answer, tokens=501)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        json.loads(answer)
        _, naive = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * len(answer) < naive


def _answer(parts: Sequence[Mapping[str, float] | None]) -> bytes:
    found = [
        part and {i: {"logprob": x, "rank": 1, "decoded_token": "t"} for i, x in part.items()}
        for part in parts
    ]
    return json.dumps({"choices": [{"text": "", "prompt_logprobs": found}]}).encode()


def _row(ids: Sequence[int]) -> Row:
    turns = [-1] + [0] * (len(ids) - 1)
    return Row(
        ids_T=np.asarray(ids, dtype=np.int32),
        turns_T=np.asarray(turns, dtype=np.int32),
        behavior_logprobs_T=np.full(len(ids), np.nan, dtype=np.float32),
        branches_T=np.zeros(len(ids), dtype=np.int32),
    )


FAULTS = {
    "error": r"HTTP 500: the engine core is dead: see the server's own log",
    "hang": r"there was no answer after 0\.4 s: raise teachers\.one\.timeout or lower",
    "slow": r"not whole after 0\.4 s: raise teachers\.one\.timeout",
    "cut": r"message body .*: is it running there\? Start it, or correct teachers\.one\.url",
    "no json": r"is no completion with prompt_logprobs .*: see the server's own log",
    "nan": r"token 3 has a log-probability of nan",
    "null": r"a log-probability that is no number",
    "logits": r"token 3 has a log-probability of \d",
    "short": r"it answers with \d+ positions for \d+ tokens",
    "empty": r"token 3 has 0 candidates, not 4 or 5",
    "other token": r"token 3 itself is not among its candidates",
    "no logprobs": r"its answer has no prompt_logprobs: is it vLLM's server\?",
    "no choice": r"is no completion with prompt_logprobs",
}
"""What is said of each, when it does not stop."""


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_what_passes_is_done_again(
        self, serve: Serve, rows: list[Row], make_model: Callable[..., Any], fault: str
    ) -> None:
        server = serve()
        server.faults = [fault, fault]
        teacher = _teacher(server, timeout=0.4)
        exact = TransformersTeacher(make_model(seed=9), vocabulary=VOCABULARY).score(
            rows, Needs(k=4)
        )
        _assert_same(teacher.score(rows, Needs(k=4)), exact)
        assert teacher.retries == 2

    @pytest.mark.parametrize(("fault", "said"), FAULTS.items())
    def test_what_does_not_pass_is_an_error_with_its_cure(
        self, serve: Serve, rows: list[Row], fault: str, said: str
    ) -> None:
        server = serve()
        server.faults = [fault] * 99
        with pytest.raises(ServerError) as raised:
            _teacher(server, timeout=0.4).score(rows[:1], Needs(k=4))
        text = str(raised.value)
        begins = f"teachers.one: {server.url}/v1/completions gave no answer in 3 attempts"
        assert text.startswith(begins) and "same command resumes" in text
        assert re.search(said, text), text
        assert server.asked == 3

    def test_a_server_that_is_not_there(
        self, serve: Serve, rows: list[Row], capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The wait is told once, not once a row."""
        teacher = _teacher(server := serve())
        server.close()
        begun = time.monotonic()
        with pytest.raises(ServerError, match=rf"{server.url}.*refused: is it running there\?"):
            teacher.score(rows, Needs(k=4))
        assert time.monotonic() - begun < 5
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(
            f"tutelage: teachers.one: {server.url}/v1/completions gave no answer"
        )
        assert line.endswith("asking again, 2 times in 0 s")

    def test_the_first_row_that_fails_ends_the_others(self, serve: Serve, rows: list[Row]) -> None:
        """Some hang, with half a minute to go; one is refused."""
        server = serve(max_model_len=33)
        server.hangs = {5, 12}
        teacher = _teacher(server, timeout=30.0)
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="cannot read a row of 33 tokens"):
            teacher.score(rows, Needs(k=4))
        assert time.monotonic() - begun < 5
        server.released.set()
        assert len(teacher.score(rows[:1], Needs(k=4))) == 1  # and it can be asked again

    def test_a_request_that_connects_too_late_is_not_waited_for(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve()
        server.faults = ["hang"]
        client = _teacher(server, timeout=30.0, concurrency=2)._client
        hold, connecting = client._connections.hold, threading.Event()

        def late(line: socket.socket) -> None:
            connecting.set()
            assert client._connections.cancelled.wait(5)
            hold(line)

        def refused() -> None:
            assert connecting.wait(5)
            raise ClientError(400, "no")

        monkeypatch.setattr(client._connections, "hold", late)
        begun = time.monotonic()
        with pytest.raises(ClientError):
            client.map_concurrently(
                [refused, lambda: client.ask("/v1/completions", {}, read=lambda _: None)]
            )
        assert time.monotonic() - begun < 5

    @pytest.mark.parametrize("fault", ["hang", "stuck"])
    def test_no_thread_is_left_when_ctrl_c_comes(
        self, serve: Serve, rows: list[Row], monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        server = serve()
        server.faults = [fault] * 9

        def interrupted(*_: Any, **__: Any) -> None:
            while server.asked < 4:
                time.sleep(0.01)
            time.sleep(0.2)  # until half of the answer is there
            raise KeyboardInterrupt

        monkeypatch.setattr(http_client, "wait", interrupted)
        before, begun = threading.active_count(), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            _teacher(server, timeout=30.0, concurrency=4).score(rows, Needs(k=4))
        assert time.monotonic() - begun < 5
        server.released.set()
        deadline = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)  # the stand-in's own
        assert threading.active_count() <= before


class TestRefusals:
    """What would not pass is not tried again, and says what to change."""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"max_logprobs": 3}, r"fewer than the 4 .*max allowed: 3\): start it .*-logprobs 4,"),
            ({"max_model_len": 12}, r"a row of 12 tokens and one more .* --max-model-len 13 or"),
            ({"name": "other"}, r"one\.model: http.* serves 'other', not 'm': .*--served-model"),
            ({"key": "secret"}, r"refuses the key \(Unauthorized\): set .*one\.api_key_env"),
        ],
    )
    def test_each_has_its_cure(
        self, serve: Serve, rows: list[Row], options: dict[str, Any], said: str
    ) -> None:
        server = serve(**options)
        with pytest.raises(ConfigError, match=said) as raised:
            _teacher(server).score(rows[:1], Needs(k=4))
        assert server.url in str(raised.value)
        assert server.asked == 1

    def test_the_key_comes_from_the_environment(
        self, serve: Serve, rows: list[Row], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve(key="secret")
        with pytest.raises(ConfigError, match=r"teachers\.one\.api_key_env: .* no TEST_KEY"):
            _teacher(server, api_key_env="TEST_KEY")
        monkeypatch.setenv("TEST_KEY", "secret")
        assert len(_teacher(server, api_key_env="TEST_KEY").score(rows[:1], Needs(k=4))) == 1

    def test_a_url_that_ends_in_v1_is_the_same(self, serve: Serve, rows: list[Row]) -> None:
        server = serve()
        server.url += "/v1/"
        assert len(_teacher(server).score(rows[:1], Needs(k=4))) == 1


class TestExam:
    def _service(self, server: StandIn) -> TeacherService:
        return serving(_teacher(server, dtype="float32"), digest="d")

    def test_it_is_that_of_the_same_network_here(
        self, serve: Serve, make_model: Callable[..., Any]
    ) -> None:
        """But for the entropies, for which -log of the largest probability stands."""
        found = self._service(serve()).fingerprint
        own = TransformersTeacher(make_model(seed=9), vocabulary=VOCABULARY)
        exact = serving(own, digest="d").fingerprint
        assert np.allclose(found.logprobs, exact.logprobs, atol=1e-5)
        assert all(a <= b for a, b in zip(found.entropies, exact.entropies, strict=True))

    def test_a_model_never_trained_is_served_and_a_lost_one_is_refused(
        self, serve: Serve, make_model: Callable[..., Any]
    ) -> None:
        model = make_model(scale=0.02)
        self._service(serve(model))
        with torch.no_grad():
            model.get_output_embeddings().weight.zero_()
        with pytest.raises(ConfigError, match=r"teachers\.one: it prefers no token.*4\.6151 nats"):
            self._service(serve(model))

    def test_another_network_under_the_same_name_is_seen_in_the_first_answer(
        self, serve: Serve, rows: list[Row], make_model: Callable[..., Any]
    ) -> None:
        server = serve()
        service = self._service(server)
        first = service.fingerprint
        service.score(rows, Needs(k=4)).fingerprint.check_same(first)
        server.model = make_model(seed=10)  # restarted by somebody, with another checkpoint
        with pytest.raises(RuntimeError, match=r"teachers\.one: its weights were lost or changed"):
            service.score(rows, Needs(k=4)).fingerprint.check_same(first)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def configure(tmp_path: Path, models: dict[str, str]) -> Callable[..., RunConfig]:
    def configure(run: str, teacher: Mapping[str, Any], **sections: Any) -> RunConfig:
        given = {
            "teachers": {"one": dict(teacher)},
            "tasks": {"math": runs.MATH | {"episodes": 4}},
            "rollout": {"processes": 0, "max_turns": 1, "max_new_tokens": 8},
            "optimizer": {"lr": 1e-3},
            "journal": {"tensorboard": False, "diagnostics_every": 1},
        }
        return runs.config(tmp_path / run, models, **given | sections)

    return configure


@pytest.fixture
def served(serve: Serve, models: dict[str, str], tokenizer: Any) -> Callable[..., StandIn]:
    """A server of one of the models, by name."""
    from tutelage.distill.models.loading import load_model

    def served(model: str, **options: Any) -> StandIn:
        loaded = load_model(models[model], dtype="float32", device="cpu")
        return serve(loaded, **{"detokenize": tokenizer.decode} | options)

    return served


def _settings(server: StandIn, **options: Any) -> dict[str, Any]:
    return {"engine": "server", "url": server.url, "model": "m", "attempts": 2, **options}


class TestRuns:
    def test_a_run_is_that_of_the_same_teacher_in_this_process(
        self,
        configure: Callable[..., RunConfig],
        served: Callable[..., StandIn],
        models: dict[str, str],
    ) -> None:
        here = metrics(train(configure("here", {"model": models["one"], "device": "cpu"})))
        server = served("one")
        server.faults = ["error", "", "cut"]
        there = train(configure("there", _settings(server)))
        for one, other in zip(metrics(there), here, strict=True):
            for name in ("loss/mean", "gap/mean", "support/overlap", "tokens/trained"):
                assert one[name] == pytest.approx(other[name], rel=1e-4), name
        assert sum(line["perf/teacher_retries"] for line in runs.lines(there)) <= 2

    def test_a_student_has_nothing_to_learn_from_itself(
        self, configure: Callable[..., RunConfig], served: Callable[..., StandIn]
    ) -> None:
        """What is left is the rounding of the top K to float16."""
        line, *_ = metrics(train(configure("self", _settings(served("student")), steps=1)))
        assert line["loss/mean"] == pytest.approx(0, abs=1e-6)
        assert line["gap/mean"] == pytest.approx(0, abs=1e-5)

    def test_a_server_that_dies_costs_a_run_nothing_but_time(
        self, configure: Callable[..., RunConfig], served: Callable[..., StandIn]
    ) -> None:
        """It dies after the second step. The run stops, saved; when the server is there again, the
        same command resumes, and ends as if nothing had happened."""
        whole = train(configure("whole", _settings(server := served("one"))))

        class Killer(Observer):
            def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
                if step == 1:
                    server.close()

        server = served("one")
        config = configure("killed", _settings(server))
        with pytest.raises(ServerError, match=rf"teachers\.one: {server.url}.*same command"):
            train(config, Killer())
        saved = Path(config.run) / "checkpoints"
        assert [path.name for path in saved.iterdir()] == ["000002"]
        with pytest.raises(ServerError, match=r"is it running there\?"):
            train(config)
        moved = served("one")  # to another machine, where it is slower
        train(configure("killed", _settings(moved, timeout=99.0, concurrency=2)))
        assert metrics(Path(config.run)) == metrics(whole)

    def test_a_server_that_comes_back_as_another_teacher_stops_the_run(
        self, configure: Callable[..., RunConfig], served: Callable[..., StandIn]
    ) -> None:
        class Swap(Observer):
            def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
                server.close()
                served("student", port=server.port)

        server = served("one")
        config = configure("swapped", _settings(server))
        with pytest.raises(RuntimeError, match=r"teachers\.one: its weights were lost or changed"):
            train(config, Swap())
        with pytest.raises(RuntimeError, match=r"teachers\.one: its weights were lost or changed"):
            train(config)  # nor may it go on with it
        assert len(runs.lines(Path(config.run))) == 1


class TestBeforeAnythingLoads:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"max_logprobs": 5}, r"fewer than the 8 log-probabilities .* --max-logprobs 8"),
            ({"name": "other"}, r"serves 'other', not 'm'"),
            (
                {"detokenize": lambda ids: "<|end|>" + "".join(map(chr, ids))},
                r"has another vocabulary: where the student's ids say 'pad\|>",
            ),
        ],
    )
    def test_a_server_that_cannot_teach_is_refused(
        self,
        configure: Callable[..., RunConfig],
        served: Callable[..., StandIn],
        monkeypatch: pytest.MonkeyPatch,
        options: dict[str, Any],
        said: str,
    ) -> None:
        from tutelage.distill.student import build as student_building

        monkeypatch.setattr(
            student_building, "load_student", lambda *_, **__: pytest.fail("loaded")
        )
        with pytest.raises(ConfigError, match=said):
            Run(configure("run", _settings(served("one", **options))))

    def test_a_vocabulary_that_ends_before_the_students(
        self,
        configure: Callable[..., RunConfig],
        serve: Serve,
        make_model: Callable[..., Any],
        tokenizer: Any,
    ) -> None:
        server = serve(make_model(vocabulary=800))  # and no /detokenize
        with pytest.raises(ConfigError, match=r"out of vocabulary\): it serves a model of another"):
            _check_server(configure("run", _settings(server)), tokenizer)

    def test_what_is_no_such_server_is_named(
        self, configure: Callable[..., RunConfig], serve: Serve, tokenizer: Any
    ) -> None:
        server = serve()
        server._server.RequestHandlerClass.do_GET = (  # type: ignore[attr-defined]
            lambda handler: handler._send(404, {"detail": "Not Found"})
        )
        with pytest.raises(ConfigError, match=r"one\.url: .* is no OpenAI-comp.*404"):
            _check_server(configure("run", _settings(server)), tokenizer)

    def test_a_wrong_port_is_an_error_in_time(
        self, configure: Callable[..., RunConfig], tokenizer: Any
    ) -> None:
        with socket.socket() as held:  # bound, and nobody listens
            held.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{held.getsockname()[1]}"
            config = configure("run", {"engine": "server", "url": url, "model": "m", "attempts": 2})
            with pytest.raises(ServerError, match=f"{url}/v1/models gave no answer in 2 attempts"):
                _check_server(config, tokenizer)


def test_garbage_is_not_taken_for_an_answer() -> None:
    for body in (b"", b"null", b"[]", b'{"choices": 3}', b'{"choices": [{"prompt_logprobs": 1}]}'):
        with pytest.raises(InvalidResponse):
            read_candidates(body, tokens=2)


def _check_server(config: RunConfig, tokenizer: Any) -> None:
    k = support_of("one", config.resolve())
    check_server("one", config.teachers["one"], tokenizer, k=k)
