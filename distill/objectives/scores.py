"""What a teacher says of N tokens: its top-K ids with log-probabilities, and the sampled token's.

Letters: N tokens, K support size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """Scores of N tokens, natural logs over the full vocabulary at temperature 1.

    ids_NK: int64, the teacher's K most probable ids, most probable first (ties by the lower id).
    logprobs_NK, sampled_N: float32. -inf is allowed (probability zero); NaN and +inf are not.
    vocabulary: V, the number of ids that take probability.
    full_NV: every log-probability, where the teacher is at hand (`from_logits`); None from a
    server.
    """

    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    sampled_N: torch.Tensor
    vocabulary: int
    full_NV: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids_NK.shape != self.logprobs_NK.shape or len(self.ids_NK) != len(self.sampled_N):
            raise ValueError(
                f"teacher scores differ in shape: ids {tuple(self.ids_NK.shape)}, log-probabilities"
                f" {tuple(self.logprobs_NK.shape)}, sampled {tuple(self.sampled_N.shape)}"
            )
        for name, tensor in (("logprobs_NK", self.logprobs_NK), ("sampled_N", self.sampled_N)):
            bad = torch.isnan(tensor) | (tensor == torch.inf)
            if bad.any():
                where = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"teacher {name} at {where} is {tensor[tuple(where)].item()}: a log-probability"
                    " is at most 0 or -inf; check the teacher's weights (tutelage eval on its own"
                    " task) and its dtype"
                )
        if self.ids_NK.numel() and (self.ids_NK.max() >= self.vocabulary or self.ids_NK.min() < 0):
            raise ValueError(
                f"a support id lies outside the vocabulary of {self.vocabulary}: the teacher's"
                " tokenizer or its padded embedding differs from the student's"
            )

    def __len__(self) -> int:
        return len(self.sampled_N)

    @classmethod
    def from_logits(
        cls, logits_NV: torch.Tensor, sampled_ids_N: torch.Tensor, *, k: int, keep_full: bool = True
    ) -> TeacherScores:
        """Scores from the teacher's logits. `keep_full=False` drops what student supports need.

        Raises:
            ValueError: k outside 1..V, or logits that are NaN or +inf.
        """
        vocabulary = logits_NV.shape[-1]
        if not 1 <= k <= vocabulary:
            raise ValueError(f"k={k}: it must be between 1 and the vocabulary's {vocabulary} ids")
        full_NV = logits_NV.detach().float().log_softmax(-1)
        top = full_NV.topk(k, dim=-1)
        return cls(
            ids_NK=top.indices,
            logprobs_NK=top.values,
            sampled_N=full_NV.gather(1, sampled_ids_N[:, None].long())[:, 0],
            vocabulary=vocabulary,
            full_NV=full_NV if keep_full else None,
        )

    @classmethod
    def join(cls, parts: Sequence[TeacherScores]) -> TeacherScores:
        """Several scores as one, in order."""
        full = [part.full_NV for part in parts]
        return cls(
            ids_NK=torch.cat([part.ids_NK for part in parts]),
            logprobs_NK=torch.cat([part.logprobs_NK for part in parts]),
            sampled_N=torch.cat([part.sampled_N for part in parts]),
            vocabulary=parts[0].vocabulary,
            full_NV=None
            if any(f is None for f in full)
            else torch.cat([f for f in full if f is not None]),
        )

    def to(self, device: torch.device | str) -> TeacherScores:
        """The same scores on another device."""
        return TeacherScores(
            ids_NK=self.ids_NK.to(device),
            logprobs_NK=self.logprobs_NK.to(device),
            sampled_N=self.sampled_N.to(device),
            vocabulary=self.vocabulary,
            full_NV=None if self.full_NV is None else self.full_NV.to(device),
        )

    def take(self, index: torch.Tensor) -> TeacherScores:
        """The scores at `index` (a mask or positions along N)."""
        return TeacherScores(
            ids_NK=self.ids_NK[index],
            logprobs_NK=self.logprobs_NK[index],
            sampled_N=self.sampled_N[index],
            vocabulary=self.vocabulary,
            full_NV=None if self.full_NV is None else self.full_NV[index],
        )
