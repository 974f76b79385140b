"""Which tokens take loss: all action tokens, minus the special-token mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.scheduler.episodes import Row


def special_ids(tokenizer: Any, texts: Iterable[str]) -> tuple[int, ...]:
    """Every id that the tokenizer makes of each text (Revisiting-OPD's `opd_mask_first_tokens`)."""
    found: dict[int, None] = {}
    for text in texts:
        # Where a tokenizer opens each text with a BOS, that would be masked, too.
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"objective.mask_tokens: {text!r} gives no token")
        found.update(dict.fromkeys(ids))
    return tuple(found)


def loss_mask(row: Row, special: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[T] True where a token takes loss: all action tokens but the first of each special id in each
    turn (the paper's code: one mask entry per id and per response).

    A teacher that opens or ends its replies with other tokens is wrong at those, and only there.
    """
    mask_T = row.action_mask_T.copy()
    if special:
        # Of action tokens alone: NO_ACTION would count as a turn.
        for turn in np.unique(row.turns_T[mask_T]):
            inside_T = row.turns_T == turn
            for token in special:
                hits = np.flatnonzero(inside_T & (row.ids_T == token))
                mask_T[hits[:1]] = False
    return mask_T
