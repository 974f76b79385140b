"""The doctor on teachers in other engines: a sound one is sound, each sickness has its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.stand_in_server import StandIn
from tutelage.distill.cli.pages import show_plan
from tutelage.distill.config.loading import parse_config
from tutelage.distill.doctor.examination import examine
from tutelage.distill.doctor.findings import Finding
from tutelage.distill.models.loading import load_model
from tutelage.distill.plan.plan import make_plan
from tutelage.distill.teachers import http_client

pytestmark = pytest.mark.runs

Diagnose = Callable[..., dict[str, Finding]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """It serves the arithmetic teacher."""
    monkeypatch.setattr(http_client, "PAUSE", 0.01)
    made = StandIn(load_model("builtin:arithmetic", dtype="float32", device="cpu"), name="sums")
    yield made
    made.close()


def _config(server: str, **teacher: Any) -> Any:
    settings = {
        "engine": "server",
        "url": server,
        "model": "sums",
        "attempts": 2,
        "dtype": "float32",
    }
    data = {
        "run": "runs/none",
        "steps": 1,
        "student": {"model": "builtin:start", "threads": 1},
        "teachers": {"one": settings | teacher},
        "tasks": {
            "math": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": "arithmetic"},
                "teacher": "one",
                "rollout": {"max_turns": 1, "max_new_tokens": 12, "processes": 0},
            }
        },
        "objective": {"name": "local_support", "k": 8},
    }
    return parse_config(data, "test")


@pytest.fixture
def diagnose(monkeypatch: pytest.MonkeyPatch) -> Diagnose:
    """The findings on teacher `one`, by check."""
    from tutelage.distill.doctor import examination

    monkeypatch.setattr(examination, "_environments", lambda *_: iter(()))

    def diagnose(url: str, **teacher: Any) -> dict[str, Finding]:
        found = examine(_config(url, **teacher))
        return {one.check: one for one in found if one.subject == "teachers.one"}

    return diagnose


def test_a_server_says_what_its_weights_say(server: StandIn, diagnose: Diagnose) -> None:
    found = diagnose(server.url, weights="builtin:arithmetic")
    assert {finding.level for finding in found.values()} == {"ok"}
    assert "as 'builtin:arithmetic' in this system's own engine" in found["parity"].text
    assert "the same top 8 on 100% of them" in found["parity"].text


def test_other_weights_than_it_says_are_named(server: StandIn, diagnose: Diagnose) -> None:
    found = diagnose(server.url, weights="builtin:household")["parity"]
    assert found.level == "fault"
    assert found.text.startswith("mismatch: apart by") and "'builtin:household'" in found.text


def test_without_its_weights_the_doctor_says_what_it_cannot_tell(
    server: StandIn, diagnose: Diagnose
) -> None:
    found = diagnose(server.url)
    assert "nothing tells" in found["engine: server"].text
    assert "teachers.one.weights" in found["engine: server"].cure
    assert found["on math's replies"].level == "ok"


def test_a_server_that_is_not_there_is_a_finding(server: StandIn, diagnose: Diagnose) -> None:
    server.close()
    found = diagnose(server.url)["engine: server"]
    assert found.level == "fault"
    assert server.url in found.text and "is it running there?" in found.text


def test_replicas_of_different_weights_are_named(
    server: StandIn, diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second request goes to another model."""
    both = server.model, load_model("builtin:household", dtype="float32", device="cpu")
    score = server._scored

    def balanced(asked: Any) -> Any:
        server.model = both[server.asked % 7 > 2]
        return score(asked)

    monkeypatch.setattr(server, "_scored", balanced)
    found = diagnose(server.url, concurrency=1)["the same twice"]
    assert found.level == "fault" and "replicas behind one url" in found.cure


def test_the_plan_shows_engine_and_url_and_asks_no_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    url = "http://10.0.0.7:8000"
    show_plan(make_plan(_config(url)), Console(width=80))
    page = capsys.readouterr().out
    assert "10.0.0.7" in page and "teacher one" not in page  # none of its memory is here
    vllm = {"engine": "vllm", "model": "builtin:arithmetic", "vllm": {"kv_cache_gib": 2}}
    cleared = {"url": None, "attempts": 8}
    show_plan(make_plan(_config(url, **vllm, **cleared)), Console(width=80))
    page = capsys.readouterr().out
    assert "here, vLLM" in page and "teacher one: vLLM's cache" in page
    assert "2.15 GB" in page  # 2 GiB
