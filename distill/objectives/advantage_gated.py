"""AOPD: forward KL where the sampled token's advantage is not positive, else policy gradient."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.divergences import check_k, forward_kl
from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.policy_gradient import check_clips, surrogate, weighted
from tutelage.distill.objectives.tokens import Case, Loss, check_behavior


class AdvantageGated:
    """Advantage-gated on-policy distillation (AOPD, arXiv:2605.06387). With pi_old the behavior
    policy and A = log q(y) - log pi_old(y), detached:

        L = G sum_{TopK q} q log(q / pi) + (1 - G) L_sampled,   G = 1[q(y) - pi_old(y) <= tau]

    tau = 0 is A <= 0; tau = -1 never opens the gate (the sampled-token objective), tau = 1 always
    opens it (forward KL).

    Args:
        k: the teacher's support (the paper's is not known). tau: a difference of probabilities.
        clip, dual_clip: PPO's bounds.
        behavior: see `Case.importance`; sampling weighs both sides of the gate, because which side
            a position is on depends on the sampled token.
    """

    name = "advantage_gated"

    def __init__(
        self,
        k: int = 32,
        tau: float = 0.0,
        clip: float = 0.2,
        dual_clip: float | None = 3.0,
        behavior: str = "full",
    ) -> None:
        check_behavior(self.name, behavior)
        check_clips(self.name, clip, dual_clip)
        check_k(self.name, k)
        if not -1 <= tau <= 1:
            raise ValueError(f"advantage_gated: tau={tau}: it must be between -1 and 1")
        self.k, self.tau, self.clip, self.dual_clip = k, tau, clip, dual_clip
        self.behavior = behavior
        self.needs = Needs(k=k, draws=True, sampling=behavior == "sampling")

    def __call__(self, case: Case) -> Loss:
        # Has the sign of A, but lies in [-1, 1]: hence tau's bounds.
        gap_N = case.teacher_logprobs().exp() - case.behavior_logprobs_N.exp()
        # tau = -1 turns the gate off, although the gap itself reaches -1: where the student is
        # certain of a token that the teacher excludes.
        gated_N = (gap_N <= self.tau) & (self.tau > -1)
        loss_N, metrics = surrogate(case, case.reward(), clip=self.clip, dual_clip=self.dual_clip)
        loss_N = torch.where(gated_N, forward_kl(case, self.k), loss_N)
        metrics = {"gate/share": gated_N.float(), **metrics}
        return weighted(loss_N, metrics, case.importance(self.behavior))
