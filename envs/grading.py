"""Whether a response equals the gold answer: exactly where possible, else by algebra, killable.

Three tiers, cheapest first:

1. string: both sides without their dress (`$`, `\\left`, `\\text`, units, spaces) are the same
   text;
2. exact: both sides are numbers of one small grammar (integers, decimals, fractions, mixed numbers,
   percent, powers, scientific notation), or lists of them, and are compared as `Fraction`, without
   tolerance. A gold answer that is a number is decided here unless the prediction is an expression
   the grammar can't read; a gold integer is always decided here;
3. symbolic: math-verify (the extra `tutelage[math]`) in worker processes that are killed at the
   deadline, because `9^{9^{9}}` holds Python's interpreter lock and no thread, alarm or asyncio
   timeout can end it.

What math-verify would get wrong or explode on (power towers, factorials, number bases, lists of
another length) never reaches it. Verdicts carry a reason, so that timeouts and missing boxes can be
counted.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from fractions import Fraction

from tutelage.envs.grading_pool import UNDECIDED, Allowance, symbolic

MAX_ANSWER = 1000  # characters; the longest gold of the public sets has 210
MAX_BARE = 200  # characters of a response without a box that still count as a bare answer
MAX_DIGITS = 400  # digits in a number; beyond them nothing is a plausible answer
MAX_EXPONENT = 2000  # powers of ten and of integers that are written out exactly
_CACHE_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`correct`, and why: which tier decided, or what kept the answer from being read.

    Reasons: string, exact, symbolic (decided); no_box, too_long, not_text, unreadable (no answer to
    compare); gold_unparseable; refused (too large to evaluate safely); timeout (its processor time
    ran out), crash (so did its process, by itself), unavailable (no math-verify that works). And of
    the machine alone, `undecided`: starting, late, lost (see grading_pool.UNDECIDED).
    """

    correct: bool
    reason: str

    @property
    def undecided(self) -> bool:
        """The machine had no time for it: nothing is said of the answer. Ask again."""
        return self.reason in UNDECIDED


def grade(prediction: str, gold: str, *, timeout: float = 5.0) -> bool:
    """True if `prediction` (a full response or a bare answer) equals `gold`. See `judge`."""
    return judge(prediction, gold, timeout=timeout).correct


def judge(
    prediction: str,
    gold: str,
    *,
    timeout: float = 5.0,
    wait: float | None = None,
    require_box: bool = False,
) -> Verdict:
    """Compare a response with a gold answer; returns within `timeout` seconds, from any thread.

    With `wait`, `timeout` is in processor seconds, and they may come within `wait` seconds on the
    clock: how busy the machine is then decides nothing up to there.

    The answer is the last `\\boxed{}` after the last `</think>`. A response without any box counts
    as a bare answer if it is short, unless `require_box`. Never raises on any prediction or gold.
    """
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return Verdict(correct=False, reason="not_text")
    allowance = Allowance.within(timeout, wait)
    found = extract(prediction, require_box=require_box)
    if isinstance(found, Verdict):
        return found
    target = gold if "\\boxed" not in gold else extract(gold, require_box=True)
    if isinstance(target, Verdict) or not target.strip() or len(target) > MAX_ANSWER:
        return Verdict(correct=False, reason="gold_unparseable")
    return _compare(found, target, allowance)


# --- the answer in a response --------------------------------------------------------------------

_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}[,;:]?\s+(?<!\\)[A-Za-z]{2,}")


def extract(response: str, *, require_box: bool) -> str | Verdict:
    """The text of the answer, or the verdict that there is none.

    An unclosed or empty last box is no answer: falling back to an earlier one would pay for not
        finishing.
    """
    text = (
        response[response.rfind("</think>") + len("</think>") :]
        if "</think>" in response
        else response
    )
    opened = text.find("<think>")
    if opened >= 0:  # the thought never ended: what it holds is no answer
        text = text[:opened]
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        bare = text.strip() if len(text) <= 4 * MAX_BARE else text
        if require_box or not bare or len(bare) > MAX_BARE or "\n" in bare:
            return Verdict(correct=False, reason="no_box")
        return bare
    after = start + (len("\\boxed") if text.startswith("\\boxed", start) else len("\\fbox"))
    content = _argument(text[after : after + MAX_ANSWER + 10])
    if content is None:
        long = len(text) - after > MAX_ANSWER
        return Verdict(correct=False, reason="too_long" if long else "no_box")
    if not content.strip():
        return Verdict(correct=False, reason="no_box")
    return content


def _argument(text: str) -> str | None:
    """The TeX argument at the start of `text`: `{...}` with balanced braces, or one word (`\\boxed
    5`).
    """
    if not text.lstrip(" ").startswith("{"):
        word = re.match(r"\s+([^\s$\\{}]+)", text)
        return word.group(1).rstrip(".,;") if word else None
    begin = text.index("{") + 1
    depth, at = 1, begin
    while at < len(text):
        if text[at] == "\\":
            at += 1  # an escaped brace is a character
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:at]
        at += 1
    return None


# --- one way of writing --------------------------------------------------------------------------

_SAME = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "π": "\\pi ", "∞": "\\infty ",
     "≤": "\\le ", "≥": "\\ge ", "°": "^\\circ ", "\u00a0": " ", "\t": " ", "\n": " "}
)  # fmt: skip
_REWRITES = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])", ""),
        (r"\\[!,;:]|\\ |\\q?quad(?![A-Za-z])|~", " "),
        (r"\{,\}", ","),
        (r"\\[$]|\$|\\[()\[\]]", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le "),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge "),
        (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
        (r"\\(?:varnothing|emptyset)(?![A-Za-z])", r"\\emptyset "),
        (r"\\mathrm\{e\}", "e"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)(?![\d}])", r"\1{\2}"),
        (r"\\sqrt\s*(\d|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}"),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\*\*", "^"),
        (r"\s*\\text\s*\{\s*(?:and|or)\s*\}\s*|\s(?:and|or)\s", ", "),
        (r"\s+", " "),
    )
)
_TEXT = r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mbox|rm)\s*\{([^{}]*)\}"
_WHOLE_TEXT = re.compile(rf"^{_TEXT}$")
_ANY_TEXT = re.compile(_TEXT)
_TAIL_TEXT = re.compile(rf"(?<=[\d}})])\s*{_TEXT}(?:\s*\^\s*\{{?\d\}}?)?$")
_TAIL_WORD = re.compile(r"(?<=[\d}])\s+([a-z]{3,}|cm|km|mm|kg|ft|mi|in)(?:\s*\^\s*\{?\d\}?)?$")
_NOT_UNITS = {"and", "mod", "sin", "cos", "tan", "log", "exp", "sqrt"}
_LABEL = re.compile(r"^\(?([A-Za-z])\)?$")
_NAME = re.compile(r"^\\?[A-Za-z]+(?:_\{?\w\}?)?(?:\([a-z]\))?\s*=(?!=)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """An answer apart: what is compared, its unit, and whether a percent sign followed it."""

    core: str
    unit: str = ""
    percent: bool = False


def _read(text: str) -> _Answer:
    text = text.translate(_SAME)
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    text = text.strip()
    while text.endswith((".", ",", ";")):
        text = text[:-1].rstrip()
    if whole := _WHOLE_TEXT.match(text):
        text = whole.group(1).strip()
    for ending in ("\\%", "%"):
        if text.endswith(ending):
            return _Answer(core=text.removesuffix(ending).strip(), percent=True)
    if text.endswith("^\\circ"):
        angle = text.removesuffix("^\\circ").strip()
        if number(angle) is not None:  # of \sin 30^\circ the degree is no unit
            return _Answer(core=angle, unit="degree")
    tail = _TAIL_TEXT.search(text) or _TAIL_WORD.search(text)
    if tail and tail.group(1).strip() not in _NOT_UNITS:
        unit = tail.group(1).strip().lower().rstrip(".")
        return _Answer(core=text[: tail.start()].strip(), unit=unit.removesuffix("s"))
    return _Answer(core=_ANY_TEXT.sub(r"\1", text))


def _squeeze(core: str) -> str:
    """What the string tier compares: no spaces, no braces around one character, words in lower
    case.
    """
    text = re.sub(r"\{(\w)\}", r"\1", core.replace(" ", ""))
    if label := _LABEL.match(text):
        return label.group(1)  # (A) and A; but c is not C
    return text.lower() if text.isalpha() and len(text) > 1 else text


# --- exact numbers -------------------------------------------------------------------------------

_INT = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DEC = rf"(?:{_INT}(?:\.\d*)?|\.\d+)"
_EXP = r"(?:\{\s*([+-]?\d{1,5})\s*\}|\(\s*([+-]?\d{1,5})\s*\)|([+-]?\d{1,5}))"
_SIGN = r"^([+-]?)\s*"
_DECIMAL = re.compile(rf"{_SIGN}({_DEC})$")
_RATIO = re.compile(rf"{_SIGN}({_DEC})\s*/\s*([+-]?)\s*({_DEC})$")
_FRAC = re.compile(
    rf"{_SIGN}\\frac\s*\{{\s*([+-]?)\s*({_DEC})\s*\}}\s*\{{\s*([+-]?)\s*({_DEC})\s*\}}$"
)
_MIXED = re.compile(rf"{_SIGN}({_INT})\s*\\frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}$")
_MIXED_PLAIN = re.compile(rf"{_SIGN}({_INT})\s+(\d+)\s*/\s*(\d+)$")
_E_NOTATION = re.compile(rf"{_SIGN}({_DEC})[eE]([+-]?\d{{1,5}})$")
_SCIENTIFIC = re.compile(rf"{_SIGN}({_DEC})\s*[*x]\s*10\s*(?:\^|\*\*)\s*{_EXP}$")
_POWER = re.compile(rf"{_SIGN}({_INT})\s*(?:\^|\*\*)\s*{_EXP}$")


def _sign(*signs: str) -> int:
    return -1 if sum(sign == "-" for sign in signs) % 2 else 1


def _decimal(text: str) -> Fraction:
    """A decimal of the grammar; `42.` and `.5` included, which Fraction itself may refuse."""
    whole, _, part = text.replace(",", "").partition(".")
    return Fraction(int(f"{whole}{part}" or "0"), 10 ** len(part))


def _power(base: Fraction, exponent: int) -> Fraction | None:
    if abs(exponent) > MAX_EXPONENT or (base == 0 and exponent <= 0):
        return None
    return base**exponent


def number(text: str) -> Fraction | None:
    """The rational number that `text` writes, or None if it is not one of the grammar (or absurdly
    long).
    """
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    if sum(map(str.isdigit, text)) > MAX_DIGITS or not text.isascii():
        return None
    if match := _DECIMAL.match(text):
        return _sign(match[1]) * _decimal(match[2])
    for pattern in (_RATIO, _FRAC):
        if match := pattern.match(text):
            *signs, top, bottom = _ratio_parts(match)
            return None if bottom == 0 else _sign(*signs) * top / bottom
    for pattern in (_MIXED, _MIXED_PLAIN):
        if match := pattern.match(text):
            below = int(match[4])
            return (
                None
                if below == 0
                else _sign(match[1]) * (_decimal(match[2]) + Fraction(int(match[3]), below))
            )
    return _number_with_exponent(text)


def _ratio_parts(match: re.Match[str]) -> tuple[str, str, str, Fraction, Fraction]:
    if match.re is _RATIO:
        return match[1], "", match[3], _decimal(match[2]), _decimal(match[4])
    return match[1], match[2], match[4], _decimal(match[3]), _decimal(match[5])


def _number_with_exponent(text: str) -> Fraction | None:
    if match := _E_NOTATION.match(text):
        scale = _power(Fraction(10), int(match[3]))
        return None if scale is None else _sign(match[1]) * _decimal(match[2]) * scale
    if match := _SCIENTIFIC.match(text):
        scale = _power(Fraction(10), int(match[3] or match[4] or match[5]))
        return None if scale is None else _sign(match[1]) * _decimal(match[2]) * scale
    if match := _POWER.match(text):
        # 40 digits: 10^40 to the 2000th is 80,000 digits, still a matter of microseconds
        base = _decimal(match[2]) if len(match[2]) <= 40 else None
        value = None if base is None else _power(base, int(match[3] or match[4] or match[5]))
        return None if value is None else _sign(match[1]) * value
    return None


def _same_number(answer: _Answer, gold: _Answer) -> bool | None:
    """None unless both are numbers. One percent sign: 50 %, 50 and 0.5 agree; two: the numbers
    must.
    """
    mine, theirs = number(answer.core), number(gold.core)
    if mine is None or theirs is None:
        return None
    if answer.percent == gold.percent:
        return mine == theirs
    percent, plain = (mine, theirs) if answer.percent else (theirs, mine)
    return percent == plain or percent == 100 * plain


# --- lists ---------------------------------------------------------------------------------------


def _parts(core: str) -> tuple[str, list[str]]:
    """The brackets around `core` ("()", "[)", "{}" or "") and its parts between top-level commas.

    Set braces and no braces are both "": `\\{1,2\\}` and `1,2` list the same two values.
    """
    brackets, inner = "", core
    if core.startswith("\\{") and core.endswith("\\}"):
        inner = core[2:-2]
    elif len(core) > 1 and core[0] in "([" and core[-1] in ")]" and _wraps(core):
        brackets, inner = core[0] + core[-1], core[1:-1]
    parts, depth, begin = [], 0, 0
    for at, char in enumerate(inner):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(inner[begin:at].strip())
            begin = at + 1
    return brackets, [*parts, inner[begin:].strip()]


def _wraps(core: str) -> bool:
    """True if the first bracket closes at the very end: (1,2), not (1)+(2)."""
    depth = 0
    for at, char in enumerate(core):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return at == len(core) - 1
    return False


def _values(parts: list[str]) -> list[Fraction | None]:
    """Their numbers; `x=1, x=2` are values of one name, `x=1, y=2` are not."""
    names = {match.group() if (match := _NAME.match(part)) else "" for part in parts}
    return [number(_NAME.sub("", part) if len(names) == 1 else part) for part in parts]


def _same_list(answer: str, gold: str) -> bool | None:
    """None unless both are lists of numbers. Tuples and intervals keep their order, plain lists and
    sets don't.
    """
    mine, theirs = _parts(answer), _parts(gold)
    if len(mine[1]) < 2 or len(theirs[1]) < 2:
        return None
    values, golds = _values(mine[1]), _values(theirs[1])
    left, right = [v for v in values if v is not None], [v for v in golds if v is not None]
    if len(left) != len(values) or len(right) != len(golds):
        return None
    if mine[0] != theirs[0]:
        return False
    return left == right if mine[0] else sorted(left) == sorted(right)


# --- the tiers -----------------------------------------------------------------------------------

# What must not reach a computer algebra system: its value is astronomically large, or it is
# compared wrongly (math-verify takes 1/2006! for 1/2004!, both being zero to fifteen digits, and
# drops the base of 204_5).
_REFUSED = re.compile(
    r"\^\s*[{(][^})]*\d\s*\}?\s*\^"  # a power of numbers in an exponent: 9^{9^{9}}, e^{10^{10}}
    r"|\^\s*\d+\s*\^"
    r"|\d{3,}\s*!|[)}]\s*!|!\s*!"  # factorials beyond two digits, or of an expression
    r"|\^\s*[({]*\s*[+-]?\d{5,}"  # exponents beyond four digits
    r"|\\binom\s*\{(?:\d{4,}|[^}]*\^)"
    r"|\d_|\\(?:sum|prod|int|lim)(?![A-Za-z])"
)


_DEEPEST = 20  # nested brackets: math-verify's parser takes seconds from about thirty on


def _too_much(core: str) -> bool:
    depth = deepest = 0
    for char in core:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST or _REFUSED.search(core) is not None


def _compare(answer: str, gold: str, allowance: Allowance) -> Verdict:
    mine, theirs = _read(answer), _read(gold)
    same = _exact_tiers(mine, theirs)
    if same is not None:
        return same
    bare_prose = _PROSE.search(answer) is not None
    if bare_prose or not mine.core:
        return Verdict(correct=False, reason="unreadable")
    if _too_much(mine.core) or _too_much(theirs.core):
        return Verdict(correct=False, reason="refused")
    written, wanted = _for_algebra(mine.core), _for_algebra(theirs.core)
    relations = [_RELATION.search(core) is not None for core in (written, wanted)]
    if relations[0] != relations[1]:
        if relations[
            0
        ]:  # x <= 3 against (-oo, 3]: math-verify reads it with the inequality as the gold
            written, wanted = wanted, written
    elif len(_parts(written)[1]) != len(_parts(wanted)[1]) and "\\pm" not in written + wanted:
        return Verdict(correct=False, reason="string")  # 1,1,1 is not 1, whatever sets say
    return _symbolic(written, wanted, allowance)


_RELATION = re.compile(r"<|>|\\[lg]e(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")


def _for_algebra(core: str) -> str:
    """What math-verify would misread, said in another way."""
    return _DEGREES.sub(r"{(\1*\\pi/180)}", core)


def _exact_tiers(mine: _Answer, theirs: _Answer) -> Verdict | None:
    """The verdict of the string and exact tiers; None: neither can tell."""
    if mine.unit and theirs.unit and mine.unit != theirs.unit:
        return Verdict(correct=False, reason="string")
    mine, theirs = _without_name(mine, theirs), _without_name(theirs, mine)
    if (same := _same_number(mine, theirs)) is not None:
        return Verdict(correct=same, reason="exact")
    if mine.percent == theirs.percent and _squeeze(mine.core) == _squeeze(theirs.core):
        return Verdict(correct=True, reason="string")
    if (same := _same_list(mine.core, theirs.core)) is not None:
        return Verdict(correct=same, reason="exact")
    gold_value = number(theirs.core)
    if gold_value is not None and gold_value.denominator == 1:
        return Verdict(correct=False, reason="exact")
    if theirs.core.isalpha():  # a word or a letter equals itself only
        return Verdict(correct=False, reason="string")
    return None


def _without_name(answer: _Answer, other: _Answer) -> _Answer:
    """`x = 5` answers 5: a name that only one side gives is left out."""
    if "," in answer.core or _NAME.match(other.core):
        return answer
    return replace(answer, core=_NAME.sub("", answer.core))


_cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
_cache_lock = threading.Lock()


def _symbolic(answer: str, gold: str, allowance: Allowance) -> Verdict:
    """math-verify's word. Decided pairs are remembered: samples of one problem repeat their
    answers.
    """
    pair = (answer, gold)
    with _cache_lock:
        if pair in _cache:
            _cache.move_to_end(pair)
            return _cache[pair]
    correct, reason = symbolic(answer, gold, allowance)
    verdict = Verdict(correct=correct, reason=reason)
    if reason == "symbolic":
        with _cache_lock:
            _cache[pair] = verdict
            if len(_cache) > _CACHE_SIZE:
                _cache.popitem(last=False)
    return verdict
