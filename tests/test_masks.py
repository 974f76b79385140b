"""The special-token mask: per id, per turn, the first occurrence only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tutelage.distill.student.masks import loss_mask, special_ids
from tutelage.scheduler.episodes import Row


def _taken(row: Row, special: list[int]) -> list[tuple[int, int]]:
    """(position, id) of the tokens that take loss."""
    mask_T = loss_mask(row, special)
    return [(int(t), int(row.ids_T[t])) for t in np.flatnonzero(mask_T)]


def test_without_special_ids_every_action_token_takes_loss(
    make_row: Callable[..., Row],
) -> None:
    row = make_row([("prompt", [1, 2]), ("said", [3, 1]), ("prompt", [3]), ("said", [2])])
    assert _taken(row, []) == [(2, 3), (3, 1), (5, 2)]
    assert row.action_mask_T.tolist() == [False, False, True, True, False, True]


def test_the_first_occurrence_of_each_id_in_each_turn_is_left_out(
    make_row: Callable[..., Row],
) -> None:
    """60 twice in the first turn: the second stays. Each turn counts anew; each id for itself."""
    row = make_row(
        [
            ("prompt", [60, 61]),
            ("said", [60, 7, 60, 61, 8]),
            ("prompt", [60]),
            ("said", [9, 60, 60]),
        ]
    )
    assert _taken(row, [60, 61]) == [(3, 7), (4, 60), (6, 8), (8, 9), (10, 60)]


def test_a_prompts_own_token_does_not_use_the_mask_up(make_row: Callable[..., Row]) -> None:
    row = make_row([("prompt", [60, 60]), ("said", [5, 60])])
    assert _taken(row, [60]) == [(2, 5)]


def test_a_branch_is_masked_like_a_reply(make_row: Callable[..., Row]) -> None:
    row = make_row([("prompt", [1]), ("branch", [60, 60]), ("prompt", [60, 3]), ("prompt", [4])])
    assert _taken(row, [60]) == [(2, 60)]


def test_the_row_itself_stays_as_it_was(make_row: Callable[..., Row]) -> None:
    row = make_row([("prompt", [1]), ("said", [60, 2])])
    loss_mask(row, [60])
    assert row.action_mask_T.tolist() == [False, True, True]


def test_texts_give_every_id_of_theirs_once(tokenizer: Any) -> None:
    """A text of several tokens lists them all, as the paper's code does for "<think>"."""
    ids = special_ids(tokenizer, ["<|end|>", "12", "21"])
    assert ids[0] == tokenizer.eos_token_id
    assert [tokenizer.decode([i]) for i in ids] == ["<|end|>", "1", "2"]
    with pytest.raises(ValueError, match=r"mask_tokens: '' gives no token"):
        special_ids(tokenizer, [""])
