"""Objectives: small functions from (student, teacher scores, tokens) to a loss per token.

    objective = build("local_support", k=32)
    scores = TeacherScores.from_logits(teacher_logits_NV, sampled_ids_N, k=32)
    student = DenseStudent(student_logits_NV)
    loss_N, metrics = objective(student, scores, sampled_ids_N, behaviour_logprobs_N)

loss_N is unreduced and minimised; masks and averages are applied outside, in one place
(student/learner.py). Every log-probability is a natural log over the full vocabulary at temperature
1. `metrics` holds per-token diagnostics [N], detached.

Some losses are means over the draw of the token (`Objective.draws`) and take it for one of the
whole policy, whatever temperature and top-p drew it. `behavior="sampling"` weighs it
(`Case.drawn`); full, the default, is what the papers' codes do, and what runs were made with until
there was a choice.

One file is one loss: a class whose options are its `__init__`'s and whose `__call__` reads as the
paper does. What is common to all, the call's arguments and their checks, is `Objective`, here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol, get_args, get_type_hints

import torch

from tutelage.distill.objectives.advantage_gated import AdvantageGated
from tutelage.distill.objectives.entropy_aware import EntropyAware
from tutelage.distill.objectives.full_vocabulary import FullVocabulary
from tutelage.distill.objectives.imitation import Imitation
from tutelage.distill.objectives.local_support import LocalSupport
from tutelage.distill.objectives.reward_clipped import RewardClipped
from tutelage.distill.objectives.sampled_token import SampledToken
from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.sparse import SparseStudent
from tutelage.distill.objectives.students import DenseStudent, StudentView
from tutelage.distill.objectives.tokens import Case, Loss, Tokens
from tutelage.distill.objectives.trust_region import TrustRegion
from tutelage.envs.names import unknown

__all__ = [
    "DenseStudent",
    "Objective",
    "SparseStudent",
    "StudentView",
    "TeacherScores",
    "Tokens",
    "build",
]


class _Rule(Protocol):
    """A loss. `needs_teacher`: any scores at all; `k`: how many of the teacher's own ids."""

    name: str
    needs_teacher: bool
    k: int

    def __call__(self, case: Case) -> Loss: ...


_RULES: dict[str, type] = {
    cls.name: cls
    for cls in (
        SampledToken,
        LocalSupport,
        FullVocabulary,
        TrustRegion,
        EntropyAware,
        RewardClipped,
        AdvantageGated,
        Imitation,
    )
}


NAMES = tuple(_RULES)


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss per token, and what it needs of a teacher."""

    rule: Any  # a _Rule

    @property
    def name(self) -> str:
        return str(self.rule.name)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.rule.needs_teacher)

    @property
    def k(self) -> int:
        """How many of the teacher's most probable ids a token's scores must hold."""
        return int(self.rule.k)

    @property
    def student_k(self) -> int:
        """At how many of the student's own most probable ids the teacher must be known."""
        return int(getattr(self.rule, "student_k", 0))

    @property
    def needs_full(self) -> bool:
        """Whether it needs the teacher's whole distribution."""
        return bool(getattr(self.rule, "needs_full", False))

    @property
    def needs_entropy(self) -> bool:
        """Whether it needs the teacher's entropy, which a top K does not tell."""
        return bool(getattr(self.rule, "needs_entropy", False))

    @property
    def draws(self) -> bool:
        """Whether its loss is a mean over the draw of the token, so that the sampling law counts:
        policy gradients, the sampled tail, supports that the sampled token joins."""
        rule = self.rule
        return hasattr(rule, "behavior") and (
            not isinstance(rule, LocalSupport) or rule.tail or rule.with_sampled
        )

    @property
    def needs_law(self) -> bool:
        """Whether it needs log-probabilities under the law that drew the tokens."""
        return bool(getattr(self.rule, "behavior", "full") == "sampling")

    def compares_entropies(self, progress: float) -> bool:
        """Whether it needs `Tokens.entropy_floor` when that share of the run is done."""
        return isinstance(self.rule, RewardClipped) and self.rule.compares_entropies(progress)

    def entropy_floor(self, entropy_N: torch.Tensor) -> float:
        """`Tokens.entropy_floor`, from the entropies of all of a task's tokens that take loss in an
        optimizer step."""
        return float(self.rule.entropy_floor(entropy_N))

    @property
    def takes_given(self) -> bool:
        """Whether tokens that the student did not sample may be among the others."""
        return bool(getattr(self.rule, "takes_given", False))

    @property
    def uses_progress(self) -> bool:
        """Whether it changes with the share of the run that is done."""
        return bool(getattr(self.rule, "uses_progress", False))

    def __call__(
        self,
        student: StudentView,
        scores: TeacherScores | None,
        sampled_ids_N: torch.Tensor,
        behaviour_logprobs_N: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        tokens: Tokens | None = None,
    ) -> Loss:
        """(loss [N] to be minimised, unreduced; diagnostics [N], detached).

        sampled_ids_N: int64. behaviour_logprobs_N: log pi_old(y) of the policy that sampled, NaN
        where a token was given instead (an expert's, a teacher's prefix). tokens: see Tokens.

        Raises:
            ValueError: lengths that differ, ids outside the vocabulary, scores that hold less than
            the objective needs.
        """
        case = Case(
            student=student,
            scores=scores,
            ids_N=sampled_ids_N,
            behaviour_N=behaviour_logprobs_N,
            tokens=tokens or Tokens(),
            generator=generator,
        )
        self._check(case)
        loss: Loss = self.rule(case)
        return loss

    def _check(self, case: Case) -> None:
        count, vocabulary = len(case.student), case.student.vocabulary
        given = {
            "sampled ids": case.ids_N,
            "behaviour log-probabilities": case.behaviour_N,
            "teacher scores": case.scores,
            "segments": case.tokens.segments_N,
            "a mask": case.tokens.mask_N,
            "uniform draws": case.tokens.uniforms_N,
            "log-probabilities under the sampling law": case.tokens.law_N,
        }
        for what, value in given.items():
            if value is not None and len(value) != count:
                raise ValueError(
                    f"{self.name}: {what} of {len(value)} tokens for {count} positions"
                )
        if count and (case.ids_N.max() >= vocabulary or case.ids_N.min() < 0):
            outside_N = (case.ids_N >= vocabulary) | (case.ids_N < 0)
            where = int(outside_N.nonzero()[0])
            raise ValueError(
                f"{self.name}: sampled id {int(case.ids_N[where])} of token {where} lies outside"
                f" the student's vocabulary of {vocabulary}: the rollouts' tokenizer is another"
            )
        if max(self.k, self.student_k) > vocabulary:
            raise ValueError(
                f"{self.name}: k={max(self.k, self.student_k)} is larger than the student's"
                f" vocabulary of {vocabulary}: lower objective.k"
            )
        if not self.needs_teacher:
            return
        if case.scores is None:
            raise ValueError(f"{self.name}: it needs a teacher's scores, and got none")
        if case.scores.vocabulary != vocabulary:
            raise ValueError(
                f"{self.name}: the teacher's vocabulary has {case.scores.vocabulary} ids, the"
                f" student's {vocabulary}: cut both to the tokenizer's ids"
            )
        if self.k > case.scores.ids_NK.shape[1]:
            raise ValueError(
                f"{self.name}: k={self.k}, but the teacher's scores hold"
                f" {case.scores.ids_NK.shape[1]} ids a token"
            )
        if not self.takes_given and case.behaviour_N.isnan().any():
            where = int(case.behaviour_N.isnan().nonzero()[0])
            raise ValueError(
                f"{self.name}: token {where} was not sampled by the student (its behaviour"
                " log-probability is NaN): only imitation and trust_region take given tokens"
            )


def build(name: str, **options: Any) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: an unknown name or option (the nearest known one is named), or a value out of
        range.
    """
    if name not in _RULES:
        raise ValueError(unknown("objective", name, _RULES))
    cls = _RULES[name]
    known = inspect.signature(cls).parameters
    kinds = get_type_hints(cls.__init__)  # type: ignore[misc]
    for option, value in options.items():
        if option not in known:
            raise ValueError(unknown(f"option of objective {name!r}:", option, known))
        if not _fits(value, kinds[option]):
            wanted = known[option].annotation
            raise ValueError(f"{name}: {option}={value!r}: it must be of type {wanted}")
        if value != value:  # NaN passes every bound
            raise ValueError(f"{name}: {option}={value!r}: it must be a number")
    return Objective(cls(**options))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type. An int is a float too; a bool is no number."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))
