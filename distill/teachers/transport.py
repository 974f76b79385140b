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

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.objectives import TeacherScores

Halves = npt.NDArray[np.float16]

LEAST = float(np.finfo(np.float16).min)
"""-65504, the least finite float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactScores:
    """One row's TeacherScores, rounded, and who gave them: its fields, but for the ids that the
    student asked for, which do not travel back."""

    teacher: str
    vocabulary: int
    ids_NK: npt.NDArray[np.int32]
    logprobs_NK: Halves
    sampled_N: npt.NDArray[np.float32]
    entropy_N: Halves | None = None
    query_logprobs_NJ: Halves | None = None
    full_NV: Halves | None = None

    def __len__(self) -> int:
        return len(self.sampled_N)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the teacher sent, by name."""
        found = [(name, getattr(self, name)) for name in self.__slots__]
        return {name: value for name, value in found if isinstance(value, np.ndarray)}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    @classmethod
    def pack(cls, scores: TeacherScores, *, teacher: str) -> CompactScores:
        """Round `scores`."""
        sent = {
            name: _narrow(name, tensor)
            for name, tensor in scores.tensors()
            if name != "query_ids_NJ"
        }
        return cls(teacher=teacher, vocabulary=scores.vocabulary, **sent)

    def unpack(self, query_ids_NJ: npt.NDArray[np.int32] | None = None) -> TeacherScores:
        """What objectives take, on the CPU. asked_ids_NJ: what `asked_logprobs_NJ` is about.

        Raises:
            ValueError: not a teacher's scores (shapes, ids beyond the vocabulary, NaN), or the ids
                that were asked for are missing.
        """
        parts: dict[str, Any] = {name: _wide(array) for name, array in self.arrays().items()}
        if query_ids_NJ is not None:
            parts["query_ids_NJ"] = _wide(query_ids_NJ)
        return TeacherScores(vocabulary=self.vocabulary, **parts)


def rounding_bound(values: torch.Tensor) -> torch.Tensor:
    """How far `pack` may move each of `values`, finite ones from -65504 up."""
    return (values.abs() * 2.0**-11).clamp(min=2.0**-25)


def _narrow(name: str, values: torch.Tensor) -> npt.NDArray[Any]:
    """Ids as int32, the sampled token's float32 as it is, else the nearest float16, ties to even;
    never an infinity that was not there."""
    if not values.is_floating_point():
        return values.cpu().numpy().astype(np.int32)
    if name == "sampled_N":
        return values.float().cpu().numpy()
    values = torch.where(values == -torch.inf, values, values.clamp(min=LEAST))
    return values.to(torch.float16).cpu().numpy()


def _wide(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """int64 or float32, in memory of its own: what comes through Ray must not be written to."""
    kind = np.int64 if array.dtype.kind == "i" else np.float32
    return torch.from_numpy(array.astype(kind))
