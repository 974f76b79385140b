"""Checks a model's numbers: does each score belong to its token, did all weights load, and do
engine and learner give the student's tokens the same log-probabilities?

The reference is a plain forward of the model. It shares no code with the batches, masks and
positions that training uses.

Letters: T tokens of a row, N action tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tutelage.distill.doctor.findings import Check, Finding
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models.batches import Batch, pack
from tutelage.distill.models.dtypes import ROWS_TOLERANCE
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import Needs, Objective, TeacherScores, Tokens
from tutelage.distill.objectives.tokens import IMPOSSIBLE
from tutelage.distill.student.sampling_bias import bias
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.scheduler.engine import Completion, Request
from tutelage.scheduler.episodes import GREEDY, NO_ACTION, Row, SamplingParams

GREEDY_TOKENS, PROMPT_TOKENS = 24, 256  # the reference keeps whole logits: 0.2 GB at V = 150,000
LOST = 0.9
"""A model whose entropy is more than this share of ln V has lost its weights; language models stay
below a third."""
STRANGE = -5.0
"""Nats a token: below it the teacher finds the student's tokens e^5 times less likely than the
student does."""

Score = Callable[..., Sequence[TeacherScores]]
"""`TransformersTeacher.score`, or that of another teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A row, and a plain forward's log-probabilities: line t of [T, V] predicts token t."""

    row: Row
    logprobs_TV: torch.Tensor


def tolerance(model: Any, other: str | None = None) -> float:
    """Nats by which two computations of a log-probability may differ in the mean. other: the dtype
    of the second one, if it is not the model's."""
    own = str(model.dtype).removeprefix("torch.")
    return max(ROWS_TOLERANCE[own], ROWS_TOLERANCE[other or own])


def greedy_probes(student: Student, prompt: Sequence[int]) -> list[Probe]:
    """Two rows of `prompt` and the model's own greedy continuation. They differ in length, and the
    longer one has a second reply inside its prompt, so that padding and gaps between action tokens
    are checked too."""
    engine = TransformersEngine(student)
    ids = list(prompt)[: min(PROMPT_TOKENS, engine.max_context - GREEDY_TOKENS)]
    engine.submit(
        Request(
            session=0,
            ids=ids,
            max_new_tokens=GREEDY_TOKENS,
            stop_ids=frozenset(),  # what follows an EOS is a text like another
            sampling=GREEDY,
            seed=0,
        )
    )
    found: list[Completion] = []
    while not found:
        found = engine.step()
    said, logprobs = found[0].ids, found[0].logprobs
    # from 1 on: nothing predicts the first token
    inside = range(max(1, len(ids) // 2), max(1, len(ids) // 2) + min(4, len(ids) // 4))
    short = GREEDY_TOKENS // 2
    return [
        _probe(student, ids, said, logprobs, inside),
        _probe(student, ids, said[:short], logprobs[:short], range(0)),
    ]


@torch.no_grad()
def _probe(
    student: Student,
    prompt: Sequence[int],
    said: Sequence[int],
    logprobs: Sequence[float],
    inside: range,
) -> Probe:
    ids_T = np.asarray([*prompt, *said], dtype=np.int32)
    turns_T = np.full(len(ids_T), NO_ACTION, dtype=np.int32)
    turns_T[inside.start : inside.stop] = 0
    turns_T[len(prompt) :] = 1
    # NaN: not sampled by anyone, such as the reply inside the prompt
    behavior_logprobs_T = np.full(len(ids_T), np.nan, dtype=np.float32)
    behavior_logprobs_T[len(prompt) :] = logprobs
    row = Row(
        ids_T=ids_T,
        turns_T=turns_T,
        behavior_logprobs_T=behavior_logprobs_T,
        branches_T=np.zeros_like(turns_T),
    )
    after_TV = student.plain_logprobs(torch.from_numpy(ids_T)).cpu()
    first_1V = torch.full_like(after_TV[:1], math.nan)  # nothing predicts the first token
    return Probe(row=row, logprobs_TV=torch.cat([first_1V, after_TV[:-1]]))


def check_alignment(
    subject: str, score: Score, probes: Sequence[Probe], *, within: float
) -> Finding:
    """Whether a token's scores are those of a plain forward, and those recorded in generation.
    Scores that are shifted by one token are recognised: they fit the plain forward there.

    within: nats, in the mean; a single token may be five times as far off.
    """
    check = Check(subject, "one-token shift")
    scores = score([probe.row for probe in probes], Needs(k=1))
    pairs = list(zip(scores, probes, strict=True))
    here = [_errors(*pair, offset=0) for pair in pairs]
    top_N, sampled_N = (torch.cat(parts) for parts in zip(*here, strict=True))
    generated_N = torch.cat([_against_generation(*pair) for pair in pairs])
    off = max(float(error_N.mean()) for error_N in (top_N, sampled_N, generated_N))
    if off <= within:
        said_N = torch.cat([_generated(probe) for probe in probes])
        return check.ok(
            f"its own greedy text, {float(said_N.mean()):.3f} nats a token when generated, is"
            f" scored alike at every token (off by {off:.0e})"
        )
    for offset, where in ((1, "after"), (-1, "before")):
        there = [_errors(*pair, offset=offset) for pair in pairs]
        fits = [torch.cat(parts) <= 5 * within for parts in zip(*there, strict=True)]
        # Not all: at the ends of a reply a shifted score is of no neighbour.
        if max(float(fit_N.float().mean()) for fit_N in fits) > 0.7:
            return check.fault(
                f"shifted by one: the scores at a token are those of the token {where} it",
                "the scores are gathered at the wrong position: row t of a causal model's logits"
                " predicts token t + 1, so token t is scored by row t - 1",
            )
    return check.fault(
        "the scores of its own greedy text are not those of a plain forward: off by"
        f" {off:.2g} nats in the mean",
        "another prompt, mask, position or temperature is used in scoring than the row's own",
    )


def _errors(
    scores: TeacherScores, probe: Probe, *, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the scores are from the plain forward `offset` tokens further on, in nats: (of the
    id said to be the most probable [N], of the token's own log-probability [N])."""
    at_N = torch.from_numpy(np.flatnonzero(probe.row.action_mask_T)) + offset
    keep_N = (at_N >= 1) & (at_N < len(probe.row.ids_T))
    logprobs_NV = probe.logprobs_TV[at_N[keep_N]].clamp(min=IMPOSSIBLE)
    best_N = logprobs_NV.amax(-1)
    # The id must be (all but) the most probable there, and its log-probability that id's: in a
    # confident text the number alone would be near 0 everywhere.
    chosen_N = logprobs_NV.gather(1, scores.ids_NK[keep_N, :1])[:, 0]
    number_N = (scores.logprobs_NK[keep_N, 0] - chosen_N).abs()
    ids_N = torch.from_numpy(probe.row.ids_T).long()[at_N[keep_N]]
    own_N = logprobs_NV.gather(1, ids_N[:, None])[:, 0]
    mine_N = scores.sampled_N[keep_N].clamp(min=IMPOSSIBLE)
    return torch.maximum(best_N - chosen_N, number_N), (mine_N - own_N).abs()


def _generated(probe: Probe) -> torch.Tensor:
    """The log-probabilities recorded in generation, of those tokens that were generated."""
    recorded_T = probe.row.behavior_logprobs_T
    return torch.from_numpy(recorded_T[np.isfinite(recorded_T)])


def _against_generation(scores: TeacherScores, probe: Probe) -> torch.Tensor:
    recorded_N = torch.from_numpy(probe.row.behavior_logprobs_T[probe.row.action_mask_T])
    error_N = (scores.sampled_N.clamp(min=IMPOSSIBLE) - recorded_N).abs()
    return error_N[recorded_N.isfinite()]


def check_support(subject: str, scores: Sequence[TeacherScores], size: int) -> Finding:
    """Whether the scores are over the tokenizer's ids alone."""
    check = Check(subject, "ids that are scored")
    over = {found.vocabulary for found in scores}
    if over == {size}:
        return check.ok(f"the tokenizer's {size:,}")
    return check.fault(
        f"vocabulary padded: scores over {max(over):,} ids for a tokenizer of {size:,}: rows that"
        " no token has take probability",
        "cut the logits to the tokenizer's ids before the softmax (TransformersTeacher's"
        " vocabulary)",
    )


def check_weights(subject: str, scores: Sequence[TeacherScores]) -> Finding:
    """Whether the model has its weights: a nearly uniform distribution says that they are lost."""
    check = Check(subject, "uniform")
    known = [found.entropy_N for found in scores if found.entropy_N is not None]
    if not known:
        return check.note("these scores hold no entropy: lost weights would go unseen")
    entropy = float(torch.cat(known).mean())
    most = math.log(scores[0].vocabulary)
    if entropy > LOST * most:
        return check.fault(
            f"weights lost: its entropy is {entropy:.2f} nats of at most ln V = {most:.2f}: it"
            " prefers no token to another",
            "load the weights again and compare their hash: not all of them arrived (a device that"
            " slept, a checkpoint without its shards), or this model was never trained",
        )
    return check.ok(f"no: its entropy is {entropy:.2f} nats a token, of at most ln V = {most:.2f}")


def check_determinism(subject: str, score: Score, rows: Sequence[Row], *, within: float) -> Finding:
    """Whether the same rows get the same scores twice, and a row alone the same as in a batch."""
    check = Check(subject, "determinism")
    first, again = (score(rows, Needs(k=1)) for _ in range(2))
    if (off := _furthest(first, again)) > 0:  # to the bit: the same shapes take the same kernels
        return check.fault(
            f"the same rows scored twice differ by up to {off:.2g} nats",
            "turn dropout off (model.eval()), and use deterministic kernels; replicas of a server"
            " must hold the same weights",
        )
    alone = [found for row in rows for found in score([row], Needs(k=1))]
    off = _furthest(first, alone)
    if off > 10 * within:  # of the furthest single token; other shapes round otherwise
        return check.fault(
            f"a row alone and in a batch differ by up to {off:.2g} nats",
            "padding is seen by real tokens: check attention mask and positions",
        )
    return check.ok(f"the same twice; alone and in a batch within {off:.0e} nats")


def _furthest(left: Sequence[TeacherScores], right: Sequence[TeacherScores]) -> float:
    ours = torch.cat([found.sampled_N for found in left]).clamp(min=IMPOSSIBLE)
    theirs = torch.cat([found.sampled_N for found in right]).clamp(min=IMPOSSIBLE)
    return float((ours - theirs).abs().max())


def check_teacher_on_student(
    subject: str, task: str, scores: Sequence[TeacherScores], rows: Sequence[Row]
) -> Finding:
    """How likely the teacher finds the student's replies: the mean of log q - log pi."""
    check = Check(subject, f"on {task}'s replies")
    sampled_N = torch.cat([found.sampled_N for found in scores]).clamp(min=IMPOSSIBLE)
    own_N = torch.cat(
        [torch.from_numpy(row.behavior_logprobs_T[row.action_mask_T]) for row in rows]
    )
    known_N = own_N.isfinite()
    if not known_N.any():
        return check.ok("none of them are the student's own")  # an expert played
    gap = float((sampled_N - own_N)[known_N].mean())
    text = f"log q - log pi = {gap:.2f} nats a token on {int(known_N.sum())} tokens of the student"
    if gap < STRANGE:
        return check.note(
            f"{text}: the teacher finds them all but impossible",
            "is it the teacher of this task, under the template that it knows? An imitation stage"
            " first brings the student nearer",
        )
    return check.ok(text)


def check_sampling(subject: str, objective: Objective, sampling: SamplingParams) -> Finding:
    """Whether the objective's mean gradient is unbiased under the sampling parameters."""
    check = Check(subject, "sampling parameters")
    found = bias(objective, sampling)
    if found is not None:
        return check.note(found.text, found.cure)
    if sampling.whole:
        return check.ok(f"{objective.name}'s tokens are drawn from the whole policy")
    return check.ok(f"{objective.name} weighs its tokens by the probabilities they are drawn with")


def check_engine(
    subject: str,
    student: Student,
    rows: Sequence[Row],
    *,
    within: float | None = None,
    check: str = "engine and learner",
) -> Finding:
    """Whether the learner gives sampled tokens the log-probabilities that the engine recorded
    (train-inference mismatch): importance ratios and rewards are computed from both. within: nats,
    in the mean; None: `tolerance`."""
    checked = Check(subject, check)
    gaps = []
    with torch.no_grad():
        for batch in _packed(rows, student):
            own_N = student.view(batch).logprobs_at(batch.targets_N[:, None])[:, 0]
            gaps.append(
                (own_N - batch.behavior_logprobs_N)[batch.behavior_logprobs_N.isfinite()]
                .abs()
                .cpu()
            )
    gap_N = torch.cat(gaps)
    if not len(gap_N):
        return checked.note("no token was sampled by the student")
    mean, most = float(gap_N.mean()), float(gap_N.max())
    text = f"apart by {mean:.0e} nats in the mean, {most:.0e} at most, on {len(gap_N)} tokens"
    if not mean <= (tolerance(student) if within is None else within):  # NaN too
        return checked.fault(
            text,
            "every importance ratio is off by that: compare the engine's positions, cache and"
            " temperature (log-probabilities are those at 1), or use dtype float32",
        )
    return checked.ok(text)


def check_self_distillation(
    subject: str, student: Student, rows: Sequence[Row], objective: Objective
) -> Finding:
    """Take the student as its own teacher, through scoring and objective as in training. Nothing is
    left to learn, so the divergence, or a policy gradient's reward, must be 0."""
    teacher = TransformersTeacher(student.model, vocabulary=student.vocabulary)
    return self_distilled(subject, student, teacher.score, rows, objective)


DIVERGENCES = ("local_support", "full_vocabulary")
"""Objectives whose loss is a distance between teacher and student, and so 0 where they agree."""


@torch.no_grad()
def self_distilled(
    subject: str, student: Student, score: Score, rows: Sequence[Row], objective: Objective
) -> Finding:
    """See `check_self_distillation`. score: the student's own scores, however computed."""
    check = Check(subject, "self-distillation")
    if not objective.needs.teacher:
        return check.ok(f"{objective.name} has no teacher")
    needs, batches, asked = objective.needs, _packed(rows, student), None
    if needs.student_k:
        own_ids: dict[int, torch.Tensor] = {}
        for batch in batches:
            own_ids |= batch.by_row(student.view(batch).top_k(needs.student_k).int().cpu())
        asked = [own_ids[i].numpy() for i in range(len(rows))]
    scores = score(rows, needs, asked)
    losses, rewards = [], []
    for batch in batches:
        view = student.view(batch)
        own = TeacherScores.join([scores[i] for i in batch.members]).to(student.device)
        logprobs_N = view.logprobs_at(batch.targets_N[:, None])[:, 0]
        rewards.append((own.sampled_N - logprobs_N).abs())
        loss_N, _ = objective(
            view,
            own,
            batch.targets_N,
            logprobs_N,
            generator=torch.Generator(student.device).manual_seed(0),
            tokens=Tokens(sampling_logprobs_N=logprobs_N),  # as if drawn from the whole policy
        )
        losses.append(loss_N.abs())  # or losses of opposite signs would cancel out
    loss, reward = float(torch.cat(losses).mean()), float(torch.cat(rewards).mean())
    text = f"{objective.name}: |log q - log pi| = {reward:.0e}"
    distance = all(rule.name in DIVERGENCES for rule in objective.rules)
    if distance:
        text += f", loss = {loss:.0e}"
    left = max(reward, loss) if distance else reward
    if not left <= tolerance(student):  # NaN too
        return check.fault(
            f"{text} nats of the student to itself, not 0",
            "teacher and learner read the rows differently (positions, mask, temperature, dtype),"
            " or the scores lose precision on their way",
        )
    return check.ok(f"{text} nats of the student to itself")


def _packed(rows: Sequence[Row], student: Student) -> list[Batch]:
    return pack(rows, max_tokens=2048, device=student.device)
