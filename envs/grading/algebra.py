"""Decides by their values whether two expressions are equal. Runs inside the grading worker.

Constants are compared at two precisions, hundreds of digits apart: a real difference keeps its
size, one that is rounding shrinks with the precision. So no tolerance is absolute, and 2^{-98} is
not 2^{-99}. Expressions with symbols are compared at fixed points, first positive, then of both
signs. A point does not count if an even root, a logarithm or a power is taken there of a negative
value that depends on a symbol (`\\sqrt{ab}` is `\\sqrt a\\sqrt b` for lengths). Expressions that
are defined for whole numbers only (`n!`, `(-1)^n`) are compared at whole numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath import mp

from tutelage.envs.grading.arithmetic import rational
from tutelage.envs.grading.shapes import same
from tutelage.envs.grading.syntax import FUNCTIONS, Node
from tutelage.envs.grading.text import ROW, TEXT

CONSTANTS = (300, 1000)  # digits of the two precisions, without symbols
POINTS = (60, 300)  # and at every point
ENOUGH = 3  # points at which both sides are defined
MOST_NODES = 500  # of both sides: each is evaluated at every point, to hundreds of digits
LARGEST = 10**5  # exponents of e and arguments of factorials


class Undefined(ArithmeticError):
    """No value at this point."""


class TooLarge(ArithmeticError):
    """A value that is not worth computing."""


def decide(answer: str, gold: str) -> tuple[bool, str] | None:
    """(correct, reason) of two plain texts, or None if they can't be read here."""
    found = same(answer, gold, Numeric())
    return None if found is None else (found, "symbolic")


def plain(text: str) -> str:
    """As TeX again, which math-verify reads: degrees as a factor."""
    text = text.replace(ROW, "\\\\ ").replace(TEXT, " ")
    return text.replace("^\\circ", "*\\pi/180 ") if "^\\circ" in text else text


class Numeric:
    """The arithmetic of high precision. See `shapes.Arithmetic`."""

    def equal(self, a: Node, b: Node, /) -> bool | None:
        values = rational(a), rational(b)
        if None not in values:
            return values[0] == values[1]
        if a == b:
            return True
        return _attempt(lambda: _equal(a, b))

    def real(self, a: Node, /) -> Fraction | None:
        value = rational(a)
        if value is not None or a.symbols():
            return value
        return _attempt(lambda: _real(a))

    def ratio(self, a: Node, b: Node, /) -> int | None:
        return _attempt(lambda: _ratio(a, b))


def _attempt(compute: Callable[[], Any]) -> Any:
    """The result of `compute`; None where it is too large, or undefined everywhere."""
    try:
        return compute()
    except (ArithmeticError, ValueError, TypeError):
        return None


# --- comparing -----------------------------------------------------------------------------------


def _equal(a: Node, b: Node) -> bool | None:
    _check(a, b)
    symbols = sorted(a.symbols() | b.symbols())
    if not symbols:
        low, high = (_pair(a, b, {}, digits) for digits in CONSTANTS)
        return _close(low, high, CONSTANTS)
    verdicts = [
        _close(low, high, POINTS)
        for low, high in _everywhere(lambda at, digits: _pair(a, b, at, digits), symbols)
    ]
    return all(verdicts) if verdicts else None


def _everywhere(
    values: Callable[[Mapping[str, Fraction], int], tuple[Any, Any]], symbols: list[str]
) -> list[tuple[Any, Any]]:
    """The values, at both precisions, at the points that count; none if those are too few."""
    for points in (_reals(symbols), _wholes(symbols)):
        found = []
        for point in points:
            try:
                found.append((values(point, POINTS[0]), values(point, POINTS[1])))
            except (Undefined, ZeroDivisionError):
                continue
        if len(found) >= ENOUGH:
            return found
    return []


def _close(low: tuple[Any, Any], high: tuple[Any, Any], digits: tuple[int, int]) -> bool:
    """Whether the difference is rounding, from the values at both precisions."""
    with mp.workdps(digits[1]):
        rough, fine = abs(low[0] - low[1]), abs(high[0] - high[1])
        size = max(abs(high[0]), abs(high[1]))
        if fine <= size * mp.mpf(10) ** (30 - digits[1]):  # equal in all but the last 30 digits
            return True
        # Where much cancels, more digits are lost; but rounding shrinks with the precision, at
        # least by half of the digits that were added.
        return bool(rough > 0 and fine <= rough * mp.mpf(10) ** ((digits[0] - digits[1]) // 2))


def _pair(a: Node, b: Node, point: Mapping[str, Fraction], digits: int) -> tuple[Any, Any]:
    with mp.workdps(digits):
        at = {name: mp.mpf(value.numerator) / value.denominator for name, value in point.items()}
        values = _value(a, at), _value(b, at)
        if not all(mp.isfinite(value) for value in values):
            raise Undefined
        return values


def _ratio(a: Node, b: Node) -> int | None:
    _check(a, b)
    symbols = sorted(a.symbols() | b.symbols())
    found = _everywhere(lambda at, digits: _pair(a, b, at, digits), symbols)
    if not found:
        return None
    (_, first) = found[0]
    with mp.workdps(POINTS[1]):
        for low, high in found[1:]:
            # a1 b2 = a2 b1, at both precisions
            crossed = [
                (base[0] * value[1], base[1] * value[0])
                for base, value in ((found[0][0], low), (first, high))
            ]
            if not _close(crossed[0], crossed[1], POINTS):
                return 0
        if first[1] == 0 or first[0] == 0:
            return None
        quotient = first[0] / first[1]
        if abs(mp.im(quotient)) > abs(quotient) * mp.mpf(10) ** -30:
            return 0
        return 1 if mp.re(quotient) > 0 else -1


def _real(a: Node) -> Fraction | None:
    _check(a)
    with mp.workdps(POINTS[0]):
        value = _value(a, {})
        if not mp.isfinite(value) or abs(mp.im(value)) > abs(value) * mp.mpf(10) ** -40:
            return None
        sign, mantissa, exponent, _ = mp.re(value)._mpf_  # mpmath's own binary form, exact
        return (-1 if sign else 1) * Fraction(int(mantissa)) * Fraction(2) ** exponent


def _check(*nodes: Node) -> None:
    if sum(map(_size, nodes)) > MOST_NODES:
        raise TooLarge


def _size(node: Node) -> int:
    return 1 + sum(map(_size, node.args))


def _reals(symbols: list[str]) -> list[dict[str, Fraction]]:
    """Fixed points: five positive, then five of both signs."""
    dice = random.Random("grading")  # a fixed seed: the same verdict in every process
    points = []
    for at in range(10):
        signs = [1 if at < 5 else dice.choice((1, -1)) for _ in symbols]
        if at == 5:
            signs = [-1] * len(symbols)
        points.append(
            {
                # Over a prime, so that no point is a value at which something special happens.
                name: sign * Fraction(dice.randrange(300, 4000), 1013)
                for name, sign in zip(symbols, signs, strict=True)
            }
        )
    return points


def _wholes(symbols: list[str]) -> list[dict[str, Fraction]]:
    dice = random.Random("whole")
    return [{name: Fraction(dice.randrange(1, 8) + at) for name in symbols} for at in range(7)]


# --- the value of a tree -------------------------------------------------------------------------


def _value(node: Node, at: Mapping[str, Any]) -> Any:
    """The value at a point, at mpmath's present precision."""
    if node.op == "number":
        assert isinstance(node.value, Fraction)
        return mp.mpf(node.value.numerator) / node.value.denominator
    if node.op == "symbol":
        return at[str(node.value)]
    if node.op == "constant":
        return {"pi": mp.pi(), "e": mp.e(), "i": mp.mpc(0, 1)}[str(node.value)]
    if node.op == "power":
        return _power(node, at)
    arguments = [_value(arg, at) for arg in node.args]
    if node.op in ("root", "ln", "log", "lg"):
        depends = bool(node.args[0].symbols())
        if depends and mp.im(arguments[0]) == 0 and mp.re(arguments[0]) < 0:
            order = rational(node.args[1]) if node.op == "root" else None
            if order is None or order.denominator > 1 or order.numerator % 2 == 0:
                raise Undefined
    compute = _COMPUTE.get(node.op)
    if compute is not None:
        return compute(*arguments)
    if node.op in FUNCTIONS and len(arguments) == 1:
        return _function(node.op, arguments[0])
    if len(node.op) == 1:  # an unknown f(x): some function of its arguments, the same on both sides
        seed = random.Random(node.op)
        return mp.sin(sum(arg * mp.mpf(seed.randrange(3, 99)) / 17 for arg in arguments) + 1)
    raise ValueError(node.op)


def _power(node: Node, at: Mapping[str, Any]) -> Any:
    base = _value(node.args[0], at)
    exponent = _value(node.args[1], at)
    if base == 0:
        if mp.re(exponent) > 0:
            return mp.mpf(0)
        raise Undefined
    if abs(exponent) * (abs(mp.log(abs(base))) + 1) > LARGEST:
        raise TooLarge
    fraction = rational(node.args[1])
    if mp.im(base) == 0 and mp.re(base) < 0 and mp.im(exponent) == 0 and exponent != int(exponent):
        if fraction is not None and fraction.denominator % 2:  # (-8)^{1/3} is -2
            sign = -1 if fraction.numerator % 2 else 1
            return sign * mp.power(-base, exponent)
        if node.symbols():
            raise Undefined
    return mp.power(base, int(exponent) if mp.isint(exponent) else exponent)


def _nth_root(value: Any, order: Any) -> Any:
    if order == 0 or abs(order) > 1000:
        raise Undefined
    if mp.im(value) == 0 and mp.re(value) < 0 and order == int(order) and int(order) % 2:
        return -mp.power(-value, 1 / order)
    return mp.sqrt(value) if order == 2 else mp.power(value, 1 / order)


def _ln(value: Any) -> Any:
    if value == 0:
        raise Undefined
    return mp.log(value)


def _exp(value: Any) -> Any:
    if abs(value) > LARGEST:
        raise TooLarge
    return mp.exp(value)


def _factorial(value: Any) -> Any:
    if abs(value) > 2000:
        raise TooLarge
    if mp.im(value) == 0 and mp.isint(value) and value < 0:
        raise Undefined
    return mp.gamma(value + 1)


def _binomial(n: Any, k: Any) -> Any:
    if max(abs(n), abs(k)) > 2000:
        raise TooLarge
    return mp.binomial(n, k)


def _whole(value: Any, function: Callable[[Any], Any]) -> Any:
    """A floor or a ceiling; Undefined so near to a whole number that rounding would decide it."""
    nearest = mp.nint(value)
    if mp.im(value) != 0 or (value != nearest and abs(value - nearest) < mp.mpf(10) ** -40):
        raise Undefined
    return function(value)


def _real_only(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*values: Any) -> Any:
        if any(mp.im(value) != 0 for value in values):
            raise Undefined
        return function(*(mp.re(value) for value in values))

    return compute


def _product(*values: Any) -> Any:
    found = values[0]
    for value in values[1:]:
        found = found * value
    return found


def _mod(value: Any, modulus: Any) -> Any:
    if modulus == 0:
        raise Undefined
    return value - modulus * mp.floor(value / modulus)


_COMPUTE: dict[str, Callable[..., Any]] = {
    "add": lambda *values: sum(values[1:], values[0]),
    "negate": lambda value: -value,
    "multiply": _product,
    "divide": lambda a, b: a / b,
    "root": _nth_root,
    "abs": abs,
    "ln": _ln,
    "lg": lambda value: _ln(value) / mp.log(10),
    # Some mean base 10 by it, some e. In a base that nobody means, equal is what is so in any base.
    "log": lambda value: _ln(value) * mp.mpf(811) / 701,
    "exp": _exp,
    "cis": lambda value: _exp(mp.mpc(0, 1) * value),
    "factorial": _factorial,
    "binom": _binomial,
    "floor": lambda value: _whole(value, mp.floor),
    "ceil": lambda value: _whole(value, mp.ceil),
    "max": _real_only(max),
    "min": _real_only(min),
    "mod": _real_only(_mod),
    "Re": lambda value: mp.re(value),
    "Im": lambda value: mp.im(value),
    "sign": lambda value: mp.sign(value),
}
_MPMATH = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec",
           "arccsc": "acsc", "arcsinh": "asinh", "arccosh": "acosh",
           "arctanh": "atanh"}  # fmt: skip


def _function(name: str, value: Any) -> Any:
    if name in ("gcd", "lcm", "double_factorial") or abs(value) > 10**30:
        raise ValueError(name)
    if name.endswith("h") and abs(value) > LARGEST:
        raise TooLarge
    return getattr(mp, _MPMATH.get(name, name))(value)
