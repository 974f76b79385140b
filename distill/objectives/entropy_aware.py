"""EOPD: forward KL added to the sampled token's objective where the teacher is undecided."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.divergences import check_k, forward_kl
from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.policy_gradient import check_clips, surrogate
from tutelage.distill.objectives.tokens import Case, Loss, check_behavior


class EntropyAware:
    """Entropy-aware on-policy distillation (EOPD, arXiv:2603.07079), pi_old the behavior policy:

        L = L_sampled + 1[H(q) > tau] sum_{TopK q} q log(q / pi)

    L_sampled is the clipped surrogate on R = log q(y) - log pi_old(y), on every token: the forward
    KL is added to it, it does not replace it. H is the teacher's entropy over the whole vocabulary,
    in nats.

    As the formula stands, q is the whole vocabulary's. The authors' actor takes the log-softmax of
    the teacher's K logits, q^ = q / sum_{TopK} q, against pi of the whole vocabulary (so their
    README; their code's default cuts that too): `renormalize`. The gradient of a gated token is
    then larger by 1 / sum_{TopK} q, 1.01 to 1.25 at K = 16, and points the same way.

    Args:
        tau: nats. k: the teacher's support. clip, dual_clip: PPO's bounds (the paper's: 0.2, none).
        renormalize: False: the paper's formula. True: the authors' code.
        behavior: see `Case.importance`. The forward KL is the same whatever token was sampled, so
            it takes no weight.
    """

    name = "entropy_aware"

    def __init__(
        self,
        # k and tau: the paper's. tau is a bound in nats, not a share of the tokens as in REOPOLD.
        k: int = 16,
        tau: float = 0.8,
        clip: float = 0.2,
        dual_clip: float | None = None,
        renormalize: bool = False,
        behavior: str = "full",
    ) -> None:
        check_behavior(self.name, behavior)
        check_clips(self.name, clip, dual_clip)
        check_k(self.name, k)
        if tau < 0:
            raise ValueError(f"entropy_aware: tau={tau}: an entropy in nats is never negative")
        self.k, self.tau, self.clip, self.dual_clip = k, tau, clip, dual_clip
        self.renormalize, self.behavior = renormalize, behavior
        self.needs = Needs(k=k, entropy=True, draws=True, sampling=behavior == "sampling")

    def __call__(self, case: Case) -> Loss:
        loss_N, metrics = surrogate(
            case,
            case.reward(),
            clip=self.clip,
            dual_clip=self.dual_clip,
            weight_N=case.importance(self.behavior),
        )
        undecided_N = case.teacher.entropy() > self.tau
        forward_N = forward_kl(case, self.k, renormalize=self.renormalize)
        # Added on top of the surrogate, not in its place: the paper's loss is no switch.
        added_N = torch.where(undecided_N, forward_N, 0.0)
        return loss_N + added_N, {"teacher/undecided": undecided_N.float(), **metrics}
