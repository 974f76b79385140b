"""The sampled-token baseline: policy gradient on log q - log pi of the token that was drawn."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.scores import TeacherScores
from tutelage.distill.objectives.students import Student


class SampledToken:
    """PPO surrogate on A = log q(y) - log pi_old(y), detached (Revisiting-OPD, arXiv:2603.25562,
    section 3.1, gamma=0).

    Args:
        clip: PPO's epsilon, both sides.
        dual_clip: a bound on the surrogate where A < 0 (Ye et al. 2020, arXiv:1912.09729); None:
            none.
        reward_clip: clamp A to [-reward_clip, reward_clip]; None: none (the paper's scripts).
    """

    name = "sampled_token"
    needs_teacher = True
    k = 1

    def __init__(
        self,
        clip: float = 0.2,
        dual_clip: float | None = 3.0,
        reward_clip: float | None = None,
        gamma: float = 0.0,
    ) -> None:
        if gamma != 0.0:
            raise ValueError(
                f"sampled_token: gamma={gamma}: only the token-level form, gamma=0, is built"
            )
        if clip <= 0:
            raise ValueError(f"sampled_token: clip={clip}: it must be positive")
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"sampled_token: dual_clip={dual_clip}: it must be above 1, or null")
        if reward_clip is not None and reward_clip <= 0:
            raise ValueError(
                f"sampled_token: reward_clip={reward_clip}: it must be positive, or null"
            )
        self.clip, self.dual_clip, self.reward_clip = clip, dual_clip, reward_clip

    def __call__(
        self,
        student: Student,
        scores: TeacherScores | None,
        sampled_ids_N: torch.Tensor,
        behaviour_logprobs_N: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert scores is not None
        logprobs_N = student.logprobs_at(sampled_ids_N[:, None])[:, 0]
        reward_N = (scores.sampled_N - behaviour_logprobs_N).detach()
        # A token that the teacher finds impossible must stay finite: -inf times a zero gradient
        # would be NaN.
        advantage_N = reward_N.clamp(min=-1e4)
        if self.reward_clip is not None:
            advantage_N = advantage_N.clamp(-self.reward_clip, self.reward_clip)
        ratio_N = (logprobs_N - behaviour_logprobs_N).exp()
        clipped_N = ratio_N.clamp(1 - self.clip, 1 + self.clip)
        loss_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * clipped_N)
        if self.dual_clip is not None:
            bound_N = torch.minimum(loss_N, -advantage_N * self.dual_clip)
            loss_N = torch.where(advantage_N < 0, bound_N, loss_N)
        with torch.no_grad():
            clipped = (-advantage_N * clipped_N > -advantage_N * ratio_N).float()
        return loss_N, {
            "reward/negative_share": (reward_N < 0).float(),
            "ppo/clip_share": clipped,
            "ppo/ratio": ratio_N.detach(),
        }
