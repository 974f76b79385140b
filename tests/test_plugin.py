"""Anyone's text environment trains: examples/guess_number, which knows nothing of this project."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from tutelage.distill.config.loading import load_config
from tutelage.distill.run.training import Run

pytestmark = pytest.mark.runs

EXAMPLE = Path(__file__).parent.parent / "examples" / "guess_number"
NUMBERS, GUESSES = 15, 4


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


def test_the_expert_finds_every_number() -> None:
    env = gymnasium.make("guess_number:GuessNumber-v0")
    check_env(env.unwrapped, skip_render_check=True)
    for index in range(NUMBERS):
        _, info = env.reset(options={"index": index})
        for _ in range(GUESSES):
            _, _, ended, _, info = env.step(info["expert_action"])
            if ended:
                break
        assert info["success"], f"number {index + 1}"


def test_it_trains_from_its_config(tmp_path: Path) -> None:
    config = load_config(
        EXAMPLE / "config.yaml",
        [f"run={tmp_path}", "steps=12", "evaluation={every: 0}", "journal.tensorboard=false"],
    )
    with Run(config) as run:
        run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert {line["reward/success"] for line in lines} == {1.0}  # the expert plays
    assert lines[-1]["loss/mean"] < lines[0]["loss/mean"] / 2
