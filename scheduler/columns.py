"""Records on their way between processes: one list for each field, not one object for each record,
and of arrays one for all records.

A message of 256 episodes is then a few lists and a few big arrays. Ray writes each array into its
shared memory once, and who reads the message uses it there. Nothing is checked again: a record was
when it was made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt


def columns(values: Sequence[Any]) -> Column:
    """The values by columns, for `restored`. What are neither records, nor arrays of one dtype, nor
    lists or tuples of such stay as they are."""
    kinds = {type(value) for value in values}
    if len(kinds) > 1 and all(map(_is_record, kinds)):
        by_kind = {kind: columns([x for x in values if type(x) is kind]) for kind in kinds}
        return _Mixed([type(value) for value in values], by_kind)
    if len(kinds) != 1:
        return list(values)
    (kind,) = kinds
    if _is_record(kind):
        names = [field.name for field in fields(kind)]
        by_name = {name: columns([getattr(value, name) for value in values]) for name in names}
        return _Records(kind, len(values), by_name)
    if kind in (tuple, list):
        items = [item for value in values for item in value]
        return _Nested(kind, [len(value) for value in values], columns(items))
    if kind is np.ndarray and _joinable(values):
        return _Arrays([len(value) for value in values], np.concatenate(values))
    return list(values)


def restored(column: Column) -> list[Any]:
    """The values that `columns` took apart. Their arrays share memory with the column's, and that
    of a message is not to be written to."""
    return column if isinstance(column, list) else column.values()


def _is_record(kind: type) -> bool:
    return is_dataclass(kind) and "__slots__" in kind.__dict__


def _joinable(arrays: Sequence[npt.NDArray[Any]]) -> bool:
    """Whether they differ in length alone."""
    first = arrays[0]
    alike = len({(array.dtype, array.ndim, array.shape[1:]) for array in arrays}) == 1
    return alike and first.ndim > 0 and not first.dtype.hasobject


@dataclass(frozen=True, slots=True)
class _Records:
    """Records of one class, field by field."""

    kind: type
    count: int
    fields: dict[str, Column]

    def values(self) -> list[Any]:
        found: list[Any] = [object.__new__(self.kind) for _ in range(self.count)]
        for name, column in self.fields.items():
            # the slot's own setter: `setattr` refuses, since the records are frozen
            put = getattr(self.kind, name).__set__
            deque(map(put, found, restored(column)), maxlen=0)
        return found


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Records of several classes. kinds: of each, in order."""

    kinds: list[type]
    parts: dict[type, Column]

    def values(self) -> list[Any]:
        own = {kind: iter(restored(part)) for kind, part in self.parts.items()}
        return [next(own[kind]) for kind in self.kinds]


@dataclass(frozen=True, slots=True)
class _Nested:
    """Lists or tuples of values, one after the other."""

    kind: type
    lengths: list[int]
    items: Column

    def values(self) -> list[Any]:
        items = restored(self.items)
        return [self.kind(items[a:b]) for a, b in _bounds(self.lengths)]


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Arrays, one after the other."""

    lengths: list[int]
    joined: npt.NDArray[Any]

    def values(self) -> list[Any]:
        return [self.joined[a:b] for a, b in _bounds(self.lengths)]


Column = list[Any] | _Records | _Mixed | _Nested | _Arrays
"""Some values by columns."""


def _bounds(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each part begins and ends."""
    return pairwise(accumulate(lengths, initial=0))
