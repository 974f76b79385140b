"""Which tasks and which games come when: a function of (seed, step, history) and nothing else."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.settings import schedule
from tutelage.scheduler.episodes import Order
from tutelage.scheduler.policies import Alternate, Mixed, Step, TokenBudget, Weighted
from tutelage.scheduler.timetable import ENDLESS, Timetable, _route

ROOT = Path(__file__).parent.parent

PLANS = {
    "household": schedule(episodes=4),
    "math": schedule(episodes=6, group=3),
    "third": schedule(episodes=5, labels=True, expert_share=(0.4, 0.4)),
}


def _table(*names: str, steps: int = 60, seed: int = 3) -> Timetable:
    return Timetable({name: PLANS[name] for name in names}, steps=steps, seed=seed)


def _walk(table: Timetable, *, gap: float = 1.0) -> list[tuple[str, ...]]:
    """Every step's tasks, each recorded as if all trained alike."""
    walked = []
    for _, tasks in table.walk():
        same = dict.fromkeys(tasks, gap)
        table.record(Step(active=table.active(), trained=tasks, tokens=same, gaps=same))
        walked.append(tasks)
    return walked


def _task_orders(table: Timetable, task: str, num_games: int | None) -> list[list[Order]]:
    """The task's episodes, step by step, from the first."""
    table.restore([])
    return _rest(table, task, num_games)


def _rest(table: Timetable, task: str, num_games: int | None) -> list[list[Order]]:
    found = []
    for _, tasks in table.walk():
        if task in tasks:
            found.append(table.orders(task, num_games))
        table.record(Step(active=table.active(), trained=tasks))
    return found


def test_tasks_alternate_in_their_given_order() -> None:
    names = [task for (task,) in _walk(_table("math", "household", "third", steps=7))]
    assert names == ["math", "household", "third", "math", "household", "third", "math"]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11])
def test_steps_of_counts_what_walk_gives(steps: int) -> None:
    table = _table("math", "household", "third", steps=steps)
    expected = {name: table.steps_of(name) for name in PLANS}
    counts = Counter(task for (task,) in _walk(table))
    assert expected == {name: counts[name] for name in PLANS}


def test_a_restored_table_goes_on_with_the_rest_of_the_whole() -> None:
    """Tasks, games and seeds, from any step."""
    whole = _table("math", "household", steps=9)
    tasks, orders = _walk(whole), _task_orders(whole, "math", 17)
    for stop in (0, 1, 4, 8):
        resumed = _table("math", "household", steps=9)
        resumed.restore(whole.history[:stop])
        assert _walk(resumed) == tasks[stop:]
        resumed.restore(whole.history[:stop])
        assert _rest(resumed, "math", 17) == orders[(stop + 1) // 2 :]


def test_a_step_that_was_not_recorded_stops_the_walk() -> None:
    walk = _table("math", "household").walk()
    next(walk)
    with pytest.raises(RuntimeError, match="step 0 was not recorded"):
        next(walk)


def test_another_seed_has_other_draws() -> None:
    one, other = (_task_orders(_table("math", seed=seed), "math", 17)[40] for seed in (3, 4))
    assert {order.seed for order in one}.isdisjoint({order.seed for order in other})


def test_it_is_the_same_in_another_process() -> None:
    """Python's own hash of a name differs from process to process."""
    code = (
        "from tutelage.scheduler.timetable import *;"
        f"t = Timetable({{'math': {schedule(episodes=6, group=3)!r}}}, steps=60, seed=3);"
        "print([(o.index, o.seed) for o in t.orders('math', 17)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    here = [(order.index, order.seed) for order in _table("math").orders("math", 17)]
    assert printed.strip() == repr(here)


@pytest.mark.parametrize("num_games", [None, 5, 17, ENDLESS])
def test_a_task_alone_is_the_same_as_in_a_mixture(num_games: int | None) -> None:
    """Its n-th step has the same games, seeds and actors, wherever in the run it stands."""
    mixed = _table("household", "math", "third", steps=30)
    for name in PLANS:
        alone = _table(name, steps=10)
        assert _task_orders(alone, name, num_games) == _task_orders(mixed, name, num_games)


def test_an_annealed_share_of_experts_is_the_same_alone_and_mixed() -> None:
    plan = schedule(episodes=20, labels=True, expert_share=(1.0, 0.0))
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
    plan = schedule(episodes=50)
    found = {
        (name, seed): tuple(
            order.index for order in Timetable({name: plan}, steps=1, seed=seed).orders(name, 50)
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
    orders = _table("math").orders("math", 50)
    assert len(orders) == 6 and [order.number for order in orders] == list(range(6))
    games = [order.index for order in orders]
    assert games[0] == games[1] == games[2] != games[3] == games[4] == games[5]
    assert len({order.seed for order in orders}) == 6


def test_a_last_group_may_be_short() -> None:
    table = Timetable({"t": schedule(episodes=5, group=2)}, steps=4, seed=0)
    games = [[order.index for order in orders] for orders in _task_orders(table, "t", 12)]
    assert all(len(set(step)) == 3 and len(step) == 5 for step in games)
    assert sorted({game for step in games for game in step}) == list(range(12))


def test_seeds_never_repeat_over_a_run() -> None:
    """32 bits for 60 * 4 draws: a repeat would mean that some draw is not independent."""
    seeds = [
        order.seed
        for name in ("household", "math")
        for orders in _task_orders(_table("household", "math"), name, 9)
        for order in orders
    ]
    assert len(set(seeds)) == len(seeds) == 30 * 4 + 30 * 6


@pytest.mark.parametrize(
    ("episodes", "share", "experts"),
    [(10, 0.0, []), (10, 1.0, [*range(10)]), (10, 0.3, [3, 6, 9]), (4, 0.5, [1, 3])],
)
def test_the_experts_share_is_exact_and_spread_evenly(
    episodes: int, share: float, experts: list[int]
) -> None:
    plan = schedule(episodes=episodes, labels=True, expert_share=(share, share))
    orders = Timetable({"t": plan}, steps=1, seed=0).orders("t", None)
    assert [order.number for order in orders if order.actor == "expert"] == experts
    assert all(order.labels for order in orders)


def test_without_labels_no_expert_acts() -> None:
    plan = schedule(episodes=4, expert_share=(1.0, 1.0))
    orders = Timetable({"t": plan}, steps=1, seed=0).orders("t", None)
    assert {(order.actor, order.labels) for order in orders} == {("student", False)}


def test_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        Timetable({}, steps=1, seed=0)


def test_a_guides_prefix_shrinks_by_a_cosine_from_all_to_nothing() -> None:
    """TrOPD: alpha(0) = 1, alpha(T / 2) = 1/2, alpha(T) = 0; on the task's own steps."""
    plan = schedule(episodes=4, guided_share=0.5)
    alone = Timetable({"a": plan}, steps=5, seed=0)
    mixed = Timetable({"b": schedule(episodes=1), "a": plan}, steps=10, seed=0)
    guides = [[order.guide for order in orders] for orders in _task_orders(alone, "a", None)]
    assert [sum(g > 0 for g in step) for step in guides] == [2, 2, 2, 2, 0]
    assert [max(step) for step in guides] == pytest.approx(
        [1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0.0]
    )
    same = [[order.guide for order in orders] for orders in _task_orders(mixed, "a", None)]
    assert guides == same


def test_guidance_can_end_before_the_run() -> None:
    plan = schedule(episodes=1, guided_share=1.0, guided_until=0.5)
    timetable = Timetable({"a": plan}, steps=9, seed=0)
    guides = [orders[0].guide for orders in _task_orders(timetable, "a", None)]
    assert guides[:5] == pytest.approx([1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0.0])
    assert guides[4:] == [0.0] * 5


class TestWindows:
    def test_a_task_starts_late_ends_early_and_has_a_cap(self) -> None:
        plans = {
            "always": schedule(episodes=1),
            "late": schedule(episodes=1, start=3),
            "early": schedule(episodes=1, end=5),
            "capped": schedule(episodes=1, most=2),
        }
        table = Timetable(plans, steps=12, seed=0)
        names = [task for (task,) in _walk(table)]
        assert names[:6] == ["always", "early", "capped", "always", "late", "capped"]
        assert set(names[6:]) == {"always", "late"}
        assert names.count("capped") == table.turn("capped") == 2

    def test_a_step_without_any_task_is_refused_before_the_run(self) -> None:
        plans = {"a": schedule(episodes=1, most=2), "b": schedule(episodes=1, end=4)}
        with pytest.raises(ValueError, match="no task is left for step 4 of 9"):
            Timetable(plans, steps=9, seed=0)


class TestPlanningAhead:
    @pytest.mark.parametrize("prefetch", [1, 2, 5])
    def test_steps_planned_early_are_the_steps_planned_in_time(self, prefetch: int) -> None:
        """Tasks, games and seeds, where the policy does not depend on what steps did."""
        plans = PLANS | {"third": schedule(episodes=5, start=4, end=20, most=6)}
        for policy in (Alternate([*plans]), Weighted([*plans], {"math": 2.5}), Mixed()):
            early, in_time = (
                Timetable(plans, steps=25, seed=1, make_policy=lambda p=policy: copy.deepcopy(p))
                for _ in range(2)
            )
            found = []
            while len(early.history) < 25:
                while len(early.planned) <= prefetch and (planned := early.plan()):
                    turns = planned.turns
                    found.append({t: early.orders(t, 17, turn) for t, turn in turns.items()})
                early.record(Step(active=early.active(), trained=tuple(early.planned[0].turns)))
            expected = []
            for _, tasks in in_time.walk():
                expected.append({task: in_time.orders(task, 17) for task in tasks})
                in_time.record(Step(active=in_time.active(), trained=tasks))
            assert found == expected
            assert [step.active for step in early.history] == [s.active for s in in_time.history]

    def test_a_token_budget_holds_though_open_steps_are_guessed(self) -> None:
        """Steps of one task train 10 times as much as the other's."""
        plans = {name: schedule(episodes=1) for name in ("long", "short")}
        table = Timetable(plans, steps=440, seed=0, make_policy=lambda: TokenBudget([*plans], {}))
        spent, size = Counter[str](), {"long": 1000.0, "short": 100.0}
        while len(table.history) < 440:
            while len(table.planned) <= 2 and table.plan():
                pass
            (task,) = table.planned[0].turns
            spent[task] += int(size[task])
            same = {task: size[task]}
            table.record(Step(active=table.active(), trained=(task,), tokens=same, gaps=same))
        assert abs(spent["long"] - spent["short"]) <= 3 * size["long"]

    def test_it_ends_with_the_run(self) -> None:
        table = _table("math", steps=2)
        assert table.plan() and table.plan() and table.plan() is None


class TestRoutes:
    @given(
        weights=st.lists(st.integers(1, 7), min_size=1, max_size=5), start=st.integers(0, 10_000)
    )
    def test_every_window_has_each_teacher_as_often_as_its_weight(
        self, weights: list[int], start: int
    ) -> None:
        """Integer weights of sum W, any W episodes in a row."""
        named = {f"t{i}": float(weight) for i, weight in enumerate(weights)}
        window = Counter(_route(start + i, named) for i in range(sum(weights)))
        assert window == {name: int(weight) for name, weight in named.items()}

    def test_the_count_goes_on_from_step_to_step(self) -> None:
        """Of 4 episodes a step thirds are not whole; of 3 steps they are."""
        plan = schedule(episodes=4, teachers={"a": 2.0, "b": 1.0})
        table = Timetable({"math": plan}, steps=9, seed=0)
        taught = Counter(
            order.teacher for orders in _task_orders(table, "math", 5) for order in orders
        )
        assert taught == {"a": 24, "b": 12}

    def test_without_teachers_there_is_none(self) -> None:
        assert {order.teacher for order in _table("math").orders("math", 5)} == {None}
