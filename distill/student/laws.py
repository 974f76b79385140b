"""Which objective is biased by which sampling law, in a line; and what a law says of tokens whose
engine did not tell.

An objective whose loss is a mean over the draw of a token (`Needs.draws`) takes it for a draw
of the whole policy at temperature 1, unless it is told to weigh it (`behavior: sampling`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tutelage.distill.config.resolved import TaskSettings
from tutelage.distill.objectives import Objective, Rule
from tutelage.distill.student.learner import Learner
from tutelage.scheduler.episodes import Dropped, Episode, Row, SamplingLaw


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """What a law does to an objective's mean gradient, and what mends it."""

    text: str
    cure: str


def bias(objective: Objective, law: SamplingLaw) -> Bias | None:
    """Of the first of its losses that has one. None: the gradient's mean is the objective's own."""
    return next((found for rule in objective.rules if (found := _bias(rule, law))), None)


def _bias(rule: Rule, law: SamplingLaw) -> Bias | None:
    if not rule.needs.draws or law.whole:
        return None
    cut = law.temperature == 0 or law.top_p < 1
    if rule.needs.law:
        if not cut:
            return None
        return Bias(
            text=f"{rule.name} weighs its tokens by the law that draws them, but what"
            f" {_parts(law)} never draws has no part in its gradient",
            cure=f"{'temperature 1' if law.temperature == 0 else 'top_p 1'} leaves nothing out",
        )
    remains = "what is never drawn stays without its part" if cut else "exact"
    return Bias(
        text=f"{rule.name} takes its tokens for draws of the whole policy at temperature 1;"
        f" {_parts(law)} draws {'from a part' if cut else 'by another law'}",
        cure=f"set behavior: sampling ({remains}), or {_whole(law)}",
    )


def biases(tasks: Mapping[str, TaskSettings]) -> dict[str, Bias]:
    """Of each task that has one."""
    found = {name: bias(task.objective, task.rollout.law) for name, task in tasks.items()}
    return {name: own for name, own in found.items() if own is not None}


def _parts(law: SamplingLaw) -> str:
    """What in a law is not the whole policy's."""
    parts = [] if law.temperature == 1 else [f"temperature {law.temperature:g}"]
    return " with ".join(parts + ([] if law.top_p == 1 else [f"top_p {law.top_p:g}"]))


def _whole(law: SamplingLaw) -> str:
    parts = [] if law.temperature == 1 else ["temperature 1"]
    return " and ".join(parts + ([] if law.top_p == 1 else ["top_p 1"]))


def told(outcomes: Sequence[Episode | Dropped], learner: Learner) -> list[Episode | Dropped]:
    """The same outcomes; where an engine did not say what its sampling law gave the tokens, the
    student says it, with the weights that played.

    Raises:
        RuntimeError: those weights are gone.
    """
    silent: dict[SamplingLaw, dict[tuple[int, int], Row]] = defaultdict(dict)  # by place
    for i, outcome in enumerate(outcomes):
        for j, row in enumerate(outcome.rows if isinstance(outcome, Episode) else ()):
            if _unsaid(row).any():
                silent[_law_of(outcome, learner.version)][i, j] = row
    said = {
        place: _filled(row, found_N)
        for law, rows in silent.items()
        for (place, row), found_N in zip(
            rows.items(), _asked(learner, [*rows.values()], law), strict=True
        )
    }
    return [
        replace(one, rows=tuple(said.get((i, j), row) for j, row in enumerate(one.rows)))
        if isinstance(one, Episode)
        else one
        for i, one in enumerate(outcomes)
    ]


def _unsaid(row: Row) -> npt.NDArray[np.bool_]:
    """The tokens that were sampled, under a law that is not known [T]."""
    return np.isfinite(row.logprobs_T) & np.isnan(row.law_T)


def _law_of(outcome: Episode | Dropped, version: int) -> SamplingLaw:
    assert isinstance(outcome, Episode)
    if outcome.version != version and not outcome.law.whole:
        raise RuntimeError(
            f"{outcome.order.name}: its engine did not say what the sampling law gave its tokens,"
            f" and the weights that played it (version {outcome.version}, now {version}) are gone:"
            " set behavior: full, or schedule.max_staleness: 0"
        )
    return outcome.law


def _asked(
    learner: Learner, rows: Sequence[Row], law: SamplingLaw
) -> list[npt.NDArray[np.float32]]:
    """Of the rows' chosen tokens."""
    if law.whole:
        return [row.logprobs_T[row.chosen_T] for row in rows]
    return [said_N.numpy() for said_N in learner.law_logprobs(rows, law)]


def _filled(row: Row, said_N: npt.NDArray[np.float32]) -> Row:
    law_T, unsaid_T = row.law_T.copy(), _unsaid(row)
    law_T[unsaid_T] = said_N[unsaid_T[row.chosen_T]]
    return replace(row, law_logprobs_T=law_T)
