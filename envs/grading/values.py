"""Compares two values: their units, percent signs and scales, then the expressions."""

from __future__ import annotations

import re

from tutelage.envs.grading.arithmetic import Arithmetic, any_of, read
from tutelage.envs.grading.numbers import Quantity, numeral, quantity
from tutelage.envs.grading.split import split, squeezed
from tutelage.envs.grading.syntax import Node, Unreadable
from tutelage.envs.grading.syntax import number as number_node
from tutelage.envs.grading.text import TEXT, stripped

_BASE = re.compile(r"^\(?\s*([\dA-Za-z]+)\s*\)?\s*_\s*\{?\s*([\dA-Za-z]+)\s*\}?$")
_DIGITS = (
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_BASES = {name: str(at) for at, name in enumerate(_DIGITS, 2)} | {"sixteen": "16"}
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def same_value(answer: str, gold: str, arithmetic: Arithmetic) -> bool | None:
    """Whether two texts write the same value; a unit that only one side has does not count."""
    if (found := _based(answer, gold)) is not NotImplemented:
        return found
    if answer.startswith("\\{") and answer.endswith("\\}") and not split(answer[2:-2], ",")[1:]:
        answer = stripped(answer[2:-2])
    if gold.startswith("\\{") and gold.endswith("\\}"):
        gold = stripped(gold[2:-2])
    mine, theirs = quantity(answer), quantity(gold)
    units = {q.unit or ("percent" if q.percent else "") for q in (mine, theirs)} - {""}
    if len(units) > 1:
        return False
    if theirs.bare and mine.unit != theirs.unit:  # 3 m, whose m may be a variable
        theirs = Quantity(value=gold)
    unread = not theirs.unit or _WORD.search(theirs.value)  # 14 right triangles
    if unread and (words := _unknown_unit(gold)) and not _unknown_unit(answer):
        theirs = Quantity(value=words)
    return _quantities(mine, theirs, arithmetic)


# The gold's own words in \text{} after a number are its unit, whatever they are: `16\text{ daps}`.
_GOLD_UNIT = re.compile(rf"^(.*[\d}})])\s*{TEXT}\s*[a-z][a-z .-]*$", re.DOTALL)
_NO_UNIT = re.compile(
    r"(?:million|billion|trillion|thousand|hundred|dozen|factorial|squared|cubed|mod|more|less|hal(?:f|ves)|times"
    r"|(?:third|fourth|fifth|quarter|sixth|seventh|eighth|ninth|tenth)s?|or|and|if|when|where|not|is|base)\b"
)


def _unknown_unit(gold: str) -> str:
    """The value before such words, or ""."""
    match = _GOLD_UNIT.match(gold)
    return "" if match is None or _NO_UNIT.search(gold) else match[1]


def _quantities(mine: Quantity, theirs: Quantity, arithmetic: Arithmetic) -> bool | None:
    alike = mine.percent == theirs.percent and mine.scale == theirs.scale
    if alike and squeezed(mine.value) == squeezed(theirs.value):
        return bool(mine.value)  # two units without a value equal nothing
    try:
        a, b = _scaled(mine), _scaled(theirs)
    except Unreadable:
        return _words(mine, theirs)
    if mine.percent == theirs.percent:
        return _angles(mine, theirs, a, b, arithmetic)
    # 50% is answered by 0.5 and by 50.
    percent, plain = (a, b) if mine.percent else (b, a)
    hundred = Node("multiply", (number_node(100), plain))
    return any_of(arithmetic.equal(percent, plain), arithmetic.equal(percent, hundred))


def _angles(
    mine: Quantity, theirs: Quantity, a: Node, b: Node, arithmetic: Arithmetic
) -> bool | None:
    """60 degrees equal 60, and also pi/3."""
    equal = arithmetic.equal(a, b)
    degrees = [q.unit == "degree^1" for q in (mine, theirs)]
    if equal is True or degrees[0] == degrees[1]:
        return equal
    half_turn = Node("divide", (Node("constant", value="pi"), number_node(180)))
    plain = theirs if degrees[0] else mine
    if plain.unit not in ("", "radian^1") or "\\pi" not in plain.value:
        return equal
    if degrees[0]:
        a = Node("multiply", (a, half_turn))
    else:
        b = Node("multiply", (b, half_turn))
    return any_of(equal, arithmetic.equal(a, b))


def _scaled(q: Quantity) -> Node:
    node = read(q.value)
    return node if q.scale == 1 else Node("multiply", (node, number_node(q.scale)))


def _words(mine: Quantity, theirs: Quantity) -> bool | None:
    """The verdict where a side cannot be parsed. Words equal only themselves, and an unreadable
    text is no number; None leaves the rest to math-verify.
    """
    if numeral(theirs.value) is not None:
        return False
    if _WORD.search(mine.value) or _WORD.search(theirs.value):
        return False
    return None


def _based(answer: str, gold: str) -> bool | None:
    """Compares numbers with a base, 204_5: the digits and the base must be the same."""
    mine, theirs = (_BASE.match(text.replace(TEXT, "")) for text in (answer, gold))
    if not any(match and match[1][0].isdigit() for match in (mine, theirs)):
        return NotImplemented
    if mine is None or theirs is None:
        return False
    bases = [_BASES.get(match[2], match[2]) for match in (mine, theirs)]
    return bases[0] == bases[1] and mine[1].lower().lstrip("0") == theirs[1].lower().lstrip("0")
