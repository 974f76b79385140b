"""Whole runs as the tests share them: a small config, training, and what two runs must have in
common."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.training import Run

MAY_DIFFER = ("time/", "perf/", "memory/")
"""The only metrics in which two runs of one config may differ."""

MATH: dict[str, Any] = {
    "env": "tutelage/Math-v0",
    "env_args": {"problems": "arithmetic"},
    "teacher": "one",
    "episodes": 2,
}


def data(folder: Path, models: Mapping[str, str], **sections: Any) -> dict[str, Any]:
    """Three steps of two replies of four tokens, in this process on one thread, under the teacher
    `one`. models: the fixture. sections: replace the whole section of that name."""
    return {
        "run": str(folder),
        "steps": 3,
        "student": {"model": models["student"], "threads": 1, "device": "cpu"},
        "teachers": {"one": {"model": models["one"], "device": "cpu"}},
        "tasks": {"math": copy.deepcopy(MATH)},
        "objective": {"k": 8},
        "rollout": {"processes": 0, "max_turns": 1, "max_new_tokens": 4},
        "journal": {"tensorboard": False},
    } | sections


def config(folder: Path, models: Mapping[str, str], **sections: Any) -> RunConfig:
    """`data`, checked."""
    return parse_config(data(folder, models, **sections), "test")


def train(config: RunConfig, watch: Observer | None = None) -> Path:
    """To the last step, or to where the run is stopped; the run folder."""
    with Run(config, watch=watch) as run:
        run.train()
    return Path(config.run)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Without the fields that may differ."""
    return [
        {key: value for key, value in line.items() if not key.startswith(MAY_DIFFER)}
        for line in lines(folder)
    ]


def metrics_bytes(folder: Path) -> bytes:
    """As text again: -0.0, 1 and 1.0 are told apart, and the order of keys counts."""
    return "\n".join(json.dumps(line) for line in metrics(folder)).encode()


def episodes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "episodes").iterdir())}


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{step:06d}" / "model.safetensors")


def assert_same(one: Path, other: Path, step: int) -> None:
    """Bit-identical: metrics, episodes, and the weights after `step`."""
    assert metrics_bytes(one) == metrics_bytes(other)
    assert episodes(one) == episodes(other)
    left, right = weights(one, step), weights(other, step)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
