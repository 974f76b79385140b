"""Checks a teacher's answer before anything is learned from it: a server or a broken device may
send numbers that no model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.distill.objectives import TeacherScores
from tutelage.distill.teachers.service import Answer, Ask

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
    found = []
    # The query ids do not travel back: the asker still has them (see CompactScores).
    query_ids: Sequence[Any] = ask.query_ids or [None] * len(rows)
    for at, (row, one, ids_NJ) in enumerate(zip(rows, answer.scores, query_ids, strict=True)):
        where, wanted = f"row {at} of {len(rows)}", int(row.action_mask_T.sum())
        if len(one) != wanted:
            raise _refusal(teacher, f"{where}: it scored {len(one)} of {wanted} tokens")
        if one.vocabulary != vocabulary:
            raise _refusal(
                teacher, f"{where}: it knows {one.vocabulary} ids, the student {vocabulary}"
            )
        try:
            scores = one.unpack(ids_NJ)
        except (ValueError, IndexError) as error:
            raise _refusal(teacher, f"{where}: {error}") from error
        # TeacherScores has checked each number, not that together they can be a distribution
        mass_N = scores.logprobs_NK.exp().sum(-1)
        if len(one) and max(mass_N.max().item(), scores.sampled_N.exp().max().item()) > 1 + SLACK:
            raise _refusal(teacher, f"{where}: its probabilities sum to more than 1")
        found.append(scores)
    return found


def _refusal(teacher: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"teachers.{teacher}: {why}: nothing was learned from it, and what was learned before is"
        " saved; load the teacher again (the same command resumes the run), or look at it with"
        " tutelage doctor"
    )
