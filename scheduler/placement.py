"""Where workers and teachers run, as the rest of a run sees it; and in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tutelage.scheduler.episodes import Dropped, Episode, Order, Row, SamplingLaw
from tutelage.scheduler.rollouts import RolloutWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Rows for a teacher; `wanted` is what its `score` takes."""

    teacher: str
    rows: Sequence[Row]
    wanted: Mapping[str, Any]


class Placement(Protocol):
    """The learner's view of everything that is not the learner. restarts: actors replaced."""

    restarts: int

    def sync(self, version: int) -> None:
        """From here on, rollouts use this version of the student."""

    def start(self, orders: Sequence[Order], *, law: SamplingLaw | None = None) -> Any:
        """Begin to play the orders with the version that was synced last."""

    def finish(self, started: Any) -> list[Episode | Dropped]:
        """What came of what was started; outcomes in the orders' order."""

    def num_episodes(self, task: str) -> int | None:
        """How many distinct games the task has; None: its environment does not say."""

    def score(self, asks: Sequence[Ask]) -> list[Any]:
        """The teachers' answers."""

    def identity(self, teacher: str) -> Any:
        """Which teacher this is."""

    def close(self) -> None:
        """Stop every process that was started."""


class InProcess:
    """Everything here: rollouts share the learner's weights, teachers answer by call."""

    restarts = 0

    def __init__(self, worker: RolloutWorker, teachers: Mapping[str, Any]) -> None:
        self._worker, self._teachers = worker, dict(teachers)

    def sync(self, version: int) -> None:
        self._worker.load(None, version)

    def start(self, orders: Sequence[Order], *, law: SamplingLaw | None = None) -> Any:
        return self._worker.collect(orders, law=law)

    def finish(self, started: Any) -> list[Episode | Dropped]:
        return list(started)

    def num_episodes(self, task: str) -> int | None:
        return self._worker.num_episodes(task)

    def score(self, asks: Sequence[Ask]) -> list[Any]:
        return [self._teachers[ask.teacher].score(ask.rows, **ask.wanted) for ask in asks]

    def identity(self, teacher: str) -> Any:
        return self._teachers[teacher].identity()

    def close(self) -> None:
        self._worker.close()
        self._worker.engine.close()
        for teacher in self._teachers.values():
            teacher.close()
