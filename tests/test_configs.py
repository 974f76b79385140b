"""The configurations that ship: each is one that the program takes."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.distill.config.loading import load_config
from tutelage.distill.run.training import Run

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.run.startswith("runs/")  # the one folder that git does not see


def test_the_joint_papers_command_with_vllm_is_a_configuration() -> None:
    """The overrides that its head tells to give, as they stand there."""
    path = CONFIGS / "papers" / "revisiting_joint.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if "tutelage train" in line)
    told = " ".join(
        line.lstrip("# ").rstrip("\\")
        for line in itertools.takewhile(lambda line: line.startswith("#     "), lines[first:])
    )
    overrides = shlex.split(told)[4:]
    assert len(overrides) == 8
    config = load_config(path, overrides)
    assert {config.rollout.engine, *(t.engine for t in config.teachers.values())} == {"vllm"}
    assert config.cluster is not None and config.cluster.worker_resources == {"GPU": 1}


def test_the_joint_paper_is_its_table_of_settings() -> None:
    """Revisiting-OPD, Table A1, and how its code prompts."""
    config = load_config(CONFIGS / "papers" / "revisiting_joint.yaml")
    assert config.steps == 400 and config.schedule.policy == "alternate"
    assert config.student.model == "Qwen/Qwen2.5-7B-Instruct"
    optimizer, tasks = config.optimizer, config.resolve()
    assert (optimizer.lr, optimizer.minibatch, optimizer.decay) == (2e-6, 64, "constant")
    for name, turns, tokens in (("household", 30, 512), ("math", 1, 16_384)):
        task, how = tasks[name], tasks[name].rollout
        assert (task.schedule.episodes, task.schedule.group) == (16 * 8, 8)
        assert (how.max_turns, how.max_new_tokens) == (turns, tokens)
        assert (how.sampling.temperature, how.sampling.top_p) == (1.0, 0.9)
        (loss,) = task.losses
        assert (loss.name, loss.options["k"]) == ("local_support", 32)
    context = tasks["household"].rollout.context
    assert (context.kind, context.turns, context.format) == ("window", 2, "gigpo")
    assert tasks["math"].rollout.context.format is None
    # DAPO's layout is the training file's alone.
    assert tasks["math"].rollout.env_args["layout"] == "dapo"
    assert tasks["math"].evaluation.env_args["layout"] == "plain"


@pytest.mark.slow
def test_math_only_trains_on_a_file_of_problems(
    tmp_path: Path, tokenizer: Any, save_model: Callable[..., str]
) -> None:
    """The single task, from a student of random weights, on problems that the file gives."""
    problems = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{n} apples and one more?", "answer": str(n + 1)} for n in range(3)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = save_model(tmp_path / "teacher", tokenizer, seed=1)
    config = load_config(
        CONFIGS / "math_only.yaml",
        [
            f"run={tmp_path / 'run'}",
            "steps=2",
            f"tasks.math.env_args.problems={problems}",
            "tasks.math.rollout.max_new_tokens=8",
            f"teachers.calculator.model={teacher}",
        ],
    )
    with Run(config) as run:
        run.train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["math", "math"]
    episodes = (tmp_path / "run" / "episodes" / "000000.jsonl").read_text()
    assert "apples and one more?" in episodes
