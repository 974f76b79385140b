"""Which tasks are next, and which of their games: a function of (seed, step, recorded history).

So a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from tutelage.scheduler.episodes import Order
from tutelage.scheduler.policies import Alternate, Policy, Step

ENDLESS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """How many episodes one of a task's steps plays, and of what.

    group: episodes of one game. teachers: by weight; each episode has one of them. labels: the
    expert's action is recorded in every state (imitation). expert_share: share of the episodes that
    the expert plays itself, at the task's first and last step, linear between (DAgger's mixing
    rate, Ross et al. 2011, section 3).
    guided_share: share of the episodes that begin with a guide's prefix. guided_until: the share of
    the task's steps after which no prefix is left. start, end: the run's steps in which the task
    can be chosen, from start up to before end. most: how many steps it gets at most.
    """

    episodes: int
    group: int
    teachers: Mapping[str, float]
    labels: bool
    expert_share: tuple[float, float]
    guided_share: float
    guided_until: float
    start: int
    end: int | None
    most: int | None

    def guide_at(self, progress: float) -> float:
        """The prefix's share of an episode's greatest length: cosine from 1 to 0 (TrOPD,
        arXiv:2606.01249: alpha = (1 + cos(pi t / T)) / 2)."""
        if progress >= self.guided_until:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * progress / self.guided_until))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A step to come. active: the tasks that it could have had. turns: those that it has, and how
    many steps each has had before."""

    active: tuple[str, ...]
    turns: Mapping[str, int]


class Timetable:
    """The steps of a run, one after the other: `for step, tasks in timetable.walk()`, and after
    each one `record` what it did.

    A task's n-th step is the same whatever else is in the run: its seeds come from (seed, task, n)
    alone.

    Steps can be planned before the ones before them are done (`plan`). Then the policy takes those
    still open for as many tokens and as large a gap as their tasks had last.

    Args:
        tasks: by name, in order. steps: of the run. seed: the run's.
        make_policy: a new policy, that decides who is next; None: they alternate.

    Raises:
        ValueError: no task, or a step at which none can be chosen.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskPlan],
        *,
        steps: int,
        seed: int,
        make_policy: Callable[[], Policy] | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("a timetable needs at least one task")
        self._tasks, self._seed, self.steps = dict(tasks), seed, steps
        self._make_policy = make_policy or (lambda: Alternate([*tasks]))
        self._expected = self._rehearse()
        self.restore([])

    def restore(self, history: Sequence[Step], planned: Sequence[Planned] = ()) -> None:
        """Begin after these steps, with these already planned."""
        self._policy, self._turns = self._make_policy(), dict.fromkeys(self._tasks, 0)
        self._planned: deque[Planned] = deque()
        self.history: list[Step] = []
        for step in history:
            self.record(step)
        self._planned.extend(planned)

    def record(self, step: Step) -> None:
        """The next step is done. It may be one of before the configuration was changed: tasks that
        are no more had no turn."""
        if self._planned:
            self._planned.popleft()
        known = replace(
            step,
            active=tuple(task for task in step.active if task in self._tasks),
            trained=tuple(task for task in step.trained if task in self._tasks),
        )
        if known.trained:
            self._policy.record(known)
        for task in known.trained:
            self._turns[task] += 1
        self.history.append(step)

    @property
    def planned(self) -> tuple[Planned, ...]:
        """The steps that are planned and not recorded."""
        return tuple(self._planned)

    def plan(self) -> Planned | None:
        """Plan one step more; None after the last."""
        step, turns = len(self.history) + len(self._planned), dict(self._turns)
        if step >= self.steps:
            return None
        policy = copy.deepcopy(self._policy) if self._planned else self._policy
        for planned in self._planned:
            policy.record(self._guess(planned))
            for task in planned.turns:
                turns[task] += 1
        active = self._active(step, turns)
        chosen = policy.choose(active)
        self._planned.append(Planned(active=active, turns={task: turns[task] for task in chosen}))
        return self._planned[-1]

    def _guess(self, planned: Planned) -> Step:
        """What an open step will have done: what its tasks did last."""
        nothing = Step(active=(), trained=())
        last = {
            task: next((step for step in reversed(self.history) if task in step.trained), nothing)
            for task in planned.turns
        }
        return Step(
            active=planned.active,
            trained=tuple(planned.turns),
            tokens={task: was.tokens.get(task, 1.0) for task, was in last.items()},
            gaps={task: was.gaps.get(task, 1.0) for task, was in last.items()},
        )

    def walk(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(step, its tasks) from the first that is not recorded on.

        Raises:
            RuntimeError: a step was not recorded before the next was asked for.
        """
        for step in range(len(self.history), self.steps):
            if len(self.history) != step:
                raise RuntimeError(f"step {len(self.history)} was not recorded before step {step}")
            if not self._planned:
                self.plan()
            yield step, tuple(self._planned[0].turns)

    def active(self) -> tuple[str, ...]:
        """The tasks that the next step may have."""
        if self._planned:
            return self._planned[0].active
        return self._active(len(self.history), self._turns)

    def turn(self, task: str) -> int:
        """How many steps the task has had."""
        return self._turns[task]

    def steps_of(self, task: str) -> int:
        """How many of the run's steps are the task's. Where that hangs on what happens in the run
        (token_budget, gap), as many as if every step trained as much and closed as much."""
        return self._expected[task]

    def progress(self, task: str, turn: int | None = None) -> float:
        """The share of its steps that the task has had, 0 to 1. turn: before that one."""
        turn = self._turns[task] if turn is None else turn
        return min(1.0, turn / max(1, self.steps_of(task) - 1))

    def orders(self, task: str, num_games: int | None, turn: int | None = None) -> list[Order]:
        """The episodes of the task's next step, or of its step number `turn`. num_games: how many
        distinct games its environment has; None: unknown.

        Games come in passes: each once in an order shuffled anew, before any comes again.
        """
        plan, turn = self._tasks[task], self._turns[task] if turn is None else turn
        games = -(-plan.episodes // plan.group)
        first = turn * games
        indexes = _passes(first, games, num_games, entropy=[self._seed, _key(task)])
        begin, end = plan.expert_share
        progress = self.progress(task, turn)
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
                    teacher=_route(turn * plan.episodes + number, plan.teachers),
                    # spread evenly, so that no kind of game goes to the expert alone
                    actor="expert" if _spread(number, by_expert, plan.episodes) else "student",
                    labels=plan.labels,
                    guide=guide if _spread(number, guided, plan.episodes) else 0.0,
                )
            )
        return orders

    def _active(self, step: int, turns: Mapping[str, int]) -> tuple[str, ...]:
        found = tuple(
            name
            for name, plan in self._tasks.items()
            if plan.start <= step
            and (plan.end is None or step < plan.end)
            and (plan.most is None or turns[name] < plan.most)
        )
        if not found:
            raise ValueError(
                f"no task is left for step {step} of {self.steps}: tasks.NAME.start, end and steps"
                f" leave none; lower steps to {step}, or widen them"
            )
        return found

    def _rehearse(self) -> dict[str, int]:
        """Every task's number of steps, if all trained and closed alike."""
        policy, turns = self._make_policy(), dict.fromkeys(self._tasks, 0)
        for step in range(self.steps):
            active = self._active(step, turns)
            chosen = policy.choose(active)
            alike = dict.fromkeys(chosen, 1.0)
            policy.record(Step(active=active, trained=chosen, tokens=alike, gaps=alike))
            for task in chosen:
                turns[task] += 1
        return turns


def _spread(number: int, count: int, total: int) -> bool:
    """True for `count` of `total` numbers, evenly spaced."""
    return (number + 1) * count // total > number * count // total


def _route(place: int, weights: Mapping[str, float]) -> str | None:
    """The teacher at `place` of an endless sequence that has each as often as its weight says, in
    every window as evenly as whole episodes allow; None where there is none.

    Each name takes its share of the places that those before it leave over.
    """
    left = {name: Fraction(str(weight)) for name, weight in weights.items()}
    for name in weights:
        share = left[name] / sum(left.values())
        before = int(place * share)
        if int((place + 1) * share) > before:
            return name
        place -= before
        del left[name]
    return None


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
