"""Mathematics problems: the record."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question, its gold answer, its kind, and a worked solution that ends in the box."""

    question: str
    answer: str
    kind: str
    solution: str


def load(source: str, *, split: str = "train") -> object:
    raise NotImplementedError
