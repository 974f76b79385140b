"""Placement: the interface to rollout workers and teachers wherever they run; and the one in which
all run in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Generic, Protocol, TypeVar

from tutelage.scheduler.episodes import Dropped, Episode, Order, SamplingParams
from tutelage.scheduler.rollouts import RolloutWorker

LOAD_SECONDS = 3600.0
"""A process of a worker, a teacher or the learner may take this long to load its model."""


class Addressed(Protocol):
    """A message to a teacher. What it holds the teachers define; here only its address counts."""

    @property
    def teacher(self) -> str: ...


AskT = TypeVar("AskT", bound=Addressed, contravariant=True)
AnswerT = TypeVar("AnswerT", covariant=True)


class Service(Protocol[AskT, AnswerT]):
    """A teacher at work, in this process or in an actor."""

    def answer(self, ask: AskT, /) -> AnswerT:
        """Answer one ask."""

    def close(self) -> None:
        """Let go of what the teacher holds."""


class Started:
    """Episodes that are being played, or have been."""

    def __init__(self, finish: Callable[[], list[Episode | Dropped]]) -> None:
        self._finish = cache(finish)  # a checkpoint may ask for them, too

    def outcomes(self) -> list[Episode | Dropped]:
        """The outcomes, in the orders' order; waits until all are there."""
        return self._finish()


class Placement(Protocol[AskT, AnswerT]):
    """The learner's view of everything that is not the learner. restarts: how many actors were
    replaced."""

    restarts: int

    def sync(self, version: int) -> None:
        """From here on, rollouts use this version of the student."""

    def start(self, orders: Sequence[Order], *, sampling: SamplingParams | None = None) -> Started:
        """Begin to play the orders with the version that was synced last."""

    def num_episodes(self, task: str) -> int | None:
        """How many distinct games the task has; None: its environment does not say."""

    def score(self, asks: Sequence[AskT]) -> Sequence[AnswerT]:
        """The teachers' answers, in the asks' order."""

    def close(self) -> None:
        """Stop every process that was started."""


class InProcess(Generic[AskT, AnswerT]):
    """All in this process: rollouts share the learner's weights, teachers are called directly."""

    restarts = 0  # there are no actors

    def __init__(
        self, worker: RolloutWorker, teachers: Mapping[str, Service[AskT, AnswerT]]
    ) -> None:
        self._worker, self._teachers = worker, dict(teachers)

    def sync(self, version: int) -> None:
        self._worker.load(None, version)

    def start(self, orders: Sequence[Order], *, sampling: SamplingParams | None = None) -> Started:
        # at once, not when the outcomes are asked for: the weights may be newer by then
        played = self._worker.collect(orders, sampling=sampling)
        return Started(lambda: played)

    def num_episodes(self, task: str) -> int | None:
        return self._worker.num_episodes(task)

    def score(self, asks: Sequence[AskT]) -> Sequence[AnswerT]:
        return [self._teachers[ask.teacher].answer(ask) for ask in asks]

    def close(self) -> None:
        self._worker.close()
        self._worker.engine.close()
        for teacher in self._teachers.values():
            teacher.close()
