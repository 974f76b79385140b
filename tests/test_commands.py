"""Every command once, as a user types it, on a run of seconds; `study`: tests/test_studies.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs
from tutelage.distill.cli import main as cli

pytestmark = pytest.mark.runs

ONE_EPISODE = {"episodes": 1, "modes": ["greedy"], "final": True}


@pytest.fixture
def path(tmp_path: Path, models: dict[str, str]) -> Path:
    """A config of one step on sums, and one evaluated problem."""
    path = tmp_path / "config.yaml"
    given = {"steps": 1, "evaluation": ONE_EPISODE, "checkpoint": {"every": 1}}
    path.write_text(yaml.safe_dump(runs.data(tmp_path / "run", models, **given)))
    return path


def _says(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that ends well."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in arguments])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return " ".join(said.out.split())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_train_then_eval(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _says(capsys, "train", path)
    assert f"done: {path.parent / 'run'}/metrics.jsonl" in said.replace("\n", "")
    folder = path.parent / "run"
    assert [line["step"] for line in runs.lines(folder)] == [0]
    trained = _json(folder / "eval.json")
    assert trained["math"]["greedy"]["n"] == 1
    said = _says(capsys, "eval", path, "--out", folder / "again.json")
    again = _json(folder / "again.json")
    assert again["model"] == str(folder / "checkpoints" / "000001")
    assert again["scores"]["math"]["greedy"]["value"] == trained["math"]["greedy"]["value"]
    assert "pass@1" in said


def test_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _says(capsys, "plan", path)
    assert "math" in said and "local_support k=8" in said
    assert not (path.parent / "run").exists()


def test_doctor(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _says(capsys, "doctor", path)
    assert "embedding rows" in said and said.endswith("faults 0")


@pytest.mark.parametrize("policy", ["expert", "random", "builtin:household"])
def test_play(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--policy", policy, "--index", 0, "difficulty=tiny")
    said = _says(capsys, "play", "tutelage/Household-v0", *given)
    assert "Your task is to" in said
    assert ("won; reward 1" in said) or policy != "expert"


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("steps=2", "evaluation.episodes=1", "evaluation.every=0", "student.threads=1")
    said = _says(capsys, "demo", f"run={tmp_path}", "tasks.math.episodes=2", *small)
    assert "household" in said and "share of the teacher's score" in said
    kept = _json(tmp_path / "demo.json")
    assert kept.keys() >= {"before", "teacher"}


def test_envs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tutelage/Household-v0" in _says(capsys, "envs")


def test_whoever_reads_may_stop_reading() -> None:
    """As `head` does: no complaint, and the exit code of a broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tutelage.distill.cli.main", "config"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
