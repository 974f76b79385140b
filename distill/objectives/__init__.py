"""Objectives: small functions from (student, teacher scores, tokens) to a loss per token.

    objective = build("local_support", k=32)
    scores = TeacherScores.from_logits(teacher_logits_NV, sampled_ids_N, k=32)
    student = DenseStudent(student_logits_NV)
    loss_N, metrics = objective(student, scores, sampled_ids_N, behaviour_logprobs_N)

    both = weighted_sum([(1.0, objective), (0.1, build("sampled_token"))])

loss_N is unreduced and minimised; masks and averages are applied outside, in one place
(student/learner.py). Every log-probability is a natural log over the full vocabulary at temperature
1. `metrics` holds per-token diagnostics [N], detached.

Some losses are means over the sampled token (`Needs.draws`). With `behavior="full"`, the default
and what the papers' codes do, they treat it as drawn from the whole policy, whatever temperature
and top-p drew it; with `behavior="sampling"` they weigh it (`Case.importance`).

One file is one loss: a class whose options are its `__init__`'s and whose `__call__` reads as the
paper does. The call's arguments and their checks, common to all, are `Objective`, here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch

from tutelage.distill.objectives.advantage_gated import AdvantageGated
from tutelage.distill.objectives.entropy_aware import EntropyAware
from tutelage.distill.objectives.full_vocabulary import FullVocabulary
from tutelage.distill.objectives.imitation import Imitation
from tutelage.distill.objectives.local_support import LocalSupport
from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.reward_clipped import RewardClipped, entropy_floor
from tutelage.distill.objectives.sampled_token import SampledToken
from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.sparse import SparseStudent
from tutelage.distill.objectives.students import DenseStudent, StudentView
from tutelage.distill.objectives.sums import Sum
from tutelage.distill.objectives.tokens import Case, Loss, Rule, Tokens
from tutelage.distill.objectives.trust_region import TrustRegion
from tutelage.envs.names import unknown

__all__ = [
    "DenseStudent",
    "Needs",
    "Objective",
    "Rule",
    "SparseStudent",
    "StudentView",
    "TeacherScores",
    "Tokens",
    "build",
    "options_of",
    "weighted_sum",
]


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
    """A loss per token, and what it needs."""

    rule: Rule

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def needs(self) -> Needs:
        return self.rule.needs

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Its own rule, or the rules of a sum."""
        if isinstance(self.rule, Sum):
            return tuple(rule for _, rule in self.rule.terms)
        return (self.rule,)

    def compares_entropies(self, progress: float) -> bool:
        """Whether it needs `Tokens.entropy_floor` at that progress of the run, 0 to 1."""
        return self.needs.undecided is not None and progress >= self.needs.undecided_from

    def entropy_floor(self, entropy_N: torch.Tensor) -> float:
        """`Tokens.entropy_floor`, from the entropies of all of a task's tokens that take loss in an
        optimizer step."""
        assert self.needs.undecided is not None
        return entropy_floor(entropy_N, self.needs.undecided)

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

        sampled_ids_N: int64. behaviour_logprobs_N: log pi_old(y), the behavior policy's; NaN for an
        off-policy token (an expert's, a teacher's prefix). tokens: see Tokens.

        Raises:
            ValueError: lengths that differ, ids outside the vocabulary, scores that hold less than
            the objective needs.
        """
        case = Case(
            student=student,
            scores=scores,
            ids_N=sampled_ids_N,
            behavior_logprobs_N=behaviour_logprobs_N,
            tokens=tokens or Tokens(),
            generator=generator,
        )
        self._check(case)
        self._check_tokens(case)
        return self.rule(case)

    def _check(self, case: Case) -> None:
        needs, count, vocabulary = self.needs, len(case.student), case.student.vocabulary
        arguments = {
            "sampled ids": case.ids_N,
            "behavior log-probabilities": case.behavior_logprobs_N,
            "teacher scores": case.scores,
            "segments": case.tokens.segments_N,
            "a mask": case.tokens.mask_N,
            "uniform draws": case.tokens.uniforms_N,
            "log-probabilities under the sampling parameters": case.tokens.sampling_logprobs_N,
            "advantages": case.tokens.advantage_N,
        }
        for what, value in arguments.items():
            if value is not None and len(value) != count:
                raise ValueError(
                    f"{self.name}: {what} of {len(value)} tokens for {count} positions"
                )
        # Later torch's topk would say `selected index k out of range`, and name no key.
        if needs.width > vocabulary:
            raise ValueError(
                f"{self.name}: k={needs.width} is larger than the student's"
                f" vocabulary of {vocabulary}: lower objective.k"
            )
        if needs.advantage and case.tokens.advantage_N is None:
            raise ValueError(f"{self.name}: it needs an advantage of each token, and got none")
        if not needs.teacher:
            return
        if case.scores is None:
            raise ValueError(f"{self.name}: it needs a teacher's scores, and got none")
        if case.scores.vocabulary != vocabulary:
            raise ValueError(
                f"{self.name}: the teacher's vocabulary has {case.scores.vocabulary} ids, the"
                f" student's {vocabulary}: cut both to the tokenizer's ids"
            )
        if needs.k > case.scores.ids_NK.shape[1]:
            raise ValueError(
                f"{self.name}: k={needs.k}, but the teacher's scores hold"
                f" {case.scores.ids_NK.shape[1]} ids a token"
            )

    def _check_tokens(self, case: Case) -> None:
        """Refuse tokens that the objective cannot take: one look at the device where all are fine.

        Raises:
            ValueError: names the first of them.
        """
        # An id outside ends a GPU process in a device-side assert that names nothing.
        outside_N = (case.ids_N < 0) | (case.ids_N >= case.student.vocabulary)
        # Else the NaN would spread through the ratio pi / pi_old into the whole gradient.
        takes = self.needs.given or not self.needs.teacher
        given_N = torch.zeros_like(outside_N) if takes else case.behavior_logprobs_N.isnan()
        if not (outside_N | given_N).any():
            return
        if outside_N.any():
            where = int(outside_N.nonzero()[0])
            raise ValueError(
                f"{self.name}: sampled id {int(case.ids_N[where])} of token {where} lies outside"
                f" the student's vocabulary of {case.student.vocabulary}: the rollouts' tokenizer"
                " is another"
            )
        raise ValueError(
            f"{self.name}: token {int(given_N.nonzero()[0])} was not sampled by the student (its"
            " behavior log-probability is NaN): only imitation and trust_region take off-policy"
            " tokens"
        )


def options_of(name: str) -> Mapping[str, inspect.Parameter]:
    """The options of the objective of that name, with their defaults."""
    return inspect.signature(_RULES[name]).parameters


def build(name: str, **options: Any) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: an unknown name or option (the nearest known one is named), or a value out of
        range.
    """
    if name not in _RULES:
        raise ValueError(unknown("objective", name, _RULES))
    cls = _RULES[name]
    known = options_of(name)
    # Annotations are strings here (`from __future__ import annotations`): resolved to compare.
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


def weighted_sum(terms: Sequence[tuple[float, Objective]]) -> Objective:
    """One objective of several, each with its weight. A single one of weight 1 is itself.

    Raises:
        ValueError: there is none, one is there twice, a weight is not positive, or one learns from
        an expert's tokens and another from the student's.
    """
    added = Sum([(weight, one.rule) for weight, one in terms])  # in any case: it checks the terms
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Objective(added)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type. An int is a float too; a bool is no number."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):  # to Python True is an int: k=True would be a support of one
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))
