"""Turns the prompt log-probabilities of a serving engine into scores, with NumPy arrays throughout.

For each token of a prompt such an engine lists candidates: its K most probable ids, and the token
itself. Where the token is not among the K, it is the one candidate more. Some engines always add
it, so it may be listed twice.

Letters: T tokens of a row, N action tokens, C candidates of all tokens, K support size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.objectives import TeacherScores
from tutelage.scheduler.episodes import Row

SLACK = 1e-3
"""By how much rounding may lift a log-probability, or a sum of probabilities, above its bound."""


class BadCandidates(ValueError):
    """The candidates cannot be those of the row's tokens."""


def read_length(row: Row) -> int:
    """Tokens of a row up to its last action token: no score depends on what follows."""
    return int(np.flatnonzero(row.action_mask_T).max(initial=0)) + 1


def check_linear(subject: str, rows: Sequence[Row]) -> None:
    """Raises ValueError for a row with branches. Only imitation makes such rows, and it asks no
    teacher."""
    if any(row.branches_T.any() for row in rows):
        raise ValueError(
            f"{subject}: a row with an expert's branches is no linear prompt, which is all that"
            f" this engine reads: set {subject}.engine to transformers, or objective to imitation,"
            " which asks no teacher"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The candidates of a row's tokens, token after token. Those of token t stand at
    `starts_T[t]` to `ends_T[t]`; the first token has none."""

    ids_C: npt.NDArray[np.int32]
    logprobs_C: npt.NDArray[np.float32]
    starts_T: npt.NDArray[np.int64]
    ends_T: npt.NDArray[np.int64]

    def scores(self, row: Row, *, k: int, vocabulary: int) -> TeacherScores:
        """The scores of the row's action tokens.

        Raises:
            BadCandidates: a token has too few candidates, too many, or one twice; it is not among
                them; a less probable id is listed in its place; or a number is no log-probability.
            ValueError: an id outside the vocabulary.
        """
        at_N = np.flatnonzero(row.action_mask_T)
        if len(self.starts_T) <= at_N.max(initial=0):  # shorter rows are read (`read_length`)
            raise BadCandidates(f"{len(self.starts_T)} positions for {len(row.ids_T)} tokens")
        starts_N, counts_N = self.starts_T[at_N], (self.ends_T - self.starts_T)[at_N]
        if len(wrong := np.flatnonzero((counts_N != k) & (counts_N != k + 1))):
            raise BadCandidates(
                f"token {at_N[wrong[0]]} has {counts_N[wrong[0]]} candidates, not {k} or {k + 1}"
            )
        # A rectangle of k + 1 columns. Where a token has only k candidates, its last column would
        # read the next token's (or past the end): `there_NC` blanks it out.
        columns = np.arange(k + 1)
        place_NC = np.minimum(starts_N[:, None] + columns, len(self.ids_C) - 1)
        there_NC = columns < counts_N[:, None]
        ids_NC = self.ids_C[place_NC]
        logprobs_NC = np.where(there_NC, self.logprobs_C[place_NC], -np.inf).astype(np.float32)
        own_NC = (ids_NC == row.ids_T[at_N][:, None]) & there_NC
        if len(wrong := np.flatnonzero(~own_NC.any(1))):
            raise BadCandidates(f"token {at_N[wrong[0]]} itself is not among its candidates")
        own_N = own_NC.argmax(1)
        # Of k + 1 candidates the token itself is the surplus one: it is outside the top k, or
        # listed a second time. Of k the blank last column is.
        keep_NC = columns != np.where(counts_N == k, k, own_N)[:, None]
        ids_NK = ids_NC[keep_NC].reshape(-1, k)
        logprobs_NK = logprobs_NC[keep_NC].reshape(-1, k)
        order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")  # ties stay as they came
        logprobs_NK = np.take_along_axis(logprobs_NK, order_NK, 1)
        ids_NK = np.take_along_axis(ids_NK, order_NK, 1).astype(np.int64)
        sampled_N = np.take_along_axis(logprobs_NC, own_N[:, None], 1)[:, 0]
        # -1: a server may spread the probability over embedding rows beyond the vocabulary
        _check_numbers(logprobs_NK, sampled_N, at_N, least=-math.log(vocabulary) - 1.0)
        _check_order(ids_NK, logprobs_NK, sampled_N, row.ids_T[at_N], at_N)
        return TeacherScores(
            ids_NK=torch.from_numpy(ids_NK),
            logprobs_NK=torch.from_numpy(logprobs_NK),
            sampled_N=torch.from_numpy(sampled_N),
            vocabulary=vocabulary,
        )


def _check_numbers(
    logprobs_NK: npt.NDArray[np.float32],
    sampled_N: npt.NDArray[np.float32],
    at_N: npt.NDArray[np.int64],
    *,
    least: float,
) -> None:
    """Raises BadCandidates for what cannot be log-probabilities of one distribution.

    least: the most probable id cannot be less probable than in a uniform distribution.
    """
    worst_N = np.maximum(logprobs_NK.max(1, initial=-np.inf), sampled_N)  # NaN stays NaN
    mass_N = np.exp(np.minimum(logprobs_NK, 1.0)).sum(1)  # cut at 1: exp must not overflow
    # Written so that NaN fails: every comparison with it is false.
    fine_N = (worst_N <= SLACK) & (mass_N <= 1 + SLACK) & (logprobs_NK[:, 0] >= least)
    if not fine_N.all():
        n = int(np.flatnonzero(~fine_N)[0])
        raise BadCandidates(
            f"token {at_N[n]} has a log-probability of {worst_N[n]:.4g} and {mass_N[n]:.4g} of"
            " probability among its candidates"
        )


def _check_order(
    ids_NK: npt.NDArray[np.int64],
    logprobs_NK: npt.NDArray[np.float32],
    sampled_N: npt.NDArray[np.float32],
    own_N: npt.NDArray[np.int32],
    at_N: npt.NDArray[np.int64],
) -> None:
    """Raises BadCandidates unless these can be the K most probable ids: each listed once, and the
    token itself not more probable than the last of them while it is left out."""
    sorted_NK = np.sort(ids_NK, axis=1)
    twice_N = (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(1)
    if twice_N.any():
        raise BadCandidates(f"token {at_N[twice_N.argmax()]} names one candidate twice")
    own_NK = ids_NK == own_N[:, None]
    # Among the K, the token is bounded by its own number there; outside, by the least of the K.
    same_N = np.where(own_NK, logprobs_NK, -np.inf).max(1)
    bound_N = np.where(own_NK.any(1), same_N, logprobs_NK[:, -1])
    wrong_N = sampled_N > bound_N + SLACK
    if wrong_N.any():
        n = int(wrong_N.argmax())
        raise BadCandidates(
            f"token {at_N[n]} itself has a log-probability of {sampled_N[n]:.4g}, and the"
            f" candidates that should be the most probable ones {bound_N[n]:.4g}"
        )
