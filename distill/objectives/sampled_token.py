"""The sampled-token baseline: policy gradient on log q - log pi of the sampled token."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.policy_gradient import check_clips, returns_to_go, surrogate
from tutelage.distill.objectives.tokens import Case, Loss, check_behavior


class SampledToken:
    """PPO surrogate on the discounted return of R = log q(y) - log pi_old(y), detached
    (Revisiting-OPD, arXiv:2603.25562, section 3.1), pi_old the behavior policy:

        A_t = sum_{t' >= t} gamma^(t' - t) R_t'     inside one reply

    gamma = 0 is the token-level estimator. gamma = 1 is the causal sequence-level one: unbiased for
    the reverse KL of whole replies, but its variance grows much faster with their length. A token
    outside the mask earns no reward, so that a masked special token does not change the returns of
    those before it (the authors' code masks the loss alone).

    Args:
        clip, dual_clip: PPO's bounds; dual_clip=None: none.
        reward_clip: clamp R to [-reward_clip, reward_clip]; None: none (the paper's scripts).
        gamma: discount, 0 to 1.
        behavior: see `Case.importance`; sampling weighs each token and, in its return, those that
            follow it; its prefix is taken as it was sampled.
    """

    name = "sampled_token"

    def __init__(
        self,
        # Both bounds are those of the authors' PPO code.
        clip: float = 0.2,
        dual_clip: float | None = 3.0,
        reward_clip: float | None = None,
        gamma: float = 0.0,
        behavior: str = "full",
    ) -> None:
        check_behavior(self.name, behavior)
        check_clips(self.name, clip, dual_clip)
        if not 0 <= gamma <= 1:
            raise ValueError(f"sampled_token: gamma={gamma}: it must be between 0 and 1")
        if reward_clip is not None and reward_clip <= 0:
            raise ValueError(
                f"sampled_token: reward_clip={reward_clip}: it must be positive, or null"
            )
        self.clip, self.dual_clip, self.reward_clip = clip, dual_clip, reward_clip
        self.gamma, self.behavior = gamma, behavior
        self.needs = Needs(k=1, draws=True, sampling=behavior == "sampling")

    def __call__(self, case: Case) -> Loss:
        reward_N = case.reward()
        if self.reward_clip is not None:
            reward_N = reward_N.clamp(-self.reward_clip, self.reward_clip)
        reward_N = torch.where(case.unmasked(), reward_N, 0.0)
        weight_N = case.importance(self.behavior)
        advantage_N = returns_to_go(
            reward_N, case.tokens.segments_N, gamma=self.gamma, weights_N=weight_N
        )
        return surrogate(
            case, advantage_N, clip=self.clip, dual_clip=self.dual_clip, weight_N=weight_N
        )
