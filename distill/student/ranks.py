"""What the ranks of a learner do together, and the trivial case of a single rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from tutelage.distill.models.student import Student
from tutelage.distill.student.muon import orthogonalized

T = TypeVar("T")


class Ranks(Protocol):
    """One rank's view of all ranks. Rank 0 alone uses `call`, `whole` and `close`; most others are
    collectives, which every rank must call at the same point."""

    count: int

    @property
    def whole(self) -> Student:
        """On rank 0, the student in one piece: to generate with and to save."""

    @property
    def alive(self) -> bool:
        """Whether the other ranks are alive."""

    def call(self, learner: Any, method: str, shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call the learner's method on every rank, each with its share of the arguments; what each
        returns."""

    def sums(self, values: Sequence[float]) -> Sequence[float]:
        """The elementwise sum of all ranks' values."""

    def gathered(self, values: Sequence[float]) -> Sequence[float]:
        """All ranks' values, concatenated in the order of ranks."""

    def each(self, items: Sequence[T], work: Callable[[T], None]) -> None:
        """Do `work`, which passes through the model once, on each of this rank's items."""

    def inside(self, function: Callable[[], T]) -> T:
        """Call a function that uses the model's weights, with the weights at hand."""

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        """Clip the gradient of all ranks to a norm; returns the norm before."""

    def orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        """See `muon.Orthogonalize`."""

    def publish(self) -> None:
        """Bring the trained weights into `whole`."""

    def joined(self, state: dict[str, Any]) -> dict[str, Any]:
        """On rank 0, an optimizer's state in one piece; elsewhere nothing."""

    def adopted(self, state: dict[str, Any]) -> dict[str, Any]:
        """Cut a state that rank 0 has in one piece: this rank's part of it. Other ranks pass its
        shapes. Also takes the weights that train from rank 0's `whole`."""

    def close(self) -> None:
        """End the other ranks."""


class Alone:
    """The only rank: it shares nothing and waits for nobody."""

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
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # Where nothing is clipped, torch would multiply every gradient by one.
        if not norm <= most:
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return float(norm)

    def orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        return orthogonalized(matrices)

    def publish(self) -> None:
        """The student in one piece is the one that trains."""

    def joined(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def adopted(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def close(self) -> None:
        """There are no others."""


def split(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The indices of the items that each rank gets, in order. Greedy: the largest item first, to
    the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):  # ties too have one order
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += sizes[i]
    return [sorted(share) for share in shares]
