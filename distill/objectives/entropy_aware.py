"""EOPD: forward KL added to the sampled token's objective where the teacher is undecided."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.divergences import check_k, forward_kl
from tutelage.distill.objectives.policy_gradient import check_clips, surrogate
from tutelage.distill.objectives.tokens import Case, Loss


class EntropyAware:
    """Entropy-aware on-policy distillation (EOPD, arXiv:2603.07079):

        L = L_sampled + 1[H(q) > tau] sum_{TopK q} q log(q / pi)

    L_sampled is the clipped surrogate on R = log q(y) - log pi_old(y), on every token: the forward
    KL is added to it, it does not replace it. H is the teacher's entropy over the whole vocabulary,
    in nats.

    Args:
        tau: nats. k: the teacher's support. clip, dual_clip: PPO's bounds (the paper's: 0.2, none).
    """

    name = "entropy_aware"
    needs_teacher = True
    needs_entropy = True

    def __init__(
        self, k: int = 16, tau: float = 0.8, clip: float = 0.2, dual_clip: float | None = None
    ) -> None:
        check_clips(self.name, clip, dual_clip)
        check_k(self.name, k)
        if tau < 0:
            raise ValueError(f"entropy_aware: tau={tau}: an entropy in nats is never negative")
        self.k, self.tau, self.clip, self.dual_clip = k, tau, clip, dual_clip

    def __call__(self, case: Case) -> Loss:
        loss_N, metrics = surrogate(case, case.reward(), clip=self.clip, dual_clip=self.dual_clip)
        undecided_N = case.teacher.entropy() > self.tau
        added_N = torch.where(undecided_N, forward_kl(case, self.k), 0.0)
        return loss_N + added_N, {"teacher/undecided": undecided_N.float(), **metrics}
