"""`tutelage demo`: one student, two jobs, two teachers, and a table that shows what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tutelage.distill import checkpoints
from tutelage.distill.config import RunConfig, load_config
from tutelage.distill.display import ConsoleWatcher, score_table
from tutelage.distill.training import Run, evaluate_model


def run_demo(path: Path, overrides: list[str]) -> int:
    """Evaluate start and teachers, train, evaluate, print the table; scores stay in demo.json."""
    begun = time.monotonic()
    config = load_config(path, overrides)
    folder = Path(config.run)
    with ConsoleWatcher() as watcher:
        say = watcher.console.print
        say(
            f"{config.steps} steps of {', '.join(config.tasks)}; everything goes to {folder}",
            highlight=False,
        )
        columns: dict[str, Any] = _kept(folder)
        if not columns:
            say("before:", highlight=False)
            columns["before"] = evaluate_model(config, None, watch=watcher)["scores"]
            say("teachers, each on its own task:", highlight=False)
            columns["teacher"] = _teachers(config, watcher)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.write_json(folder / "demo.json", columns)
        with Run(config, watch=watcher) as run:
            run.train()
            say("after:", highlight=False)
            columns["after"] = run.evaluate(config.evaluation.modes)
    checkpoints.write_json(folder / "demo.json", columns)
    shown = {name: columns[name] for name in ("before", "after", "teacher")}
    title = f"One student under {len(config.teachers)} teachers, unseen games and problems"
    watcher.console.print(score_table(title, shown))
    watcher.console.print(_shares(columns), highlight=False)
    watcher.console.print(
        f"{(time.monotonic() - begun) / 60:.1f} minutes; {folder}", highlight=False
    )
    return 0


def _kept(folder: Path) -> dict[str, Any]:
    """What an interrupted demo had measured already."""
    path = folder / "demo.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _teachers(config: RunConfig, watcher: ConsoleWatcher) -> dict[str, Any]:
    """Each teacher's scores on the tasks that it teaches."""
    scores: dict[str, Any] = {}
    for name, teacher in config.teachers.items():
        own = {
            task: value
            for task, value in config.tasks.items()
            if next(iter(value.teachers), None) == name  # of several, the first
        }
        if not own or teacher.files is None:  # a server scores, and does not play
            continue
        found = evaluate_model(
            config.model_copy(update={"tasks": own}), teacher.files, watch=watcher
        )
        scores |= found["scores"]
    return scores


def _shares(columns: dict[str, Any]) -> str:
    """The student's final score as a share of its teacher's."""
    parts = []
    for task, after in columns["after"].items():
        theirs = columns["teacher"].get(task, {})
        for mode, found in after.items():
            if mode != "metric" and mode in theirs and (best := theirs[mode]["value"]):
                parts.append(f"{task}, {mode}: {found['value'] / best:.0%}")
    return "share of the teacher's score: " + "; ".join(parts)
