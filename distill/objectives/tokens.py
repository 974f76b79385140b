"""What an objective is told of N tokens: the student, its teacher's scores, the draw, the masks.

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
"""By which law an objective takes its tokens for drawn: the whole policy's, or the recorded one."""


def check_behavior(objective: str, behavior: str) -> None:
    """Raises ValueError for a behavior that is none, naming the nearest."""
    if behavior not in BEHAVIORS:
        raise ValueError(unknown(f"{objective} behavior", behavior, BEHAVIORS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a batch knows of its tokens beside their ids. Every field has a plain default.

    segments_N: int64; tokens of one number, which stand together and in order, are one reply: a
    return-to-go stays inside it. None: all N are one reply.
    mask_N: True where the token takes loss; elsewhere its cost counts for nothing either. None:
    everywhere.
    uniforms_N: the draw in [0, 1) that decides TrOPD's trust mask, so that a token's fate does not
    hang on its batch. None: drawn from the call's generator.
    law_N: log-probability of the token under the law that drew it, after temperature and top-p;
    NaN where none was drawn. None: nobody said, which `behavior: sampling` refuses.
    advantage_N: how much better the token was than expected, by a reward. None: nobody said.
    entropy_floor: the student's entropy, in nats, from which on a token is among the most undecided
    of its update (REOPOLD). None: of this call's tokens.
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
    """All that a loss may use. `behaviour_N` is NaN where the student did not sample the token."""

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
        the whole laws', whatever drew y: which y are met is `drawn`'s to mend. pi_old stays that of
        the weights that played, through the minibatches of an update and under max_staleness, as
        PPO's advantages do; the ratio pi / pi_old corrects for the rest."""
        return (self.teacher_logprobs() - self.behavior_logprobs_N).detach()

    def drawn(self, behavior: str) -> torch.Tensor | None:
        """w = pi_old(y) / mu(y) [N], by which a mean over y ~ mu, the law that drew the tokens
        (temperature, top-p), becomes one over y ~ pi_old:

            E_mu[ w f(y) ] = sum_{y: mu(y) > 0} pi_old(y) f(y)

        Exact for a law that cuts nothing (any temperature); under top-p what is never drawn is
        missing, its sum over the cut tail. 1 where a token was given. None: behavior is full, which
        takes mu for pi_old, as the papers' codes do.

        PPO's clips stay on pi / pi_old, which is 1 on policy, and w multiplies what they leave: a
        clip of pi / mu would cut tokens that no update has moved yet (the decoupled objective of
        Hilton et al. 2022, arXiv:2110.00641).
        """
        if behavior == "full":
            return None
        if self.tokens.sampling_logprobs_N is None:
            raise ValueError(
                "behavior='sampling' needs the tokens' log-probabilities under the law that drew"
                " them, and got none: give tokens=Tokens(law_N=...), or behavior='full'"
            )
        sampling_logprobs_N = self.tokens.sampling_logprobs_N
        unsaid_N = sampling_logprobs_N.isnan() & ~self.behavior_logprobs_N.isnan() & self.unmasked()
        if unsaid_N.any():
            where = int(unsaid_N.nonzero()[0])
            raise ValueError(
                f"behavior='sampling': the sampling law's log-probability of token {where} is not"
                " known: its rollout was recorded by an engine, or a version, that did not say"
            )
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
