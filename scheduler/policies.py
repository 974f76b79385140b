"""Policies, which choose the tasks of each step from the run's recorded history.

A policy is asked (`choose`) and told (`record`) step by step, and knows nothing else: with the same
history it gives the same answers, so that a resumed run has the steps it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

from tutelage.envs.names import unknown

POLICIES = ("alternate", "weighted", "mixed", "token_budget", "gap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step did. active: the tasks that it could have had; trained: those that it had.

    tokens: how many of a task's tokens took loss. gaps: how far from its teacher a task's student
    was (log pi - log q of its sampled tokens, the k1 estimate of the KL; a task without teacher:
    its loss).
    """

    active: tuple[str, ...]
    trained: tuple[str, ...]
    tokens: Mapping[str, float] = field(default_factory=dict)
    gaps: Mapping[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """Chooses among the active tasks, given in the configuration's order."""

    def choose(self, active: Sequence[str]) -> tuple[str, ...]:
        """The next step's tasks. Asking changes no state."""

    def record(self, step: Step) -> None:
        """Take note of what a step did."""


class Alternate:
    """One task a step, in turn (Revisiting-OPD's round robin). One that ends leaves the cycle."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._place = {task: at for at, task in enumerate(tasks)}
        self._last = -1

    def choose(self, active: Sequence[str]) -> tuple[str, ...]:
        count = len(self._place)
        # Places after the last one come first, round the ring; tasks that are over are skipped.
        return (min(active, key=lambda task: (self._place[task] - self._last - 1) % count),)

    def record(self, step: Step) -> None:
        self._last = self._place[step.trained[-1]]


class Mixed:
    """Every active task in every step: one update on all of them."""

    def choose(self, active: Sequence[str]) -> tuple[str, ...]:
        return tuple(active)

    def record(self, step: Step) -> None:
        return


class Weighted:
    """One task a step, in proportion to the weights, as evenly as whole steps allow (smooth
    weighted round robin). With integer weights of sum W every W steps in a row hold each task as
    often as its weight says."""

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        # Whole numbers: sums of floats would break ties by rounding. By str: 0.1 is meant as 1/10.
        exact = {task: Fraction(str(weights.get(task, 1.0))) for task in tasks}
        scale = math.lcm(*(weight.denominator for weight in exact.values()))
        self._weights = {task: int(weight * scale) for task, weight in exact.items()}
        self._credits = dict.fromkeys(tasks, 0)

    def choose(self, active: Sequence[str]) -> tuple[str, ...]:
        # max takes the first of equals: the configuration's order
        return (max(active, key=lambda task: self._credits[task] + self._weights[task]),)

    def record(self, step: Step) -> None:
        for task in step.active:
            self._credits[task] += self._weights[task]
        total = sum(self._weights[task] for task in step.active)
        for task in step.trained:
            self._credits[task] -= total


class TokenBudget:
    """One task a step: the one that is furthest behind its share of the trained tokens.

    A task that starts late does not catch up: it starts level with the least trained of the others.
    """

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        self._weights = {task: weights.get(task, 1.0) for task in tasks}
        self._spent: dict[str, float] = {}  # tokens by weight

    def choose(self, active: Sequence[str]) -> tuple[str, ...]:
        least = min((self._spent[task] for task in active if task in self._spent), default=0.0)
        return (min(active, key=lambda task: self._spent.get(task, least)),)

    def record(self, step: Step) -> None:
        known = [self._spent[task] for task in step.active if task in self._spent]
        for task in step.active:
            self._spent.setdefault(task, min(known, default=0.0))
        for task in step.trained:
            self._spent[task] += step.tokens[task] / self._weights[task]


class Gap:
    """One task a step, more often the one whose gap to its teacher closes fastest.

    A part `least` of all steps is shared equally; the rest in proportion to the speed at which a
    task's gap falls, which is a slow moving average less a fast one. So no task waits longer than
    about len(tasks) / least steps.
    """

    def __init__(self, tasks: Sequence[str], *, least: float) -> None:
        self._least = least
        self._fast: dict[str, float] = {}
        self._slow: dict[str, float] = {}
        self._credits = dict.fromkeys(tasks, 0)

    def choose(self, active: Sequence[str]) -> tuple[str, ...]:
        shares = self._shares(active)
        return (max(active, key=lambda task: self._credits[task] + shares[task]),)

    def record(self, step: Step) -> None:
        shares = self._shares(step.active)
        for task, share in shares.items():
            self._credits[task] += share
        for task in step.trained:
            self._credits[task] -= sum(shares.values())
            gap = step.gaps[task]
            # Averages over about the last 3 and the last 20 of the task's steps.
            self._fast[task] = 0.7 * self._fast.get(task, gap) + 0.3 * gap
            self._slow[task] = 0.95 * self._slow.get(task, gap) + 0.05 * gap

    def _shares(self, active: Sequence[str]) -> dict[str, int]:
        """Each task's part of a step, in millionths: whole numbers, so that ties stay ties."""
        speed = {task: self._speed(task) for task in active}
        total = sum(speed.values())
        if total <= 0:
            # no gap falls, or none is known yet
            return dict.fromkeys(active, round(1e6 / len(active)))
        equal, rest = self._least / len(active), 1 - self._least
        return {task: round(1e6 * (equal + rest * speed[task] / total)) for task in active}

    def _speed(self, task: str) -> float:
        return max(0.0, self._slow.get(task, 0.0) - self._fast.get(task, 0.0))


def make_policy(
    name: str, tasks: Sequence[str], *, weights: Mapping[str, float], least: float
) -> Policy:
    """The policy of that name.

    weights: of `weighted` (steps) and `token_budget` (tokens), 1 where a task has none. least: of
    `gap`.

    Raises:
        ValueError: an unknown policy or task, or weights that the policy does not use.
    """
    if name not in POLICIES:
        raise ValueError(unknown("schedule policy", name, POLICIES))
    if weights and name not in ("weighted", "token_budget"):
        raise ValueError(
            f"schedule.weights: policy {name!r} has none; use weighted or token_budget"
        )
    for task, weight in weights.items():
        if task not in tasks:
            raise ValueError("schedule.weights: " + unknown("task", task, tasks))
        if not weight > 0:
            raise ValueError(f"schedule.weights.{task}: {weight} must be positive")
    if name == "alternate":
        return Alternate(tasks)
    if name == "weighted":
        return Weighted(tasks, weights)
    if name == "token_budget":
        return TokenBudget(tasks, weights)
    return Mixed() if name == "mixed" else Gap(tasks, least=least)
