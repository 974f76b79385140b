"""REOPOLD: the sampled token's reward with a floor, first on the tokens above it, then on the
undecided ones."""

from __future__ import annotations

import math

import torch

from tutelage.distill.objectives.tokens import Case, Loss


class RewardClipped:
    """Relaxed on-policy distillation (REOPOLD, arXiv:2603.11137). R = log q(y) - log pi_old(y):

        L = -rho max(R, c) M,   rho = pi(y) / pi_old(y)
        M = 1[R >= c]                  up to `switch` of the run: exploration
        M = 1[H(pi) among the highest `share`]      after it: refinement

    The floor is c = log(lam) / (1 - lam), the Jensen bound of log((1 - lam) q/pi + lam); notes on
    the paper also give log(lam / (1 - lam)): `floor` sets c itself. The entropies compared are
    those of one micro-batch. Left out: the division by sum M; the mean outside is over all tokens
    that take loss, so the gradient is smaller by the share that M keeps (logged).

    Args:
        lam: in (0, 1). floor: c, in place of lam's. share: in (0, 1]. switch: in [0, 1].
    """

    name = "reward_clipped"
    needs_teacher = True
    k = 1

    def __init__(
        self,
        lam: float = 0.2,
        floor: float | None = None,
        share: float = 0.2,
        switch: float = 0.5,
    ) -> None:
        if not 0 < lam < 1:
            raise ValueError(f"reward_clipped: lam={lam}: it must lie between 0 and 1")
        if not 0 < share <= 1:
            raise ValueError(f"reward_clipped: share={share}: it must be in (0, 1]")
        if not 0 <= switch <= 1:
            raise ValueError(f"reward_clipped: switch={switch}: it must be between 0 and 1")
        self.floor = math.log(lam) / (1 - lam) if floor is None else floor
        self.share, self.switch = share, switch
        self.uses_progress = switch > 0

    def __call__(self, case: Case) -> Loss:
        reward_N = case.reward()
        if case.tokens.progress < self.switch:
            kept_N = reward_N >= self.floor
        else:
            entropy_N, counted_N = case.student.entropy(), case.unmasked()
            kept_N = torch.zeros_like(counted_N)
            if counted_N.any():
                kept_N = entropy_N >= entropy_N[counted_N].quantile(1 - self.share)
        ratio_N = (case.student_logprobs() - case.behaviour_N).exp()
        loss_N = torch.where(kept_N, -ratio_N * reward_N.clamp(min=self.floor), 0.0)
        return loss_N, {"reward/kept": kept_N.float()}
