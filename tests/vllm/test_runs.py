"""Whole runs whose rollouts vLLM plays: here, in a Ray actor, through faults, under the doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.distill.cli.main import main
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.doctor.examination import examine
from tutelage.distill.engines.vllm import sync
from tutelage.distill.run import checkpoints
from tutelage.distill.run.training import Run
from tutelage.evaluation import run_folder
from tutelage.scheduler.engine import Engine

HOUSEHOLD = {
    "env": "tutelage/Household-v0",
    "env_args": {"split": "train", "difficulty": "tiny"},
    "teacher": "keeper",
    "episodes": 6,
    "rollout": {"max_turns": 4, "max_new_tokens": 12},
}
MATH = {
    "env": "tutelage/Math-v0",
    "env_args": {"problems": "arithmetic"},
    "teacher": "keeper",
    "episodes": 8,
    "rollout": {"max_turns": 1, "max_new_tokens": 12},
}
LOCAL = {"address": "local", "workers": 1, "threads": 1, "timeout": 120.0}


def _data(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "steps": 3,
        "student": {"model": "builtin:start", "threads": 1, "device": "cpu"},
        "teachers": {"keeper": {"model": "builtin:household", "device": "cpu"}},
        "tasks": {"household": HOUSEHOLD, "math": MATH},
        "objective": {"name": "sampled_token", "clip": 0.2},
        "rollout": {"engine": "vllm", "processes": 0, "top_p": 0.9},
        "vllm": {"kv_cache_gib": 0.1},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 100},
        "journal": {"tensorboard": False, "diagnostics_every": 1},
    } | sections


def _config(folder: Path, **sections: Any) -> RunConfig:
    return parse_config(_data(folder, **sections), "test")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _assert_in_step(folder: Path, steps: int) -> None:
    """Every step's tokens were sampled from the weights that then learned from them."""
    lines = _metrics(folder)
    assert len(lines) == steps
    assert all(line["gap/engine"] < 1e-5 for line in lines)
    assert all(0 < line["time/sync"] < 60 for line in lines)
    assert len({line["loss/mean"] for line in lines}) == steps
    episodes = [
        json.loads(line)
        for path in sorted((folder / "run" / "episodes").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert {episode["version"] for episode in episodes} == set(range(steps))


def test_the_command_line_trains_with_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_data(tmp_path)))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path)])
    assert ended.value.code in (0, None)
    _assert_in_step(tmp_path, 3)


def test_an_engine_killed_in_the_middle_of_a_batch_is_replaced_and_plays_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the Ray actor with requests in flight: the run goes on as one that was left alone,
    up to what vLLM's batches move."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    scar = tmp_path / "scar"

    def config(name: str, env_args: dict[str, str], **sections: Any) -> RunConfig:
        task = HOUSEHOLD | {"env": "deadly_env:Deadly-v0", "env_args": env_args, "episodes": 8}
        return _config(tmp_path / name, tasks={"household": task}, **sections)

    with Run(config("whole", {})) as run:
        run.train()
    with Run(config("killed", {"scar": str(scar)}, cluster=LOCAL)) as run:
        run.train()
        assert run.placement.restarts == 1
    assert int(scar.read_text()) > 0  # requests in flight
    for name in ("whole", "killed"):
        _assert_in_step(tmp_path / name, 3)
    for one, other in zip(_metrics(tmp_path / "whole"), _metrics(tmp_path / "killed"), strict=True):
        assert other["episodes/played"] == one["episodes/played"] == 8
        assert other["tokens/trained"] == one["tokens/trained"]
        assert other["loss/mean"] == pytest.approx(one["loss/mean"], rel=1e-3)


def test_a_sync_that_does_nothing_stops_the_run_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, pushed = sync.push, []

    def once(engine: Any, weights: Any) -> None:
        pushed.append(weights)
        if len(pushed) == 1:
            push(engine, weights)

    monkeypatch.setattr(sync, "push", once)
    with (
        Run(_config(tmp_path)) as run,
        pytest.raises(sync.SyncError, match=r"weights of version 1 .*the sync did nothing"),
    ):
        run.train()
    assert len(_metrics(tmp_path)) == 1
    found = run_folder.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and checkpoints.load_state(found)["step"] == 1


class _Liar:
    """An engine whose log-probabilities are of another temperature."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[Any]:
        from dataclasses import replace

        return [
            replace(one, logprobs=[0.9 * logprob for logprob in one.logprobs])
            for one in self._engine.step()
        ]


def test_the_doctor_compares_engine_and_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, tasks={"math": MATH})
    findings = [one for one in examine(config) if one.check == "vllm and learner"]
    assert [(one.subject, one.level) for one in findings] == [("tasks.math", "ok")]

    from tutelage.distill.doctor import examination

    make = examination.make_engine
    monkeypatch.setattr(examination, "make_engine", lambda *a: _Liar(make(*a)))
    (fault,) = [one for one in examine(config) if one.check == "vllm and learner"]
    assert (fault.subject, fault.level) == ("tasks.math", "fault")
    assert "every importance ratio is off" in fault.cure
    plain = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"engine": "transformers"})}
    )
    assert not any(one.check == "vllm and learner" for one in examine(plain))
