"""The student as an objective sees it: logits and log-probabilities, not how they are made.

Letters: N tokens, K ids a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from tutelage.distill.objectives.largest import top_k


class StudentView(Protocol):
    """N positions of a student. Float32 (or float64), differentiable unless said."""

    vocabulary: int

    def __len__(self) -> int: ...

    def logits_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] at `ids_NK`, up to a constant per token (which no softmax sees)."""

    def logprobs_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        """Full-vocabulary natural log-probabilities [N, K] at `ids_NK`."""

    def top_k(self, k: int) -> torch.Tensor:
        """The K most probable ids of each token [N, K], most probable first. No gradient."""

    def entropy(self) -> torch.Tensor:
        """Over the whole vocabulary, in nats [N]. No gradient."""

    def survey(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(`entropy` [N], `top_k` [N, K], none for k = 0) in one pass over the vocabulary, after
        which log-probabilities without a gradient need no other."""

    def sampling_logprobs_at(
        self, ids_N: torch.Tensor, *, temperature: float, top_p: float
    ) -> torch.Tensor:
        """See `sampling_logprobs` [N]. No gradient."""

    def over_vocabulary(
        self,
        measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        teacher_NV: torch.Tensor,
    ) -> torch.Tensor:
        """measure(log pi, log q) -> [N], over every token of the vocabulary."""


def sampling_logprobs(
    logits_NV: torch.Tensor, ids_N: torch.Tensor, *, temperature: float, top_p: float
) -> torch.Tensor:
    """Log-probability of each token under the sampling parameters: softmax(logits / temperature),
    cut to its nucleus (the fewest most probable tokens with mass >= top_p) and renormalised; 0 at
    temperature 0. The token counts as part of the nucleus, since it was sampled from it: at its
    edge rounding could say otherwise."""
    if temperature == 0:
        return torch.zeros_like(logits_NV[:, 0])  # greedy: probability 1
    # Temperature first, then top-p, as both engines do: the nucleus is one of the tempered policy.
    logprobs_NV = (logits_NV / temperature).log_softmax(-1)
    own_N1 = logprobs_NV.gather(1, ids_N[:, None])
    if top_p == 1:
        return own_N1[:, 0]
    sorted_NV = logprobs_NV.sort(dim=-1, descending=True).values
    probs_NV = sorted_NV.exp()
    rank_N1 = (sorted_NV > own_N1).sum(-1, keepdim=True)  # among equals it counts as the first
    ranks_V = torch.arange(logprobs_NV.shape[1], device=logprobs_NV.device)
    # By the mass before a token: the one that crosses top_p belongs to the nucleus.
    inside_NV = (probs_NV.cumsum(-1) - probs_NV < top_p) | (ranks_V <= rank_N1)
    return own_N1[:, 0] - torch.where(inside_NV, probs_NV, 0.0).sum(-1).log()


class DenseStudent:
    """A student given by its whole logits [N, V]."""

    def __init__(self, logits_NV: torch.Tensor) -> None:
        # float64 stays: the tests and the estimator study compare in it
        self.logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        self.vocabulary = logits_NV.shape[-1]
        self._logprobs_NV: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.logits_NV)

    def logits_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        return self.logits_NV.gather(1, ids_NK)

    def logprobs(self) -> torch.Tensor:
        """Every log-probability [N, V]."""
        if self._logprobs_NV is None:
            with torch.enable_grad():  # kept: a later caller may need its gradient
                self._logprobs_NV = self.logits_NV.log_softmax(-1)
        return self._logprobs_NV

    def logprobs_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        return self.logprobs().gather(1, ids_NK)

    def top_k(self, k: int) -> torch.Tensor:
        return top_k(self.logits_NV, k)[1]

    def entropy(self) -> torch.Tensor:
        logprobs_NV = self.logprobs().detach()
        return -(logprobs_NV.exp() * logprobs_NV).sum(-1)

    def survey(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids_NK = self.top_k(k) if k else self.logits_NV.new_empty((len(self), 0), dtype=torch.long)
        return self.entropy(), ids_NK

    def sampling_logprobs_at(
        self, ids_N: torch.Tensor, *, temperature: float, top_p: float
    ) -> torch.Tensor:
        logits_NV = self.logits_NV.detach()
        return sampling_logprobs(logits_NV, ids_N, temperature=temperature, top_p=top_p)

    def over_vocabulary(
        self,
        measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        teacher_NV: torch.Tensor,
    ) -> torch.Tensor:
        return measure(self.logprobs(), teacher_NV)
