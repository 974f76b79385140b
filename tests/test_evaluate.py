"""Evaluation: every game once, fixed draws, failures in the denominator, faults counted apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests import settings
from tutelage.evaluation.evaluate import EVALUATION, evaluate, evaluate_tasks, orders, summarise
from tutelage.evaluation.metrics import wilson
from tutelage.scheduler.episodes import GREEDY, Dropped, Episode, Order, SamplingParams, Turn

SAMPLING = SamplingParams(temperature=0.4, top_p=0.9)


def _episode(
    order: Order, *, success: bool, kind: str = "a", complete: bool = True, turns: int = 2
) -> Episode:
    turn = Turn(observation="x", action="y", complete=complete)
    return Episode(
        order=order,
        rows=(),
        turns=(turn,) * turns,
        success=success,
        reward=float(success),
        task_type=kind,
        ended="terminated" if success else "max_turns",
        sampling=SAMPLING,
        version=0,
    )


def _dropped(order: Order) -> Dropped:
    return Dropped(order=order, reason="died", detail="exit code 3", attempts=3)


class TestOrders:
    def test_every_game_of_a_split_exactly_once(self) -> None:
        wanted = orders("t", episodes="all", num_games=134)
        assert [order.index for order in wanted] == list(range(134))
        assert [order.number for order in wanted] == list(range(134))
        assert {(order.actor, order.labels) for order in wanted} == {("student", False)}

    @pytest.mark.parametrize(
        ("episodes", "num_games", "count"), [(5, 9, 5), (9, 5, 5), (7, None, 7)]
    )
    def test_a_number_of_games_is_never_more_than_there_are(
        self, episodes: int, num_games: int | None, count: int
    ) -> None:
        wanted = orders("t", episodes=episodes, num_games=num_games)
        assert [order.index for order in wanted] == list(range(count))

    def test_draws_are_fixed_and_each_games_own(self) -> None:
        """One seed for all would give every game the same lucky or unlucky numbers."""
        one, other = (orders("t", episodes=300, num_games=None, samples=2) for _ in range(2))
        assert one == other
        assert len({order.seed for order in one}) == 600
        few = orders("t", episodes=10, num_games=None, samples=2)
        assert few == one[:20]  # a smaller evaluation is the beginning of a larger one
        assert [order.number for order in one] == list(range(600))
        assert [order.index for order in few] == [game for game in range(10) for _ in range(2)]

    def test_all_of_an_unknown_number_is_refused(self) -> None:
        for count in (None, 10**15):
            with pytest.raises(ValueError, match=r"'kitchen'.*'all'.*give a number"):
                orders("kitchen", episodes="all", num_games=count)


class TestSummary:
    def test_rates_by_hand(self) -> None:
        """Five played, two of them won; of the two kinds, one game of each is won."""
        wanted = orders("t", episodes=6, num_games=None)
        won = [True, False, False, True, False]
        kinds = ["b", "a", "a", "a", "b"]
        outcomes: list[Episode | Dropped] = [
            _episode(order, success=success, kind=kind, complete=success, turns=1 + i)
            for i, (order, success, kind) in enumerate(zip(wanted, won, kinds, strict=False))
        ]
        found = summarise([*outcomes, _dropped(wanted[5])])
        assert (found["value"], found["n"], found["dropped"]) == (0.4, 5, 1)
        assert found["interval"] == pytest.approx(wilson(2, 5), abs=1e-4)
        assert found["turns"] == 3.0
        assert found["cut_off"] == pytest.approx((2 + 3 + 5) / 15, abs=1e-4)
        assert found["unfinished"] == 0.6
        assert list(found["by_type"]) == ["a", "b"]
        assert (found["by_type"]["a"]["value"], found["by_type"]["a"]["n"]) == (1 / 3, 3)
        assert (found["by_type"]["b"]["value"], found["by_type"]["b"]["n"]) == (0.5, 2)
        assert found["by_type"]["b"]["interval"] == pytest.approx(wilson(1, 2), abs=1e-4)

    def test_verdicts_are_counted_where_an_environment_tells_them(self) -> None:
        wanted = orders("t", episodes=3, num_games=None)
        one, two, three = (_episode(order, success=True) for order in wanted)
        assert "verdicts" not in summarise([one, two])
        told = [replace(one, verdict="timeout"), replace(two, verdict="exact"), three]
        assert summarise(told)["verdicts"] == {"exact": 1, "timeout": 1}

    def test_nothing_played_is_an_error_that_says_why(self) -> None:
        dropped = [_dropped(order) for order in orders("t", episodes=2, num_games=None)]
        with pytest.raises(RuntimeError, match=r"all 2 .* dropped: died: exit code 3"):
            summarise(dropped)


def test_evaluate_plays_all_in_parts_and_reports_progress() -> None:
    batches: list[tuple[int, SamplingParams]] = []
    progress: list[tuple[int, int]] = []

    def collect(wanted: Sequence[Order], sampling: SamplingParams) -> list[Episode | Dropped]:
        batches.append((len(wanted), sampling))
        return [_episode(order, success=order.index % 4 == 0) for order in wanted]

    found = evaluate(
        "t",
        collect,
        sampling=SAMPLING,
        episodes="all",
        num_games=10,
        part=4,
        progress=lambda *at: progress.append(at),
    )
    assert batches == [(4, SAMPLING), (4, SAMPLING), (2, SAMPLING)]
    assert progress == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert (found["value"], found["n"]) == (0.3, 10)
    assert (found["temperature"], found["top_p"]) == (0.4, 0.9)


def test_each_task_is_played_in_each_mode_and_told_as_its_score_is_there() -> None:
    told: list[tuple[Any, ...]] = []
    games = {"evaluation:one": 3, "evaluation:two": 2}

    def collect(wanted: Sequence[Order], sampling: SamplingParams) -> list[Episode | Dropped]:
        told.append((wanted[0].task, len(wanted), sampling))
        return [_episode(order, success=True) for order in wanted]

    scores = evaluate_tasks(
        {
            "one": settings.rollout("One-v0", temperature=0.4, top_p=0.9, max_turns=1),
            "two": settings.rollout("Two-v0", temperature=0.4, top_p=0.9, max_turns=2),
        },
        collect,
        modes=("greedy", "sampled"),
        episodes=3,
        num_games=games.__getitem__,
        progress=lambda *at: told.append(at),
        scored=lambda task, mode, found: told.append((task, mode, found["n"])),
    )
    assert told == [
        event
        for task, n in (("one", 3), ("two", 2))
        for mode, sampling in (("greedy", GREEDY), ("sampled", SAMPLING))
        for event in (
            (task, mode, 0, n),
            (EVALUATION + task, n, sampling),
            (task, mode, n, n),
            (task, mode, n),
        )
    ]
    assert [scores[task]["metric"] for task in scores] == ["pass@1", "success rate"]
    assert scores["two"]["sampled"]["top_p"] == SAMPLING.top_p


def test_prompts_none_of_which_can_be_asked_are_no_score() -> None:
    some = orders("t", episodes=3, num_games=None)
    unasked = [
        replace(_episode(order, success=False), turns=(), ended="context") for order in some[:2]
    ]
    with pytest.raises(ValueError, match="none of 2 prompts leaves room"):
        summarise(unasked)
    assert summarise([*unasked, _episode(some[2], success=True)])["value"] == pytest.approx(
        1 / 3, abs=1e-4
    )
