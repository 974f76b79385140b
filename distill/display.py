"""What a person sees: progress with rates and current scores, and tables with intervals."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tutelage.distill.config import RunConfig
from tutelage.distill.training import Watcher

QUIET_SECONDS = 10.0
"""Without a terminal, a line of progress at most this often."""


class ConsoleWatcher(Watcher):
    """Draws a bar on a terminal, prints a line now and then elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bar: Progress | None = None
        self._bars: dict[str, Any] = {}
        self._latest: dict[str, Mapping[str, Any]] = {}
        self._printed = 0.0
        self._begun = time.monotonic()
        self._steps = self._first = 0

    def __enter__(self) -> ConsoleWatcher:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, config: RunConfig, step: int) -> None:
        self._steps, self._first, self._begun = config.steps, step, time.monotonic()
        if step:
            self.say(f"going on at step {step} of {config.steps} in {config.run}")

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        self._latest[task] = metrics
        rate = (step + 1 - self._first) / max(1e-9, time.monotonic() - self._begun)
        note = "  ".join(_brief(name, found) for name, found in sorted(self._latest.items()))
        self.advance("training", step + 1, self._steps, f"{rate:.2f} steps/s  {note}")

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        self.advance(f"evaluating {task}, {mode}", done, total)

    def score(self, task: str, mode: str, found: Mapping[str, Any]) -> None:
        self.say(f"{task}, {mode}: {_percent(found)}")

    def advance(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how much of something is done."""
        if self._bar is not None:
            if what not in self._bars:
                self._bars[what] = self._bar.add_task(what, total=total, note="")
            self._bar.update(self._bars[what], completed=done, total=total, note=note)
            if what != "training" and done == total:
                self._bar.remove_task(self._bars.pop(what))
        elif done == total or time.monotonic() - self._printed > QUIET_SECONDS:
            self._printed = time.monotonic()
            self.say(f"{what} {done}/{total}  {note}".rstrip())

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, highlight=False, soft_wrap=True)


def _brief(task: str, metrics: Mapping[str, Any]) -> str:
    return f"{task}: success {metrics['reward/success']:.0%}, loss {metrics['loss/mean']:.3f}"


def _percent(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}], n={found['n']}"


def score_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of scores. columns: heading -> scores by task as `Run.evaluate` gives them."""
    table = Table(title=title, caption="95 % Wilson intervals in brackets")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("sampling")
    for heading in columns:
        table.add_column(heading, justify="right")
    tasks = list(dict.fromkeys(task for scores in columns.values() for task in scores))
    for task in tasks:
        held = [scores[task] for scores in columns.values() if task in scores]
        modes = [mode for mode in held[0] if mode != "metric"]
        for mode in modes:
            cells = [_cell(scores.get(task, {}).get(mode)) for scores in columns.values()]
            table.add_row(task, held[0]["metric"], mode, *cells)
    return table


def type_table(title: str, scores: Mapping[str, Any], mode: str) -> Table:
    """One row per task type."""
    table = Table(title=title)
    for heading in ("task", "type", "score"):
        table.add_column(heading, justify="left" if heading != "score" else "right")
    for task, found in scores.items():
        for kind, rate in found[mode]["by_type"].items():
            table.add_row(task, kind, f"{_cell(rate)}, n={rate['n']}")
    return table


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['value']:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"
