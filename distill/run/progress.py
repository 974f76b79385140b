"""The console's observer: a bar or lines with the pace, the time left and the current scores."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.observers import Observer
from tutelage.evaluation.tables import percent

QUIET_SECONDS = 10.0
"""Without a terminal, a line of progress at most this often."""
SLOW_SECONDS = 60.0
"""Without a terminal, where a step takes longer than this its parts are told, too."""
LATELY = 20
"""How many of a task's last steps predict how long its next one takes."""


class Pace:
    """The mean seconds of a step, by task: one task's steps may take three times another's."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self._recent: dict[str, deque[float]] = {task: deque(maxlen=LATELY) for task in tasks}
        self._counts: Counter[str] = Counter()

    def add(self, task: str, seconds: float) -> None:
        """Add a step. A task's first one, which warms up, counts only until there is a second."""
        if self._counts[task] == 1:
            self._recent[task].clear()
        self._recent[task].append(seconds)
        self._counts[task] += 1

    def seconds(self) -> float:
        """A step's mean, weighted by how often each task came; 0.0 before the first."""
        means = {task: fmean(recent) for task, recent in self._recent.items() if recent}
        if not means:
            return 0.0
        unknown = fmean(means.values())
        # + 1: a task that has not come yet will, and is taken for as slow as the others' mean
        weights = {task: self._counts[task] + 1 for task in self._recent}
        total = sum(weight * means.get(task, unknown) for task, weight in weights.items())
        return total / sum(weights.values())


class ConsoleObserver(Observer):
    """Draws a bar on a terminal, prints a line now and then elsewhere.

    Args:
        evaluates_after: one more evaluation follows the training, and counts as time left.
    """

    def __init__(self, console: Console | None = None, *, evaluates_after: bool = False) -> None:
        self.console = console or Console()
        self._evaluates_after = evaluates_after
        self._bar: Progress | None = None
        self._bars: dict[str, Any] = {}
        self._begun: dict[str, float] = {}
        self._latest: dict[str, Mapping[str, Any]] = {}
        self._printed = self._mark = time.monotonic()
        self._config: RunConfig | None = None
        self._pace = Pace(())
        self._done = 0
        self._evaluations: dict[tuple[str, str], float] = {}  # seconds of the last one

    def __enter__(self) -> ConsoleObserver:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._drop("doing")
            self._bar.stop()

    def doing(self, what: str) -> None:
        if self._bar is not None:
            self._draw("doing", None, None, what)
        elif not self._pace.seconds() or self._pace.seconds() > SLOW_SECONDS:
            self.say(what)

    def start(self, config: RunConfig, step: int) -> None:
        self._config, self._pace, self._done = config, Pace(config.tasks), step
        self._mark = time.monotonic()
        if step:
            self.say(f"resuming at step {step} of {config.steps} in {config.run}")

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        assert self._config is not None
        self._latest[task] = metrics
        done, now, steps = step + 1, time.monotonic(), self._config.steps
        first = not self._pace.seconds()
        if done != self._done:  # called once for each task of a step, which takes its time once
            self._pace.add(task, now - self._mark)
            self._mark, self._done = now, done
        pace = f"{_seconds(self._pace.seconds())} a step, {_span(self._left(done))} left"
        note = "  ".join(_brief(name, found) for name, found in sorted(self._latest.items()))
        if self._bar is not None:
            self._draw("training", done, steps, f"{done}/{steps}, {pace}  {note}")
        elif first or done == steps or now - self._printed > QUIET_SECONDS:
            self.say(f"step {done} of {steps}, {pace}  {note}")

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        if not done:
            self._mark = time.monotonic()
        self.advance(f"evaluating {task}, {mode}", done, total)

    def score(self, task: str, mode: str, found: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._evaluations[task, mode] = now - self._mark
        self._mark = now  # the next step's time begins here: evaluation is no part of a step
        self.say(f"{task}, {mode}: {percent(found)}")

    def advance(self, what: str, done: int, total: int) -> None:
        """Show how much of `what` is done."""
        now = time.monotonic()
        begun = self._begun.setdefault(what, now)
        left = f", {_span((now - begun) * (total - done) / done)} left" if 0 < done < total else ""
        if self._bar is not None:
            self._draw(what, done, total, f"{done}/{total}{left}")
        elif not done or now - self._printed > QUIET_SECONDS:
            self.say(f"{what} {done}/{total}{left}")
        if done == total:
            self._drop(what)

    def _left(self, done: int) -> float:
        """Seconds to the end of the run, if evaluations take as long as they last did."""
        assert self._config is not None
        tasks, wanted, total = self._config.tasks, self._config.evaluation, self._config.steps

        def once(modes: Iterable[str]) -> float:
            asked = [(task, mode) for task in tasks for mode in modes]
            return sum(self._evaluations.get(one, 0.0) for one in asked)

        # done - 1: this step's own evaluation, if one is due, is still to come
        live = total // wanted.every - (done - 1) // wanted.every if wanted.every else 0
        last = wanted.final + self._evaluates_after
        steps = (total - done) * self._pace.seconds()
        return steps + live * once(wanted.live_modes) + last * once(wanted.modes)

    def _draw(self, what: str, done: int | None, total: int | None, note: str) -> None:
        """A row on the terminal, with a bar where the total is known."""
        assert self._bar is not None
        if what not in self._bars:
            shown = "" if total is None else what
            self._bars[what] = self._bar.add_task(shown, total=total, note=note)
        self._bar.update(self._bars[what], completed=done, total=total, note=note)

    def _drop(self, what: str) -> None:
        self._begun.pop(what, None)
        if self._bar is not None and what in self._bars:
            self._bar.remove_task(self._bars.pop(what))

    def say(self, text: str) -> None:
        """Print a line."""
        self._printed = time.monotonic()
        # soft_wrap: in a file, rich would break lines at 80 columns
        self.console.print(text, highlight=False, soft_wrap=True)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _span(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _brief(task: str, metrics: Mapping[str, Any]) -> str:
    return f"{task}: success {metrics['reward/success']:.0%}, loss {metrics['loss/mean']:.3f}"
