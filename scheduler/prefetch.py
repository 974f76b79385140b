"""Asynchronous rollouts: while the student learns from one step's episodes, later ones are played.

With staleness s the episodes of step n are started before the update of step n - s, so the weights
that play them are at most s updates old; 0 is strictly on-policy. On Ray playing and learning
overlap. In one process nothing does: there the episodes are played when they are started, with the
same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from tutelage.scheduler.episodes import Dropped, Episode, Order, revived, saved
from tutelage.scheduler.placement import Started
from tutelage.scheduler.timetable import Planned, Timetable


class Prefetch:
    """The run's episodes, step by step.

    Args:
        start: begins to play the orders of a task.
        num_games: how many distinct games a task's environment has, or None.
        staleness: how many updates old the weights that play an episode may be.
    """

    def __init__(
        self,
        timetable: Timetable,
        start: Callable[[Sequence[Order]], Started],
        num_games: Callable[[str], int | None],
        *,
        staleness: int,
    ) -> None:
        self._timetable, self._play = timetable, start
        self._num_games, self._staleness = num_games, staleness
        self._started: dict[int, dict[str, Started]] = {}  # by step

    def next(self) -> dict[str, list[Episode | Dropped]]:
        """The episodes of the step that is due, by task. First those of the next `staleness` steps
        are started, with the weights that the placement has now."""
        # `plan` returns None after the last step.
        while len(self._timetable.planned) <= self._staleness and self._timetable.plan():
            pass
        due = len(self._timetable.history)
        self._started = {step: own for step, own in self._started.items() if step >= due}
        for step, planned in enumerate(self._timetable.planned, due):
            if step not in self._started:
                self._started[step] = self._start(planned)
        return {task: started.outcomes() for task, started in self._started[due].items()}

    def _start(self, planned: Planned) -> dict[str, Started]:
        return {
            task: self._play(self._timetable.orders(task, self._num_games(task), turn))
            for task, turn in planned.turns.items()
        }

    def state(self) -> list[dict[str, Any]]:
        """The planned steps and their episodes as plain data, for a checkpoint; waits until all are
        played. A resumed run could not play them again: the weights that did are gone."""
        if not self._staleness:
            return []  # on-policy: the checkpoint's own weights play the next step
        due, found = len(self._timetable.history), []
        for step, planned in enumerate(self._timetable.planned, due):
            own = self._started.get(step, {})
            outcomes = {task: [saved(o) for o in x.outcomes()] for task, x in own.items()}
            found.append({"planned": asdict(planned), "outcomes": outcomes})
        return found

    def restore(
        self,
        state: Sequence[Mapping[str, Any]],
        sound: Callable[[str, Sequence[Episode | Dropped]], bool],
    ) -> list[Planned]:
        """Put back what `state` gave; returns the planned steps. A step whose episodes are not
        `sound` (by task and outcomes) is played anew: it stopped the run, and would again."""
        self._started = {}
        for step, one in enumerate(state, len(self._timetable.history)):
            outcomes = {task: [revived(o) for o in own] for task, own in one["outcomes"].items()}
            if outcomes and all(sound(task, own) for task, own in outcomes.items()):
                # `partial`, not a lambda, which would see the last task's `own`
                self._started[step] = {
                    task: Started(partial(list, own)) for task, own in outcomes.items()
                }
        return [Planned(**one["planned"]) for one in state]
