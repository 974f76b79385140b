"""What of a configuration may change when a run resumes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.resume import (
    depending_on_steps,
    differences,
    refuse_changes,
    write_config,
)
from tutelage.evaluation import run_folder

BASE: dict[str, Any] = {
    "run": "RUN",
    "steps": 6,
    "student": {"model": "student"},
    "teachers": {"two": {"model": "two"}},
    "tasks": {
        "math": {
            "env": "tutelage/Math-v0",
            "env_args": {"problems": "arithmetic"},
            "teacher": "two",
            "rollout": {"max_turns": 1},
        }
    },
}


def _config(folder: Path, **keys: Any) -> RunConfig:
    """The base with dotted keys, written with __ for a dot, replaced."""
    data = copy.deepcopy(BASE) | {"run": str(folder)}
    for key, value in keys.items():
        *parents, last = key.split("__")
        place: Any = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return parse_config(data, "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run of the base that has done 4 of its 6 steps."""
    folder = tmp_path / "run"
    write_config(folder, _config(folder), step=0)
    checkpoint = folder / "checkpoints" / "000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / run_folder.STATE).touch()
    return folder


def _refuse(folder: Path, config: RunConfig) -> None:
    refuse_changes(folder, config, config.resolve())


def test_every_key_that_touches_what_is_learned_is_told_in_one_line(folder: Path) -> None:
    now = _config(
        folder,
        optimizer__lr=5e-5,
        seed=1,
        tasks__math__episodes=8,
        tasks__math__env_args__prompt="{problem}?",
        optimizer__betas=(0.9, 0.99),
        objective={"name": "local_support", "k": 8},
        evaluation__every=5,
    )
    with pytest.raises(ConfigError) as refused:
        _refuse(folder, now)
    said = str(refused.value)
    inside = said[said.index("(") + 1 : said.rindex(")")]
    assert inside.split("; ") == [
        "seed: 0, now 1",
        "tasks.math.episodes: 16, now 8",
        "optimizer.lr: 0.0001, now 5e-05",
        "optimizer.betas: [0.9, 0.95], now [0.9, 0.99]",
        "tasks.math.env_args.prompt: not there, now {problem}?",
        "objective.k: not there, now 8",
    ]
    assert said.startswith(f"{folder}/config.yaml: ") and "accept_changes=true" in said
    assert "\n" not in said
    _refuse(folder, now.model_copy(update={"accept_changes": True}))


@pytest.mark.parametrize(
    "keys",
    [
        {"rollout__timeout": 5.0, "tasks__math__rollout__timeout": 7.0},
        {"rollout__max_live": 4, "rollout__processes": 3, "rollout__attempts": 9},
        {"rollout__lost": 0.9, "optimizer__micro_tokens": 512, "optimizer__recompute": True},
        {"student__threads": 1, "student__device": "cpu", "learner__processes": 2},
        {"teachers__two__model": "moved/two", "teachers__two__cache": "scores"},
        {"cluster": {"address": "local"}, "checkpoint__every": 1, "journal__tensorboard": False},
        {"evaluation__episodes": 3, "tasks__math__eval_args__split": "test"},
        {"vllm__gpu_memory_utilization": 0.3},
        {"steps": 4},
        {"steps": 600},
    ],
    ids=lambda keys: "-".join(keys),
)
def test_what_does_not_touch_it_needs_no_permission(folder: Path, keys: dict[str, Any]) -> None:
    now = _config(folder, **keys)
    assert differences(yaml.safe_load((folder / "config.yaml").read_text()), now)
    _refuse(folder, now)


def test_of_a_list_of_losses_the_key_that_changed_is_told(folder: Path) -> None:
    def config(weight: float) -> RunConfig:
        terms = [{"name": "local_support", "k": 8}, {"name": "sampled_token", "weight": weight}]
        return _config(folder, objective=terms)

    write_config(folder, config(0.1), step=0)
    _refuse(folder, config(0.1))
    with pytest.raises(ConfigError, match=r"\(objective\.1\.weight: 0\.1, now 0\.2\)"):
        _refuse(folder, config(0.2))


@pytest.mark.parametrize(
    ("keys", "hangs"),
    [
        ({"optimizer__decay": "cosine"}, "optimizer.decay"),
        (
            {
                "tasks__math__guidance": {"by": "teacher"},
                "objective": {"name": "trust_region"},
            },
            "tasks.math.guidance",
        ),
        (
            {"tasks__math__expert_share": [1.0, 0.5], "objective": {"name": "imitation"}},
            "tasks.math.expert_share",
        ),
        ({"objective": {"name": "reward_clipped"}}, "tasks.math.objective (reward_clipped)"),
        ({"tasks__math__objective": {"name": "reward_clipped"}}, "tasks.math.objective"),
        ({"objective": {"name": "reward_clipped", "switch": 0.0}}, ""),  # one phase only
        ({"tasks__math__expert_share": 0.5, "objective": {"name": "imitation"}}, ""),
        ({"tasks__math__expert_share": [1.0, 0.5]}, ""),  # nobody asks the expert
        ({"schedule__policy": "token_budget"}, ""),
        ({"schedule__policy": "gap", "schedule__max_staleness": 1}, ""),
        ({"optimizer__warmup": 10}, ""),
    ],
    ids=str,
)
def test_more_steps_are_asked_about_where_something_hangs_on_them(
    folder: Path, keys: dict[str, Any], hangs: str
) -> None:
    write_config(folder, _config(folder, **keys), step=4)
    longer = _config(folder, steps=12, **keys)
    assert hangs in depending_on_steps(longer, longer.resolve())
    if not hangs:
        _refuse(folder, longer)
        return
    with pytest.raises(ConfigError) as refused:
        _refuse(folder, longer)
    assert f"(steps: 6, now 12, on which {hangs}" in str(refused.value)


def test_fewer_steps_than_are_done(folder: Path) -> None:
    for accept in (False, True):  # no permission makes steps undone
        with pytest.raises(ConfigError, match=r"^steps: 3, but 4 are done in .*: set it to 4"):
            _refuse(folder, _config(folder, steps=3, accept_changes=accept))


@pytest.mark.parametrize(
    "text", ["", "steps: [", "garbage", "- 1\n", "{}", "steps: 6\n", "\x00\x01", "a: &a [*a]"]
)
def test_a_damaged_configuration_is_named(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged \(.+put it back") as refused:
        _refuse(folder, _config(folder))
    assert "\n" not in str(refused.value) and "accept_changes=true" in str(refused.value)
    _refuse(folder, _config(folder, accept_changes=True))
    write_config(folder, _config(folder, accept_changes=True), step=4)
    _refuse(folder, _config(folder))


def test_cut_off_anywhere_it_is_refused_in_one_line(folder: Path) -> None:
    """Up to its last key that is not free and has a value other than its default's."""
    whole = (folder / "config.yaml").read_bytes()
    last = whole.index(b"max_turns: 1\n") + len(b"max_turns: 1")
    for length in range(0, last, 7):
        (folder / "config.yaml").write_bytes(whole[:length])
        with pytest.raises(ConfigError) as refused:
            _refuse(folder, _config(folder))
        assert "\n" not in str(refused.value)


def test_one_that_is_missing_beside_checkpoints(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged \(.*No such file"):
        _refuse(folder, _config(folder))


def test_without_a_checkpoint_nothing_is_compared(tmp_path: Path) -> None:
    write_config(tmp_path, _config(tmp_path), step=0)
    _refuse(tmp_path, _config(tmp_path, seed=5, steps=1))


def test_defaults_that_came_later_are_no_change(folder: Path) -> None:
    path = folder / "config.yaml"
    old = yaml.safe_load(path.read_text())
    del old["optimizer"]["recompute"], old["schedule"], old["tasks"]["math"]["group"]
    path.write_text(yaml.safe_dump(old))
    _refuse(folder, _config(folder))


def test_the_permission_is_for_once_and_what_it_changed_is_on_record(folder: Path) -> None:
    write_config(folder, _config(folder, accept_changes=True, optimizer__lr=5e-5), step=4)
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["accept_changes"] is False and kept["optimizer"]["lr"] == 5e-5
    write_config(folder, _config(folder, optimizer__lr=5e-5), step=5)  # nothing new
    write_config(folder, _config(folder, optimizer__lr=5e-5, steps=9), step=6)
    lines = [json.loads(x) for x in (folder / "changes.jsonl").read_text().splitlines()]
    assert [(line["step"], line["changes"]) for line in lines] == [
        (4, {"optimizer.lr": [1e-4, 5e-5]}),
        (6, {"steps": [6, 9]}),
    ]


def test_files_that_may_hold_a_key_are_their_owners(folder: Path) -> None:
    write_config(folder, _config(folder, seed=2), step=4)
    for name in ("config.yaml", "changes.jsonl"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
