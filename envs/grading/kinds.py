"""Compares answers that have a notation of their own: choices, approximations, times, ratios,
matrices, residues.

Each function takes two texts, an `Arithmetic` and `again`, which compares two parts of them. It
returns NotImplemented for texts of another kind.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from tutelage.envs.grading.arithmetic import (
    Arithmetic,
    Equal,
    all_of,
    any_of,
    matched,
    rational,
    read,
)
from tutelage.envs.grading.numbers import numeral
from tutelage.envs.grading.split import listed, squeezed
from tutelage.envs.grading.syntax import Node, Unreadable
from tutelage.envs.grading.text import ROW, TEXT, stripped

MOST = 60  # cells of a matrix

# --- choices ------------------------------------------------------------------------------------


_LABEL = re.compile(r"^\(?\s*([A-Z])\s*\)?$")
_LABELLED = re.compile(
    rf"^\(\s*([A-Z])\s*\)[\s:.{TEXT}]*(\S.*)$|^([A-Z])\s*[).:][\s{TEXT}]*(\S.*)$"
)
_CHOICE = re.compile(
    rf"^(?:option|choice|answer|选项?|选择|答案)[\s:{TEXT}]*(?=\(?[A-Z]\b)", re.IGNORECASE
)


# How the text beside a label never begins: these make `A < B` or `A is wrong` of it.
_NO_TEXT = re.compile(
    r"[+*/^=<>!|]|-(?![\d\\.])|(?:not|or|and|nor|vs|is|are|was|isn't)(?![A-Za-z])"
    r"|\\(?:ne|le|ge|to|in|cup|cap|pm)(?![A-Za-z])"
)


def label(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """Choices: A, (A), `A. 5`, Option A. Of a label with its text either is enough."""
    mine, theirs = _labelled(answer), _labelled(gold)
    if mine == ("", answer) and theirs == ("", gold):
        return NotImplemented
    if mine[0] and theirs[0]:
        others = {letter for _, text in (mine, theirs) if (letter := _labelled(text)[0])}
        return mine[0] == theirs[0] and others <= {mine[0]}
    (letter, text), other = (mine, gold) if mine[0] else (theirs, answer)
    if not text or not letter:
        return NotImplemented if len(other) > 1 and not text else False
    return again(text, other) if mine[0] else again(other, text)


def _labelled(text: str) -> tuple[str, str]:
    """(the label or "", the text that it stands for)."""
    text = _CHOICE.sub("", text)
    if match := _LABEL.match(text):
        return match[1], ""
    if (match := _LABELLED.match(text)) and not _NO_TEXT.match(match[2] or match[4]):
        return match[1] or match[3], match[2] or match[4]
    return "", text


# --- approximations, times and ratios ------------------------------------------------------------


def approximate(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    r"""`\pi\approx 3.14` gives both; a gold after `\approx` is the number itself."""
    if "\\approx" not in answer + gold:
        return NotImplemented
    golds = [part for part in gold.split("\\approx") if part.strip()]
    parts = [part for part in answer.split("\\approx") if part.strip()]
    if _LABEL.match(gold) or _far(parts):
        return len(parts) == 1 and again(parts[0], gold)
    if len(golds) != 1 or not parts:
        return any(squeezed(p) == squeezed(golds[-1]) for p in parts) if golds else False
    return any_of(*(again(part, golds[0]) for part in parts[:3]))


def _far(parts: list[str]) -> bool:
    """Whether two neighbours are numbers too far apart to be approximations: 2 \\approx 3."""
    values = [value for part in parts if (value := numeral(stripped(part))) is not None]
    return any(abs(a - b) > max(Fraction(1, 2), abs(a) / 10) for a, b in itertools.pairwise(values))


_CLOCK = re.compile(
    rf"^(\d{{1,2}})\s*(?::\s*(\d{{2}})(?:\s*:\s*(\d{{2}}))?)?[\s{TEXT}]*([ap])\.?\s*m\.?$|^(\d{{1,2}}):(\d{{2}})(?::(\d{{2}}))?$",
    re.IGNORECASE,
)


_TO = re.compile(rf"(?<=[\d}}])[\s{TEXT}]+to[\s{TEXT}]+(?=[\d\\])")  # 2 to 3


def clock(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """Times of the day, and ratios, which a colon writes too."""
    mine, theirs = _CLOCK.match(answer), _CLOCK.match(gold)
    if mine and theirs:
        return _times(mine, theirs)
    if ":" in answer + gold:
        answer, gold = _TO.sub(":", answer), _TO.sub(":", gold)
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
    if any(rational(node) == 0 for node in (*first, *second)):  # crosswise 0:1 would equal 0:0
        return all_of([arithmetic.equal(a, b) for a, b in zip(first, second, strict=True)])
    return all_of(crossed)


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


# Products and powers of matrices, which are still to be computed.
_MORE = re.compile(r"\\begin.*\\begin|\\end\s*\{\s*\w+\s*\}[)\]\s]*\^", re.DOTALL)


def matrix(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """Cell by cell; the brackets of a matrix don't matter, the bars of a determinant do."""
    if "\\begin" not in answer + gold:
        return NotImplemented
    mine, theirs = _cells(answer), _cells(gold)
    if mine is None or theirs is None:
        if "=" in answer + gold:
            return NotImplemented
        one = [
            found is not None or _MORE.search(text) is None
            for found, text in ((mine, answer), (theirs, gold))
        ]
        return False if all(one) else None
    if mine[0] != theirs[0] or [len(row) for row in mine[1]] != [len(row) for row in theirs[1]]:
        return False
    return all_of(
        [
            again(a, b)
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


_REMAINDER = re.compile(r"^[\d+*^(){} -]+\\bmod\s*\d+(?:\s*=.*)?$")


def modular(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    """Residues: `n\\equiv 3\\pmod 7`. A gold without a modulus is a number, not a residue class."""
    found = [_MOD.search(text) for text in (answer, gold)]
    if found[1] is None and _REMAINDER.match(answer):
        return NotImplemented  # an operation on two numbers
    if not any(found):
        if any("\\equiv" in text for text in (answer, gold)):
            return _congruence_free(answer, gold, arithmetic, again)
        return NotImplemented
    if not all(found):
        return False
    sides = [
        (text[: match.start()], stripped(re.sub(r"[)\s]+$", "", match[1].strip()).lstrip("(")))
        for text, match in zip((answer, gold), found, strict=True)
        if match
    ]
    (mine, m), (theirs, n) = sides
    if (modulus := again(m, n)) is not True:
        return modulus
    residues = [_residues(text) for text in (mine, theirs)]
    if residues[0][0] and residues[1][0] and squeezed(residues[0][0]) != squeezed(residues[1][0]):
        return False
    parts = [listed(text).parts for text in (residues[0][1], residues[1][1])]
    if len(parts[0]) != len(parts[1]):
        return False
    return matched(parts[0], parts[1], lambda a, b: _congruent(a, b, n, arithmetic, again))


def _residues(text: str) -> tuple[str, str]:
    """(the name, the residue) before a modulus."""
    for sign in ("\\equiv", "="):
        if sign in text:
            name, _, rest = text.rpartition(sign)
            return stripped(name), stripped(rest)
    return "", stripped(text)


def _congruent(a: str, b: str, modulus: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    if (found := again(a, b)) is True:
        return True
    values = [numeral(stripped(text)) for text in (a, b, modulus)]
    if None in values or values[2] == 0:
        return found
    return (values[0] - values[1]) % values[2] == 0  # type: ignore[operator]


def _congruence_free(answer: str, gold: str, arithmetic: Arithmetic, again: Equal) -> bool | None:
    parts = [text.rpartition("\\equiv")[2] for text in (answer, gold)]
    return again(parts[0], parts[1])
