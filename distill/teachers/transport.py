"""The compact form in which teachers' scores are sent and cached: 6 bytes an id instead of 12.

A token with K ids takes 6 K bytes (ids int32, log-probabilities float16) and 6 more (at K = 32
together 198): the sampled token's log-probability stays float32, since policy gradients subtract
the student's from it; the entropy is float16.

float16 moves a log-probability x by at most max(2^-11 |x|, 2^-25), `rounding_bound`. Below -65504
it becomes -65504, far under what objectives take for impossible; -inf stays -inf. A teacher rounds
before it answers, so its scores are bit-identical whether it runs here or on another machine.

Letters: N tokens, K support size, J query ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.objectives import TeacherScores

QueryIds = Sequence[npt.NDArray[np.int32]] | None
"""For each row, the student's own ids [N, J] at which a teacher scores; None: its own alone."""

Halves = npt.NDArray[np.float16]

LEAST = float(np.finfo(np.float16).min)
"""-65504, the least finite float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactScores:
    """One row's TeacherScores, rounded, and the name of the teacher. The query ids are left out:
    who asked has them."""

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
        """The fields that are arrays, by name."""
        found = [(name, getattr(self, name)) for name in self.__slots__]
        return {name: value for name, value in found if isinstance(value, np.ndarray)}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    @classmethod
    def pack(cls, scores: TeacherScores, *, teacher: str) -> CompactScores:
        """`scores`, rounded, of one row or of several."""
        sent = {
            name: _narrow(name, tensor)
            for name, tensor in scores.tensors()
            if name != "query_ids_NJ"
        }
        return cls(teacher=teacher, vocabulary=scores.vocabulary, **sent)

    @classmethod
    def join(cls, parts: Sequence[CompactScores]) -> CompactScores:
        """Several rows' scores as one. What one of them lacks, the whole lacks.

        Raises:
            ValueError: they are not of one teacher, or of different support sizes.
        """
        first, arrays = parts[0], [part.arrays() for part in parts]
        if any((x.teacher, x.vocabulary) != (first.teacher, first.vocabulary) for x in parts):
            raise ValueError("scores of several teachers cannot be joined")
        names = [name for name in arrays[0] if all(name in own for own in arrays)]
        joined = {name: np.concatenate([own[name] for own in arrays]) for name in names}
        return cls(teacher=first.teacher, vocabulary=first.vocabulary, **joined)

    def split(self, counts: Sequence[int]) -> list[CompactScores]:
        """The scores of rows that have so many tokens each; they share this one's memory."""
        arrays: dict[str, Any] = dict(self.arrays())
        return [
            replace(self, **{name: array[a:b] for name, array in arrays.items()})
            for a, b in pairwise(accumulate(counts, initial=0))
        ]

    def unpack(self, query_ids_NJ: npt.NDArray[np.int32] | None = None) -> TeacherScores:
        """The TeacherScores that objectives take, on the CPU. query_ids_NJ: the ids that
        `query_logprobs_NJ` scores.

        Raises:
            ValueError: not a teacher's scores (shapes, ids beyond the vocabulary, NaN), or the
                query ids are missing.
        """
        parts: dict[str, Any] = {name: _wide(array) for name, array in self.arrays().items()}
        if query_ids_NJ is not None:
            parts["query_ids_NJ"] = _wide(query_ids_NJ)
        return TeacherScores(vocabulary=self.vocabulary, **parts)


def rounding_bound(values: torch.Tensor) -> torch.Tensor:
    """How far `pack` may move each of `values`; they are finite and not below -65504."""
    # half a step of float16's 11-bit significand; below 2^-14 its steps no longer shrink
    return (values.abs() * 2.0**-11).clamp(min=2.0**-25)


def _narrow(name: str, values: torch.Tensor) -> npt.NDArray[Any]:
    """Ids as int32; the sampled token's log-probability as float32; else the nearest float16, ties
    to even. A finite number stays finite."""
    if not values.is_floating_point():
        return values.cpu().numpy().astype(np.int32)
    if name == "sampled_N":
        return values.float().cpu().numpy()
    # float16 would make -inf of what lies below its range, and an objective of that an error
    values = torch.where(values == -torch.inf, values, values.clamp(min=LEAST))
    return values.to(torch.float16).cpu().numpy()


def _wide(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """int64 or float32, copied: arrays that come through Ray are read-only, and torch warns."""
    kind = np.int64 if array.dtype.kind == "i" else np.float32
    return torch.from_numpy(array.astype(kind))
