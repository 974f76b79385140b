"""What kind of answer two texts are, and whether they are the same one: lists, tuples, sets of
reals, equations, matrices, residues, times, labels, and at the bottom two values.

All of it works on plain TeX (`grading_text.clean`). Whether two values are equal is asked of an
`Arithmetic`: the exact one here in the process, the numerical one in the grading worker. The answer
is True, False, or None: this arithmetic can't tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

from tutelage.envs import grading_sets
from tutelage.envs.grading_exact import NotRational, evaluate, oversized
from tutelage.envs.grading_numbers import Quantity, numeral, quantity
from tutelage.envs.grading_split import (
    Listing,
    brackets,
    grouped,
    joined,
    listed,
    split,
    squeezed,
    ungrouped,
)
from tutelage.envs.grading_syntax import Node, Unreadable, parse
from tutelage.envs.grading_syntax import number as number_node
from tutelage.envs.grading_text import ROW, TEXT, stripped

Equal = Callable[[str, str], bool | None]

DEEPEST = 8  # shapes in shapes
MOST = 60  # parts of a list


class Arithmetic(Protocol):
    """What is asked about expressions."""

    def equal(self, a: Node, b: Node, /) -> bool | None:
        """Whether two expressions are one."""

    def real(self, a: Node, /) -> Fraction | None:
        """The value of a real constant, near enough to sort by."""

    def ratio(self, a: Node, b: Node, /) -> int | None:
        """1 or -1 if a is a positive or negative constant times b, 0 if it is no multiple."""


class Exact:
    """The arithmetic of rational numbers, and of expressions that are written alike.

    With `strict`, only a numeral equals an integer. Afterwards `unsure` says that algebra may know
    more, `oversized` that something is too large to be asked about.
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
        if values[1] is not None and a.symbols():
            return False  # an expression in x is no number
        self._ask(a, b)
        return None

    def real(self, a: Node, /) -> Fraction | None:
        value = rational(a)
        if value is None:
            self._ask(a)
        return value

    def ratio(self, a: Node, b: Node, /) -> int | None:
        if a == b:
            return 1
        self._ask(a, b)
        return None

    def _ask(self, *nodes: Node) -> None:
        self.unsure = True
        self.oversized = self.oversized or any(map(oversized, nodes))


def _numeric(node: Node) -> bool:
    return node.op == "number" or (node.op == "negate" and _numeric(node.args[0]))


def _integral(node: Node) -> bool:
    return node.op == "number" and node.value.denominator == 1  # type: ignore[union-attr]


def rational(node: Node) -> Fraction | None:
    try:
        return evaluate(node)
    except NotRational:
        return None


def same(answer: str, gold: str, arithmetic: Arithmetic, depth: int = 0) -> bool | None:
    """Whether two texts give the same answer."""
    answer, gold = stripped(answer), stripped(gold)
    if not answer or not gold or depth > DEEPEST:
        return False
    if squeezed(answer) == squeezed(gold):
        return True
    for shape in (_approximate, _matrix, _modular, _clock, _equation, _set, _list):
        if (found := shape(answer, gold, arithmetic, depth)) is not NotImplemented:
            return found
    return _value(answer, gold, arithmetic)


def read(text: str) -> Node:
    """The tree of a value. Raises `Unreadable`."""
    value = numeral(text)
    return parse(text) if value is None else number_node(value)


# --- values --------------------------------------------------------------------------------------

_LABEL = re.compile(r"^\(?\s*([A-Z])\s*\)?$")
_LABELLED = re.compile(
    rf"^\(\s*([A-Z])\s*\)[\s:.{TEXT}]*(\S.*)$|^([A-Z])\s*[).:][\s{TEXT}]*(\S.*)$"
)
_CHOICE = re.compile(
    rf"^(?:option|choice|answer|选项?|选择|答案)[\s:{TEXT}]*(?=\(?[A-Z]\b)", re.IGNORECASE
)
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


def _value(answer: str, gold: str, arithmetic: Arithmetic) -> bool | None:
    if (found := _label(answer, gold, arithmetic)) is not NotImplemented:
        return found
    if (found := _based(answer, gold)) is not NotImplemented:
        return found
    if answer.startswith("\\{") and answer.endswith("\\}") and not split(answer[2:-2], ",")[1:]:
        answer = stripped(answer[2:-2])
    if gold.startswith("\\{") and gold.endswith("\\}"):
        gold = stripped(gold[2:-2])
    mine, theirs = quantity(answer), quantity(gold)
    if mine.unit and theirs.unit and mine.unit != theirs.unit:
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
        return bool(mine.value)
    try:
        a, b = _scaled(mine), _scaled(theirs)
    except Unreadable:
        return _words(mine, theirs)
    if mine.percent == theirs.percent:
        return _angles(mine, theirs, a, b, arithmetic)
    percent, plain = (a, b) if mine.percent else (b, a)
    hundred = Node("multiply", (number_node(100), plain))
    return _any(arithmetic.equal(percent, plain), arithmetic.equal(percent, hundred))


def _angles(
    mine: Quantity, theirs: Quantity, a: Node, b: Node, arithmetic: Arithmetic
) -> bool | None:
    """60 is 60 degrees, and so is pi/3."""
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
    return _any(equal, arithmetic.equal(a, b))


def _scaled(q: Quantity) -> Node:
    node = read(q.value)
    return node if q.scale == 1 else Node("multiply", (node, number_node(q.scale)))


def _words(mine: Quantity, theirs: Quantity) -> bool | None:
    """Words equal themselves only, and nothing unreadable is a number; the rest is asked
    elsewhere."""
    if numeral(theirs.value) is not None:
        return False
    if _WORD.search(mine.value) or _WORD.search(theirs.value):
        return False
    return None


def _any(*found: bool | None) -> bool | None:
    return True if True in found else None if None in found else False


def _all(found: list[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True


def _label(answer: str, gold: str, arithmetic: Arithmetic) -> bool | None:
    """Choices: A, (A), `A. 5`, Option A. A label with its text is as good as either."""
    mine, theirs = _labelled(answer), _labelled(gold)
    if mine == ("", answer) and theirs == ("", gold):
        return NotImplemented
    if mine[0] and theirs[0]:
        return mine[0] == theirs[0]
    (label, text), other = (mine, gold) if mine[0] else (theirs, answer)
    if not text or not label:
        return NotImplemented if len(other) > 1 and not text else False
    return (
        same(text, other, arithmetic, DEEPEST)
        if mine[0]
        else same(other, text, arithmetic, DEEPEST)
    )


def _labelled(text: str) -> tuple[str, str]:
    """(the label or "", the text that it stands for)."""
    text = _CHOICE.sub("", text)
    if match := _LABEL.match(text):
        return match[1], ""
    if match := _LABELLED.match(text):
        return match[1] or match[3], match[2] or match[4]
    return "", text


def _based(answer: str, gold: str) -> bool | None:
    """Numbers of a base: the digits and the base are compared."""
    mine, theirs = (_BASE.match(text.replace(TEXT, "")) for text in (answer, gold))
    if not any(match and match[1][0].isdigit() for match in (mine, theirs)):
        return NotImplemented
    if mine is None or theirs is None:
        return False
    bases = [_BASES.get(match[2], match[2]) for match in (mine, theirs)]
    return bases[0] == bases[1] and mine[1].lower().lstrip("0") == theirs[1].lower().lstrip("0")


# --- approximations, times and ratios ------------------------------------------------------------


def _approximate(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    r"""`\pi\approx 3.14` gives both; a gold after `\approx` is the number itself."""
    if "\\approx" not in answer + gold:
        return NotImplemented
    golds = [part for part in gold.split("\\approx") if part.strip()]
    parts = [part for part in answer.split("\\approx") if part.strip()]
    if len(golds) != 1 or not parts:
        return any(squeezed(p) == squeezed(golds[-1]) for p in parts) if golds else False
    return _any(*(same(part, golds[0], arithmetic, depth + 1) for part in parts[:3]))


_CLOCK = re.compile(
    rf"^(\d{{1,2}})\s*(?::\s*(\d{{2}})(?:\s*:\s*(\d{{2}}))?)?[\s{TEXT}]*([ap])\.?\s*m\.?$|^(\d{{1,2}}):(\d{{2}})(?::(\d{{2}}))?$",
    re.IGNORECASE,
)


def _clock(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    """Times of the day, and ratios, which a colon writes too."""
    mine, theirs = _CLOCK.match(answer), _CLOCK.match(gold)
    if mine and theirs and (mine[4] or theirs[4] or depth == 0):
        return _times(mine, theirs)
    ratios = [re.split(r"\s*:\s*", text) for text in (answer, gold)]
    if (len(ratios[0]) < 2 and len(ratios[1]) < 2) or _LABELLED.match(answer):
        return NotImplemented
    nodes = []
    for parts in ratios:
        try:
            nodes.append([read(part) for part in parts])
        except Unreadable:
            return NotImplemented
    if len(nodes[0]) != len(nodes[1]):
        one, many = sorted(nodes, key=len)
        if len(one) == 1 and len(many) == 2:  # 1:2 is a half
            return arithmetic.equal(one[0], Node("divide", (many[0], many[1])))
        return False
    first, second = nodes
    crossed = [
        arithmetic.equal(Node("multiply", (a, second[0])), Node("multiply", (b, first[0])))
        for a, b in zip(first, second, strict=True)
    ]
    if any(rational(node) == 0 for node in (first[0], second[0])):
        return False
    return _all(crossed)


def _times(mine: re.Match[str], theirs: re.Match[str]) -> bool:
    halves = [(match[4] or "").lower() for match in (mine, theirs)]
    clocks = [_minutes(match) for match in (mine, theirs)]
    if clocks[0] == clocks[1]:
        return not all(halves) or halves[0] == halves[1]
    if all(halves) or not any(halves):
        return False
    said, plain = (0, 1) if halves[0] else (1, 0)  # 3:30 PM is 15:30
    hour, *rest = clocks[said]
    return (hour % 12 + (12 if halves[said] == "p" else 0), *rest) == clocks[plain] and hour <= 12


def _minutes(match: re.Match[str]) -> tuple[int, int, int]:
    return int(match[1] or match[5]), int(match[2] or match[6] or 0), int(match[3] or match[7] or 0)


# --- matrices and residues -----------------------------------------------------------------------

_MATRIX = re.compile(
    r"^(.*?)\\begin\s*\{\s*([pbvBV]?(?:small)?matrix|array|vmatrix|Vmatrix)\s*\}\s*(?:\{[lcr|\s]*\})?(.*)"
    r"\\end\s*\{\s*\2\s*\}(.*)$",
    re.DOTALL,
)


def _matrix(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    """Cell by cell; the brackets of a matrix don't matter, the bars of a determinant do."""
    if "\\begin" not in answer + gold:
        return NotImplemented
    mine, theirs = _cells(answer), _cells(gold)
    if mine is None or theirs is None:
        return _equation(answer, gold, arithmetic, depth) if "=" in answer + gold else None
    if mine[0] != theirs[0] or [len(row) for row in mine[1]] != [len(row) for row in theirs[1]]:
        return False
    return _all(
        [
            same(a, b, arithmetic, depth + 1)
            for row, other in zip(mine[1], theirs[1], strict=True)
            for a, b in zip(row, other, strict=True)
        ]
    )


def _cells(text: str) -> tuple[bool, list[list[str]]] | None:
    """(whether it is a determinant, the rows), a factor before the matrix multiplied in."""
    match = _MATRIX.match(text)
    if match is None or match[4].strip(" )]") or "\\begin" in match[3]:
        return None
    factor = stripped(re.sub(r"[(\[]$", "", match[1].strip()))
    if "=" in factor:
        factor = stripped(factor.rpartition("=")[2])
    before = f"({factor})*" if factor and factor != "-" else factor
    rows = [row.split("&") for row in match[3].split(ROW) if row.strip()]
    if sum(len(row) for row in rows) > MOST:
        return None
    determinant = match[2][0] in "vV" or (match[1].strip() == "|")
    return determinant, [
        [f"{before}({cell.strip()})" if before else cell for cell in row] for row in rows
    ]


_MOD = re.compile(
    rf"\(?[\s{TEXT}]*(?:\\pmod|\\pod|\\mod|\\bmod|(?<![A-Za-z\\])mod(?:ulo)?(?![A-Za-z]))\s*(.*)$"
)


def _modular(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    """Residues: `n\\equiv 3\\pmod 7`. A gold without a modulus is a number; it is not a class."""
    found = [_MOD.search(text) for text in (answer, gold)]
    if not any(found):
        if any("\\equiv" in text for text in (answer, gold)):
            return _congruence_free(answer, gold, arithmetic, depth)
        return NotImplemented
    if not all(found):
        return False
    sides = [
        (text[: match.start()], stripped(re.sub(r"[)\s]+$", "", match[1].strip()).lstrip("(")))
        for text, match in zip((answer, gold), found, strict=True)
        if match
    ]
    (mine, m), (theirs, n) = sides
    if (modulus := same(m, n, arithmetic, depth + 1)) is not True:
        return modulus
    residues = [_residues(text) for text in (mine, theirs)]
    if residues[0][0] and residues[1][0] and squeezed(residues[0][0]) != squeezed(residues[1][0]):
        return False
    parts = [listed(text).parts for text in (residues[0][1], residues[1][1])]
    if len(parts[0]) != len(parts[1]):
        return False
    return _matched(parts[0], parts[1], lambda a, b: _congruent(a, b, n, arithmetic, depth))


def _residues(text: str) -> tuple[str, str]:
    """(the name, the residue) before a modulus."""
    for sign in ("\\equiv", "="):
        if sign in text:
            name, _, rest = text.rpartition(sign)
            return stripped(name), stripped(rest)
    return "", stripped(text)


def _congruent(a: str, b: str, modulus: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    if (found := same(a, b, arithmetic, depth + 1)) is True:
        return True
    values = [numeral(stripped(text)) for text in (a, b, modulus)]
    if None in values or values[2] == 0:
        return found
    return (values[0] - values[1]) % values[2] == 0  # type: ignore[operator]


def _congruence_free(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    parts = [text.rpartition("\\equiv")[2] for text in (answer, gold)]
    return same(parts[0], parts[1], arithmetic, depth + 1)


# --- sets of real numbers ------------------------------------------------------------------------


def _set(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    """Intervals, inequalities, unions, set builders, excluded points, against each other."""
    if not grading_sets.is_set(answer) and not grading_sets.is_set(gold):
        return NotImplemented
    member = [grading_sets.member(text) for text in (answer, gold)]
    if member[0][0] and member[1][0] and member[0][0] != member[1][0]:
        return False
    if any(name for name, _ in member) and not any(grading_sets.is_set(text) for _, text in member):
        return same(member[0][1], member[1][1], arithmetic, depth + 1)  # x in {1, 2}
    return grading_sets.same_set(answer, gold, read, arithmetic)


# --- equations and names -------------------------------------------------------------------------


def _equation(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    """`m+n=53` answers 53, `f(x)=2x` answers 2x; two equations are compared as equations."""
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
        return _any(False, *(same(text, theirs[0], arithmetic, depth + 1) for text in given))
    if len(mine) == 1:
        return same(mine[0], theirs[-1], arithmetic, depth + 1) if _is_name(theirs[0]) else False
    if squeezed(mine[0]) == squeezed(theirs[0]) and (
        same(mine[-1], theirs[-1], arithmetic, depth + 1) is True
    ):
        return True
    if len(mine) > 2 or len(theirs) > 2:
        return False
    try:
        zeros = [
            Node("add", (read(left), Node("negate", (read(right),))))
            for left, right in (mine, theirs)
        ]
    except Unreadable:
        return _all([same(a, b, arithmetic, depth + 1) for a, b in zip(mine, theirs, strict=True)])
    if not all(zero.symbols() for zero in zeros):
        return False
    ratio = arithmetic.ratio(*zeros)
    return None if ratio is None else ratio != 0


def _gives(left: str, right: str) -> bool:
    """Whether `left = right` says what a quantity is; `2x = 10` is still to be solved."""
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


def _is_name(text: str) -> bool:
    """A name of a value: a symbol, f(x), |AB|, \\angle ABC, (x, y), a word."""
    around = brackets(text)
    if around.opening == "(":
        return all(_is_name(part) for part in split(around.inner, ","))
    return _NAME.match(text) is not None


# --- lists ---------------------------------------------------------------------------------------

_POINT = re.compile(r"^[A-Z]'?\s*(?=\(.*,.*\)$)")


def _list(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    """Values one after the other: in any order, unless brackets or several names order them."""
    if numeral(answer) is not None and numeral(gold) is not None:
        return NotImplemented  # 1,234
    answer, gold = ungrouped(answer), ungrouped(gold)
    if numeral(answer) is not None and numeral(gold) is not None:
        return NotImplemented
    if _POINT.match(answer) or _POINT.match(gold):
        answer, gold = _POINT.sub("", answer), _POINT.sub("", gold)
    mine, theirs = listed(answer), listed(gold)
    signs = any("\\pm" in text or "\\mp" in text for text in (answer, gold))
    if not signs and len(mine.parts) == len(theirs.parts) == 1 and mine.opening == theirs.opening:
        return NotImplemented
    return (
        _any_reading(answer, gold, arithmetic, depth)
        if signs
        else _parts(mine, theirs, arithmetic, depth)
    )


def _any_reading(answer: str, gold: str, arithmetic: Arithmetic, depth: int) -> bool | None:
    """Both signs: the upper ones and the lower ones, or each sign by itself."""
    found: list[bool | None] = []
    for joint in (True, False):
        mine, theirs = listed(answer, signs=joint), listed(gold, signs=joint)
        found.append(_parts(mine, theirs, arithmetic, depth))
        if found[-1] is True:
            break
    return _any(*found)


def _parts(mine: Listing, theirs: Listing, arithmetic: Arithmetic, depth: int) -> bool | None:
    if len(mine.parts) != len(theirs.parts) or len(mine.parts) > MOST:
        return False
    named = [_named(found.parts) for found in (mine, theirs)]
    values = [parts for _, parts in named]
    ordered = mine.ordered or theirs.ordered
    if named[0][0] is None and named[1][0] is None:  # both sides name several things
        return _matched(mine.parts, theirs.parts, lambda a, b: same(a, b, arithmetic, depth + 1))
    if None in (named[0][0], named[1][0]):  # one does: x=1, y=2 against (1, 2)
        ordered = True
        if {mine.brackets, theirs.brackets} - {"", "()"}:
            return False
    elif mine.brackets != theirs.brackets or (
        named[0][0] and named[1][0] and named[0][0] != named[1][0]
    ):
        return False
    if ordered:
        return _all([same(a, b, arithmetic, depth + 1) for a, b in zip(*values, strict=True)])
    return _matched(values[0], values[1], lambda a, b: same(a, b, arithmetic, depth + 1))


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


def _matched(mine: list[str], theirs: list[str], equal: Equal) -> bool | None:
    """Each of one list to one of the other. Equality is transitive: the first that fits will do."""
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
