"""Which task and which game comes when: a function of (seed, step) and of nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from tutelage.scheduler.episodes import Order
from tutelage.scheduler.timetable import ENDLESS, TaskPlan, Timetable

PLANS = {
    "household": TaskPlan(episodes=4),
    "math": TaskPlan(episodes=6, group=3),
    "third": TaskPlan(episodes=5, labels=True, expert_share=(0.4, 0.4)),
}


def _table(*names: str, steps: int = 60, seed: int = 3) -> Timetable:
    return Timetable({name: PLANS[name] for name in names}, steps=steps, seed=seed)


def _task_orders(table: Timetable, task: str, num_games: int | None) -> list[list[Order]]:
    return [table.orders(step, num_games) for step, name in table.walk() if name == task]


def test_tasks_alternate_in_their_given_order() -> None:
    names = [task for _, task in _table("math", "household", "third", steps=7).walk()]
    assert names == ["math", "household", "third", "math", "household", "third", "math"]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11])
def test_steps_of_counts_what_walk_gives(steps: int) -> None:
    table = _table("math", "household", "third", steps=steps)
    counts = Counter(task for _, task in table.walk())
    assert {name: table.steps_of(name) for name in PLANS} == {n: counts[n] for n in PLANS}


def test_a_walk_from_the_middle_is_the_rest_of_the_whole() -> None:
    table = _table("math", "household", steps=9)
    assert [*table.walk()][4:] == [*table.walk(4)]


def test_a_step_is_a_pure_function_of_seed_and_step() -> None:
    """Another object, asked in another order, for one step only."""
    one, other = _table("household", "math"), _table("household", "math")
    backwards = {step: one.orders(step, 17) for step in reversed(range(60))}
    assert backwards[41] == other.orders(41, 17)
    assert backwards[0] == other.orders(0, 17)
    reseeded = _table("household", "math", seed=4).orders(41, 17)
    assert {o.seed for o in reseeded}.isdisjoint({o.seed for o in backwards[41]})


def test_it_is_the_same_in_another_process() -> None:
    """Python's own hash of a name differs from process to process."""
    code = (
        "from tutelage.scheduler.timetable import *;"
        "t = Timetable({'math': TaskPlan(episodes=6, group=3)}, steps=60, seed=3);"
        "print([(o.index, o.seed) for o in t.orders(5, 17)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    here = [(order.index, order.seed) for order in _table("math").orders(5, 17)]
    assert printed.strip() == repr(here)


@pytest.mark.parametrize("num_games", [None, 5, 17, ENDLESS])
def test_a_task_alone_is_the_same_as_in_a_mixture(num_games: int | None) -> None:
    """Its n-th step has the same games, seeds and actors, wherever in the run it stands."""
    mixed = _table("household", "math", "third", steps=30)
    for name in PLANS:
        alone = _table(name, steps=10)
        assert _task_orders(alone, name, num_games) == _task_orders(mixed, name, num_games)


def test_an_annealed_share_of_experts_is_the_same_alone_and_mixed() -> None:
    plan = TaskPlan(episodes=20, labels=True, expert_share=(1.0, 0.0))
    alone = Timetable({"a": plan}, steps=11, seed=0)
    mixed = Timetable({"b": PLANS["math"], "a": plan}, steps=22, seed=0)
    assert _task_orders(alone, "a", 7) == _task_orders(mixed, "a", 7)
    shares = [
        sum(order.actor == "expert" for order in orders) for orders in _task_orders(alone, "a", 7)
    ]
    assert shares == [20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]


@pytest.mark.parametrize("num_games", [1, 3, 10, 23])
def test_each_pass_plays_every_game_once_before_any_comes_again(num_games: int) -> None:
    played = [
        order.index
        for orders in _task_orders(_table("household", "math"), "household", num_games)
        for order in orders
    ]
    assert len(played) == 120
    passes = [played[at : at + num_games] for at in range(0, 120, num_games)]
    for whole in passes[: 120 // num_games]:
        assert sorted(whole) == list(range(num_games))
    if num_games > 3:
        assert passes[0] != passes[1]  # shuffled anew
        assert passes[0] != list(range(num_games))


def test_passes_differ_from_seed_to_seed_and_from_task_to_task() -> None:
    plan = TaskPlan(episodes=50)
    found = {
        (name, seed): tuple(
            order.index for order in Timetable({name: plan}, steps=1, seed=seed).orders(0, 50)
        )
        for name in ("a", "b")
        for seed in (0, 1)
    }
    assert len(set(found.values())) == 4


def test_endless_games_are_never_repeated() -> None:
    for num_games in (None, ENDLESS, 10 * ENDLESS):
        played = [
            order.index
            for orders in _task_orders(_table("household"), "household", num_games)
            for order in orders
        ]
        assert len(set(played)) == len(played) == 240


def test_a_group_plays_one_game_with_seeds_of_its_own() -> None:
    orders = _table("math").orders(4, 50)
    assert len(orders) == 6 and [order.number for order in orders] == list(range(6))
    games = [order.index for order in orders]
    assert games[0] == games[1] == games[2] != games[3] == games[4] == games[5]
    assert len({order.seed for order in orders}) == 6


def test_a_last_group_may_be_short() -> None:
    table = Timetable({"t": TaskPlan(episodes=5, group=2)}, steps=4, seed=0)
    games = [[order.index for order in table.orders(step, 12)] for step in range(4)]
    assert all(len(set(step)) == 3 and len(step) == 5 for step in games)
    assert sorted({game for step in games for game in step}) == list(range(12))


def test_seeds_never_repeat_over_a_run() -> None:
    """32 bits for 60 * 4 draws: a repeat would mean that some draw is not independent."""
    table = _table("household", "math")
    seeds = [order.seed for step, _ in table.walk() for order in table.orders(step, 9)]
    assert len(set(seeds)) == len(seeds) == 30 * 4 + 30 * 6


@pytest.mark.parametrize(
    ("episodes", "share", "experts"),
    [(10, 0.0, []), (10, 1.0, [*range(10)]), (10, 0.3, [3, 6, 9]), (4, 0.5, [1, 3])],
)
def test_the_experts_share_is_exact_and_spread_evenly(
    episodes: int, share: float, experts: list[int]
) -> None:
    plan = TaskPlan(episodes=episodes, labels=True, expert_share=(share, share))
    orders = Timetable({"t": plan}, steps=1, seed=0).orders(0, None)
    assert [order.number for order in orders if order.actor == "expert"] == experts
    assert all(order.labels for order in orders)


def test_without_labels_no_expert_acts() -> None:
    plan = TaskPlan(episodes=4, expert_share=(1.0, 1.0))
    orders = Timetable({"t": plan}, steps=1, seed=0).orders(0, None)
    assert {(order.actor, order.labels) for order in orders} == {("student", False)}


def test_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        Timetable({}, steps=1, seed=0)


def test_a_guides_prefix_shrinks_by_a_cosine_from_all_to_nothing() -> None:
    """TrOPD: alpha(0) = 1, alpha(T / 2) = 1/2, alpha(T) = 0; on the task's own steps."""
    plan = TaskPlan(episodes=4, guided_share=0.5)
    alone = Timetable({"a": plan}, steps=5, seed=0)
    mixed = Timetable({"b": TaskPlan(episodes=1), "a": plan}, steps=10, seed=0)
    guides = [[order.guide for order in alone.orders(step, None)] for step in range(5)]
    assert [sum(g > 0 for g in step) for step in guides] == [2, 2, 2, 2, 0]
    assert [max(step) for step in guides] == pytest.approx(
        [1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0.0]
    )
    assert guides == [[order.guide for order in mixed.orders(2 * i + 1, None)] for i in range(5)]


def test_guidance_can_end_before_the_run() -> None:
    plan = TaskPlan(episodes=1, guided_share=1.0, guided_until=0.5)
    timetable = Timetable({"a": plan}, steps=9, seed=0)
    guides = [timetable.orders(step, None)[0].guide for step in range(9)]
    assert guides[:5] == pytest.approx([1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0.0])
    assert guides[4:] == [0.0] * 5
