"""Which task is next, and which of its games: a pure function of (seed, step).

So a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.scheduler.episodes import Order

ENDLESS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """How many episodes one of a task's steps plays, and of what.

    group: episodes of one game. labels: the expert's action is recorded in every state (imitation).
    expert_share: share of the episodes that the expert plays itself, at the task's first and last
    step, linear between (DAgger's mixing rate, Ross et al. 2011, section 3).
    guided_share: share of the episodes that begin with a guide's prefix. guided_until: the share of
    the task's steps after which no prefix is left.
    """

    episodes: int
    group: int = 1
    labels: bool = False
    expert_share: tuple[float, float] = (0.0, 0.0)
    guided_share: float = 0.0
    guided_until: float = 1.0

    def guide_at(self, progress: float) -> float:
        """The prefix's share of an episode's greatest length: cosine from 1 to 0 (TrOPD,
        arXiv:2606.01249: alpha = (1 + cos(pi t / T)) / 2)."""
        if progress >= self.guided_until:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * progress / self.guided_until))


class Timetable:
    """Alternates the tasks in their given order, one a step (Revisiting-OPD's round robin).

    A task's n-th step is the same whatever else is in the run: its seeds come from (seed, task, n)
    alone.

    Args:
        tasks: by name, in order. steps: of the run. seed: the run's.
    """

    def __init__(self, tasks: Mapping[str, TaskPlan], *, steps: int, seed: int) -> None:
        if not tasks:
            raise ValueError("a timetable needs at least one task")
        self._tasks, self._names = dict(tasks), tuple(tasks)
        self.steps, self._seed = steps, seed

    def task_at(self, step: int) -> str:
        """The task of a step (0-based)."""
        return self._names[step % len(self._names)]

    def turn_at(self, step: int) -> int:
        """How many steps its task had before this one."""
        return step // len(self._names)

    def steps_of(self, task: str) -> int:
        """How many of the run's steps are the task's."""
        return len(range(self._names.index(task), self.steps, len(self._names)))

    def walk(self, start: int = 0) -> Iterator[tuple[int, str]]:
        """(step, task) from `start` on."""
        for step in range(start, self.steps):
            yield step, self.task_at(step)

    def orders(self, step: int, num_games: int | None) -> list[Order]:
        """The episodes of a step. num_games: how many distinct games the task's environment has;
        None: unknown.

        Games come in passes: each once in an order shuffled anew, before any comes again.
        """
        task = self.task_at(step)
        plan, turn = self._tasks[task], self.turn_at(step)
        games = -(-plan.episodes // plan.group)
        first = turn * games
        indexes = _passes(first, games, num_games, entropy=[self._seed, _key(task)])
        begin, end = plan.expert_share
        progress = turn / max(1, self.steps_of(task) - 1)
        by_expert = round((begin + (end - begin) * progress) * plan.episodes) if plan.labels else 0
        guided, guide = round(plan.guided_share * plan.episodes), plan.guide_at(progress)
        orders = []
        for number in range(plan.episodes):
            entropy = np.random.SeedSequence([self._seed, _key(task), turn, number])
            orders.append(
                Order(
                    task=task,
                    number=number,
                    seed=int(entropy.generate_state(1)[0]),
                    index=indexes[number // plan.group],
                    # spread evenly, so that no kind of game goes to the expert alone
                    actor="expert" if _spread(number, by_expert, plan.episodes) else "student",
                    labels=plan.labels,
                    guide=guide if _spread(number, guided, plan.episodes) else 0.0,
                )
            )
        return orders


def _spread(number: int, count: int, total: int) -> bool:
    """True for `count` of `total` numbers, evenly spaced."""
    return (number + 1) * count // total > number * count // total


def _passes(first: int, count: int, num_games: int | None, *, entropy: Sequence[int]) -> list[int]:
    """The games at places first..first+count-1 of an endless sequence of shuffled passes."""
    if num_games is None:
        return list(range(first, first + count))
    if num_games >= ENDLESS:  # generated games: no pass will end, and a permutation would cost more
        return [place % num_games for place in range(first, first + count)]
    shuffled: dict[int, np.ndarray] = {}
    games = []
    for place in range(first, first + count):
        turn, at = divmod(place, num_games)
        if turn not in shuffled:
            shuffled[turn] = np.random.default_rng([*entropy, turn]).permutation(num_games)
        games.append(int(shuffled[turn][at]))
    return games


def _key(name: str) -> int:
    """A stable number for a name; the built-in hash differs from process to process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
