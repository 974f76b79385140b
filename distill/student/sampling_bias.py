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
from tutelage.scheduler.episodes import Dropped, Episode, Row, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """What a law does to an objective's mean gradient, and what mends it."""

    text: str
    cure: str


def bias(objective: Objective, sampling: SamplingParams) -> Bias | None:
    """Of the first of its losses that has one. None: the gradient's mean is the objective's own."""
    return next((found for rule in objective.rules if (found := _bias(rule, sampling))), None)


def _bias(rule: Rule, sampling: SamplingParams) -> Bias | None:
    if not rule.needs.draws or sampling.whole:
        return None
    cut = sampling.temperature == 0 or sampling.top_p < 1
    if rule.needs.sampling:
        if not cut:
            return None
        return Bias(
            text=f"{rule.name} weighs its tokens by the law that draws them, but what"
            f" {_parts(sampling)} never draws has no part in its gradient",
            cure=f"{'top_p 1' if sampling.temperature else 'temperature 1'} leaves nothing out",
        )
    remains = "what is never drawn stays without its part" if cut else "exact"
    return Bias(
        text=f"{rule.name} takes its tokens for draws of the whole policy at temperature 1;"
        f" {_parts(sampling)} draws {'from a part' if cut else 'by another law'}",
        cure=f"set behavior: sampling ({remains}), or {_whole(sampling)}",
    )


def biases(tasks: Mapping[str, TaskSettings]) -> dict[str, Bias]:
    """Of each task that has one."""
    found = {name: bias(task.objective, task.rollout.sampling) for name, task in tasks.items()}
    return {name: own for name, own in found.items() if own is not None}


def _parts(sampling: SamplingParams) -> str:
    """What in a law is not the whole policy's."""
    parts = [] if sampling.temperature == 1 else [f"temperature {sampling.temperature:g}"]
    return " with ".join(parts + ([] if sampling.top_p == 1 else [f"top_p {sampling.top_p:g}"]))


def _whole(sampling: SamplingParams) -> str:
    parts = [] if sampling.temperature == 1 else ["temperature 1"]
    return " and ".join(parts + ([] if sampling.top_p == 1 else ["top_p 1"]))


def told(outcomes: Sequence[Episode | Dropped], learner: Learner) -> list[Episode | Dropped]:
    """The same outcomes; where an engine did not say what its sampling law gave the tokens, the
    student says it, with the weights that played.

    Raises:
        RuntimeError: those weights are gone.
    """
    silent: dict[SamplingParams, dict[tuple[int, int], Row]] = defaultdict(dict)  # by place
    for i, outcome in enumerate(outcomes):
        for j, row in enumerate(outcome.rows if isinstance(outcome, Episode) else ()):
            if _unsaid(row).any():
                silent[_params_of(outcome, learner.version)][i, j] = row
    said = {
        place: _filled(row, found_N)
        for sampling, rows in silent.items()
        for (place, row), found_N in zip(
            rows.items(), _asked(learner, [*rows.values()], sampling), strict=True
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
    return np.isfinite(row.behavior_logprobs_T) & np.isnan(row.sampling_T)


def _params_of(outcome: Episode | Dropped, version: int) -> SamplingParams:
    assert isinstance(outcome, Episode)
    if outcome.version != version and not outcome.sampling.whole:
        raise RuntimeError(
            f"{outcome.order.name}: its engine did not say what the sampling law gave its tokens,"
            f" and the weights that played it (version {outcome.version}, now {version}) are gone:"
            " set behavior: full, or schedule.max_staleness: 0"
        )
    return outcome.sampling


def _asked(
    learner: Learner, rows: Sequence[Row], sampling: SamplingParams
) -> list[npt.NDArray[np.float32]]:
    """Of the rows' chosen tokens."""
    if sampling.whole:
        return [row.behavior_logprobs_T[row.action_mask_T] for row in rows]
    return [said_N.numpy() for said_N in learner.sampling_logprobs(rows, sampling)]


def _filled(row: Row, said_N: npt.NDArray[np.float32]) -> Row:
    sampling_T, unsaid_T = row.sampling_T.copy(), _unsaid(row)
    sampling_T[unsaid_T] = said_N[unsaid_T[row.action_mask_T]]
    return replace(row, sampling_logprobs_T=sampling_T)
