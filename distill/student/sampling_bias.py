"""Which sampling parameters bias which objective, in one line; and the sampling log-probabilities
of tokens whose engine did not tell them.

An objective whose loss is a mean over the sampled token (`Needs.draws`) treats it as drawn from the
whole policy at temperature 1, unless `behavior: sampling` has it weigh its tokens.
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
    """What sampling parameters do to an objective's mean gradient, and the cure."""

    text: str
    cure: str


def bias(objective: Objective, sampling: SamplingParams) -> Bias | None:
    """The bias of the first of its losses that has one; None: the mean gradient is unbiased."""
    return next((found for rule in objective.rules if (found := _bias(rule, sampling))), None)


def _bias(rule: Rule, sampling: SamplingParams) -> Bias | None:
    if not rule.needs.draws or sampling.whole:
        return None
    # Greedy cuts as well: all but one token have probability 0.
    cut = sampling.temperature == 0 or sampling.top_p < 1
    if rule.needs.sampling:
        if not cut:
            return None
        return Bias(
            text=f"{rule.name} weighs its tokens for the sampling parameters, but tokens that"
            f" {_parts(sampling)} never draws have no part in its gradient",
            cure=f"{'top_p 1' if sampling.temperature else 'temperature 1'} leaves nothing out",
        )
    remains = "tokens that are never drawn stay without their part" if cut else "exact"
    return Bias(
        text=f"{rule.name} treats its tokens as drawn from the whole policy at temperature 1;"
        f" {_parts(sampling)} draws from {'a part of it' if cut else 'another distribution'}",
        cure=f"set behavior: sampling ({remains}), or {_whole(sampling)}",
    )


def biases(tasks: Mapping[str, TaskSettings]) -> dict[str, Bias]:
    """The bias of each task that has one."""
    found = {name: bias(task.objective, task.rollout.sampling) for name, task in tasks.items()}
    return {name: own for name, own in found.items() if own is not None}


def _parts(sampling: SamplingParams) -> str:
    """The parameters that differ from the whole policy's, in words."""
    parts = [] if sampling.temperature == 1 else [f"temperature {sampling.temperature:g}"]
    return " with ".join(parts + ([] if sampling.top_p == 1 else [f"top_p {sampling.top_p:g}"]))


def _whole(sampling: SamplingParams) -> str:
    """The same, as they would have to be."""
    parts = [] if sampling.temperature == 1 else ["temperature 1"]
    return " and ".join(parts + ([] if sampling.top_p == 1 else ["top_p 1"]))


def with_sampling_logprobs(
    outcomes: Sequence[Episode | Dropped], learner: Learner
) -> list[Episode | Dropped]:
    """The same outcomes; where an engine did not tell its tokens' log-probabilities under the
    sampling parameters, the student computes them, with the weights that generated.

    Raises:
        RuntimeError: those weights are gone.
    """
    # By (outcome, row). One forward for all rows of the same parameters.
    lacking: dict[SamplingParams, dict[tuple[int, int], Row]] = defaultdict(dict)
    for i, outcome in enumerate(outcomes):
        for j, row in enumerate(outcome.rows if isinstance(outcome, Episode) else ()):
            if _unknown(row).any():
                lacking[_params_of(outcome, learner.version)][i, j] = row
    filled = {
        index: _filled(row, found_N)
        for sampling, rows in lacking.items()
        for (index, row), found_N in zip(
            rows.items(), _computed(learner, [*rows.values()], sampling), strict=True
        )
    }
    return [
        replace(one, rows=tuple(filled.get((i, j), row) for j, row in enumerate(one.rows)))
        if isinstance(one, Episode)
        else one
        for i, one in enumerate(outcomes)
    ]


def _unknown(row: Row) -> npt.NDArray[np.bool_]:
    """[T] True at sampled tokens whose log-probability under the sampling parameters is unknown."""
    return np.isfinite(row.behavior_logprobs_T) & np.isnan(row.sampling_T)


def _params_of(outcome: Episode | Dropped, version: int) -> SamplingParams:
    assert isinstance(outcome, Episode)
    if outcome.version != version and not outcome.sampling.whole:
        raise RuntimeError(
            f"{outcome.order.name}: its engine did not tell its tokens' log-probabilities under the"
            f" sampling parameters, and the weights that generated it (version {outcome.version},"
            f" now {version}) are gone: set behavior: full, or schedule.max_staleness: 0"
        )
    return outcome.sampling


def _computed(
    learner: Learner, rows: Sequence[Row], sampling: SamplingParams
) -> list[npt.NDArray[np.float32]]:
    """The sampling log-probabilities at each row's action tokens."""
    if sampling.whole:  # then the two kinds are one, and recorded
        return [row.behavior_logprobs_T[row.action_mask_T] for row in rows]
    return [found_N.numpy() for found_N in learner.sampling_logprobs(rows, sampling)]


def _filled(row: Row, found_N: npt.NDArray[np.float32]) -> Row:
    sampling_T, unknown_T = row.sampling_T.copy(), _unknown(row)
    sampling_T[unknown_T] = found_N[unknown_T[row.action_mask_T]]
    return replace(row, sampling_logprobs_T=sampling_T)
