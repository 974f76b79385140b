"""`tutelage demo`: trains one student under two teachers, and prints a table of scores."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from tutelage.distill.cli.signals import Signals
from tutelage.distill.config.loading import load_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.lock import Lock
from tutelage.distill.run.progress import ConsoleObserver
from tutelage.distill.run.training import Run, Stopped, evaluate_model
from tutelage.envs.errors import first_line
from tutelage.evaluation.files import write_json
from tutelage.evaluation.tables import score_table


def run_demo(path: Path, overrides: list[str]) -> int:
    """Evaluate student and teachers, train, evaluate the student again, print the table. Scores are
    kept in demo.json."""
    begun = time.monotonic()
    config = load_config(path, overrides)
    folder = Path(config.run)
    # locked here: `Run` locks only while it trains, and demo.json is written before that
    with ConsoleObserver(evaluates_after=True) as watcher, Signals() as signals, Lock(folder):
        say = watcher.say
        say(f"{config.steps} steps of {', '.join(config.tasks)}; everything goes to {folder}")
        columns = _measured(config, watcher)
        with Run(config, watch=watcher) as run:
            signals.stop = run.stop
            run.train()
            if not run.stopped:
                say("after:")
                columns["after"] = _after(run)
            signals.stop = None  # nothing is left to save: another signal may end this at once
        if run.stopped:
            say(f"stopped; {run.record.standing()}")
            return signals.code
        write_json(folder / "demo.json", columns)
    shown = {name: columns[name] for name in ("before", "after", "teacher")}
    title = f"One student under {len(config.teachers)} teachers, unseen games and problems"
    watcher.console.print(score_table(title, shown))
    watcher.console.print(_shares(columns), highlight=False)
    watcher.say(f"{(time.monotonic() - begun) / 60:.1f} minutes; {folder}")
    return 0


def _measured(config: RunConfig, watcher: ConsoleObserver) -> dict[str, Any]:
    """The scores of the untrained student and of the teachers. What an interrupted demo measured is
    not measured again; each new score is saved at once."""
    path = Path(config.run) / "demo.json"
    columns = _kept(path, config, watcher)
    if "before" not in columns:
        watcher.say("before:")
        columns["before"] = evaluate_model(config, None, watch=watcher)["scores"]
        write_json(path, columns)
    if "teacher" not in columns:
        watcher.say("teachers, each on its own task:")
        columns["teacher"] = _teachers(config, watcher)
        write_json(path, columns)
    return columns


def _kept(path: Path, config: RunConfig, watcher: ConsoleObserver) -> dict[str, Any]:
    """What an interrupted demo had measured."""
    with_teacher = [name for name, task in config.tasks.items() if task.teachers]
    wanted = {"before": [*config.tasks], "teacher": with_teacher}
    try:
        # every number is checked: a damaged file must not end the demo when it prints its table
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        columns = {name: found[name] for name in wanted if name in found}
        if not columns:
            raise ValueError("no scores")
        for name, scores in columns.items():
            for task, mode in itertools.product(wanted[name], config.evaluation.modes):
                score = scores[task][mode]
                low, value, high = score["interval"][0], score["value"], score["interval"][1]
                if not 0 <= low <= value <= high <= 1:
                    raise ValueError(f"{task}, {mode}: {value} is no share")
    except FileNotFoundError:
        return {}
    # RecursionError: json's, of brackets nested by the thousand
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        # a KeyError's text is the missing key and nothing else
        why = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        watcher.say(f"{path} is damaged ({why}): its scores are measured again")
        return {}
    return columns


def _after(run: Run) -> dict[str, Any]:
    try:
        return run.evaluate(run.config.evaluation.modes)
    except Stopped:  # train() notes its own stop; evaluate() only raises
        run.stopped = True
        return {}


def _teachers(config: RunConfig, watcher: ConsoleObserver) -> dict[str, Any]:
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
        # model_copy checks nothing: RunConfig would refuse the teachers that now have no task
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
            # beside the modes stands the metric's name; of a teacher's 0 there is no share
            if mode != "metric" and mode in theirs and (best := theirs[mode]["value"]):
                parts.append(f"{task}, {mode}: {found['value'] / best:.0%}")
    return "share of the teacher's score: " + "; ".join(parts)
