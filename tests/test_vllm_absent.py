"""A run that wants vLLM where there is none, or not the right one. Here there is none."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.doctor.examination import examine
from tutelage.distill.engines.vllm import start
from tutelage.distill.run import training
from tutelage.distill.run.training import Run
from tutelage.distill.student import build as student_building


def _config(folder: Path, **sections: Any) -> RunConfig:
    data = {
        "run": str(folder / "run"),
        "steps": 1,
        "student": {"model": "builtin:start", "threads": 1, "device": "cpu"},
        "tasks": {
            "math": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": "arithmetic", "expert": True},
                "episodes": 2,
                "rollout": {"max_turns": 1, "max_new_tokens": 4},
            }
        },
        "objective": {"name": "imitation"},
        "rollout": {"engine": "vllm", "processes": 0},
    }
    return parse_config(data | sections, "test")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_it_is_said_before_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(student_building, "load_student", never)
    monkeypatch.setattr(training, "load_tokenizer", never)
    said = r"rollout\.engine=vllm: vllm is not installed: .*pip install 'tutelage\[vllm\]'"
    with pytest.raises(ConfigError, match=said):
        Run(_config(tmp_path))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
@pytest.mark.slow
def test_the_doctor_says_it_and_examines_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.distill.doctor.examination.check_grader", lambda: [])
    findings = list(examine(_config(tmp_path)))
    (fault,) = [finding for finding in findings if finding.level == "fault"]
    assert (fault.subject, fault.check) == ("student", "vllm and learner")
    assert "not installed" in fault.text
    assert any(finding.check == "engine and learner" for finding in findings)


def test_an_older_release_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "installed", lambda: "0.19.1+cpu")
    with pytest.raises(
        ConfigError, match=r"x: vllm 0\.19\.1\+cpu is older than 0\.32: pip install"
    ):
        start.require_vllm("x")
    for fine in ("0.32.0", "0.100.0rc1", "1.0"):
        monkeypatch.setattr(start, "installed", lambda fine=fine: fine)
        start.require_vllm("x")


def test_tasks_share_one_engine(tmp_path: Path) -> None:
    tasks = _config(tmp_path).model_dump()["tasks"]
    tasks["math"]["rollout"]["engine"] = "transformers"
    with pytest.raises(ConfigError, match=r"tasks\.math\.rollout\.engine: all tasks are played by"):
        _config(tmp_path, tasks=tasks)


def test_options_are_checked_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm\.gpu_memory: .*gpu_memory_utilization"):
        _config(tmp_path, vllm={"gpu_memory": 0.5})
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization: .* \(got 1\.5\)"):
        _config(tmp_path, vllm={"gpu_memory_utilization": 1.5})
