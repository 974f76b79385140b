"""A step's line of metrics: what is counted of its episodes."""

from __future__ import annotations

from tutelage.distill.run.measures import UNGRADED, outcome_metrics
from tutelage.scheduler.episodes import GREEDY, Dropped, Episode, Order


def _order(number: int) -> Order:
    return Order(task="t", number=number, seed=number, index=number)


def _episode(number: int, verdict: str) -> Episode:
    return Episode(
        order=_order(number),
        rows=(),
        turns=(),
        success=verdict == "exact",
        reward=float(verdict == "exact"),
        task_type="",
        ended="terminated",
        sampling=GREEDY,
        version=0,
        verdict=verdict,
    )


def _dropped(number: int, reason: str) -> Dropped:
    return Dropped(order=_order(number), reason=reason, detail="no grade within 45 s", attempts=3)


def test_answers_that_were_not_compared_are_counted_by_reason() -> None:
    said = ["exact", "timeout", "timeout", "no_box", "symbolic"]
    outcomes = [*(_episode(n, verdict) for n, verdict in enumerate(said)), _dropped(5, "undecided")]
    found = outcome_metrics(outcomes, version=0)
    counts = {name: count for name, count in found.items() if name.startswith("grading/") and count}
    assert counts == {"grading/timeout": 2, "grading/no_box": 1, "grading/undecided": 1}
    assert {f"grading/{one}" for one in (*UNGRADED, "undecided")} <= found.keys()  # a curve each
    assert found["reward/success"] == 0.2  # of what was played: the undecided one is not wrong
    assert found["episodes/lost"] == ["t[5] seed 5: undecided: no grade within 45 s"]


def test_a_task_without_verdicts_has_none_of_it() -> None:
    outcomes = [_episode(0, ""), _episode(1, "fell into the lake"), _dropped(2, "died")]
    assert not any(name.startswith("grading/") for name in outcome_metrics(outcomes, version=0))
