"""Numbers that tell how a distillation goes, per token; the learner averages them.

Cheap ones come from what was recorded when the tokens were sampled and scored. Costly ones need
the student's distribution over the whole vocabulary.

Letters: N tokens, K support size, M metrics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from tutelage.distill.objectives import StudentView, TeacherScores
from tutelage.distill.objectives.tokens import IMPOSSIBLE

BUCKETS = (0, 4, 16, 64, 256, 1024, 2048, 4096, 8192)
"""First response positions of the buckets that gaps are averaged in."""


class Meter:
    """Weighted means of per-token values, over any number of batches.

    What it is given is summed where it is, and read when somebody asks: each look at a number on a
    GPU waits for all that the GPU has been given to do.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)
        self._unread: list[tuple[tuple[str, ...], torch.Tensor]] = []  # names, their sums [2, M]

    def add(
        self,
        values: Mapping[str, torch.Tensor],
        weights: torch.Tensor,
        where_N: torch.Tensor | None = None,
    ) -> None:
        """Count `values` [N] by weight, where `where_N` is true. weights: [N], or [M, N] with a
        line for each of the M values."""
        if where_N is not None:
            weights = torch.where(where_N, weights, 0.0)
        values_MN = torch.stack([*values.values()])
        # Where the weight is 0 the value must not count even if it is infinite.
        weighted_MN = torch.where(weights > 0, values_MN, 0.0) * weights
        sums_2M = torch.stack([weighted_MN, weights.expand_as(values_MN)]).sum(-1)
        self._unread.append((tuple(values), sums_2M))

    def sums(self, name: str) -> tuple[float, float]:
        """(the sum of the weighted values, the sum of their weights) so far."""
        self._read()
        return self._sums.get(name, 0.0), self._weights.get(name, 0.0)

    def merge(self, other: Meter) -> None:
        """Add all that another meter has counted."""
        self._read()
        other._read()
        for name in other._sums:
            # Sums, not means: ranks have different numbers of tokens.
            self._sums[name] += other._sums[name]
            self._weights[name] += other._weights[name]

    def means(self) -> dict[str, float]:
        """The mean of each name over the tokens that it was counted on."""
        self._read()
        return {name: self._sums[name] / self._weights[name] for name in self._sums}

    def _read(self) -> None:
        """Add up what was given since the last time, all of it in one look at the device."""
        if not self._unread:
            return
        names = [name for own, _ in self._unread for name in own]
        sums, weights = torch.cat([sums_2M for _, sums_2M in self._unread], dim=1).tolist()
        self._unread = []
        for name, value, weight in zip(names, sums, weights, strict=True):
            if weight > 0:  # where no token counts, a key would make `means` divide by zero
                self._sums[name] += value
                self._weights[name] += weight

    def __getstate__(self) -> dict[str, Any]:
        self._read()  # another process has no use for this one's device
        return self.__dict__


def recorded(scores: TeacherScores, behavior_logprobs_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """The teacher against the behavior policy pi_old, on sampled tokens. Elsewhere pi_old is NaN,
    and so are these: the caller leaves off-policy tokens out.

    Their means estimate a divergence only where the tokens were sampled at temperature 1 and top-p
    1. Otherwise they are means over the tokens that the student's sampling produces, which is what
    the schedule `gap` compares.

    gap/mean: log q(y) - log pi_old(y); its mean over y ~ pi_old is minus the k1 estimate of
    KL(pi_old || q) (Schulman 2020). kl/k3: r - 1 - log r with r = q / pi_old; the same divergence
    in the mean, and never negative. A token that the teacher rules out counts with IMPOSSIBLE, as
    in the losses, so that means stay finite.
    """
    gap_N = scores.sampled_N.clamp(min=IMPOSSIBLE) - behavior_logprobs_N
    return {
        "gap/mean": gap_N,
        "kl/k3": gap_N.exp() - 1 - gap_N,  # log r is the gap
        "reward/negative_share": (gap_N < 0).float(),
    }


def add_by_position(
    meter: Meter, gap_N: torch.Tensor, positions_N: torch.Tensor, weights_N: torch.Tensor
) -> None:
    """Count the gap by response position, in buckets (Revisiting-OPD, Figure 4)."""
    begins_M1 = torch.tensor(BUCKETS, device=positions_N.device)[:, None]
    inside_MN = positions_N >= begins_M1
    inside_MN[:-1] &= positions_N < begins_M1[1:]
    names = [f"gap/place_{begin}" for begin in BUCKETS]
    meter.add(dict.fromkeys(names, gap_N), torch.where(inside_MN, weights_N, 0.0))


def mismatch(
    student: StudentView, ids_N: torch.Tensor, behavior_logprobs_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """gap/engine: |log pi(y) - log pi_old(y)| of sampled tokens, NaN elsewhere: on policy, the
    train-inference mismatch between rollout engine and learner."""
    return {"gap/engine": (student.logprobs_at(ids_N[:, None])[:, 0] - behavior_logprobs_N).abs()}


def examined(
    student: StudentView, scores: TeacherScores | None, ids_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Diagnostics that need the student's whole distribution.

    support/student_mass: pi on the teacher's top K; support/overlap: the share of the teacher's top
    K that is in the student's too.
    """
    entropy_N, own_NK = student.survey(0 if scores is None else scores.ids_NK.shape[1])
    logprobs_N = student.logprobs_at(ids_N[:, None])[:, 0]
    found = {"student/logprob": logprobs_N, "student/entropy": entropy_N}
    if scores is not None:
        support_NK = scores.ids_NK
        found["support/student_mass"] = student.logprobs_at(support_NK).exp().sum(-1)
        shared_NK = (support_NK[:, :, None] == own_NK[:, None, :]).any(-1)
        found["support/overlap"] = shared_NK.float().mean(-1)
        if scores.entropy_N is not None:
            found["teacher/entropy"] = scores.entropy_N
    return found
