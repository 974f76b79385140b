"""Finds out what kind of answer two texts are, and compares them: lists, tuples, equations, sets of
reals, kinds with a notation of their own (`kinds`), and at the bottom two values.

It works on plain TeX (`text.clean`). An `Arithmetic` says whether two values are equal: the exact
one in this process, the numerical one in the grading worker.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from fractions import Fraction

from tutelage.envs.grading import sets
from tutelage.envs.grading.arithmetic import (
    Arithmetic,
    Equal,
    all_of,
    any_of,
    matched,
    rational,
    read,
)
from tutelage.envs.grading.kinds import approximate, clock, label, matrix, modular
from tutelage.envs.grading.numbers import numeral, quantity
from tutelage.envs.grading.split import (
    Listing,
    brackets,
    grouped,
    joined,
    listed,
    split,
    squeezed,
    ungrouped,
)
from tutelage.envs.grading.syntax import Node, Unreadable, parse
from tutelage.envs.grading.text import TEXT, stripped
from tutelage.envs.grading.values import same_value

DEEPEST = 8  # shapes in shapes
MOST = 60  # parts of a list


def same(answer: str, gold: str, arithmetic: Arithmetic, depth: int = 0) -> bool | None:
    """Whether two texts give the same answer."""
    answer, gold = stripped(answer), stripped(gold)
    if not answer or not gold or depth > DEEPEST:
        return False
    if squeezed(answer) == squeezed(gold):
        return True

    def again(part: str, other: str) -> bool | None:
        return same(part, other, arithmetic, depth + 1)

    for shape in (approximate, matrix, modular, clock, _equation, _set, _list, label):
        if (found := shape(answer, gold, arithmetic, again)) is not NotImplemented:
            return found
    return same_value(answer, gold, arithmetic)


# --- sets of real numbers ------------------------------------------------------------------------


def _set(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """Intervals, inequalities, unions, set builders, excluded points, in any combination."""
    if not sets.is_set(answer) and not sets.is_set(gold):
        return NotImplemented
    member = [sets.member(text) for text in (answer, gold)]
    if member[0][0] and member[1][0] and member[0][0] != member[1][0]:
        return False
    if any(name for name, _ in member) and not any(sets.is_set(text) for _, text in member):
        letters = [_LETTER.match(text) is not None for _, text in member]
        return not any(letters) and again(member[0][1], member[1][1])  # x in {1, 2}
    return sets.same_set(answer, gold, read, arithmetic)


# --- equations and names -------------------------------------------------------------------------


def _equation(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """`m+n=53` answers a gold 53, `f(x)=2x` a gold 2x. Two equations are the same if left minus
    right of one is a multiple of left minus right of the other.
    """
    mine, theirs = split(answer, "="), split(gold, "=")
    if len(mine) == len(theirs) == 1:
        return NotImplemented
    several = [len(split(joined(grouped(text)), ",;")) > 1 for text in (answer, gold)]
    if any(several) and (all(several) or len(mine if several[0] else theirs) > 1):
        return NotImplemented  # a list of equations
    if not all(part.strip() for part in (*mine, *theirs)):
        return False
    if len(theirs) == 1:
        given = [mine[-1]] if _gives(mine[0], mine[-1]) else []
        if _is_name(mine[-1]) and not _is_name(mine[0]):  # 5 = x
            given.append(mine[0])
        if (_LETTER.match(theirs[0]) and _LETTER.match(mine[0])) or _untrue(mine):
            return False
        return any_of(False, *(again(text, theirs[0]) for text in given))
    if len(mine) == 1:
        return again(mine[0], theirs[-1]) if _is_name(theirs[0]) else False
    if squeezed(mine[0]) == squeezed(theirs[0]) and (again(mine[-1], theirs[-1]) is True):
        return True
    if len(mine) > 2 or len(theirs) > 2:
        return False
    try:
        zeros = [
            Node("add", (read(left), Node("negate", (read(right),))))
            for left, right in (mine, theirs)
        ]
    except Unreadable:
        return all_of([again(a, b) for a, b in zip(mine, theirs, strict=True)])
    if not all(zero.symbols() for zero in zeros):
        return False
    ratio = arithmetic.ratio(*zeros)
    return None if ratio is None else ratio != 0


_LETTER = re.compile(rf"^[\s{TEXT}]*\(?\s*[A-Z]\s*\)?[\s{TEXT}]*$")  # of a choice: B=A is not A
_NEAR = Fraction(1, 100)  # relative: 1/3 = 0.33 is rounding, not an untrue equation


def _untrue(sides: list[str]) -> bool:
    """Whether two neighbours in a chain of equations are different numbers, as in 2+3=6."""
    values = []
    for side in sides:
        with contextlib.suppress(Unreadable):
            values.append((rational(read(stripped(side))), "." in side))
    found = [(value, rounded) for value, rounded in values if value is not None]
    return any(
        abs(a - b) > (_NEAR * abs(a) if rounded or other else 0)
        for (a, rounded), (b, other) in itertools.pairwise(found)
    )


def _gives(left: str, right: str) -> bool:
    """Whether `left = right` says what a quantity is; `2x = 10` is still to be solved."""
    if _DENIED.search(left):
        return False
    try:
        node = parse(left)
    except Unreadable:
        return True  # \angle ABC, a tuple, words
    if node.op == "power" and node.args[0].op == "abs":
        return True  # |z|^2
    if node.op in ("add", "multiply", "power", "divide", "negate", "root", "factorial"):
        return len(node.symbols()) != 1 and (not node.symbols() or numeral(right) != 0)
    return True


_NAME = re.compile(
    rf"^[\s{TEXT}]*(?:\|?\s*(?:\\(?:angle|triangle|overline|vec|hat|bar|overrightarrow|widehat|measuredangle|mathbb|operatorname|lVert)\b.*"
    r"|m\s*\\angle.*|[A-Za-z]'*|\\[A-Za-z]+|[A-Z]{2,4})\s*\|?"
    rf"|[A-Za-z{TEXT} ]{{3,40}})(?:_(?:\{{[^{{}}]*\}}|\w))*(?:\s*\([^()=]*\))?'*\s*$"
)


_DENIED = re.compile(r"(?<![A-Za-z])(?:not|never|isn't|no)(?![A-Za-z])")  # not x = 5


def _is_name(text: str) -> bool:
    """A name of a value: a symbol, f(x), |AB|, \\angle ABC, (x, y), a word."""
    around = brackets(text)
    if _DENIED.search(text):
        return False
    if around.opening == "(":
        return all(_is_name(part) for part in split(around.inner, ","))
    return _NAME.match(text) is not None


# --- lists ---------------------------------------------------------------------------------------

_POINT = re.compile(r"^[A-Z]'?\s*(?=\(.*,.*\)$)")


def _list(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """Several values: their order counts only if brackets or names say which is which."""
    if _one_number(answer) and _one_number(gold):
        return NotImplemented  # 1,234
    answer, gold = _by_name(answer), _by_name(gold)
    answer, gold = ungrouped(answer), ungrouped(gold)
    if _one_number(answer) and _one_number(gold):
        return NotImplemented
    bare = _POINT.sub("", answer), _POINT.sub("", gold)
    if bare != (answer, gold) and all(len(listed(text).parts) > 1 for text in bare):
        answer, gold = bare  # P(1, 2); but beside a single number C(10, 3) is a binomial
    mine, theirs = listed(answer), listed(gold)
    signs = any("\\pm" in text or "\\mp" in text for text in (answer, gold))
    if not signs and len(mine.parts) == len(theirs.parts) == 1 and mine.opening == theirs.opening:
        return NotImplemented
    return (
        _any_reading(answer, gold, arithmetic, again)
        if signs
        else _parts(mine, theirs, arithmetic, again)
    )


def _by_name(text: str) -> str:
    """`(p,q)=(2,3)` as `p=2,q=3`."""
    sides = split(text, "=")
    if len(sides) != 2 or not _is_name(sides[0]):
        return text
    names, values = (listed(side) for side in sides)
    if len(names.parts) != len(values.parts) or {names.brackets, values.brackets} != {"()"}:
        return text
    return ",".join(f"{a}={b}" for a, b in zip(names.parts, values.parts, strict=True))


def _one_number(text: str) -> bool:
    """Whether the text is a numeral, with or without a unit: `\\$1,234`."""
    return numeral(text) is not None or numeral(quantity(text).value) is not None


def _any_reading(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """Compares texts with `\\pm`: with all upper and all lower signs, or with every combination."""
    found: list[bool | None] = []
    for joint in (True, False):
        mine, theirs = listed(answer, signs=joint), listed(gold, signs=joint)
        found.append(_parts(mine, theirs, arithmetic, again))
        if found[-1] is True:
            break
    return any_of(*found)


def _parts(mine: Listing, theirs: Listing, arithmetic: Arithmetic, again: Equal) -> bool | None:
    if len(mine.parts) != len(theirs.parts) or len(mine.parts) > MOST:
        return False
    named = [_named(found.parts) for found in (mine, theirs)]
    values = [parts for _, parts in named]
    ordered = mine.ordered or theirs.ordered
    if named[0][0] is None and named[1][0] is None:  # both sides name several things
        return matched(mine.parts, theirs.parts, lambda a, b: again(a, b))
    if None in (named[0][0], named[1][0]):  # one does: x=1, y=2 against (1, 2)
        ordered = True
        if named[0][0] or named[1][0]:
            return False  # f(u)=x, f(x)=-x against f(x)=x, f(x)=-x
        if {mine.brackets, theirs.brackets} - {"", "()"}:
            return False
    elif mine.brackets != theirs.brackets or (
        named[0][0] and named[1][0] and named[0][0] != named[1][0]
    ):
        return False
    if ordered:
        return all_of([again(a, b) for a, b in zip(*values, strict=True)])
    return matched(values[0], values[1], lambda a, b: again(a, b))


def _named(parts: list[str]) -> tuple[str | None, list[str]]:
    """(the one name or "", the values); the name is None if the parts have several."""
    names: set[str] = set()
    values: list[str] = []
    for part in parts:
        left, *rest = split(part, "=")
        if rest and _is_name(left):
            names.add(re.sub(r"_.*", "", squeezed(left)))
            values.append(rest[-1])
        else:
            values.append(part)
    if len(names) > 1:
        return None, values
    return (names.pop() if names else ""), values
