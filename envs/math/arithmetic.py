"""Makes arithmetic problems from nothing but (split, index), for students of about a million
parameters.

Every kind asks for one non-negative integer, so the exact tier of the grader decides it, a guess
rarely scores, and no download is needed. The worked solution is a scratchpad whose every step a
small transformer can do in one hop (schoolbook columns, units first), then `\\boxed{answer}`.

Splits are disjoint by construction: a question belongs to the split that the SHA-256 of its key
names (one key in ten is `valid`, one in ten `test`, the rest `train`), whatever the preset, the
kind or the index. The key is the question with commuting operands in order, so that 17+25 can't be
trained on and 25+17 tested.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tutelage.envs.math.problems import Problem
from tutelage.envs.names import unknown

SPLITS = ("train", "valid", "test")
TRAIN_PROBLEMS = 2**31 - 1  # indexes, not distinct questions: training draws with replacement
HELD_OUT_PROBLEMS = 500  # a Wilson interval of about +-2 points at 95 %
PATIENCE = 2000  # draws of a kind without a new question, and its held-out share counts as used up

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How big a kind's numbers are (digits) and how long its lists (length); both ends included."""

    digits: Range = (1, 1)
    length: Range = (1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A drawn question before its split is known."""

    question: str
    answer: str
    work: str = ""  # the scratchpad, without the box
    key: str = ""  # empty: the question itself


def _number(rng: random.Random, digits: Range) -> int:
    """Uniform over the lengths first: otherwise nine numbers in ten have the most digits."""
    count = rng.randint(*digits)
    return rng.randint(10 ** (count - 1), 10**count - 1)


def _digit_string(rng: random.Random, length: Range) -> str:
    """Digits 1 to 9: a leading zero would make two answers of one number."""
    return "".join(rng.choice("123456789") for _ in range(rng.randint(*length)))


def _columns(a: int, b: int) -> str:
    """Schoolbook addition, units first: 478+356 -> `8+6=14,7+5+1=13,4+3+1=8`."""
    width = max(len(str(a)), len(str(b)))
    steps, carry = [], 0
    for digit_a, digit_b in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True):
        total = int(digit_a) + int(digit_b) + carry
        steps.append(f"{digit_a}+{digit_b}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ",".join(steps)


def _add(rng: random.Random, size: Size) -> Draft:
    a, b = _number(rng, size.digits), _number(rng, size.digits)
    low, high = sorted((a, b))
    return Draft(question=f"{a}+{b}=", answer=str(a + b), work=_columns(a, b), key=f"{low}+{high}=")


def _borrowing(a: int, b: int) -> str:
    """Schoolbook subtraction, units first, a >= b: 42-17 -> `12-7=5,3-1=2`."""
    steps, borrow = [], 0
    for digit_a, digit_b in zip(reversed(str(a)), reversed(f"{b:0{len(str(a))}}"), strict=True):
        top, bottom = int(digit_a) - borrow, int(digit_b)
        borrow = int(top < bottom)
        top += 10 * borrow
        steps.append(f"{top}-{bottom}={top - bottom}")
    return ",".join(steps)


def _sub(rng: random.Random, size: Size) -> Draft:
    a, b = sorted((_number(rng, size.digits), _number(rng, size.digits)), reverse=True)
    return Draft(question=f"{a}-{b}=", answer=str(a - b), work=_borrowing(a, b))


def _mul(rng: random.Random, size: Size) -> Draft:
    """One digit times many; the carry is added in each column: 7*46 -> `7*6=42,7*4+4=32`."""
    a, b = rng.randint(2, 9), _number(rng, size.digits)
    steps, carry = [], 0
    for digit in reversed(str(b)):
        total = a * int(digit) + carry
        steps.append(f"{a}*{digit}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return Draft(question=f"{a}*{b}=", answer=str(a * b), work=",".join(steps))


def _muladd(rng: random.Random, size: Size) -> Draft:
    """a*b+c with one-digit factors: the times table, in enough questions for a held-out split."""
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), _number(rng, size.digits)
    low, high = sorted((a, b))
    return Draft(
        question=f"{a}*{b}+{c}=",
        answer=str(a * b + c),
        work=f"{a}*{b}={a * b},{_columns(a * b, c)}",
        key=f"{low}*{high}+{c}=",
    )


def _lin(rng: random.Random, size: Size) -> Draft:
    x, a = _number(rng, size.digits), _number(rng, size.digits)
    if rng.random() < 0.5:
        x, a = max(x, a), min(x, a)  # no negative numbers in the easy kinds
        work = f"{x - a}+{a},{_columns(x - a, a)}"
        return Draft(question=f"x-{a}={x - a}", answer=str(x), work=work)
    left = f"x+{a}" if rng.random() < 0.5 else f"{a}+x"
    work = f"{x + a}-{a},{_borrowing(x + a, a)}"
    return Draft(question=f"{left}={x + a}", answer=str(x), work=work, key=f"x+{a}={x + a}")


def _seq(rng: random.Random, size: Size) -> Draft:
    """The next term of an arithmetic progression that stays positive."""
    terms = rng.randint(*size.length)
    step, start = rng.randint(1, 9), _number(rng, size.digits)
    values = [start + step * i for i in range(terms + 1)]
    if rng.random() < 0.5:
        values.reverse()
    low, high = sorted(values[-3:-1])
    sign = "+" if values[1] > values[0] else "-"
    shown = ",".join(map(str, values[:-1]))
    work = f"{high}-{low}={step},{values[-2]}{sign}{step}"
    return Draft(question=f"{shown},", answer=str(values[-1]), work=work)


def _rev(rng: random.Random, size: Size) -> Draft:
    digits = _digit_string(rng, size.length)
    return Draft(question=f"rev {digits}", answer=digits[::-1])


def _sort(rng: random.Random, size: Size) -> Draft:
    digits = _digit_string(rng, size.length)
    return Draft(question=f"sort {digits}", answer="".join(sorted(digits)))


def _max(rng: random.Random, size: Size) -> Draft:
    values = [_number(rng, size.digits) for _ in range(rng.randint(*size.length))]
    ordered = " ".join(map(str, sorted(values)))
    return Draft(
        question=f"max {' '.join(map(str, values))}",
        answer=str(max(values)),
        key=f"max {ordered}",
    )


def _ones(rng: random.Random, size: Size) -> Draft:
    bits = "".join(rng.choice("01") for _ in range(rng.randint(*size.length)))
    return Draft(question=f"ones {bits}", answer=str(bits.count("1")))


def _mod(rng: random.Random, size: Size) -> Draft:
    a, b = _number(rng, size.digits), rng.randint(3, 9)
    return Draft(question=f"{a} mod {b}", answer=str(a % b), work=f"{a // b}*{b}={a // b * b}")


def _gcd(rng: random.Random, size: Size) -> Draft:
    """A common factor is put in on purpose: of random pairs six in ten answer 1."""
    factor = rng.randint(2, 12)
    a, b = factor * _number(rng, size.digits), factor * _number(rng, size.digits)
    low, high = sorted((a, b))
    return Draft(question=f"gcd {a} {b}", answer=str(math.gcd(a, b)), key=f"gcd {low} {high}")


def _chain(rng: random.Random, size: Size) -> Draft:
    """Additions and subtractions from left to right that never fall below zero."""
    total = _number(rng, size.digits)
    text, work = str(total), []
    for _ in range(rng.randint(*size.length) - 1):
        term = _number(rng, size.digits)
        sign = -1 if term <= total and rng.random() < 0.5 else 1
        after = total + sign * term
        work.append(f"{total}{'+' if sign > 0 else '-'}{term}={after}")
        text, total = f"{text}{'+' if sign > 0 else '-'}{term}", after
    return Draft(question=f"{text}=", answer=str(total), work=",".join(work))


KINDS: Mapping[str, Callable[[random.Random, Size], Draft]] = {
    "add": _add,
    "chain": _chain,
    "gcd": _gcd,
    "lin": _lin,
    "max": _max,
    "mod": _mod,
    "mul": _mul,
    "muladd": _muladd,
    "ones": _ones,
    "rev": _rev,
    "seq": _seq,
    "sort": _sort,
    "sub": _sub,
}

# easy: questions of at most 20 characters, solutions of at most 40, what a model of 0.4 to 1 M
# parameters learns to 95 % in minutes on a CPU. hard adds what such a model stays below one half
# on.
PRESETS: Mapping[str, Mapping[str, Size]] = {
    "easy": {
        "add": Size(digits=(2, 3)),
        "lin": Size(digits=(1, 2)),
        "max": Size(digits=(2, 2), length=(3, 4)),
        "mul": Size(digits=(2, 3)),
        "muladd": Size(digits=(1, 2)),
        "ones": Size(length=(5, 10)),
        "rev": Size(length=(3, 6)),
        "seq": Size(digits=(1, 2), length=(3, 4)),
        "sort": Size(length=(3, 6)),
    },
    "medium": {
        "add": Size(digits=(3, 4)),
        "lin": Size(digits=(2, 2)),
        "max": Size(digits=(2, 3), length=(4, 5)),
        "mul": Size(digits=(3, 4)),
        "muladd": Size(digits=(2, 3)),
        "ones": Size(length=(8, 14)),
        "rev": Size(length=(5, 9)),
        "seq": Size(digits=(2, 3), length=(3, 4)),
        "sort": Size(length=(5, 9)),
        "sub": Size(digits=(2, 3)),
    },
    "hard": {
        "add": Size(digits=(4, 6)),
        "chain": Size(digits=(2, 2), length=(3, 4)),
        "gcd": Size(digits=(1, 2)),
        "lin": Size(digits=(2, 3)),
        "max": Size(digits=(3, 4), length=(4, 6)),
        "mod": Size(digits=(2, 3)),
        "mul": Size(digits=(4, 6)),
        "muladd": Size(digits=(3, 5)),
        "ones": Size(length=(12, 20)),
        "rev": Size(length=(8, 14)),
        "seq": Size(digits=(3, 3), length=(3, 4)),
        "sort": Size(length=(8, 14)),
        "sub": Size(digits=(3, 5)),
    },
}
# For a kind that `kinds` names and the preset leaves out: its size in the easiest preset that has
# it.
_SIZES = {**PRESETS["hard"], **PRESETS["medium"], **PRESETS["easy"]}


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(key: str) -> str:
    """The split that a question (its key) belongs to: train 8 in 10, valid and test 1 each."""
    bucket = _digest(f"split:{key}") % 10
    return "valid" if bucket == 0 else "test" if bucket == 1 else "train"


def _finish(kind: str, draft: Draft) -> Problem:
    box = f"\\boxed{{{draft.answer}}}"
    return Problem(
        question=draft.question,
        answer=draft.answer,
        kind=kind,
        solution=f"{draft.work} {box}" if draft.work else box,
    )


def _knob(name: str, value: object) -> Range:
    """An integer (both ends) or a pair, as YAML gives it."""
    ends = value if isinstance(value, (list, tuple)) else (value, value)
    if len(ends) != 2 or not all(isinstance(end, int) and 1 <= end <= 50 for end in ends):
        raise ValueError(
            f"{name}={value!r}: give a whole number from 1 to 50, or [lowest, highest]"
        )
    low, high = ends
    if low > high:
        raise ValueError(f"{name}={value!r}: the lowest stands first")
    return low, high


def sizes(
    preset: str = "easy",
    kinds: Sequence[str] | None = None,
    digits: int | Sequence[int] | None = None,
    length: int | Sequence[int] | None = None,
) -> dict[str, Size]:
    """The kinds to draw and their sizes: a preset, narrowed to `kinds`, with `digits`/`length` for
    all.

    Raises ValueError for an unknown preset or kind (naming the nearest) and for sizes out of range.
    """
    if preset not in PRESETS:
        raise ValueError(unknown("preset", preset, PRESETS))
    chosen = [kinds] if isinstance(kinds, str) else kinds
    if chosen is not None and not chosen:
        raise ValueError(f"kinds is empty: name at least one of {', '.join(KINDS)}")
    for kind in chosen or ():
        if kind not in KINDS:
            raise ValueError(unknown("kind", kind, KINDS))
    table = {kind: PRESETS[preset].get(kind, _SIZES[kind]) for kind in chosen or PRESETS[preset]}
    return {
        kind: Size(
            digits=size.digits if digits is None else _knob("digits", digits),
            length=size.length if length is None else _length(kind, length),
        )
        for kind, size in table.items()
    }


# The shortest list with which a kind's question is not trivial.
_SHORTEST = {"seq": 2, "max": 2, "sort": 2, "rev": 2, "chain": 2}


def _length(kind: str, value: object) -> Range:
    low, high = _knob("length", value)
    shortest = _SHORTEST.get(kind, 1)
    if low < shortest:
        raise ValueError(f"length={value!r}: {kind} needs at least {shortest}")
    return low, high


class ArithmeticProblems:
    """Problems by index. `train` has TRAIN_PROBLEMS of them, the others up to HELD_OUT_PROBLEMS
    distinct ones.

    Kinds have equal shares. Same (split, sizes, index), same problem, on every machine and Python.
    """

    def __init__(self, split: str, table: Mapping[str, Size]) -> None:
        if split not in SPLITS:
            raise ValueError(unknown("split", split, SPLITS))
        self.split = split
        self._table = tuple(sorted(table.items()))
        if split == "train":
            self._count = TRAIN_PROBLEMS
        else:
            self._count = len(_held_out(split, self._table))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} outside 0..{self._count - 1} of split {self.split!r}")
        if self.split != "train":
            return _held_out(self.split, self._table)[index]
        # SHA-256, because Python's own hash of a text differs between processes.
        rng = random.Random(_digest(f"train:{index}"))
        kind, size = rng.choice(self._table)
        return _draw(rng, kind, size, "train")[1]


def _draw(rng: random.Random, kind: str, size: Size, split: str) -> tuple[str, Problem]:
    """The next question of `kind` that belongs to `split`, with its key."""
    for _ in range(PATIENCE):
        draft = KINDS[kind](rng, size)
        key = draft.key or draft.question
        if split_of(key) == split:
            return key, _finish(kind, draft)
    raise ValueError(
        f"no {split} question of kind {kind!r} with digits={size.digits}, length={size.length}: "
        "too few questions of that size to split; raise digits or length"
    )


@lru_cache(maxsize=64)
def _held_out(split: str, table: tuple[tuple[str, Size], ...]) -> tuple[Problem, ...]:
    """Distinct questions, kinds in turn, until there are enough or every kind is used up."""
    streams = {kind: random.Random(_digest(f"{split}:{kind}")) for kind, _ in table}
    live = dict(table)
    seen: set[str] = set()
    problems: list[Problem] = []
    while live and len(problems) < HELD_OUT_PROBLEMS:
        for kind, size in list(live.items()):
            problem = _new(streams[kind], kind, size, split, seen)
            if problem is None:
                del live[kind]
            else:
                problems.append(problem)
    if not problems:
        raise ValueError(
            f"no {split} question with kinds {[kind for kind, _ in table]}: raise digits or length"
        )
    return tuple(problems[:HELD_OUT_PROBLEMS])  # the last round may have gone beyond


def _new(rng: random.Random, kind: str, size: Size, split: str, seen: set[str]) -> Problem | None:
    """A question whose key was not seen yet; None once the kind's share of the split is used up."""
    for _ in range(PATIENCE):
        draft = KINDS[kind](rng, size)
        key = draft.key or draft.question
        if key not in seen and split_of(key) == split:
            seen.add(key)
            return _finish(kind, draft)
    return None
