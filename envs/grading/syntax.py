"""Parses plain TeX (see text.py) into a tree: one expression of numbers, symbols, functions.

A text that can be read in more than one way, or not at all, raises `Unreadable`: `\\sin\\pi/3`,
`12 34`, words, sums and integrals, ellipses. Nothing of a text is ever executed.

A tree is a `Node`: an operation, its operands, and for a leaf its value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from tutelage.envs.grading.text import GREEK

DEEPEST = 40  # nested expressions
MAX_DIGITS = 1000


class Unreadable(ValueError):
    """The text is no expression of this grammar."""


@dataclass(frozen=True, slots=True)
class Node:
    """`op` is number, symbol, constant (pi, e, i), add, multiply, divide, power, negate or the name
    of a function; `value` is the number, or the name of a symbol or constant."""

    op: str
    args: tuple[Node, ...] = ()
    value: Fraction | str | None = None

    def symbols(self) -> frozenset[str]:
        """The names of its symbols."""
        if self.op == "symbol":
            return frozenset((str(self.value),))
        return frozenset().union(*(arg.symbols() for arg in self.args))


def number(value: int | Fraction) -> Node:
    return Node("number", value=Fraction(value))


_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:\((\d+)\)(?=\D|$))?")
_E_NOTATION = re.compile(r"[eE]([+-]?\d{1,5})(?![\d.])")
_EXPONENT_NUMBER = re.compile(r"[+-]?\s*\d+(?:\.\d+)?")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_WORD = re.compile(r"[A-Za-z]+")
_SPACE = re.compile(r"[\s\ue001]+")
_SUBSCRIPT = re.compile(r"\s*_\s*(?:\{([^{}]*)\}|([A-Za-z\d]))")
_BASE = re.compile(r"\s*_\s*(?:\{([^{}]*)\}|(\d|[A-Za-z]))")
_ROOT_ORDER = re.compile(r"\s*\[([^\[\]]*)\]")
_INTEGER_FRACTION = re.compile(
    r"\s*\\frac\s*(?:\{\s*\d+\s*\}|\d)\s*(?:\{\s*\d+\s*\}|\d)(?!\s*[\^!])"
)
_MODULES = re.compile(r"(?<![A-Za-z])(?:np|numpy|math|sympy|cmath|torch)\.(?=[A-Za-z])")

_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc")
_INVERSE = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "acot": "arccot",
    "asec": "arcsec", "acsc": "arccsc", "tg": "tan", "ctg": "cot", "cosec": "csc", "sgn": "sign",
    "sh": "sinh", "ch": "cosh", "arctg": "arctan", "fact": "factorial", "comb": "binom",
    "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh", "arsinh": "arcsinh",
    "arcosh": "arccosh", "artanh": "arctanh",
}  # fmt: skip
FUNCTIONS = frozenset(
    (
        *_CIRCULAR, *("arc" + name for name in _CIRCULAR), "sinh", "cosh", "tanh", "coth",
        "arcsinh", "arccosh", "arctanh", "ln", "log", "lg", "exp", "gcd", "lcm", "max", "min",
        "abs", "floor", "ceil", "factorial", "cis",
        "sign", "Re", "Im",
    )
)  # fmt: skip
_NAMES = sorted(
    (*FUNCTIONS, *_INVERSE, "sqrt", "cbrt", "binom", "pi", "frac"), key=len, reverse=True
)
_GREEK = (
    frozenset(GREEK)
    - {"pi", "sigma_"}
    | {
        "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega",
        "infty", "ell", "hbar", "partial", "Re", "Im",
    }
)  # fmt: skip
_AT_NUMBER = re.compile(r"\(\s*-?\d+(?:\.\d+)?\s*\)")
_CHOICES = re.compile(r"([CP])[\s\ue001]*\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)")
_TWO = re.compile(r"\([^(),]*,[^(),]*\)")
_OPAQUE = frozenset("fghFGH")  # letters that are functions when a parenthesis follows
_CLOSERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_SHORT_WORDS = frozenset(  # of at most three letters, which could be products of symbols
    ("mod", "and", "or", "if", "is", "of", "to", "no", "in", "as", "at", "not", "the", "for", "or")
)


def parse(text: str) -> Node:
    """The tree of the whole text. Raises `Unreadable`."""
    reader = _Reader(_MODULES.sub("", text))
    node = reader.expression(0)
    reader.space()
    if reader.at < len(reader.text):
        raise Unreadable(reader.text[reader.at :])
    return node


class _Reader:
    """Recursive descent over the characters; every method reads from `at` on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.bars = 0  # open |

    # -- characters

    def space(self) -> None:
        if match := _SPACE.match(self.text, self.at):
            self.at = match.end()

    def peek(self) -> str:
        """The next character, or the next command with its backslash; "" at the end."""
        self.space()
        if match := _COMMAND.match(self.text, self.at):
            return match.group()
        return self.text[self.at : self.at + (2 if self.text[self.at : self.at + 1] == "\\" else 1)]

    def accept(self, *tokens: str) -> str | None:
        token = self.peek()
        if token and token in tokens:
            self.at += len(token)
            return token
        return None

    def expect(self, token: str) -> None:
        if self.accept(token) is None:
            raise Unreadable(f"{token} expected")

    # -- grammar

    def expression(self, depth: int) -> Node:
        if depth > DEEPEST:
            raise Unreadable("too deep")
        terms = [self.signed(depth)]
        while (sign := self.accept("+", "-")) is not None:
            term = self.signed(depth)
            terms.append(Node("negate", (term,)) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def signed(self, depth: int) -> Node:
        negative = False
        while (sign := self.accept("+", "-")) is not None:
            negative ^= sign == "-"
        term = self.term(depth)
        return Node("negate", (term,)) if negative else term

    def term(self, depth: int) -> Node:
        """A product. All its factors are operands of one node: a tree of a thousand levels would
        exceed Python's recursion limit.
        """
        above, below = [self.factor(depth)], list[Node]()
        while True:
            if self.accept("*"):
                above.append(self.signed_factor(depth))
            elif self.accept("/"):
                below.append(self.signed_factor(depth))
            elif self.accept("\\bmod"):
                return Node("mod", (_product(above, below), self.signed_factor(depth)))
            elif self.juxtaposed():
                above.append(self.factor(depth))
            else:
                return _product(above, below)

    def signed_factor(self, depth: int) -> Node:
        if self.accept("-"):
            return Node("negate", (self.factor(depth),))
        self.accept("+")
        return self.factor(depth)

    def juxtaposed(self) -> bool:
        """Whether a factor without a sign of multiplication follows. A number may only follow a
        factorial: `4!4!`, but not `12 34`.
        """
        after = self.text[: self.at].rstrip()[-1:]
        token = self.peek()
        if token[:1].isdigit() and after == "!":
            return True
        if token[:1].isdigit() or token == ".":
            raise Unreadable("a number after a factor")
        if token == "|":
            return self.bars == 0  # else it closes |x|
        if token in ("\\lfloor", "\\lceil", "(", "[", "{"):
            return True
        if token.startswith("\\"):
            return (
                token[1:] in _GREEK
                or token[1:] in ("frac", "sqrt", "binom", "pi", "angle")
                or self.function(token[1:]) is not None
            )
        return token.isascii() and token.isalpha()

    def factor(self, depth: int) -> Node:
        base = self.atom(depth + 1)
        if self.peek() == "^":
            base = self.power(base, depth)
        if self.accept("!"):
            base = Node("double_factorial" if self.accept("!") else "factorial", (base,))
        if self.peek() == "^" and base.op != "factorial":
            raise Unreadable("a^b^c")  # TeX refuses it, too
        return self.power(base, depth) if self.peek() == "^" else base

    def power(self, base: Node, depth: int) -> Node:
        self.expect("^")
        if self.accept("\\circ"):
            half_turn = Node("divide", (Node("constant", value="pi"), number(180)))
            return Node("multiply", (base, half_turn))
        return Node("power", (base, self.exponent(depth)))

    def exponent(self, depth: int) -> Node:
        self.space()
        if match := _EXPONENT_NUMBER.match(self.text, self.at):  # 10^23, 2^-3: plain text
            self.at = match.end()
            text = match.group().replace(" ", "")
            return number(Fraction(text))
        if self.accept("-"):
            return Node("negate", (self.argument(depth),))
        return self.argument(depth)

    def argument(self, depth: int) -> Node:
        """A TeX argument: a group, one command with its own arguments, one letter, one digit."""
        token = self.peek()
        if token[:1].isdigit():
            self.at += 1
            return number(int(token))
        if len(token) == 1 and token.isalpha() and token.isascii():
            self.at += 1
            return _letter(token)
        return self.atom(depth + 1)

    def group(self, opening: str, depth: int) -> Node:
        self.expect(opening)
        bars, self.bars = self.bars, 0  # inside brackets a | opens anew
        node = self.expression(depth + 1)
        self.bars = bars
        self.expect(_CLOSERS[opening])
        return node

    def atom(self, depth: int) -> Node:
        token = self.peek()
        if depth > DEEPEST:
            raise Unreadable("too deep")
        if token in ("(", "[", "{"):
            return self.group(token, depth)
        if token == "|" and not self.bars:
            self.at += 1
            self.bars += 1
            node = self.expression(depth + 1)
            self.bars -= 1
            self.expect("|")
            return Node("abs", (node,))
        if token in ("\\lfloor", "\\lceil"):
            self.at += len(token)
            node = self.expression(depth + 1)
            self.expect(token.replace("\\l", "\\r"))
            return Node("floor" if token == "\\lfloor" else "ceil", (node,))
        if token[:1].isdigit() or token == ".":
            return self.number()
        if token.startswith("\\"):
            return self.command(token[1:], depth)
        if token.isascii() and token.isalpha():
            return self.letters(depth)
        raise Unreadable(token)

    def number(self) -> Node:
        match = _NUMBER.match(self.text, self.at)
        if match is None or len(match.group()) > MAX_DIGITS:
            raise Unreadable("a number")
        self.at = match.end()
        whole, _, part = match[1].partition(".")
        value = Fraction(int(f"{whole}{part}" or "0"), 10 ** len(part))
        if match[2] is not None:
            if "." not in match[1]:
                self.at = match.end(1)  # 3(5) is a product
            else:
                value += Fraction(int(match[2]), (10 ** len(match[2]) - 1) * 10 ** len(part))
        if exponent := _E_NOTATION.match(self.text, self.at):
            if abs(int(exponent[1])) > 2000:
                raise Unreadable("an exponent")
            self.at = exponent.end()
            return number(value * Fraction(10) ** int(exponent[1]))
        if value.denominator == 1 and "." not in match[1]:
            if _INTEGER_FRACTION.match(self.text, self.at):
                return Node("add", (number(value), self.command(self.peek()[1:], 0)))  # 3\frac12
            if base := re.match(r"\s*_", self.text[self.at :]):
                raise Unreadable(f"a number base {base.group()}")
        return number(value)

    def command(self, name: str, depth: int) -> Node:
        self.at += len(name) + 1
        if name == "frac":
            return Node("divide", (self.argument(depth), self.argument(depth)))
        if name == "binom":
            return Node("binom", (self.argument(depth), self.argument(depth)))
        if name == "sqrt":
            return self.root(depth)
        if name == "pi":
            return Node("constant", value="pi")
        if name in _GREEK and name not in ("Re", "Im"):
            return self.symbol("\\" + name)
        if (function := self.function(name)) is not None:
            return self.call(function, depth)
        raise Unreadable(name)

    def root(self, depth: int) -> Node:
        order = number(2)
        if match := _ROOT_ORDER.match(self.text, self.at):
            self.at = match.end()
            order = parse(match[1])
        return Node("root", (self.argument(depth), order))

    @staticmethod
    def function(name: str) -> str | None:
        name = _INVERSE.get(name, name)
        return name if name in FUNCTIONS else None

    def symbol(self, name: str) -> Node:
        if match := _SUBSCRIPT.match(self.text, self.at):
            self.at = match.end()
            name += "_" + re.sub(r"[\s\ue001{}]", "", match[1] or match[2])
        while self.text.startswith("'", self.at):
            self.at += 1
            name += "'"
        return Node("symbol", value=name)

    def letters(self, depth: int) -> Node:
        """A function's name in plain text, or one symbol. A word is neither."""
        run = _WORD.match(self.text, self.at)
        assert run is not None
        word = run.group()
        for name in _NAMES:
            if word.startswith(name):
                return self.named(name, depth)
        if word.lower() in _SHORT_WORDS or (len(word) > 3 and not _sparse(word)):
            raise Unreadable(word)
        self.at += 1
        rest = self.text[self.at :].lstrip()
        if chosen := _CHOICES.match(word[0] + rest):  # C(10,3)
            self.at = len(self.text) - len(rest) + chosen.end() - 1
            n, k = int(chosen[2]), int(chosen[3])
            ways = Node("binom", (number(n), number(k)))
            ordered = Node("multiply", (ways, Node("factorial", (number(k),))))
            return ways if chosen[1] == "C" else ordered
        if word[0] == "C" and (counted := self.choices(depth)) is not None:
            return counted
        if word[0] in _OPAQUE and rest.startswith("("):
            return self.call(word[0], depth)
        if word[0] not in "ei" and _AT_NUMBER.match(rest):  # I(0) is no product
            return self.call(word[0], depth)
        if word[0] in ("e", "i") and not rest.startswith("_"):
            return Node("constant", value=word[0])
        return self.symbol(word[0])

    def choices(self, depth: int) -> Node | None:
        """C(n, k) of two plain arguments, or None: then C is a symbol. A pattern decides, without
        parsing: nested C(C(... would be parsed twice at every level, 2^depth times.
        """
        self.space()
        if _TWO.match(self.text, self.at) is None:
            return None
        return Node("binom", self.parenthesised(depth))

    def named(self, name: str, depth: int) -> Node:
        self.at += len(name)
        if name == "pi":
            return Node("constant", value="pi")
        if name == "sqrt":
            return self.root(depth) if self.peek() == "[" else self.plain_root(depth, 2)
        if name == "cbrt":
            return self.plain_root(depth, 3)
        if name in ("binom", "comb"):
            arguments = self.parenthesised(depth)
            if len(arguments) != 2:
                raise Unreadable(name)
            return Node("binom", arguments)
        function = self.function(name)
        if function is None:
            raise Unreadable(name)
        return self.call(function, depth)

    def plain_root(self, depth: int, order: int) -> Node:
        """`sqrt(5)`, `sqrt5`, `sqrt 21`: a whole number outside TeX."""
        if self.peek()[:1].isdigit():
            return Node("root", (self.number(), number(order)))
        return Node("root", (self.argument(depth), number(order)))

    def parenthesised(self, depth: int) -> tuple[Node, ...]:
        self.expect("(")
        bars, self.bars = self.bars, 0
        found = [self.expression(depth + 1)]
        while self.accept(","):
            found.append(self.expression(depth + 1))
        self.bars = bars
        self.expect(")")
        return tuple(found)

    def call(self, name: str, depth: int) -> Node:
        """A function with its power, its base and what it is applied to."""
        base: Node | None = None
        exponent: Node | None = None
        if name == "log" and (match := _BASE.match(self.text, self.at)):
            self.at = match.end()
            base = parse(match[1] or match[2])
        elif name == "log" and re.match(r"(?:10|2)\s*\(", self.text[self.at :]):
            base = self.number()  # log10(x), log2(x)
        elif name == "lg":
            base = number(10)
        if self.peek() == "^":
            self.at += 1
            exponent = self.exponent(depth)
        arguments = self.applied(depth)
        if exponent is not None and _is_minus_one(exponent):  # sin^{-1} is no power, sin^2 is one
            if name not in _CIRCULAR:
                raise Unreadable("an inverse")
            name, exponent = "arc" + name, None
        if name in ("log", "lg") and base is not None:
            node = Node("divide", (Node("ln", arguments), Node("ln", (base,))))
        else:
            node = Node(name, arguments)
        return node if exponent is None else Node("power", (node, exponent))

    def applied(self, depth: int) -> tuple[Node, ...]:
        """`(x, y)`, or without parentheses the product up to a sign or another function."""
        token = self.peek()
        if token == "(":
            return self.parenthesised(depth)
        if token in ("{", "[", "|"):
            return (self.factor(depth),)
        factors = [self.factor(depth + 1)]
        while self.simple_follows():
            factors.append(self.factor(depth + 1))
        if self.peek() in ("/", "*"):
            raise Unreadable("what the function is applied to")
        return (_product(factors, []),)

    def simple_follows(self) -> bool:
        """Whether the argument continues: a letter, \\pi, a fraction or a root belongs to it. A
        parenthesis may or may not, so it is unreadable.
        """
        token = self.peek()
        if token in ("(", "[", "{"):
            raise Unreadable("what the function is applied to")
        if token.startswith("\\"):
            return token[1:] in _GREEK or token[1:] in ("pi", "frac", "sqrt")
        run = _WORD.match(self.text, self.at)
        return run is not None and not any(run.group().startswith(name) for name in FUNCTIONS)


def _product(above: list[Node], below: list[Node]) -> Node:
    top, bottom = (
        factors[0] if len(factors) == 1 else Node("multiply", tuple(factors))
        for factors in (above, below or [number(1)])
    )
    return Node("divide", (top, bottom)) if below else top


def _letter(token: str) -> Node:
    return Node("constant" if token in "ei" else "symbol", value=token)


def _sparse(word: str) -> bool:
    """Single letters side by side, such as `abcd` or `xyzw`, rather than a word."""
    return len(word) <= 5 and list(word.lower()) == sorted(set(word.lower()))


def _is_minus_one(node: Node) -> bool:
    if node.op == "negate":
        return node.args[0].value == 1
    return node.op == "number" and node.value == -1
