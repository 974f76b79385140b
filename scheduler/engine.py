"""What a rollout needs of an inference engine: ids in, ids out, many requests in flight.

It is the loop of a continuous-batching server (add a request, step, collect what finished), so that
vLLM and the transformers engine can be driven by the same three calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tutelage.scheduler.episodes import SamplingParams

Weights = Mapping[str, npt.NDArray[np.generic]]
"""The student's, by name, as they travel to where it plays."""

SLACK = 1e-3
"""Nats by which rounding may lift a log-probability above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Continue `ids` by at most `max_new_tokens`, ending with one of `stop_ids` (which is kept).

    session: requests of one session extend each other's ids, so the engine may keep their keys and
    values.
    seed: all randomness of this reply. The same request gives the same reply whatever else is in
    flight.
    """

    session: int
    ids: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    sampling: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The sampled ids, with natural log-probabilities over the full vocabulary at temperature 1.

    sampling_logprobs: the same under the request's sampling parameters, after temperature and
    top-p; None: the engine does not know them.
    """

    session: int
    ids: list[int]
    logprobs: list[float]
    stopped: bool  # ended by a stop id, not by the length limit
    sampling_logprobs: list[float] | None = None

    def __post_init__(self) -> None:
        self._check(self.logprobs, "log-probability")
        if self.sampling_logprobs is not None:
            self._check(self.sampling_logprobs, "log-probability under the sampling parameters")

    def _check(self, logprobs: Sequence[float], what: str) -> None:
        if len(self.ids) != len(logprobs):
            raise RuntimeError(
                f"the engine sampled {len(self.ids)} ids and {len(logprobs)} log-probabilities"
            )
        for at, (token, logprob) in enumerate(zip(self.ids, logprobs, strict=True)):
            if token < 0 or not -math.inf < logprob <= SLACK:  # NaN fails both comparisons
                raise RuntimeError(
                    f"the engine sampled id {token} with {what} {logprob} (token {at} of"
                    f" {len(self.ids)}): ids count from 0, and log-probabilities are finite and at"
                    " most 0; its weights or its sampling are broken"
                )


class Engine(Protocol):
    """An inference engine that holds one version of the student."""

    version: int
    max_context: int
    lockstep: bool
    """True: results depend (in the last bits) on what shares a batch, so the caller should answer
    all sessions before it steps again; then a run repeats exactly."""

    def load(self, weights: Weights | None, version: int) -> None:
        """Take the learner's weights (None: the engine shares them in memory already)."""

    def submit(self, request: Request) -> None:
        """Queue a request."""

    def step(self) -> list[Completion]:
        """Advance; return what finished. Empty: requests still run, or none was queued."""

    def release(self, session: int) -> None:
        """Forget a session and its cache."""

    def close(self) -> None:
        """Let go of what the engine holds beside the model."""

    @property
    def pending(self) -> int:
        """Requests not yet completed."""
