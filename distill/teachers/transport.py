"""Teacher scores as they travel and are kept, 6 bytes an id instead of 12.

A token with K ids takes 6 K bytes (ids int32, log-probabilities float16) and 6 more: the sampled
token's log-probability, which policy gradients subtract from the student's, stays float32; the
entropy is float16. 192 + 6 bytes at K = 32.

float16 moves a log-probability x by at most max(2^-11 |x|, 2^-25), `rounding_bound`. Below -65504
it becomes -65504, far under what objectives take for impossible; -inf stays what it is. A teacher
rounds before it answers, so that scores are the same bits wherever it runs.

Letters: N tokens, K support size, J ids that the student asked for, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.objectives import TeacherScores

Halves = npt.NDArray[np.float16]

LEAST = float(np.finfo(np.float16).min)
"""-65504, the least finite float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactScores:
    """One row's TeacherScores, rounded, and who gave them.

    asked_ids_NJ does not travel back: the asker puts it in again (`answering`).
    """

    teacher: str
    vocabulary: int
    ids_NK: npt.NDArray[np.int32]
    logprobs_NK: Halves
    sampled_N: npt.NDArray[np.float32]
    entropy_N: Halves | None = None
    asked_logprobs_NJ: Halves | None = None
    full_NV: Halves | None = None
    asked_ids_NJ: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.sampled_N)

    @property
    def nbytes(self) -> int:
        """Bytes of what the teacher sent."""
        sent = (self.ids_NK, self.logprobs_NK, self.sampled_N, self.entropy_N)
        return sum(
            part.nbytes
            for part in (*sent, self.asked_logprobs_NJ, self.full_NV)
            if part is not None
        )

    @classmethod
    def pack(cls, scores: TeacherScores, *, teacher: str) -> CompactScores:
        """Round `scores`. The ids that were asked for are left out."""
        return cls(
            teacher=teacher,
            vocabulary=scores.vocabulary,
            ids_NK=scores.ids_NK.cpu().numpy().astype(np.int32),
            logprobs_NK=_halves(scores.logprobs_NK),
            sampled_N=scores.sampled_N.float().cpu().numpy(),
            entropy_N=None if scores.entropy_N is None else _halves(scores.entropy_N),
            asked_logprobs_NJ=None
            if scores.asked_logprobs_NJ is None
            else _halves(scores.asked_logprobs_NJ),
            full_NV=None if scores.full_NV is None else _halves(scores.full_NV),
        )

    def answering(self, asked_ids_NJ: npt.NDArray[np.int32]) -> CompactScores:
        """With the ids that `asked_logprobs_NJ` is about."""
        return replace(self, asked_ids_NJ=asked_ids_NJ)

    def unpack(self) -> TeacherScores:
        """What objectives take, on the CPU.

        Raises:
            ValueError: not a teacher's scores (shapes, ids beyond the vocabulary, NaN), or the ids
                that were asked for are missing.
        """
        return TeacherScores(
            ids_NK=_wide(self.ids_NK),
            logprobs_NK=_wide(self.logprobs_NK),
            sampled_N=_wide(self.sampled_N),
            vocabulary=self.vocabulary,
            entropy_N=None if self.entropy_N is None else _wide(self.entropy_N),
            asked_ids_NJ=None if self.asked_ids_NJ is None else _wide(self.asked_ids_NJ),
            asked_logprobs_NJ=None
            if self.asked_logprobs_NJ is None
            else _wide(self.asked_logprobs_NJ),
            full_NV=None if self.full_NV is None else _wide(self.full_NV),
        )


def rounding_bound(values: torch.Tensor) -> torch.Tensor:
    """How far `pack` may move each of `values`, finite ones from -65504 up."""
    return (values.abs() * 2.0**-11).clamp(min=2.0**-25)


def _halves(values: torch.Tensor) -> Halves:
    """Nearest float16, ties to even; never an infinity that was not there."""
    values = torch.where(values == -torch.inf, values, values.clamp(min=LEAST))
    return values.to(torch.float16).cpu().numpy()


def _wide(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """int64 or float32, in memory of its own: what comes through Ray must not be written to."""
    kind = np.int64 if array.dtype.kind == "i" else np.float32
    return torch.from_numpy(array.astype(kind))
