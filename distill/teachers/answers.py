"""Checks a teacher's answer before anything is learned from it: a server or a broken device may
send numbers that no model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tutelage.distill.objectives import TeacherScores
from tutelage.distill.teachers.service import Answer, Ask
from tutelage.distill.teachers.transport import CompactScores
from tutelage.scheduler.episodes import Row

SLACK = 1e-2
"""By how much rounding to float16, and other kernels, may make a probability exceed 1."""


def unpack_answer(ask: Ask, answer: Answer, *, vocabulary: int) -> list[TeacherScores]:
    """The rows' scores. vocabulary: the student's.

    Raises:
        RuntimeError: these are not scores of these rows; names teacher, row and cure.
    """
    teacher, rows = ask.teacher, ask.rows
    if len(answer.scores) != len(rows):
        raise _refusal(teacher, f"it answered {len(answer.scores)} rows of {len(rows)}")
    if not rows:
        return []
    for at, (row, one) in enumerate(zip(rows, answer.scores, strict=True)):
        wanted = np.count_nonzero(row.action_mask_T)
        if len(one) != wanted:
            raise _refusal(teacher, f"{_row(at, rows)}: it scored {len(one)} of {wanted} tokens")
        if one.vocabulary != vocabulary:
            known = f"it knows {one.vocabulary} ids, the student {vocabulary}"
            raise _refusal(teacher, f"{_row(at, rows)}: {known}")
    # The query ids do not travel back: the asker still has them (see CompactScores).
    query_ids = None if ask.query_ids is None else np.concatenate(ask.query_ids)
    try:
        scores = CompactScores.join(answer.scores).unpack(query_ids)
    except (ValueError, IndexError) as error:
        raise _fault(ask, answer) or _refusal(teacher, str(error)) from error
    # TeacherScores has checked each number, not that together they can be a distribution
    most_N = torch.maximum(scores.logprobs_NK.exp().sum(-1), scores.sampled_N.exp())
    if len(most_N) and most_N.max() > 1 + SLACK:
        n = int((most_N > 1 + SLACK).nonzero()[0])
        at = int(np.searchsorted(np.cumsum([len(one) for one in answer.scores]), n, side="right"))
        raise _refusal(teacher, f"{_row(at, rows)}: its probabilities sum to more than 1")
    return scores.split([len(one) for one in answer.scores])


def _fault(ask: Ask, answer: Answer) -> RuntimeError | None:
    """The refusal of the first row whose scores cannot be unpacked."""
    query_ids: Sequence[Any] = ask.query_ids or [None] * len(ask.rows)
    for at, (one, ids_NJ) in enumerate(zip(answer.scores, query_ids, strict=True)):
        try:
            one.unpack(ids_NJ)
        except (ValueError, IndexError) as error:
            return _refusal(ask.teacher, f"{_row(at, ask.rows)}: {error}")
    return None


def _row(at: int, rows: Sequence[Row]) -> str:
    return f"row {at} of {len(rows)}"


def _refusal(teacher: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"teachers.{teacher}: {why}: nothing was learned from it, and what was learned before is"
        " saved; load the teacher again (the same command resumes the run), or look at it with"
        " tutelage doctor"
    )
