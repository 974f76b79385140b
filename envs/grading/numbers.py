"""Reads numerals, and takes off what stands around a value: its unit, a percent sign, `million`.

A numeral is a number written out (integer, decimal, fraction, mixed number, power, scientific
notation, repeating decimal); it is read as a `Fraction`, without tolerance. An expression whose
value must be computed (`10!`) is no numeral: see `exact`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from tutelage.envs.grading import units
from tutelage.envs.grading.text import TEXT, repeating, stripped

MAX_DIGITS = 400  # digits in a number; beyond them nothing is a plausible answer
MAX_EXPONENT = 2000  # powers of ten and of integers that are written out exactly

_INT = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DEC = rf"(?:{_INT}(?:\.\d*)?|\.\d+)"
_EXP = r"(?:\{\s*([+-]?\s*\d{1,5})\s*\}|\(\s*([+-]?\d{1,5})\s*\)|([+-]?\d{1,5}))"
_SIGN = r"^([+-]?)\s*"
_DECIMAL = re.compile(rf"{_SIGN}({_DEC})$")
_REPEATING = re.compile(rf"{_SIGN}(\d*)\.(\d*)\((\d+)\)$")
_RATIO = re.compile(rf"{_SIGN}({_DEC})\s*/\s*([+-]?)\s*({_DEC})$")
_FRAC = re.compile(
    rf"{_SIGN}\\frac\s*(?:\{{\s*([+-]?)\s*({_DEC})\s*\}}|(\d))\s*"
    rf"(?:\{{\s*([+-]?)\s*({_DEC})\s*\}}|(\d))$"
)
_PART = r"(?:\{\s*(\d+)\s*\}|(\d))"
_MIXED = re.compile(rf"{_SIGN}({_INT})\s*\\frac\s*{_PART}\s*{_PART}$")
_MIXED_JOINED = re.compile(rf"{_SIGN}({_INT})\s+(\d+)\s*/\s*(\d+)$")
_E_NOTATION = re.compile(rf"{_SIGN}({_DEC})\s?[eE]([+-]?\d{{1,5}})$")
_SCIENTIFIC = re.compile(rf"{_SIGN}({_DEC})\s*[*xX]\s*10\s*\^\s*{_EXP}$")
_POWER = re.compile(rf"{_SIGN}({_INT})\s*\^\s*{_EXP}$")


def numeral(text: str) -> Fraction | None:
    """The number that `text` writes, or None if it is no numeral (or absurdly long)."""
    text = text.replace(TEXT, " ").strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    # ASCII only: the patterns' \d and int() would take digits of any script.
    if sum(map(str.isdigit, text)) > MAX_DIGITS or not text.isascii():
        return None
    for pattern, read in _GRAMMAR:
        if match := pattern.match(text):
            try:
                return read(*(group or "" for group in match.groups()))
            except (ZeroDivisionError, OverflowError):
                return None
    return None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _decimal(text: str) -> Fraction:
    """A decimal of the grammar, also `42.` and `.5`, which Fraction itself may refuse."""
    whole, _, part = text.replace(",", "").replace(" ", "").partition(".")
    return Fraction(int(f"{whole}{part}" or "0"), 10 ** len(part))


def _repeating(sign: str, whole: str, fixed: str, block: str) -> Fraction:
    period = Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(fixed))
    return _signed(sign, _decimal(f"{whole}.{fixed}") + period)


def _ratio(sign: str, top: str, below: str, bottom: str) -> Fraction:
    return _signed(sign, _signed(below, _decimal(top) / _decimal(bottom)))


def _frac(
    sign: str, above: str, top: str, top_digit: str, below: str, bottom: str, bottom_digit: str
) -> Fraction:
    value = _ratio(sign, top or top_digit, below, bottom or bottom_digit)
    return _signed(above, value)


def _mixed(sign: str, whole: str, *parts: str) -> Fraction:
    top, bottom = [int(part) for part in parts if part]
    return _signed(sign, _decimal(whole) + Fraction(top, bottom))


def _scaled(sign: str, digits: str, *exponents: str) -> Fraction:
    return _signed(sign, _decimal(digits) * _to(Fraction(10), "".join(exponents)))


def _power(sign: str, base: str, *exponents: str) -> Fraction:
    # 40 digits: 10^40 to the 2000th is 80,000 digits, still a matter of microseconds
    if len(base) > 40:
        raise OverflowError
    return _signed(sign, _to(_decimal(base), "".join(exponents)))


def _to(base: Fraction, exponent: str) -> Fraction:
    times = int(exponent.replace(" ", ""))
    if abs(times) > MAX_EXPONENT or (base == 0 and times <= 0):
        raise OverflowError
    return base**times


_GRAMMAR = (
    (_DECIMAL, lambda sign, digits: _signed(sign, _decimal(digits))),
    (_REPEATING, _repeating),
    (_RATIO, _ratio),
    (_FRAC, _frac),
    (_MIXED, _mixed),
    (_MIXED_JOINED, _mixed),
    (_E_NOTATION, _scaled),
    (_SCIENTIFIC, _scaled),
    (_POWER, _power),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A value and what stands around it.

    bare: the unit is one letter outside `\\text{}`, which may be a variable: `3 m`.
    """

    value: str
    unit: str = ""
    percent: bool = False
    scale: Fraction = Fraction(1)
    bare: bool = False


_PERCENT = re.compile(
    rf"[\s{TEXT}]*(?:\\?%|\bper\s?cent(?:age)?\b|\bpercentage points\b)\s*$", re.IGNORECASE
)
_MINUTES = re.compile(
    r"^(-?)(\d+)\s*\^\\circ\s*(\d+(?:\.\d+)?)\s*'(?:\s*(\d+(?:\.\d+)?)\s*(?:''|\"))?$"
)


_IN_FUNCTIONS = re.compile(
    r"(?:sin|cos|cis|tan|cot|csc|exp|ln|log)(?![a-z])"
    r"|sec(?![a-z]|(?:\s*\^\s*\{?-?\d\}?)?[\s)}]*$)"  # a second, where nothing follows
)
_TEMPERATURE = re.compile(rf"\^\\circ[\s{TEXT}]*[CFK](?![A-Za-z])")


def quantity(text: str) -> Quantity:
    """Takes a text apart: `\\$2.5\\text{ million}`, `36\\pi cm^3`, `50\\%`, `30^\\circ 15'`."""
    text = repeating(text)
    if match := _PERCENT.search(text):
        return Quantity(value=stripped(text[: match.start()]), percent=True)
    if angle := _MINUTES.match(text):
        value = Fraction(angle[2]) + Fraction(angle[3]) / 60 + Fraction(angle[4] or 0) / 3600
        return Quantity(value=f"{angle[1]}{value}", unit="degree^1")
    if "^\\circ" in text and not _IN_FUNCTIONS.search(text) and not _TEMPERATURE.search(text):
        core = text.replace("^\\circ", " ")  # 180^\circ-2x: degrees throughout
        return Quantity(value=stripped(core), unit="degree^1")
    core, unit, bare = ("", "", False) if _IN_FUNCTIONS.search(text) else units.split(text)
    core = core or text
    core, scale = units.scaled(core)
    return Quantity(value=stripped(core), unit=unit, scale=scale, bare=bare)
