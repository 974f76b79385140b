"""Whole runs of objectives that ask more of the teacher: its whole distribution, or its word on ids
of the student's choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs

pytestmark = pytest.mark.runs

OBJECTIVES: dict[str, dict[str, Any]] = {
    "student support": {"name": "local_support", "k": 8, "support": "student"},
    "student+sampled": {"name": "local_support", "k": 8, "support": "student+sampled"},
    "whole vocabulary": {"name": "full_vocabulary", "direction": "jsd"},
    "trust region": {"name": "trust_region", "k": 8},
    "adaptive support": {"name": "local_support", "k": 8, "mass": 0.3},
}


def _run(
    folder: Path, models: dict[str, str], teacher: str, objective: Any, **sections: Any
) -> list[dict[str, Any]]:
    """The metrics of a short run on sums, of one to eight tokens each."""
    given = {
        "steps": 1,
        "teachers": {"one": {"model": models[teacher], "device": "cpu"}},
        "tasks": {"math": runs.MATH | {"episodes": 6}},
        "objective": objective,
        "rollout": {"processes": 0, "max_turns": 1, "max_new_tokens": 8},
        "optimizer": {"micro_tokens": 64},
    }
    return runs.lines(runs.train(runs.config(folder, models, **given | sections)))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_student_has_nothing_to_learn_from_itself_and_something_from_another(
    objective: dict[str, Any], tmp_path: Path, models: dict[str, str]
) -> None:
    """From rollout to update: an answer at another row's ids, or at another token's, shows here.
    What is left is the rounding of a teacher's log-probabilities to float16."""
    (own,) = _run(tmp_path / "own", models, "student", objective)
    (other,) = _run(tmp_path / "other", models, "one", objective)
    assert own["tokens/trained"] > 20
    assert own["loss/mean"] == pytest.approx(0, abs=1e-5)
    assert own["optimizer/grad_norm"] < min(2e-3, other["optimizer/grad_norm"] / 20)
    assert abs(other["loss/mean"]) > 0.1 and other["optimizer/grad_norm"] > 0.01
    if objective["name"] == "trust_region":
        assert own["trust/share"] == 1 and 0 < other["trust/share"] < 1


def test_the_whole_divergence_falls(tmp_path: Path, models: dict[str, str]) -> None:
    """On new problems at each step."""
    objective = OBJECTIVES["whole vocabulary"]
    lines = _run(tmp_path, models, "one", objective, steps=18, optimizer={"lr": 1e-2})
    first, last = (sum(line["loss/mean"] for line in part) for part in (lines[:3], lines[-3:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("name", ["student+sampled", "trust region"])
def test_one_loss_in_a_list_trains_to_the_same_bits(
    name: str, tmp_path: Path, models: dict[str, str]
) -> None:
    for folder, objective in (("plain", OBJECTIVES[name]), ("listed", [OBJECTIVES[name]])):
        _run(tmp_path / folder, models, "one", objective, steps=2)
    runs.assert_same(tmp_path / "plain", tmp_path / "listed", step=2)


def test_a_sum_asks_once_for_what_its_losses_need(tmp_path: Path, models: dict[str, str]) -> None:
    """The teacher at the student's own ids, and its whole distribution; in the first step each loss
    is what it is alone."""
    parts = [OBJECTIVES["student support"], OBJECTIVES["whole vocabulary"]]
    (both,) = _run(tmp_path / "both", models, "one", [parts[0], parts[1] | {"weight": 0.5}])
    alone = [_run(tmp_path / one["name"], models, "one", one)[0]["loss/mean"] for one in parts]
    found = [both["loss/local_support"], both["loss/full_vocabulary"]]
    assert found == pytest.approx(alone, rel=1e-5)
    assert both["loss/mean"] == pytest.approx(alone[0] + 0.5 * alone[1], rel=1e-5)
    assert both["local_support/support/size"] == 8
