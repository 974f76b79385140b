"""Draws a token for each row by inverse CDF, under its own temperature and top-p.

A nucleus, or the part of the distribution up to the drawn token, nearly always lies among a few of
the most probable tokens. So only those are put in order; a row for which they do not suffice is
drawn once more, with its whole vocabulary in order. Both ways give the same token to the bit.

Letters: B rows, V vocabulary, K candidates, the most probable first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from tutelage.scheduler.episodes import SamplingParams

GREEDIEST = 1e-30
"""A top-p below every probability of a most probable token: the nucleus is that token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """How each of some rows is drawn. Greedy is the smallest nucleus, at temperature 1.

    tempered, greedy: whether any row has another temperature than 1, or is greedy.
    """

    temperature_B1: torch.Tensor
    top_p_B1: torch.Tensor
    cut_B1: torch.Tensor  # top_p < 1
    tempered: bool
    greedy: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Laws:
        found = np.array([(p.temperature, p.top_p) for p in params], dtype=np.float32)
        greedy = found[:, 0] == 0
        found[greedy] = 1.0, GREEDIEST
        found_2B1 = torch.from_numpy(found.T[..., None].copy()).to(device)
        return cls(
            temperature_B1=found_2B1[0],
            top_p_B1=found_2B1[1],
            cut_B1=found_2B1[1] < 1,
            tempered=bool((found[:, 0] != 1).any()),
            greedy=bool(greedy.any()),
        )

    def __getitem__(self, rows: list[int]) -> Laws:
        return replace(
            self,
            temperature_B1=self.temperature_B1[rows],
            top_p_B1=self.top_p_B1[rows],
            cut_B1=self.cut_B1[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Tokens, where the model is and here; their log-probabilities at temperature 1 over the whole
    vocabulary, and those under the sampling parameters (greedy: 0)."""

    ids_B1: torch.Tensor
    ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]


def draw(logits_BV: torch.Tensor, laws: Laws, uniform_B1: torch.Tensor) -> Drawn:
    """Draw a token for each row by its uniform number; no row depends on another.

    Raises:
        FloatingPointError: the logits hold NaN or infinity.
    """
    drawn_4B = _draw(logits_BV, laws, uniform_B1, whole=False)
    said = drawn_4B.tolist()  # a step's only look: on a GPU it waits for the forward
    short = [b for b, exact in enumerate(said[3]) if not exact]
    if short:
        _refuse_broken(logits_BV[short])
        drawn_4B[:, short] = _draw(logits_BV[short], laws[short], uniform_B1[short], whole=True)
        said = drawn_4B.tolist()
    return Drawn(
        ids_B1=drawn_4B[0, :, None].long(),
        ids=[int(token) for token in said[0]],
        logprobs=said[1],
        sampling_logprobs=said[2],
    )


def _refuse_broken(logits_BV: torch.Tensor) -> None:
    if not torch.isfinite(logits_BV).all():
        raise FloatingPointError(
            "the student's logits hold NaN or infinity during a rollout: its weights are broken"
            " (lower optimizer.lr, or go back to an earlier checkpoint)"
        )


def _draw(
    logits_BV: torch.Tensor, laws: Laws, uniform_B1: torch.Tensor, *, whole: bool
) -> torch.Tensor:
    """For each row [4, B]: the token, its log-probability, that under the sampling parameters, and
    whether it is exact (1) or a row of broken logits or one to draw by the whole vocabulary (0).

    The nucleus is the fewest most probable tokens with mass >= top_p. At temperature 1 and top-p 1
    both log-probabilities are the same to the bit.
    """
    plain_BV = logits_BV.log_softmax(-1)
    law_BV = plain_BV
    if laws.tempered:
        law_BV = (logits_BV / laws.temperature_B1).log_softmax(-1)
    if whole:  # stable: equal probabilities keep the order of ids, on every device
        values_BK, ids_BK = law_BV.sort(dim=-1, descending=True, stable=True)
    else:
        values_BK, ids_BK = law_BV.topk(_candidates(law_BV.shape[1]))
    upto_BK = values_BK.exp().cumsum(-1)
    before_BK = F.pad(upto_BK[:, :-1], (1, 0))
    inside_BK = before_BK < laws.top_p_B1
    kept_B1 = inside_BK.sum(-1, keepdim=True) - 1
    mass_B1 = upto_BK.gather(1, kept_B1).where(laws.cut_B1, 1.0)
    goal_B1 = uniform_B1 * mass_B1
    # minimum: where the sums round below 1, a draw near 1 would land beyond the nucleus
    rank_B1 = torch.minimum((upto_BK <= goal_B1).sum(-1, keepdim=True), kept_B1)
    ids_B1, value_B1 = ids_BK.gather(1, rank_B1), values_BK.gather(1, rank_B1)
    plain_B1 = plain_BV.gather(1, ids_B1) if laws.tempered else value_B1
    # clamp: a nucleus of one token, whose mass rounds, would have a probability above 1
    value_B1 = (value_B1 - mass_B1.log()).clamp_(max=0)
    if laws.greedy:
        value_B1.masked_fill_(laws.top_p_B1 == GREEDIEST, 0.0)
    # Among equals topk has no order. A comparison with NaN is False, so that NaN is never exact.
    apart_BK = F.pad(values_BK[:, :-1] > values_BK[:, 1:], (0, 1), value=whole)
    needed_BK = inside_BK.where(laws.cut_B1, before_BK <= goal_B1)
    exact_B1 = (apart_BK | ~needed_BK).all(-1, keepdim=True)
    exact_B1 &= logits_BV.sum(-1, keepdim=True).isfinite()
    return torch.cat([ids_B1, plain_B1, value_B1, exact_B1], dim=1).T


def _candidates(vocabulary: int) -> int:
    """How many: on the CPU topk takes one pass for up to a 64th of the vocabulary, and several for
    more."""
    return min(vocabulary, max(8, min(64, vocabulary // 64)))
