"""Compares sets of real numbers, as intervals, inequalities, unions or set builders.

A set is read as a list of pieces with two ends each. Pieces whose ends are numbers are sorted and
merged, so that x != 2 and (-oo, 2) u (2, oo) are the same set. Pieces whose ends hold symbols are
compared one by one, in the order in which they are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from tutelage.envs.grading.split import brackets, outside, split, split_at, squeezed
from tutelage.envs.grading.syntax import Node, Unreadable
from tutelage.envs.grading.text import TEXT, stripped

if TYPE_CHECKING:
    from tutelage.envs.grading.arithmetic import Arithmetic

Reader = Callable[[str], Node]

_RELATION = re.compile(r"<|>|\\(?:le|ge|ne)(?![A-Za-z])")
_UNION = re.compile(r"\\(?:cup|sqcup)(?![A-Za-z])")
_INTERSECTION = re.compile(r"\\cap(?![A-Za-z])")
_WITHOUT = re.compile(r"\\setminus(?![A-Za-z])|(?<=R)\s*-(?=\s*\\\{)|\\backslash")
_ALL = re.compile(
    rf"^(?:\\mathbb\s*\{{?R\}}?|[\s{TEXT}]*(?:the set of |set of )?(?:all |any )?(?:the )?"
    r"real(?:s| numbers?)(?: x)?|全体实数|所有实数)$"
)
_NONE = re.compile(
    rf"^(?:\\emptyset|[\s{TEXT}]*(?:no (?:real )?solutions?|(?:the )?empty set|空集|无解|none))$",
    re.IGNORECASE,
)
_SET_SIGN = re.compile(
    r"<|>|\\(?:le|ge|ne|cup|cap|setminus|in|emptyset|notin)(?![A-Za-z])"
    r"|\\mathbb\s*\{?[RZQNC]|real numbers?\b|\breals\b"
    r"|\\infty\s*[)\]]|\bno (?:real )?solutions?\b|\\\{[^|:]*[|:]|空集|无解|实数"
)
_MEMBER = re.compile(
    r"^\s*([A-Za-z]|\\(?:theta|alpha|beta|lambda|mu|phi)|[A-Za-z]_\{?\w\}?)"
    r"\s*\\in(?![A-Za-z])\s*(.*)$",
    re.DOTALL,
)
_BUILDER = re.compile(
    rf"^\s*([A-Za-z]|\\[a-z]+)\s*(?:\\in\s*(\\mathbb\s*\{{?\s*[A-Z]\s*\}}?)\s*)?[\s{TEXT}]*"
    rf"(?:\||:|(?<=[\s{TEXT}])such that\s)(.*)$",
    re.DOTALL,
)
_OR = re.compile(rf"[\s{TEXT},;]+or[\s{TEXT}]+|\\lor")
_AND = re.compile(rf"[\s{TEXT},;]+(?:and|but)[\s{TEXT}]+|\\land")
_COMMA = re.compile(r"[,;]")


class NoSet(ValueError):
    """The text is no set of real numbers that this file can read."""


@dataclass(frozen=True, slots=True)
class End:
    """An end of a piece: its expression (None: infinite), its value if it is a number."""

    node: Node | None
    value: Fraction | float | None
    open: bool


Piece = tuple[End, End]
_LOWEST, _HIGHEST = End(None, -math.inf, True), End(None, math.inf, True)


def is_set(text: str) -> bool:
    return _SET_SIGN.search(text) is not None


def member(text: str) -> tuple[str, str]:
    """(x, the set) of `x \\in ...`; ("", text) otherwise."""
    match = _MEMBER.match(text)
    return (squeezed(match[1]), stripped(match[2])) if match else ("", text)


def same_set(answer: str, gold: str, read: Reader, arithmetic: Arithmetic) -> bool | None:
    """Whether two texts, at least one of which is written as a set, are the same set."""
    found, unread = [], False
    for text in (answer, gold):
        if "," in text and not brackets(text).opening and not is_set(text):
            text = f"\\{{{text}\\}}"  # -1, 2 is {-1} u {2}
        try:
            found.append(_Reading(read, arithmetic).of(text))
        except (NoSet, Unreadable):
            unread = True
    if unread:
        return _same_relation(answer, gold, read, arithmetic)
    (name, mine), (other, theirs) = found
    if name and other and name != other:
        return False
    return _same_pieces(_merged(mine), _merged(theirs), arithmetic)


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reading:
    """Reads texts as (the variable's name or "", the pieces)."""

    read: Reader
    arithmetic: Arithmetic

    def of(self, text: str, depth: int = 0) -> tuple[str, list[Piece]]:
        text = stripped(text)
        if depth > 6:
            raise NoSet("too deep")
        name, text = member(text)
        if name and _RELATION.search(text) is None:
            return name, self.of(text, depth + 1)[1]
        if name:  # x in R, x != 2
            inside, *conditions = split(text, ",;")
            pieces = self.of(inside, depth + 1)[1]
            for condition in conditions:
                pieces = _common(pieces, self.of(condition, depth + 1)[1])
            return name, pieces
        if _ALL.match(text):
            return "", [(_LOWEST, _HIGHEST)]
        if _NONE.match(text):
            return "", []
        for pattern, combine in (  # weakest binding first: it splits the whole text
            (_OR, _union),
            (_UNION, _union),
            (_AND, _common),
            (_INTERSECTION, _common),
            (_WITHOUT, _difference),
        ):
            parts, between = split_at(text, pattern)
            if between:
                return self.combined([self.of(part, depth + 1) for part in parts], combine)
        around = brackets(text)
        if around.opening == "\\{":
            return self.braces(around.inner, depth)
        relations, commas = _RELATION.search(text), outside(text, _COMMA)
        if relations and commas:
            return self.conditions(split(text, ",;"), depth)
        if relations:
            return self.relation(text)
        if around.opening and len(ends := split(around.inner, ",;")) == 2:
            lower = self.end(ends[0], around.opening == "(")
            return "", [(lower, self.end(ends[1], around.closing == ")"))]
        sides = split(text, "=")
        if len(sides) == 2 and (variable := _variable(sides[0])) and not variable[1]:
            end = self.end(sides[1], False)  # x = 0 or x > 1
            return variable[0], [(end, end)]
        raise NoSet(text)

    def combined(
        self,
        parts: list[tuple[str, list[Piece]]],
        combine: Callable[[list[Piece], list[Piece]], list[Piece]],
    ) -> tuple[str, list[Piece]]:
        names = {name for name, _ in parts if name}
        if len(names) > 1:
            raise NoSet("two variables")
        pieces = parts[0][1]
        for _, more in parts[1:]:
            pieces = combine(pieces, more)
        return (names.pop() if names else ""), pieces

    def conditions(self, texts: list[str], depth: int) -> tuple[str, list[Piece]]:
        """A comma is an `and` where both can hold (x > 1, x != 3), else an `or` (x < 2, x > 5)."""
        whole: list[str] = []
        for text in texts:
            before = re.match(r".*\\ne(?![A-Za-z])", whole[-1], re.DOTALL) if whole else None
            if before and not _RELATION.search(text):  # x != 2, 3
                text = f"{before.group()} {text}"
            whole.append(text)
        parts = [self.of(text, depth + 1) for text in whole if text.strip()]
        name, both = self.combined(parts, _common)
        return (name, both) if both else self.combined(parts, _union)

    def braces(self, inner: str, depth: int) -> tuple[str, list[Piece]]:
        if builder := _BUILDER.match(inner):
            if builder[2] and "R" not in builder[2]:
                raise NoSet("of integers")
            _, pieces = self.of(builder[3], depth + 1)
            return "", pieces
        ends = [self.end(text, False) for text in split(inner, ",;")]
        return "", [(end, end) for end in ends]

    def end(self, text: str, is_open: bool) -> End:
        text = stripped(text)
        bare = text.replace(" ", "").replace("{", "").replace("}", "")
        if bare in ("\\infty", "+\\infty", "-\\infty", "inf", "-inf", "+inf", "oo", "-oo", "+oo"):
            return _LOWEST if bare.startswith("-") else _HIGHEST
        node = self.read(text)
        return End(node, self.arithmetic.real(node), is_open)

    def relation(self, text: str) -> tuple[str, list[Piece]]:
        sides, signs = split_at(text, _RELATION)
        if any("=" in side for side in sides):
            raise NoSet(text)
        names = [_variable(side) for side in sides]
        if sum(name is not None for name in names) != 1 or len(sides) > 3:  # a < x < b at most
            raise NoSet(text)
        at = next(i for i, name in enumerate(names) if name is not None)
        (name, absolute) = names[at] or ("", False)
        pieces = [(_LOWEST, _HIGHEST)]
        for i, sign in enumerate(signs):
            if i not in (at - 1, at) or (len(sides) == 3 and at != 1):
                raise NoSet(text)
            other = sides[i] if i < at else sides[i + 1]
            sign = sign.strip()
            if i < at:  # 2 < x is x > 2
                sign = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(sign, sign)
            pieces = _common(pieces, self.half(sign, other, absolute=absolute))
        return name, pieces

    def half(self, sign: str, other: str, *, absolute: bool) -> list[Piece]:
        end = self.end(other, sign in ("<", ">"))
        ends = [end]
        if absolute and end.node is not None:
            ends = [self.end(f"-({other})", end.open), end]
            if end.value is None or end.value < 0:  # the ends -b and b would change places
                raise NoSet(other)
        if sign == "\\ne":
            return _difference(
                [(_LOWEST, _HIGHEST)], [(e, e) for e in (self.shut(e) for e in ends)]
            )
        if sign in ("<", "\\le"):
            return [(ends[0], ends[1])] if absolute else [(_LOWEST, end)]
        return [(_LOWEST, ends[0]), (ends[1], _HIGHEST)] if absolute else [(end, _HIGHEST)]

    @staticmethod
    def shut(end: End) -> End:
        return End(end.node, end.value, False)


_SYMBOL = re.compile(
    rf"^[\s{TEXT}]*(\|?)\s*((?:[A-Za-z]|\\(?!pi|infty)[A-Za-z]+)(?:_(?:\{{[^{{}}]*\}}|\w))?'?(?:\([a-z]\))?)\s*(\|?)[\s{TEXT}]*$"
)


def _variable(text: str) -> tuple[str, bool] | None:
    """(the name, whether it is |x|) of a side that is one symbol."""
    match = _SYMBOL.match(text)
    if match is None or match[1] != match[3] or match[2] == "e":  # e is Euler's number
        return None
    return squeezed(match[2]), bool(match[1])


# --- pieces --------------------------------------------------------------------------------------


def _known(*ends: End) -> None:
    if any(end.value is None for end in ends):
        raise NoSet("ends that cannot be sorted")


def _lower(a: End, b: End) -> End:
    """Of two lower ends the one that leaves less of the line."""
    if a is _LOWEST or b is _LOWEST:
        return b if a is _LOWEST else a
    _known(a, b)
    return max(a, b, key=lambda end: (end.value, end.open))


def _upper(a: End, b: End) -> End:
    if a is _HIGHEST or b is _HIGHEST:
        return b if a is _HIGHEST else a
    _known(a, b)
    return min(a, b, key=lambda end: (end.value, not end.open))


def _holds_any(lower: End, upper: End) -> bool:
    if lower.value is None or upper.value is None:
        return True  # ends with symbols: nobody can say
    return lower.value < upper.value or (
        lower.value == upper.value and not lower.open and not upper.open
    )


def _common(first: list[Piece], second: list[Piece]) -> list[Piece]:
    pieces = [(_lower(a[0], b[0]), _upper(a[1], b[1])) for a in first for b in second]
    return [piece for piece in pieces if _holds_any(*piece)][:100]  # each \ne doubles them


def _union(first: list[Piece], second: list[Piece]) -> list[Piece]:
    return [*first, *second]


def _difference(first: list[Piece], second: list[Piece]) -> list[Piece]:
    for lower, upper in second:
        rest: list[Piece] = []
        if lower is not _LOWEST:
            rest.append((_LOWEST, End(lower.node, lower.value, not lower.open)))
        if upper is not _HIGHEST:
            rest.append((End(upper.node, upper.value, not upper.open), _HIGHEST))
        first = _common(first, rest)
    return first


def _merged(pieces: list[Piece]) -> list[Piece]:
    """The pieces sorted, and those that touch made one; unchanged if an end has no value."""
    if any(end.value is None for piece in pieces for end in piece):
        return pieces
    pieces = [piece for piece in pieces if _holds_any(*piece)]
    merged: list[Piece] = []
    for lower, upper in sorted(pieces, key=lambda piece: (piece[0].value, piece[0].open)):
        if merged:
            end = merged[-1][1]
            touches = lower.value < end.value or (  # type: ignore[operator]
                lower.value == end.value and not (lower.open and end.open)
            )
            if touches:
                furthest = max(end, upper, key=lambda e: (e.value, not e.open))
                merged[-1] = (merged[-1][0], furthest)
                continue
        merged.append((lower, upper))
    return merged


def _same_pieces(mine: list[Piece], theirs: list[Piece], arithmetic: Arithmetic) -> bool | None:
    if len(mine) != len(theirs):
        unsorted = any(e.value is None for p in (*mine, *theirs) for e in p)
        return None if unsorted else False
    verdicts: list[bool | None] = []
    for piece, other in zip(mine, theirs, strict=True):
        for end, target in zip(piece, other, strict=True):
            if end.open != target.open or (end.node is None) != (target.node is None):
                return False
            if end.node is None or target.node is None:
                verdicts.append(end.value == target.value)
            else:
                verdicts.append(arithmetic.equal(end.node, target.node))
    return False if False in verdicts else None if None in verdicts else True


# --- relations between expressions ---------------------------------------------------------------


def _same_relation(answer: str, gold: str, read: Reader, arithmetic: Arithmetic) -> bool | None:
    """a < b is b > a: the differences are a positive multiple of each other."""
    first, second = _difference_of(answer, read), _difference_of(gold, read)
    if first is None or second is None:
        relations = [_RELATION.search(text) is not None for text in (answer, gold)]
        return None if relations[0] == relations[1] else False
    (mine, sign), (theirs, other) = first, second
    if sign != other:
        return False
    ratio = arithmetic.ratio(mine, theirs)
    if ratio is None:
        return None
    return ratio != 0 if sign == "\\ne" else ratio == 1  # a negative multiple turns < around


def _difference_of(text: str, read: Reader) -> tuple[Node, str] | None:
    """(left - right, <, \\le or \\ne) of one relation, turned to point left."""
    sides, signs = split_at(text, _RELATION)
    if len(signs) != 1:
        return None
    left, right = sides
    sign = signs[0].strip()
    if sign in (">", "\\ge"):
        left, right, sign = right, left, {">": "<", "\\ge": "\\le"}[sign]
    try:
        return Node("add", (read(stripped(left)), Node("negate", (read(stripped(right)),)))), sign
    except Unreadable:
        return None
