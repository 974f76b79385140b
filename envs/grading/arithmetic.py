"""What a comparison needs to know of expressions (`Arithmetic`), and its exact form (`Exact`).

A verdict is True, False, or None: this arithmetic can't tell.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

from tutelage.envs.grading.exact import NotRational, evaluate, oversized
from tutelage.envs.grading.numbers import numeral
from tutelage.envs.grading.syntax import Node, parse
from tutelage.envs.grading.syntax import number as number_node

Equal = Callable[[str, str], bool | None]


class Arithmetic(Protocol):
    """Compares expressions."""

    def equal(self, a: Node, b: Node, /) -> bool | None:
        """Whether two expressions are equal."""

    def real(self, a: Node, /) -> Fraction | None:
        """The value of a real constant, near enough to sort by."""

    def ratio(self, a: Node, b: Node, /) -> int | None:
        """1 or -1 if a is a positive or negative constant times b, 0 if it is no multiple."""


class Exact:
    """The arithmetic of rational numbers, and of expressions that are written alike.

    With `strict`, only a numeral equals an integer. After comparisons, `unsure` says that algebra
    may know more, and `oversized` that an expression is too large to compute.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.unsure = False
        self.oversized = False

    def equal(self, a: Node, b: Node, /) -> bool | None:
        values = rational(a), rational(b)
        if self.strict and _integral(b) and not _numeric(a):
            return False
        if None not in values:
            return values[0] == values[1]
        if a == b:
            return True
        if undefined(a) != undefined(b):
            return False
        if values[1] is not None and a.symbols():
            return False  # an expression in x is no number
        self._leave(a, b)
        return None

    def real(self, a: Node, /) -> Fraction | None:
        value = rational(a)
        if value is None:
            self._leave(a)
        return value

    def ratio(self, a: Node, b: Node, /) -> int | None:
        if a == b:
            return 1
        self._leave(a, b)
        return None

    def _leave(self, *nodes: Node) -> None:
        """Leave these to algebra."""
        self.unsure = True
        self.oversized = self.oversized or any(map(oversized, nodes))


def _numeric(node: Node) -> bool:
    return node.op == "number" or (node.op == "negate" and _numeric(node.args[0]))


def _integral(node: Node) -> bool:
    return node.op == "number" and node.value.denominator == 1  # type: ignore[union-attr]


def undefined(node: Node) -> bool:
    """Whether it divides by zero."""
    return (node.op == "divide" and rational(node.args[1]) == 0) or any(map(undefined, node.args))


def rational(node: Node) -> Fraction | None:
    try:
        return evaluate(node)
    except NotRational:
        return None


def read(text: str) -> Node:
    """The tree of a value. Raises `Unreadable`."""
    value = numeral(text)
    return parse(text) if value is None else number_node(value)


# --- verdicts that may be None


def any_of(*found: bool | None) -> bool | None:
    return True if True in found else None if None in found else False


def all_of(found: list[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True


def matched(mine: list[str], theirs: list[str], equal: Equal) -> bool | None:
    """Whether each of one list equals one of the other. Equality is transitive, so that the first
    that fits can be taken.
    """
    left, unsure = list(mine), False
    for gold in theirs:
        verdicts = [equal(answer, gold) for answer in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True
