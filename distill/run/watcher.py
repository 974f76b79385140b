"""Who is told what a run does, as it does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutelage.distill.config.run import RunConfig


class Watcher:
    """Told what a run does, as it does it. This one keeps silent; the command line's draws it."""

    def doing(self, what: str) -> None:
        """This begins, and may take a while."""

    def start(self, config: RunConfig, step: int) -> None:
        """Training begins at `step`."""

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        """A step is done."""

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        """Evaluation has played `done` of `total` episodes, 0 at first."""

    def score(self, task: str, mode: str, found: Mapping[str, Any]) -> None:
        """A task has been evaluated."""
