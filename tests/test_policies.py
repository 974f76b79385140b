"""Policies: exact proportions, nobody starved, the same again from the same history."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.scheduler.policies import POLICIES, Policy, Step, make_policy

Results = Callable[[int, str], float]


def _make(name: str, tasks: Sequence[str], **options: Any) -> Policy:
    return make_policy(name, tasks, **({"weights": {}, "least": 0.4} | options))


def _run(
    policy: Policy,
    tasks: Sequence[str],
    steps: int,
    *,
    tokens: Results = lambda step, task: 100.0,
    gaps: Results = lambda step, task: 1.0,
    active: Callable[[int], Sequence[str]] | None = None,
    history: list[Step] | None = None,
) -> list[tuple[str, ...]]:
    """The chosen tasks of `steps` steps, recorded as they go."""
    chosen = []
    for step in range(steps):
        able = tuple(active(step)) if active else tuple(tasks)
        trained = policy.choose(able)
        assert set(trained) <= set(able) and trained
        done = Step(
            active=able,
            trained=trained,
            tokens={task: tokens(step, task) for task in trained},
            gaps={task: gaps(step, task) for task in trained},
        )
        policy.record(done)
        if history is not None:
            history.append(done)
        chosen.append(trained)
    return chosen


weights_of = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1, max_size=6)


@given(weights=weights_of)
def test_weighted_is_exact_in_every_window_of_the_weights_sum(weights: dict[str, int]) -> None:
    """Not only in aligned ones; and at no time is a task a whole step off its share."""
    total, tasks = sum(weights.values()), list(weights)
    names = [n for (n,) in _run(_make("weighted", tasks, weights=weights), tasks, 3 * total)]
    for start in range(2 * total + 1):
        assert Counter(names[start : start + total]) == Counter(weights)
    for count in range(1, total + 1):
        for task, weight in weights.items():
            assert abs(names[:count].count(task) - count * weight / total) < len(tasks) / 2 + 0.5


def test_weights_may_be_fractions_and_default_to_one() -> None:
    tasks = ["a", "b", "c"]
    names = [n for (n,) in _run(_make("weighted", tasks, weights={"a": 0.5}), tasks, 50)]
    assert Counter(names) == {"a": 10, "b": 20, "c": 20}


@given(st.integers(1, 6), st.integers(0, 40))
def test_alternate_is_the_weighted_policy_of_equal_weights(count: int, steps: int) -> None:
    tasks = [f"t{i}" for i in range(count)]
    alternate = _run(_make("alternate", tasks), tasks, steps)
    assert alternate == _run(_make("weighted", tasks), tasks, steps)
    assert alternate == [(tasks[step % count],) for step in range(steps)]


def test_mixed_has_every_active_task_in_every_step() -> None:
    tasks = ["a", "b"]
    chosen = _run(_make("mixed", tasks), tasks, 3, active=lambda s: tasks if s else ["b"])
    assert chosen == [("b",), ("a", "b"), ("a", "b")]


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=5),
    weights=st.lists(st.integers(1, 5), min_size=5, max_size=5),
)
def test_a_token_budget_holds_to_within_one_step(sizes: list[int], weights: list[int]) -> None:
    """Tokens by weight never differ by more than what one step adds."""
    tasks = [f"t{i}" for i in range(len(sizes))]
    size = dict(zip(tasks, sizes, strict=True))
    weight = dict(zip(tasks, weights, strict=False))
    policy, spent = _make("token_budget", tasks, weights=weight), dict.fromkeys(tasks, 0.0)
    for (task,) in _run(policy, tasks, 300, tokens=lambda step, task: size[task]):
        spent[task] += size[task] / weight[task]
    assert max(spent.values()) - min(spent.values()) <= max(size[t] / weight[t] for t in tasks)


def test_short_answers_get_as_many_tokens_as_long_chains() -> None:
    """Open-MOPD's misallocation: by steps, the long task would get ten tokens of eleven."""
    tasks, size = ["agent", "math"], {"agent": 50.0, "math": 500.0}
    names = [
        n
        for (n,) in _run(
            _make("token_budget", tasks), tasks, 110, tokens=lambda step, task: size[task]
        )
    ]
    assert Counter(names) == {"agent": 100, "math": 10}


class TestGap:
    def test_the_task_that_closes_gets_more_and_the_other_its_least(self) -> None:
        tasks = ["closing", "stuck"]
        gaps = {"closing": lambda step: 5.0 * 0.99**step, "stuck": lambda step: 3.0}
        names = [
            n
            for (n,) in _run(
                _make("gap", tasks, least=0.4), tasks, 200, gaps=lambda step, task: gaps[task](step)
            )
        ]
        share = names[50:].count("stuck") / 150
        assert share == pytest.approx(0.2, abs=0.02)  # half of the 0.4 that is shared equally

    @settings(max_examples=50)
    @given(
        count=st.integers(2, 6),
        least=st.sampled_from([0.1, 0.4, 1.0]),
        noise=st.lists(st.floats(0, 10), min_size=7, max_size=23),
    )
    def test_nobody_starves_whatever_the_gaps_do(
        self, count: int, least: float, noise: list[float]
    ) -> None:
        tasks = [f"t{i}" for i in range(count)]
        names = [
            n
            for (n,) in _run(
                _make("gap", tasks, least=least),
                tasks,
                600,
                gaps=lambda step, task: noise[(step * 7 + tasks.index(task)) % len(noise)],
            )
        ]
        for task in tasks:
            places = [-1, *(i for i, n in enumerate(names) if n == task), 600]
            waits = [b - a for a, b in itertools.pairwise(places)]
            assert max(waits) <= 2 * count / least + count

    def test_without_any_movement_it_alternates(self) -> None:
        tasks = ["a", "b", "c"]
        assert _run(_make("gap", tasks), tasks, 9) == _run(_make("alternate", tasks), tasks, 9)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(stop=st.integers(0, 59), seed=st.integers(0, 5))
def test_the_same_history_gives_the_same_answers(name: str, stop: int, seed: int) -> None:
    """A policy that is told the first steps of a run continues exactly as the one that made them,
    with tasks that start late and end."""
    tasks = ["a", "b", "c"]

    def active(step: int) -> list[str]:
        return [t for t in tasks if not (t == "b" and step < 9) and not (t == "c" and step > 40)]

    def result(step: int, task: str) -> float:
        return float(1 + (step * 31 + 17 * seed + ord(task)) % 13)

    history: list[Step] = []
    whole = _run(
        _make(name, tasks), tasks, 60, tokens=result, gaps=result, active=active, history=history
    )
    resumed = _make(name, tasks)
    for step in history[:stop]:
        resumed.record(step)
    rest = []
    for step in range(stop, 60):
        assert resumed.choose(active(step)) == resumed.choose(
            active(step)
        )  # asking changes nothing
        rest.append(resumed.choose(active(step)))
        resumed.record(history[step])
    assert rest == whole[stop:]


@pytest.mark.parametrize("name", POLICIES)
def test_one_task_alone_has_every_step(name: str) -> None:
    assert _run(_make(name, ["a"]), ["a"], 20) == [("a",)] * 20


@pytest.mark.parametrize("name", ["weighted", "token_budget", "gap", "alternate"])
def test_a_late_task_does_not_take_over(name: str) -> None:
    """It owes nothing for the steps before it began."""
    tasks = ["a", "b"]
    names = [
        n
        for (n,) in _run(
            _make(name, tasks), tasks, 120, active=lambda s: tasks if s >= 100 else ["a"]
        )
    ]
    assert Counter(names[100:]) == {"a": 10, "b": 10}


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("alternatte", {}, "alternate"),
        ("weighted", {"mth": 2.0}, "math"),
        ("weighted", {"math": 0.0}, "must be positive"),
        ("mixed", {"math": 2.0}, "policy 'mixed' has none"),
    ],
)
def test_mistakes_are_named(name: str, weights: Mapping[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_policy(name, ["household", "math"], weights=weights, least=0.4)
