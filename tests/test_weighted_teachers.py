"""A task that several teachers share, by weight: every command takes it, whatever their engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in_server import StandIn
from tutelage.distill.cli.main import main
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.resolved import support_of
from tutelage.distill.config.run import RunConfig
from tutelage.distill.doctor.examination import examine
from tutelage.distill.models.loading import load_model
from tutelage.distill.plan.plan import make_plan
from tutelage.distill.run.training import Run, evaluate_model
from tutelage.distill.teachers import http_client

pytestmark = pytest.mark.runs

HERE = {"model": "builtin:arithmetic", "device": "cpu", "dtype": "float32"}
ENGINES = [("here", "here"), ("server", "server"), ("server", "here"), ("here", "server")]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """It serves the arithmetic teacher."""
    monkeypatch.setattr(http_client, "PAUSE", 0.01)
    made = StandIn(load_model("builtin:arithmetic", dtype="float32", device="cpu"), name="sums")
    yield made
    made.close()


@pytest.fixture
def configure(tmp_path: Path, server: StandIn) -> Callable[..., dict[str, Any]]:
    """Teachers a and b in these engines; three of four episodes are a's. k differs by task."""
    there = {"engine": "server", "url": server.url, "model": "sums", "dtype": "float32"}

    def configure(a: str, b: str, **sections: Any) -> dict[str, Any]:
        task = {
            "env": "tutelage/Math-v0",
            "env_args": {"problems": "arithmetic"},
            "teacher": {"a": 3, "b": 1},
            "episodes": 4,
            "rollout": {"max_turns": 1, "max_new_tokens": 6, "processes": 0},
        }
        wide = {"objective": {"name": "local_support", "k": 12}, "teacher": {"b": 2, "a": 1}}
        teachers = {name: HERE if how == "here" else there for name, how in (("a", a), ("b", b))}
        return {
            "run": str(tmp_path / "run"),
            "steps": 2,
            "student": {"model": "builtin:start", "threads": 1, "device": "cpu"},
            "teachers": teachers,
            "tasks": {"narrow": task, "wide": task | wide},
            "objective": {"name": "local_support", "k": 5},
            "evaluation": {"episodes": 2, "modes": ["greedy"]},
            "journal": {"tensorboard": False},
        } | sections

    return configure


Configure = Callable[..., dict[str, Any]]


def _parsed(data: dict[str, Any]) -> RunConfig:
    return parse_config(data, "test")


def test_a_teacher_is_asked_for_the_most_that_any_of_its_tasks_wants(configure: Configure) -> None:
    tasks = _parsed(configure("server", "here")).resolve()
    assert [support_of(name, tasks) for name in ("a", "b", "nobody")] == [12, 12, 1]
    one = configure("server", "here")
    one["tasks"]["wide"]["teacher"] = "b"
    tasks = _parsed(one).resolve()
    assert [support_of(name, tasks) for name in ("a", "b")] == [5, 12]


@pytest.mark.parametrize("engines", ENGINES, ids="+".join)
def test_a_run_gives_each_its_share(configure: Configure, engines: tuple[str, str]) -> None:
    with Run(_parsed(configure(*engines))) as run:
        run.train()
    lines = [
        json.loads(line)
        for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    shares = [[line.get(f"teacher/{name}/rows", 0) for name in ("a", "b")] for line in lines]
    assert [sum(share) for share in shares] == [4, 4]
    assert shares[0] == [3, 1]


@pytest.mark.parametrize("engines", ENGINES[1:3], ids="+".join)
def test_the_doctor_finds_each_of_them_sound(
    configure: Configure, engines: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.distill.doctor import examination

    monkeypatch.setattr(examination, "_environments", lambda *_: iter(()))
    data = configure(*engines)
    for teacher in data["teachers"].values():
        if teacher.get("engine") == "server":
            teacher["weights"] = "builtin:arithmetic"
    found = [one for one in examine(_parsed(data)) if one.subject.startswith("teachers.")]
    assert {one.level for one in found} == {"ok"}
    parity = {one.subject: one.text for one in found if one.check == "parity"}
    assert set(parity) == {
        f"teachers.{n}" for n, e in zip("ab", engines, strict=True) if e == "server"
    }
    assert all("the same top 12 on 100% of them" in text for text in parity.values())
    assert {one.subject for one in found if one.check == "on wide's replies"} == {
        "teachers.a",
        "teachers.b",
    }


@pytest.mark.parametrize("engines", ENGINES[:2], ids="+".join)
def test_plan_and_evaluation_take_them(configure: Configure, engines: tuple[str, str]) -> None:
    config = _parsed(configure(*engines))
    assert [task.teacher for task in make_plan(config).tasks] == ["a 75%, b 25%", "b 67%, a 33%"]
    assert set(evaluate_model(config, None)["scores"]) == {"narrow", "wide"}


def test_the_doctors_page_is_shown_on_the_command_line(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import yaml

    monkeypatch.setattr("tutelage.distill.doctor.examination.check_grader", lambda: [])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(configure("server", "server")))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(path)])
    shown = capsys.readouterr()
    assert ended.value.code in (0, 1) and "Traceback" not in shown.out + shown.err
    assert "teachers.a" in shown.out and "teachers.b" in shown.out
