"""What an objective knows of N tokens: the student, its teacher's scores, how they were sampled,
which of them take loss.

Letters: N tokens, K support size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.students import StudentView
from tutelage.envs.names import unknown

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Loss per token [N], unreduced, and per-token diagnostics [N], detached."""

IMPOSSIBLE = -1e4
"""Log-probability of what a teacher rules out. Finite, so that 0 log 0 is 0 and a sampled token
that the teacher finds impossible is a large loss instead of a NaN; its exponential is 0."""

BEHAVIORS = ("full", "sampling")
"""From which distribution an objective takes its tokens to be sampled: the whole policy, or the
policy under the recorded sampling parameters."""


def check_behavior(objective: str, behavior: str) -> None:
    """Raises ValueError for an unknown behavior, naming the nearest."""
    if behavior not in BEHAVIORS:
        raise ValueError(unknown(f"{objective} behavior", behavior, BEHAVIORS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a batch knows of its tokens beside their ids. Every field has a plain default.

    segments_N: int64; tokens of one number, which stand together and in order, are one reply: a
    return-to-go stays inside it. None: all N are one reply.
    mask_N: True where the token takes loss; elsewhere it earns no reward either. None: everywhere.
    uniforms_N: the draw in [0, 1) that decides TrOPD's trust mask, so that it does not depend on
    the batch. None: drawn from the call's generator.
    sampling_logprobs_N: log-probability of the token under the sampling parameters, after
    temperature and top-p; NaN for off-policy tokens. None: unknown, which `behavior: sampling`
    refuses.
    advantage_N: how much better the token was than expected, by a reward. None: unknown.
    entropy_floor: the student's entropy, in nats, from which on a token is among the most undecided
    of its update (REOPOLD). None: computed from this call's tokens.
    progress: how much of the run is done, 0 to 1.
    """

    segments_N: torch.Tensor | None = None
    mask_N: torch.Tensor | None = None
    uniforms_N: torch.Tensor | None = None
    sampling_logprobs_N: torch.Tensor | None = None
    advantage_N: torch.Tensor | None = None
    entropy_floor: float | None = None
    progress: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that a loss may use. `behavior_logprobs_N` is NaN for off-policy tokens."""

    student: StudentView
    scores: TeacherScores | None
    ids_N: torch.Tensor
    behavior_logprobs_N: torch.Tensor
    tokens: Tokens
    generator: torch.Generator | None

    @property
    def teacher(self) -> TeacherScores:
        """The scores of an objective that needs them."""
        assert self.scores is not None
        return self.scores

    def student_logprobs(self) -> torch.Tensor:
        """log pi(y) of each token [N], differentiable."""
        return self.student.logprobs_at(self.ids_N[:, None])[:, 0]

    def teacher_logprobs(self) -> torch.Tensor:
        """log q(y) of each token [N], at least IMPOSSIBLE."""
        return self.teacher.sampled_N.clamp(min=IMPOSSIBLE)

    def reward(self) -> torch.Tensor:
        """R = log q(y) - log pi_old(y) [N], detached: Revisiting-OPD's -r_t, TrOPD's K1. Both are
        log-probabilities at temperature 1 over the whole vocabulary, however y was sampled; for
        that `importance` corrects. pi_old stays the policy that sampled, through the minibatches of
        an update and under max_staleness, as in PPO's advantages; the ratio pi / pi_old corrects
        for what the student has learned since."""
        return (self.teacher_logprobs() - self.behavior_logprobs_N).detach()

    def importance(self, behavior: str) -> torch.Tensor | None:
        """The importance weight w = pi_old(y) / mu(y) [N]. mu is what the tokens were sampled from:
        the behavior policy pi_old after temperature and top-p. w turns a mean over y ~ mu into one
        over y ~ pi_old:

            E_mu[ w f(y) ] = sum_{y: mu(y) > 0} pi_old(y) f(y)

        Exact at any temperature above 0; under top-p the sum lacks the tokens that mu cuts off. 1
        for off-policy tokens. None: behavior is full, which treats the tokens as sampled from
        pi_old, at temperature 1 and top-p 1, as the papers' codes do.

        PPO's clips stay on pi / pi_old, which is 1 on policy, and w multiplies the clipped loss: a
        clip of pi / mu would cut tokens that no update has moved yet (the decoupled objective of
        Hilton et al. 2022, arXiv:2110.00641).
        """
        if behavior == "full":
            return None
        if self.tokens.sampling_logprobs_N is None:
            raise ValueError(
                "behavior='sampling' needs the tokens' log-probabilities under the sampling"
                " parameters, and got none: give tokens=Tokens(sampling_logprobs_N=...), or"
                " behavior='full'"
            )
        sampling_logprobs_N = self.tokens.sampling_logprobs_N
        unknown_N = (
            sampling_logprobs_N.isnan() & ~self.behavior_logprobs_N.isnan() & self.unmasked()
        )
        if unknown_N.any():
            where = int(unknown_N.nonzero()[0])
            raise ValueError(
                f"behavior='sampling': the log-probability of token {where} under the sampling"
                " parameters is not known: its rollout was recorded by an engine, or a version,"
                " that did not tell it"
            )
        # NaN is left for off-policy tokens, whose weight is 1, and for masked ones, which count 0.
        return (self.behavior_logprobs_N - sampling_logprobs_N).exp().nan_to_num(nan=1.0).detach()

    def unmasked(self) -> torch.Tensor:
        """[N] bool, True where the token takes loss."""
        if self.tokens.mask_N is None:
            return torch.ones_like(self.ids_N, dtype=torch.bool)
        return self.tokens.mask_N

    def uniforms(self) -> torch.Tensor:
        """One number in [0, 1) a token."""
        if self.tokens.uniforms_N is not None:
            return self.tokens.uniforms_N
        return torch.rand(len(self.ids_N), generator=self.generator, device=self.ids_N.device)


class Rule(Protocol):
    """A loss: what it needs, and from a case a loss per token."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def __call__(self, case: Case) -> Loss: ...
