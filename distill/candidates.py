"""What serving engines say of a prompt, token by token, made into scores: arrays all the way.

At each token such an engine names its K most probable ids and the token itself, which comes on top
where it is not among them (or always: then twice).

Letters: T tokens of a row, N chosen tokens, C candidates of all tokens, K support size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.objectives import TeacherScores
from tutelage.scheduler.episodes import Row

SLACK = 1e-3
"""By which a log-probability, or the sum of some probabilities, may exceed its bound: rounding."""


class BadCandidates(ValueError):
    """These are not the log-probabilities of the row's tokens."""


def read_length(row: Row) -> int:
    """Tokens of a row up to the last chosen one: nothing sees what follows."""
    return int(np.flatnonzero(row.chosen_T).max(initial=0)) + 1


def check_linear(subject: str, rows: Sequence[Row]) -> None:
    """Raises ValueError for a row with branches. Imitation alone has them, and asks no teacher."""
    if any(row.branches_T.any() for row in rows):
        raise ValueError(
            f"{subject}: a row with an expert's branches is no linear prompt, which is all that"
            f" this engine reads: set {subject}.engine to transformers, or objective to imitation,"
            " which asks no teacher"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """A row's: ids and log-probabilities, token after token. Those of token t are
    `starts_T[t]` to `ends_T[t]`; the first token has none."""

    ids_C: npt.NDArray[np.int32]
    logprobs_C: npt.NDArray[np.float32]
    starts_T: npt.NDArray[np.int64]
    ends_T: npt.NDArray[np.int64]

    def scores(self, row: Row, *, k: int, vocabulary: int) -> TeacherScores:
        """Of the row's chosen tokens.

        Raises:
            BadCandidates: a token has too few or too many, none of them its own, or numbers that
                are no log-probabilities.
            ValueError: an id outside the vocabulary.
        """
        at_N = np.flatnonzero(row.chosen_T)
        if len(self.starts_T) <= at_N.max(initial=0):
            raise BadCandidates(f"{len(self.starts_T)} positions for {len(row.ids_T)} tokens")
        starts_N, counts_N = self.starts_T[at_N], (self.ends_T - self.starts_T)[at_N]
        if len(wrong := np.flatnonzero((counts_N != k) & (counts_N != k + 1))):
            raise BadCandidates(
                f"token {at_N[wrong[0]]} has {counts_N[wrong[0]]} candidates, not {k} or {k + 1}"
            )
        columns = np.arange(k + 1)
        place_NC = np.minimum(starts_N[:, None] + columns, len(self.ids_C) - 1)
        there_NC = columns < counts_N[:, None]
        ids_NC = self.ids_C[place_NC]
        logprobs_NC = np.where(there_NC, self.logprobs_C[place_NC], -np.inf).astype(np.float32)
        own_NC = (ids_NC == row.ids_T[at_N][:, None]) & there_NC
        if len(wrong := np.flatnonzero(~own_NC.any(1))):
            raise BadCandidates(f"token {at_N[wrong[0]]} itself is not among its candidates")
        own_N = own_NC.argmax(1)
        # Of k + 1 the token itself is too many: it is outside the top k, or named a second time.
        keep_NC = columns != np.where(counts_N == k, k, own_N)[:, None]
        ids_NK = ids_NC[keep_NC].reshape(-1, k)
        logprobs_NK = logprobs_NC[keep_NC].reshape(-1, k)
        order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")
        logprobs_NK = np.take_along_axis(logprobs_NK, order_NK, 1)
        sampled_N = np.take_along_axis(logprobs_NC, own_N[:, None], 1)[:, 0]
        _check_numbers(logprobs_NK, sampled_N, at_N)
        return TeacherScores(
            ids_NK=torch.from_numpy(np.take_along_axis(ids_NK, order_NK, 1).astype(np.int64)),
            logprobs_NK=torch.from_numpy(logprobs_NK),
            sampled_N=torch.from_numpy(sampled_N),
            vocabulary=vocabulary,
        )


def _check_numbers(
    logprobs_NK: npt.NDArray[np.float32],
    sampled_N: npt.NDArray[np.float32],
    at_N: npt.NDArray[np.int64],
) -> None:
    worst_N = np.maximum(logprobs_NK.max(1, initial=-np.inf), sampled_N)  # NaN stays NaN
    mass_N = np.exp(np.minimum(logprobs_NK, 1.0)).sum(1)
    fine_N = (worst_N <= SLACK) & (mass_N <= 1 + SLACK)
    if not fine_N.all():
        n = int(np.flatnonzero(~fine_N)[0])
        raise BadCandidates(
            f"token {at_N[n]} has a log-probability of {worst_N[n]:.4g} and {mass_N[n]:.4g} of"
            " probability among its candidates"
        )
