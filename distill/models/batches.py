"""Rows packed into padded batches, and the hidden states that predict their action tokens.

Letters: B rows, T tokens a row (padded), N action tokens of the batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from tutelage.distill.models.decoders import Decoder
from tutelage.scheduler.episodes import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some rows as tensors; action tokens N run row by row. members: which rows, in order."""

    members: tuple[int, ...]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor | None  # None: 0, 1, 2, ...
    mask_B1TT: torch.Tensor | None  # None: causal
    rows_N: torch.Tensor
    sources_N: torch.Tensor  # index of the hidden state that predicts each action token
    targets_N: torch.Tensor
    behavior_logprobs_N: torch.Tensor
    sampling_logprobs_N: torch.Tensor  # under the sampling parameters; NaN: unknown
    advantage_N: torch.Tensor | None  # None: no row has any
    segments_N: torch.Tensor  # tokens of one number are one turn's reply
    positions_N: torch.Tensor  # response positions, from 0

    def hidden(self, decoder: Decoder) -> torch.Tensor:
        """The hidden states [N, D] that predict the action tokens."""
        return decoder(
            self.ids_BT,
            positions_BT=self.positions_BT,
            mask_B1TP=self.mask_B1TT,
            at=(self.rows_N, self.sources_N),
        )

    def by_row(self, values_N: torch.Tensor) -> dict[int, torch.Tensor]:
        """Each row's part of values of the batch's tokens."""
        counts = torch.bincount(self.rows_N, minlength=len(self.members)).tolist()
        return dict(zip(self.members, values_N.split(counts), strict=True))

    def locate(self, n: int) -> tuple[int, int]:
        """(the row of token n, how many of the row's action tokens come before it)."""
        row = self.rows_N[n]
        return self.members[int(row)], int((self.rows_N[:n] == row).sum())


FORWARD = {"cpu": 256, "cuda": 2048}
"""What starting one more forward costs, in tokens of a forward, by the kind of device. On a CPU as
many rows in one forward as fit would read mostly padding; a GPU is hardly slower with more."""


def pack(rows: Sequence[Row], *, max_tokens: int, device: torch.device) -> list[Batch]:
    """The cheapest batches of rows of similar length, of at most `max_tokens`, padding included. A
    longer row goes alone. What follows the last token that predicts anything is not read.

    Rows are padded on the right: under the causal mask no real token sees the padding.
    """
    lengths = [_read_length(row) for row in rows]
    # The index breaks ties, so that equal lengths have one order, whoever sorts.
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
    cuts = _cheapest([lengths[i] for i in order], max_tokens, FORWARD.get(device.type, 2048))
    return [
        _batch(rows, tuple(order[start:end]), lengths[order[end - 1]], device)
        for start, end in pairwise(cuts)
    ]


def _read_length(row: Row) -> int:
    """How many of a row's tokens a forward reads: up to the last that predicts an action token."""
    return int(row.sources_T()[row.action_mask_T].max(initial=0)) + 1


def _cheapest(lengths: Sequence[int], max_tokens: int, forward: int) -> list[int]:
    """Where to cut rows of ascending lengths into batches, from 0 to their count, so that tokens,
    padding included, and `forward` for every batch add up to the least."""
    costs, starts = np.zeros(len(lengths) + 1, dtype=np.int64), [0] * (len(lengths) + 1)
    for end, width in enumerate(lengths, start=1):
        # the last batch's first row: it holds at least one row, and as many as fit
        first = max(0, min(end - 1, end - max_tokens // width))
        whole = costs[first:end] + width * np.arange(end - first, 0, -1) + forward
        best = int(whole.argmin())
        costs[end], starts[end] = whole[best], first + best
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    return cuts[::-1]


def _batch(
    rows: Sequence[Row], members: tuple[int, ...], width: int, device: torch.device
) -> Batch:
    own = [rows[i] for i in members]
    ids_BT = np.zeros((len(own), width), dtype=np.int64)
    for b, row in enumerate(own):
        ids_BT[b, : len(row.ids_T)] = row.ids_T[:width]
    branched = any(row.branches_T.any() for row in own)
    where = [np.flatnonzero(row.action_mask_T) for row in own]
    rows_N = np.concatenate([np.full(len(at), b) for b, at in enumerate(where)])
    turns_N = np.concatenate([row.turns_T[at] for row, at in zip(own, where, strict=True)])
    # A reply begins where the row or the turn changes: two rows may both end and begin with turn 0.
    begins_N = np.ones(len(rows_N), dtype=bool)
    begins_N[1:] = (np.diff(rows_N) != 0) | (np.diff(turns_N) != 0)
    segments_N = np.cumsum(begins_N) - 1
    return Batch(
        members=members,
        ids_BT=torch.from_numpy(ids_BT).to(device),
        positions_BT=_positions(own, width).to(device) if branched else None,
        mask_B1TT=_branch_mask(own, width).to(device) if branched else None,
        rows_N=torch.from_numpy(rows_N).to(device),
        sources_N=_actions([row.sources_T() for row in own], where, device),
        targets_N=_actions([row.ids_T for row in own], where, device).long(),
        behavior_logprobs_N=_actions([row.behavior_logprobs_T for row in own], where, device),
        sampling_logprobs_N=_actions([row.sampling_T for row in own], where, device),
        advantage_N=_advantages(own, where, device),
        segments_N=torch.from_numpy(segments_N).to(device),
        positions_N=torch.from_numpy(
            np.arange(len(rows_N)) - np.flatnonzero(begins_N)[segments_N]
        ).to(device),
    )


def _actions(
    values: Sequence[np.ndarray], where: Sequence[np.ndarray], device: torch.device
) -> torch.Tensor:
    """The rows' values [T] at their action tokens, joined [N]."""
    parts = [values_T[at] for values_T, at in zip(values, where, strict=True)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _advantages(
    rows: Sequence[Row], where: Sequence[np.ndarray], device: torch.device
) -> torch.Tensor | None:
    parts = [row.advantage_T for row in rows if row.advantage_T is not None]
    if parts and len(parts) < len(rows):
        raise ValueError(f"{len(parts)} of {len(rows)} rows have advantages: all must, or none")
    return _actions(parts, where, device) if parts else None


def _positions(rows: Sequence[Row], width: int) -> torch.Tensor:
    positions_BT = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        positions_BT[b, : len(row.ids_T)] = row.positions_T()[:width]
    return torch.from_numpy(positions_BT)


def _branch_mask(rows: Sequence[Row], width: int) -> torch.Tensor:
    """[B, 1, T, T] True where a query may attend: to earlier tokens of the trunk (branch 0) and of
    its own branch."""
    branches_BT = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        branches_BT[b, : len(row.ids_T)] = row.branches_T[:width]
    branches = torch.from_numpy(branches_BT)
    key_B1T, query_BT1 = branches[:, None, :], branches[:, :, None]
    earlier_TT = torch.ones(width, width, dtype=torch.bool).tril()
    return (earlier_TT & ((key_B1T == 0) | (key_B1T == query_BT1)))[:, None]
