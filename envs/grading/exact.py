"""Computes the exact value of an expression without symbols, where it is rational.

It knows integers of a bounded size, fractions, powers, perfect roots, factorials, binomials and
floors, so that a gold integer or a tiny fraction is compared without any tolerance. Work is bounded
twice: no number has more than MAX_BITS bits, and all numbers of one expression together have at
most EFFORT bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from tutelage.envs.grading.syntax import Node, Unreadable, parse

MAX_BITS = 40_000  # of a numerator or denominator: 2006! has 19,100
EFFORT = 600_000  # bits of all the numbers on the way


class NotRational(ValueError):
    """Not a rational number, or none within the bounds."""


def exact(text: str) -> Fraction | None:
    """The rational number that `text` writes; None if it writes none, or one out of bounds."""
    try:
        return evaluate(parse(text))
    except (Unreadable, NotRational):
        return None


def evaluate(node: Node) -> Fraction:
    """The value of a tree. Raises `NotRational`."""
    return _Evaluation().value(node)


class _Evaluation:
    def __init__(self) -> None:
        self.left = EFFORT

    def value(self, node: Node) -> Fraction:
        if node.op == "number":
            assert isinstance(node.value, Fraction)
            return self.kept(node.value)
        if node.op == "power":
            return self.kept(self.power(node))
        compute = _OPERATIONS.get(node.op)
        if compute is None:
            raise NotRational(node.op)
        arguments = [self.value(arg) for arg in node.args]
        try:
            return self.kept(compute(*arguments))
        except (ZeroDivisionError, TypeError):  # a TypeError: one argument too many
            raise NotRational(node.op) from None

    def kept(self, value: Fraction) -> Fraction:
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        self.left -= bits
        if bits > 2 * MAX_BITS or self.left < 0:
            raise NotRational("too large")
        return value

    def power(self, node: Node) -> Fraction:
        base, exponent = (self.value(arg) for arg in node.args)
        if exponent.denominator > 1:
            if exponent.denominator > 64:
                raise NotRational("a root")
            base, exponent = (
                _root(base, Fraction(exponent.denominator)),
                Fraction(exponent.numerator),
            )
        times = exponent.numerator
        if base == 0:
            if times <= 0:
                raise NotRational("0^0")
            return base
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and bits * abs(times) > 2 * MAX_BITS:
            raise NotRational("too large")
        # Of 1 and -1 only the parity counts, however large the exponent is.
        return base ** (times if bits > 1 else times % 2 if times >= 0 else -(-times % 2))


def _integer(value: Fraction, *, most: int) -> int:
    if value.denominator != 1 or not 0 <= value <= most:
        raise NotRational("no small integer")
    return value.numerator


def _root(value: Fraction, order: Fraction) -> Fraction:
    n = _integer(order, most=64)
    if n == 0 or (value < 0 and n % 2 == 0):
        raise NotRational("no real root")
    sign = -1 if value < 0 else 1
    return sign * Fraction(_whole_root(abs(value.numerator), n), _whole_root(value.denominator, n))


def _whole_root(value: int, n: int) -> int:
    """The integer whose nth power is `value`."""
    if n == 1:
        return value
    if value.bit_length() > 4096:
        raise NotRational("too large")
    if n == 2:
        found = math.isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // n + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**n <= value else (low, middle - 1)
        found = low
    if found**n != value:
        raise NotRational("an irrational root")
    return found


def _double_factorial(value: Fraction) -> Fraction:
    n = _integer(value, most=1000)
    return Fraction(math.prod(range(n, 0, -2)))


def _binomial(n: Fraction, k: Fraction) -> Fraction:
    return Fraction(math.comb(_integer(n, most=5000), _integer(k, most=5000)))


def _mod(value: Fraction, modulus: Fraction) -> Fraction:
    if modulus <= 0:
        raise NotRational("a modulus")
    return value % modulus


def _whole(function: str, *values: Fraction) -> Fraction:
    integers = [abs(_integer(abs(value), most=10**300)) for value in values]
    return Fraction(math.gcd(*integers) if function == "gcd" else math.lcm(*integers))


_OPERATIONS: dict[str, Callable[..., Fraction]] = {
    "add": lambda *values: sum(values, Fraction(0)),
    "negate": lambda value: -value,
    "multiply": lambda *values: math.prod(values, start=Fraction(1)),
    "divide": lambda a, b: a / b,
    "root": _root,
    "mod": _mod,
    "abs": abs,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "factorial": lambda value: Fraction(math.factorial(_integer(value, most=3000))),
    "double_factorial": _double_factorial,
    "binom": _binomial,
    "gcd": lambda *values: _whole("gcd", *values),
    "lcm": lambda *values: _whole("lcm", *values),
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
}


_SYMBOL_SIZE = 10.0  # what a symbol counts as, where only the size of the whole matters
LARGEST = 10**5  # exponents and arguments of functions that are worth computing


def oversized(node: Node) -> bool:
    """Whether its value is astronomically large, as that of a power tower is."""
    try:
        return _size(node) == math.inf
    except OverflowError:
        return True


def _size(node: Node) -> float:
    """An upper bound of its size, roughly; infinite if its value must not be computed."""
    if node.op == "number":
        return abs(float(node.value)) if isinstance(node.value, Fraction) else math.inf
    if not node.args:
        return _SYMBOL_SIZE
    sizes = [_size(arg) for arg in node.args]
    if math.inf in sizes:
        return math.inf
    if node.op == "power":
        if sizes[1] > LARGEST:
            return math.inf
        return min(
            1e300, max(sizes[0], 1.0) ** min(sizes[1], 300.0 / max(1.0, math.log10(sizes[0] + 1)))
        )
    if node.op in ("factorial", "double_factorial", "exp", "binom") and max(sizes) > 5000:
        return math.inf
    if node.op == "multiply":  # at most 1e300: a product costs little, however large it is
        return min(1e300, math.prod(min(size, 1e300) for size in sizes))
    return min(1e300, sum(sizes)) if node.op == "add" else max(sizes[0], *sizes)
