"""Checks teachers in vLLM and behind servers: do they answer, and score as their weights do?

The weights on this machine score first and leave their device; then the engine starts, or the
server is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tutelage.distill.config.resolved import TaskSettings
from tutelage.distill.config.run import RunConfig
from tutelage.distill.doctor.findings import Check, Finding
from tutelage.distill.doctor.numbers import Score, check_teacher_on_student
from tutelage.distill.models.dtypes import ROWS_TOLERANCE
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.objectives.tokens import IMPOSSIBLE
from tutelage.distill.teachers.build import check_teachers, load_teacher
from tutelage.distill.teachers.service import Teacher
from tutelage.envs.errors import one_line
from tutelage.scheduler.episodes import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the weights on this machine score. reference: their folder or hub id."""

    reference: str
    rows: tuple[Row, ...]
    scores: tuple[TeacherScores, ...]


def examine_engine(
    config: RunConfig,
    tasks: Mapping[str, TaskSettings],
    name: str,
    tokenizer: Any,
    known: Known | None,
    played: Mapping[str, Sequence[Row]],
) -> Iterator[Finding]:
    """Findings on teacher `name` in its engine. known: None where its weights are not on this
    machine. played: the student's rows of the tasks that it teaches."""
    subject, settings = f"teachers.{name}", config.teachers[name]
    check = Check(subject, f"engine: {settings.engine}")
    within = ROWS_TOLERANCE[settings.dtype]
    # this teacher alone: the others have findings of their own
    own = config.model_copy(update={"teachers": {name: settings}})
    teacher: Teacher | None = None
    try:
        check_teachers(own, tasks, tokenizer)
        teacher = load_teacher(name, config, len(tokenizer))
        if known is not None:
            yield check_parity(subject, teacher.score, known, within=within)
        elif settings.engine == "server":
            yield check.note(
                "its weights are not on this machine: nothing tells whether it scores as they do",
                f"set {subject}.weights to a folder or hub id of the same model, to compare once",
            )
        if rows := [row for own_rows in played.values() for row in own_rows]:
            yield check_steadiness(subject, teacher.score, rows, within=within)
        if known is None:  # else its weights here have answered this
            for task, own_rows in played.items():
                theirs = teacher.score(own_rows, Needs(k=1))
                yield check_teacher_on_student(subject, task, theirs, own_rows)
    except (ValueError, RuntimeError, OSError) as error:
        yield check.fault(one_line(error), "see the message")
    finally:
        if teacher is not None:
            teacher.close()


def check_parity(subject: str, score: Score, known: Known, *, within: float) -> Finding:
    """Whether the engine's log-probabilities are those of the same weights in a plain forward."""
    check, k = Check(subject, "parity"), known.scores[0].ids_NK.shape[1]
    theirs = score(known.rows, Needs(k=k))
    pairs = list(zip(theirs, known.scores, strict=True))
    gap_N = torch.cat([_gap(one.sampled_N, other.sampled_N) for one, other in pairs])
    top_NK = torch.cat([_gap(one.logprobs_NK, other.logprobs_NK) for one, other in pairs])
    # sorted, as sets: ids that are nearly as probable may change places
    same_N = torch.cat(
        [(a.ids_NK.sort(-1)[0] == b.ids_NK.sort(-1)[0]).all(-1) for a, b in pairs]
    ).float()
    # means: single tokens of another engine's kernels may be far off, wrong weights are everywhere
    off = max(float(gap_N.mean()), float(top_NK.mean()))
    text = (
        f"apart by {off:.0e} nats in the mean and {float(gap_N.max()):.0e} at most on"
        f" {len(gap_N)} tokens; the same top {k} on {float(same_N.mean()):.0%} of them"
    )
    if not off <= within:  # NaN too
        return check.fault(
            f"mismatch: {text}, where {within:g} is allowed: it does not score with"
            f" {known.reference!r}, or not with these weights unchanged",
            "give the engine these weights, without quantisation, in this dtype, with"
            " logprobs-mode raw_logprobs, and an embedding without padding rows",
        )
    return check.ok(f"as {known.reference!r} in this system's own engine: {text}")


def check_steadiness(subject: str, score: Score, rows: Sequence[Row], *, within: float) -> Finding:
    """Whether the same rows get the same scores twice, up to rounding, which depends on how the
    engine batches them."""
    check = Check(subject, "the same twice")
    pairs = zip(score(rows, Needs(k=1)), score(rows, Needs(k=1)), strict=True)
    off = float(torch.cat([_gap(a.sampled_N, b.sampled_N) for a, b in pairs]).mean())
    if not off <= within:  # NaN too
        return check.fault(
            f"the same rows scored twice are {off:.2g} nats apart in the mean",
            "replicas behind one url must serve the same weights",
        )
    return check.ok(f"within {off:.0e} nats in the mean")


def _gap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # clamped: -inf against -inf is NaN, and -inf against -1e4 no difference that matters
    return (one.clamp(min=IMPOSSIBLE) - other.clamp(min=IMPOSSIBLE)).abs()
