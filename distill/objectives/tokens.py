"""What an objective is told of N tokens: the student, its teacher's scores, the draw, the masks.

Letters: N tokens, K support size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.students import Student

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Loss per token [N], unreduced, and per-token diagnostics [N], detached."""

IMPOSSIBLE = -1e4
"""Log-probability of what a teacher rules out. Finite, so that 0 log 0 is 0 and a sampled token
that the teacher finds impossible is a large loss instead of a NaN; its exponential is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a batch knows of its tokens beside their ids. Every field has a plain default.

    segments_N: int64; tokens of one number, which stand together and in order, are one reply: a
    return-to-go stays inside it. None: all N are one reply.
    mask_N: True where the token takes loss; elsewhere its cost counts for nothing either. None:
    everywhere.
    uniforms_N: the draw in [0, 1) that decides TrOPD's trust mask, so that a token's fate does not
    hang on its batch. None: drawn from the call's generator.
    progress: how much of the run is done, 0 to 1.
    """

    segments_N: torch.Tensor | None = None
    mask_N: torch.Tensor | None = None
    uniforms_N: torch.Tensor | None = None
    progress: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that a loss may use. `behaviour_N` is NaN where the student did not sample the token."""

    student: Student
    scores: TeacherScores | None
    ids_N: torch.Tensor
    behaviour_N: torch.Tensor
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
        """R = log q(y) - log pi_old(y) [N], detached: Revisiting-OPD's -r_t, TrOPD's K1."""
        return (self.teacher_logprobs() - self.behaviour_N).detach()

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
