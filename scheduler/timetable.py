"""Which tasks are next, and which of their games: a function of (seed, step, recorded history).

A resumed run therefore has exactly the steps that it would have had.
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
"""An environment with so many games generates them: no run comes to their end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """How many episodes one of a task's steps plays, and of what.

    group: episodes of one game. teachers: with their weights; each episode has one of them. labels:
    the expert's action is recorded in every state (imitation). expert_share: share of the episodes
    that the expert plays itself, at the task's first and at its last step, linear between (DAgger's
    mixing rate, Ross et al. 2011, section 3).
    guided_share: share of the episodes that begin with a guide's prefix. guided_until: the share of
    the task's steps after which there are no prefixes. start, end: the task can have the run's
    steps from `start` to before `end`. most: how many steps it gets at most.
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
        """The prefix's share of an episode's maximum length: a cosine from 1 to 0 (TrOPD,
        arXiv:2606.01249: alpha = (1 + cos(pi t / T)) / 2)."""
        if progress >= self.guided_until:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * progress / self.guided_until))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A step to come. active: the tasks that the policy could choose. turns: those that it chose,
    with how many steps each has had before."""

    active: tuple[str, ...]
    turns: Mapping[str, int]


class Timetable:
    """The steps of a run: `for step, tasks in timetable.walk()`, and `record` after each.

    A task's n-th step is the same whatever else is in the run: its seeds come from (seed, task, n)
    alone.

    A step can be planned before earlier ones are done (`plan`). The policy then assumes that each
    open step has as many tokens, and as large a gap, as its task's last step.

    Args:
        tasks: by name, in order. steps: of the run. seed: the run's.
        make_policy: makes the policy that decides which tasks are next; None: they alternate.

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
        """Start after the steps of `history`, with those of `planned` planned already."""
        self._policy, self._turns = self._make_policy(), dict.fromkeys(self._tasks, 0)
        self._planned: deque[Planned] = deque()
        self.history: list[Step] = []
        for step in history:
            self.record(step)
        self._planned.extend(planned)

    def record(self, step: Step) -> None:
        """Note what the next step did. Tasks that the configuration no longer has are left out of
        what the policy is told."""
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
        """Plan one more step; None after the last."""
        step, turns = len(self.history) + len(self._planned), dict(self._turns)
        if step >= self.steps:
            return None
        # a copy: the guesses about open steps must not stay in the policy
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
        """An open step as it will probably be recorded: as its tasks' last ones."""
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
            RuntimeError: the caller asks for the next step without having recorded this one.
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
        """How many of the run's steps are the task's. Where that depends on what happens in the run
        (token_budget, gap), it is computed as if all steps had the same tokens and gap."""
        return self._expected[task]

    def progress(self, task: str, turn: int | None = None) -> float:
        """The share of its steps that the task has had, 0 to 1. turn: before its step `turn`."""
        turn = self._turns[task] if turn is None else turn
        # - 1: the last step is at 1. min: there may be more steps than were expected
        return min(1.0, turn / max(1, self.steps_of(task) - 1))

    def orders(self, task: str, num_games: int | None, turn: int | None = None) -> list[Order]:
        """The episodes of the task's next step, or of its step number `turn`. num_games: how many
        distinct games its environment has; None: unknown.

        Games come in passes: each once in an order shuffled anew, before any comes again.
        """
        plan, turn = self._tasks[task], self._turns[task] if turn is None else turn
        key = _key(task)
        games = -(-plan.episodes // plan.group)  # rounded up: the last group may be smaller
        first = turn * games
        indexes = _passes(first, games, num_games, entropy=[self._seed, key])
        begin, end = plan.expert_share
        progress = self.progress(task, turn)
        by_expert = round((begin + (end - begin) * progress) * plan.episodes) if plan.labels else 0
        guided, guide = round(plan.guided_share * plan.episodes), plan.guide_at(progress)
        orders = []
        for number in range(plan.episodes):
            entropy = np.random.SeedSequence([self._seed, key, turn, number])
            orders.append(
                Order(
                    task=task,
                    number=number,
                    seed=int(entropy.generate_state(1)[0]),
                    # neighbours are a group: one game, each with a seed of its own
                    index=indexes[number // plan.group],
                    teacher=_route(turn * plan.episodes + number, plan.teachers),
                    # spread evenly: the first n would give the expert the same places every step
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
        """Every task's number of steps, if all steps had the same tokens and gap."""
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
    """The teacher at `place` of an endless sequence in which each is as frequent as its weight
    says, as evenly as whole episodes allow; None without teachers.

    The first teacher takes its share of the places, evenly spaced; the second its share of those
    that are left, and so on.
    """
    if len(weights) == 1:  # nearly always: every place is its
        return next(iter(weights))
    # fractions: with floats, rounding would give a place to two teachers or to none
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
    """The games at places first..first+count-1 of an endless sequence of passes over all games,
    each shuffled anew."""
    if num_games is None:
        return list(range(first, first + count))
    if num_games >= ENDLESS:  # in order: generated games are random, a permutation costs memory
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
    """A stable number for a name: Python's own hash differs from process to process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
