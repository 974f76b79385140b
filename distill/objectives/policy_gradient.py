"""Policy gradients on a detached advantage: the clipped surrogate, and returns inside a reply.

Letters: N tokens, S segments, L longest segment.
"""

from __future__ import annotations

import torch

from tutelage.distill.objectives.tokens import Case, Loss


def check_clips(objective: str, clip: float, dual_clip: float | None) -> None:
    """Raises ValueError for bounds out of range."""
    if clip <= 0:
        raise ValueError(f"{objective}: clip={clip}: it must be positive")
    # c > 1 in the paper: else even on-policy tokens, whose ratio is 1, would reach the bound.
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"{objective}: dual_clip={dual_clip}: it must be above 1, or null")


def surrogate(
    case: Case,
    advantage_N: torch.Tensor,
    *,
    clip: float,
    dual_clip: float | None,
    weight_N: torch.Tensor | None = None,
) -> Loss:
    """PPO's clipped surrogate to minimise (Schulman et al. 2017, arXiv:1707.06347, equation 7):

        max(-A rho, -A clip(rho, 1 - e, 1 + e)),  rho = pi(y) / pi_old(y)

    pi_old the behavior policy; where A < 0, at most -A dual_clip (Ye et al. 2020, arXiv:1912.09729,
    equation 5). weight_N: `Case.importance`, outside the clips.
    """
    # 1 in value on policy, but with a gradient: without the ratio there would be nothing to descend
    ratio_N = (case.student_logprobs() - case.behavior_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip)
    loss_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * clipped_N)
    if dual_clip is not None:
        # Where A < 0 the maximum above has no upper bound: a large ratio would move the policy far.
        bound_N = torch.minimum(loss_N, -advantage_N * dual_clip)
        loss_N = torch.where(advantage_N < 0, bound_N, loss_N)
    with torch.no_grad():
        clipped = (-advantage_N * clipped_N > -advantage_N * ratio_N).float()
    metrics = {"ppo/clip_share": clipped, "ppo/ratio": ratio_N.detach()}
    return weighted(loss_N, metrics, weight_N)


def weighted(
    loss_N: torch.Tensor, metrics: dict[str, torch.Tensor], weight_N: torch.Tensor | None
) -> Loss:
    """A loss that is a mean over sampled tokens, times `Case.importance`; None: unchanged. The mean
    of `behavior/weight` is the share of the policy's mass that temperature and top-p leave."""
    if weight_N is None:
        return loss_N, metrics
    return weight_N * loss_N, metrics | {"behavior/weight": weight_N}


def returns_to_go(
    values_N: torch.Tensor,
    segments_N: torch.Tensor | None,
    *,
    gamma: float,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_{t' >= t} gamma^(t' - t) values_t' inside each segment [N] (Revisiting-OPD, section 3.1).

    gamma = 0 gives the values back, gamma = 1 the reverse cumulative sum. weights_N: importance
    weights w, which correct the tokens that follow for the distribution they were sampled from
    (per-decision importance sampling, Precup et al. 2000): A_t = values_t + gamma w_{t+1} A_{t+1}.
    """
    if gamma == 0 or not len(values_N):
        return values_N
    if segments_N is None:
        segments_N = torch.zeros_like(values_N, dtype=torch.long)
    # One row a segment: the loop below then runs over positions, for all segments at once.
    _, row_N, counts_S = segments_N.unique_consecutive(return_inverse=True, return_counts=True)
    starts_S = counts_S.cumsum(0) - counts_S
    column_N = torch.arange(len(values_N), device=values_N.device) - starts_S[row_N]
    padded_SL = values_N.new_zeros(len(counts_S), int(counts_S.max()))
    padded_SL[row_N, column_N] = values_N
    factors_SL = torch.full_like(padded_SL, gamma)
    if weights_N is not None:
        factors_SL[row_N, column_N] *= weights_N
    run_S = padded_SL.new_zeros(len(counts_S))  # gamma w_{t+1} A_{t+1}; padding adds zeros to it
    for at in reversed(range(padded_SL.shape[1])):
        padded_SL[:, at] += run_S
        run_S = factors_SL[:, at] * padded_SL[:, at]
    return padded_SL[row_N, column_N]
