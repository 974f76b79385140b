"""What the ranks of a learner do together; where there is one rank alone, that is little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from tutelage.distill.models.student import Student
from tutelage.distill.student.muon import orthogonalized

T = TypeVar("T")


class Ranks(Protocol):
    """One rank's view of them all. `call` is for rank 0; the rest all ranks call at once."""

    count: int

    @property
    def whole(self) -> Student:
        """On rank 0, the student in one piece: to generate with and to save."""

    @property
    def alive(self) -> bool:
        """Whether the other ranks are."""

    def call(self, learner: Any, method: str, shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the learner's method returns on every rank, each with its share of arguments."""

    def sums(self, values: Sequence[float]) -> Sequence[float]:
        """Of all ranks' values, place by place."""

    def gathered(self, values: Sequence[float]) -> Sequence[float]:
        """All ranks' values, one rank's after the other's."""

    def each(self, items: Sequence[T], work: Callable[[T], None]) -> None:
        """Do `work`, which is one pass through the model, on each of this rank's items."""

    def inside(self, function: Callable[[], T]) -> T:
        """Call what uses the model's weights."""

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        """Clip the gradient of all ranks to a norm; what it was before."""

    def orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        """See `muon.Orthogonalize`."""

    def publish(self) -> None:
        """Bring the trained weights into `whole`."""

    def joined(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state in one piece, on rank 0."""

    def adopted(self, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a state in one piece (other ranks than 0 are given its shapes alone);
        and take the weights that train from `whole`."""

    def close(self) -> None:
        """End the other ranks."""


class Alone:
    """The only rank."""

    count, alive = 1, True

    def __init__(self, student: Student) -> None:
        self.whole = student

    def call(self, learner: Any, method: str, shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        (share,) = shares
        return [getattr(learner, method)(*share)]

    def sums(self, values: Sequence[float]) -> Sequence[float]:
        return values

    def gathered(self, values: Sequence[float]) -> Sequence[float]:
        return values

    def each(self, items: Sequence[T], work: Callable[[T], None]) -> None:
        for item in items:
            work(item)

    def inside(self, function: Callable[[], T]) -> T:
        return function()

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(parameters, most))

    def orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        return orthogonalized(matrices)

    def publish(self) -> None:
        """The student in one piece is the one that trains."""

    def joined(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def adopted(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def close(self) -> None:
        """There is none."""


def split(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of these each rank gets: the largest first, to the rank that has least; in order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += sizes[i]
    return [sorted(share) for share in shares]
