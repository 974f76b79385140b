"""The run's journal: in whose episode a training example stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tutelage.distill.run.journal import Journal
from tutelage.distill.student.examples import Example
from tutelage.scheduler.episodes import Dropped, Episode, Order, Row, SamplingParams


def test_an_episode_holds_its_own_examples_whatever_their_rows_are(
    tmp_path: Path, make_row: Callable[..., Row]
) -> None:
    """All say the same, so that the row tells nothing; one was lost, one has a row per turn."""
    row = make_row([("prompt", [1]), ("said", [2, 3])])

    def played(task: str, number: int, rows: int = 1) -> Episode:
        return Episode(
            order=Order(task=task, number=number, seed=0, index=number),
            rows=(row,) * rows,
            turns=(),
            success=True,
            reward=1.0,
            task_type="",
            ended="terminated",
            sampling=SamplingParams(),
            version=3,
        )

    lost = Order(task="a", number=1, seed=0, index=1)
    outcomes = [
        played("a", 0),
        Dropped(order=lost, reason="died", detail="-", attempts=1),
        played("a", 2, rows=2),
        played("b", 0),
    ]
    masks = {("a", 0): [[0, 0, 1]], ("a", 2): [[0, 1, 0], [0, 1, 1]], ("b", 0): [[0, 0, 0]]}
    examples = [
        Example(task=task, row=row, scores=None, mask_T=np.array(mask, dtype=bool), number=number)
        for (task, number), own in masks.items()
        for mask in own
    ]
    journal = Journal(tmp_path)
    journal.write_episodes(7, outcomes, examples, 4)
    journal.close()
    lines = (tmp_path / "episodes" / "000007.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert found[1]["dropped"] == "died"
    own = [[one["mask"] for one in episode["rows"]] for episode in found if "rows" in episode]
    assert own == [*masks.values()]
