"""The student as an objective sees it: logits and log-probabilities, not how they are made."""

from __future__ import annotations

from typing import Protocol

import torch


class Student(Protocol):
    """N positions of a student. Everything it returns is differentiable."""

    vocabulary: int

    def __len__(self) -> int: ...

    def logits_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] at `ids_NK`, float32."""

    def logprobs_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        """Full-vocabulary natural log-probabilities [N, K] at `ids_NK`, float32."""


class DenseStudent:
    """A student given by its whole logits [N, V]."""

    def __init__(self, logits_NV: torch.Tensor) -> None:
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
            self._logprobs_NV = self.logits_NV.log_softmax(-1)
        return self._logprobs_NV

    def logprobs_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        return self.logprobs().gather(1, ids_NK)
