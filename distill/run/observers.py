"""Observers, which are told what a run does as it does it: the terminal, TensorBoard, a user's own.

RUN/metrics.jsonl is written before they are told, and not by one of them: the run depends on that
file, and on no observer.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Mapping
from typing import Any

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.sections import CONSOLE, OBSERVERS
from tutelage.evaluation.files import first_line


class Observer:
    """Is told what a run does. A subclass overrides the methods that it needs; configurations name
    it as `module:Class`, and it is made without arguments."""

    def start(self, config: RunConfig, step: int) -> None:
        """Training begins at `step`."""

    def doing(self, what: str) -> None:
        """The run begins something that may take a while."""

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        """A step's update is done; with several tasks this is called once for each."""

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        """Evaluation has played `done` of `total` episodes, 0 at first."""

    def score(self, task: str, mode: str, found: Mapping[str, Any]) -> None:
        """A task has been evaluated."""

    def written(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        """A step's line is in metrics.jsonl, with the scores of an evaluation that followed the
        step; its tasks are joined by `+`. In a resumed run, the first call replaces the old line of
        that step and all lines after it."""

    def close(self) -> None:
        """The run has ended, well or not."""


def curves(task: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step's line, by names that begin with the task's."""
    prefix = "" if "+" in task else f"{task}/"  # a line of several tasks has the prefixes already
    return {prefix + name: x for name, x in metrics.items() if isinstance(x, int | float)}


class Observers(Observer):
    """Tells each observer. One that raises is dropped, with a warning, and counted in `failed`; the
    run continues."""

    def __init__(self, observers: Mapping[str, Observer]) -> None:
        self._told = dict(observers)
        self.failed = 0

    def start(self, config: RunConfig, step: int) -> None:
        self._tell("start", config, step)

    def doing(self, what: str) -> None:
        self._tell("doing", what)

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        self._tell("step", step, task, metrics)

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        self._tell("evaluating", task, mode, done, total)

    def score(self, task: str, mode: str, found: Mapping[str, Any]) -> None:
        self._tell("score", task, mode, found)

    def written(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        self._tell("written", step, task, metrics)

    def close(self) -> None:
        self._tell("close")

    def _tell(self, event: str, *what: Any) -> None:
        for name, observer in [*self._told.items()]:  # a copy: one that fails is deleted
            try:
                getattr(observer, event)(*what)
            except Exception as error:
                del self._told[name]
                self.failed += 1
                why = first_line(error.__cause__ or error)
                warnings.warn(
                    f"journal.observers: {name} failed ({event}: {why}): it is told"
                    " no more; the run continues, and metrics.jsonl has everything",
                    stacklevel=2,
                )
                if event != "close":
                    with contextlib.suppress(Exception):
                        observer.close()


def make_observers(config: RunConfig, console: Observer | None, *, trains: bool) -> Observers:
    """The observers that the configuration names; where nothing is trained, the console alone.
    console: the observer that `console` stands for; None: there is none.

    Raises:
        ConfigError: one of them is not here, or cannot be made.
    """
    found: dict[str, Observer] = {}
    for name in config.journal.observers:
        if name != CONSOLE and trains:
            found[name] = _made(name)
        elif name == CONSOLE and console is not None:
            found[name] = console
    return Observers(found)


def _made(name: str) -> Observer:
    module, _, kind = OBSERVERS.get(name, name).partition(":")
    try:
        made = getattr(importlib.import_module(module), kind)()
    except Exception as error:
        raise ConfigError(
            f"journal.observers: {name!r} cannot be made ({type(error).__name__}:"
            f" {first_line(error)}): install what it needs, or leave it out"
        ) from error
    if not isinstance(made, Observer):
        raise ConfigError(
            f"journal.observers: {name!r} is no subclass of {Observer.__module__}.Observer"
        )
    return made
