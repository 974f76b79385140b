"""REOPOLD: the sampled token's reward with a floor; first on the tokens whose reward is above it,
later on those where the student is undecided."""

from __future__ import annotations

import math

import numpy as np
import torch

from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.policy_gradient import weighted
from tutelage.distill.objectives.tokens import Case, Loss, check_behavior

ALIKE = 1e-4
"""Nats by which entropies of the same state may differ by rounding, which depends on the batch."""


def entropy_floor(entropy_N: torch.Tensor, share: float) -> float:
    """The entropy from which on a token is among the highest `share` of those that take loss.
    Tokens in the same state fall on the same side, though their entropies differ by rounding."""
    # numpy's, in float64: torch.quantile refuses more than 16 million numbers
    return float(np.quantile(entropy_N.double().cpu().numpy(), 1 - share)) - ALIKE


class RewardClipped:
    """Relaxed on-policy distillation (REOPOLD, arXiv:2603.11137). With pi_old the behavior policy
    and R = log q(y) - log pi_old(y):

        L = -rho max(R, c) M,   rho = pi(y) / pi_old(y)
        M = 1[R >= c]                  up to `switch` of the run: exploration
        M = 1[H(pi) among the highest `share`]      after it: refinement

    The floor is c = log(lam) / (1 - lam), the Jensen bound of log((1 - lam) q/pi + lam); notes on
    the paper also give log(lam / (1 - lam)): `floor` sets c itself. The entropies compared are
    those of all of the task's tokens that take loss in one optimizer step, whatever micro-batches
    and processes they are in (`Tokens.entropy_floor`). Left out: the division by sum M. The learner
    divides by all tokens that take loss, so the gradient is smaller by the share that M keeps,
    which is logged as reward/kept.

    Args:
        lam: in (0, 1). floor: c, in place of lam's. share: in (0, 1]. switch: in [0, 1].
        behavior: see `Case.importance`.
    """

    name = "reward_clipped"

    def __init__(
        self,
        lam: float = 0.2,
        floor: float | None = None,
        share: float = 0.2,
        switch: float = 0.5,
        behavior: str = "full",
    ) -> None:
        check_behavior(self.name, behavior)
        if not 0 < lam < 1:
            raise ValueError(f"reward_clipped: lam={lam}: it must lie between 0 and 1")
        if not 0 < share <= 1:
            raise ValueError(f"reward_clipped: share={share}: it must be in (0, 1]")
        if not 0 <= switch <= 1:
            raise ValueError(f"reward_clipped: switch={switch}: it must be between 0 and 1")
        self.floor = math.log(lam) / (1 - lam) if floor is None else floor
        self.share, self.switch, self.behavior = share, switch, behavior
        self.needs = Needs(
            k=1,
            draws=True,
            sampling=behavior == "sampling",
            # With switch 0 there is one phase only, and a resumed run may have more steps.
            progress=switch > 0,
            undecided=share,
            undecided_from=switch,
        )

    def __call__(self, case: Case) -> Loss:
        reward_N = case.reward()
        if case.tokens.progress < self.switch:
            kept_N = reward_N >= self.floor
        else:
            kept_N = self._undecided(case)
        ratio_N = (case.student_logprobs() - case.behavior_logprobs_N).exp()
        loss_N = torch.where(kept_N, -ratio_N * reward_N.clamp(min=self.floor), 0.0)
        return weighted(loss_N, {"reward/kept": kept_N.float()}, case.importance(self.behavior))

    def _undecided(self, case: Case) -> torch.Tensor:
        entropy_N, counted_N = case.student.entropy(), case.unmasked()
        floor = case.tokens.entropy_floor
        if floor is None:  # called without a learner: this call's tokens are all that is known
            # a quantile of no numbers is an error in numpy
            floor = entropy_floor(entropy_N[counted_N], self.share) if counted_N.any() else math.inf
        return entropy_N >= floor
