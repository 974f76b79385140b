"""Which of the student's tokens take loss: all that it chose, minus the special-token mask."""

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
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"objective.mask_tokens: {text!r} gives no token")
        found.update(dict.fromkeys(ids))
    return tuple(found)


def loss_mask(row: Row, special: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[T] True where the loss falls: each special id is left out where a turn first has it.

    A teacher that ends or opens its reply with other tokens is wrong there, and only there (the
    paper's code: one mask entry per id and per response).
    """
    mask_T = row.action_mask_T.copy()
    if special:
        for turn in np.unique(row.turns_T[mask_T]):
            inside_T = row.turns_T == turn
            for token in special:
                hits = np.flatnonzero(inside_T & (row.ids_T == token))
                mask_T[hits[:1]] = False
    return mask_T
