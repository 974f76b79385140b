"""Judges whether a response equals the gold answer: exactly, or by algebra in killable processes.

Three tiers, cheapest first:

1. string: both sides in plain TeX (`text`) are the same text;
2. exact: lists, sets, equations, units and the like are taken apart (`shapes`, `sets`, `kinds`,
   `values`), and numbers are compared as `Fraction`, without tolerance, expressions that have a
   rational value among them (`exact`). If the gold is a number, this tier decides, unless the
   answer is an irrational expression;
3. symbolic: the same again by values of high precision (`algebra`), and what that can't read by
   math-verify (the extra `tutelage[math]`), in worker processes that are killed at the deadline,
   because `9^{9^{9}}` holds Python's interpreter lock and no thread, alarm or asyncio timeout can
   end it.

What math-verify would get wrong or explode on (power towers, factorials, number bases, lists of
another length, moduli, tiny values) never reaches it. Verdicts carry a reason, so that timeouts and
missing boxes can be counted.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass

from tutelage.envs.grading.arithmetic import Exact
from tutelage.envs.grading.numbers import numeral
from tutelage.envs.grading.pool import UNDECIDED, Allowance, symbolic
from tutelage.envs.grading.shapes import same
from tutelage.envs.grading.split import listed, squeezed
from tutelage.envs.grading.text import clean

MAX_ANSWER = 1000  # characters; the longest gold of the public sets has 210
MAX_BARE = 200  # characters of a response without a box that still count as a bare answer
_CACHE_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the answer is correct, and the reason: which tier decided, or why none could.

    Reasons: string, exact, symbolic (decided); no_box, too_long, not_text, unreadable (no answer to
    compare); gold_unparseable; refused (too large to evaluate safely); timeout (its processor time
    ran out), crash (so did its process, by itself), unavailable (no math-verify that works). And of
    the machine alone, `undecided`: starting, late, lost (see pool.UNDECIDED).
    """

    correct: bool
    reason: str

    @property
    def undecided(self) -> bool:
        """Whether the machine had no time for it: that says nothing of the answer. Judge again."""
        return self.reason in UNDECIDED


def grade(prediction: str, gold: str, *, timeout: float = 5.0, strict: bool = False) -> bool:
    """True if `prediction` (a full response or a bare answer) equals `gold`. See `judge`."""
    return judge(prediction, gold, timeout=timeout, strict=strict).correct


def judge(
    prediction: str,
    gold: str,
    *,
    timeout: float = 5.0,
    wait: float | None = None,
    require_box: bool = False,
    strict: bool = False,
) -> Verdict:
    """Compare a response with a gold answer; returns within `timeout` seconds, from any thread.

    With `wait`, `timeout` is in processor seconds, and they may come within `wait` seconds on the
    clock: how busy the machine is then decides nothing up to there.

    The answer is the last `\\boxed{}` after the last `</think>`. A response without any box counts
    as a bare answer if it is short, unless `require_box`. With `strict`, a gold integer wants a
    numeral: `10!` is not 3628800 then. Never raises on any prediction or gold.
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
    return _compare(found, target, allowance, strict=strict)


# --- the answer in a response --------------------------------------------------------------------

_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}[,;:]?\s+(?<!\\)[A-Za-z]{2,}")


def extract(response: str, *, require_box: bool) -> str | Verdict:
    """The text of the answer, or the verdict that there is none.

    An unclosed or empty last box is no answer: falling back to an earlier one would reward replies
    that do not finish.
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
        most = MAX_BARE if " " in bare else MAX_ANSWER  # without a space it is no prose
        if require_box or not bare or len(bare) > most or "\n" in bare:
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
    """The TeX argument at the start of `text`: `{...}` with balanced braces, perhaps on the next
    line, or one word (`\\boxed 5`).
    """
    if not text.lstrip("% \t\r\n").startswith("{"):
        word = re.match(r"\s+([^\s$\\{}]+)", text)
        return word.group(1).rstrip(".,;") if word else None
    begin = text.index("{") + 1
    depth, at = 1, begin
    while at < len(text):
        if text[at] == "\\":
            at += 1  # an escaped brace is a character
            if text.startswith(" }", at) and text.count("\\{", begin, at) > text.count(
                "\\}", begin, at
            ):
                at += 1  # "\ }": an escaped brace that a space came into
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:at]
        at += 1
    return None


# --- the tiers -----------------------------------------------------------------------------------

# What must not reach a computer algebra system: its value is astronomically large, or it is
# compared wrongly (math-verify takes 1/2006! for 1/2004!, both being zero to fifteen digits, and
# drops the base of 204_5 and the modulus of 3 mod 7).
_REFUSED = re.compile(
    r"\^\s*[{(][^})]*\d\s*\}?\s*\^"  # a power of numbers in an exponent: 9^{9^{9}}, e^{10^{10}}
    r"|\^\s*\d+\s*\^"
    r"|(?:\^[^\^]{1,4}){4}"  # x^x^x^x^x, which TeX refuses too, takes seconds
    r"|(?:=[^=]*){11}"  # so do long chains
    r"|\d{3,}\s*!|[)}]\s*!|!\s*!"  # factorials beyond two digits, or of an expression
    r"|\^\s*[({]*\s*[+-]?\d{5,}"  # exponents beyond four digits
    r"|\\binom\s*\{(?:\d{4,}|[^}]*\^)"
    r"|\d_|\\(?:sum|prod|int|lim|pmod|bmod|mod|equiv|ldots)(?![A-Za-z])"
)
_DEEPEST = 20  # nested brackets: math-verify's parser takes seconds from about thirty on


# math-verify leaves out what it can't read: \\frac 4 + 2 is 4 + 2 there
_UNFINISHED = re.compile(
    r"\\frac\s*(?:\{[^{}]*\}|\w|\\[a-z]+)?\s*(?:[-+=,;)\]]|$)"
    r"|\\(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|arc[a-z]{3})\s*(?:\^\s*(?:\{[^{}]*\}|\w))?\s*(?:[+=,;)\]]|$)"
)


def _too_much(text: str) -> bool:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST or _REFUSED.search(text) is not None


def _compare(answer: str, gold: str, allowance: Allowance, *, strict: bool) -> Verdict:
    mine, theirs = clean(answer), clean(gold)
    if mine and squeezed(mine) == squeezed(theirs):
        return Verdict(correct=True, reason="string")
    exact = Exact(strict=strict)
    try:
        found = same(mine, theirs, exact)
    except RecursionError:
        return Verdict(correct=False, reason="refused")
    if found is not None:
        return Verdict(correct=found, reason="exact")
    if _PROSE.search(answer) is not None or _UNFINISHED.search(mine) is not None or not mine:
        return Verdict(correct=False, reason="unreadable")
    if exact.oversized or (not exact.unsure and (_too_much(mine) or _too_much(theirs))):
        return Verdict(correct=False, reason="refused")
    if numeral(theirs) is not None and not exact.unsure:
        return Verdict(correct=False, reason="exact")
    if not exact.unsure and len(listed(mine).parts) != len(listed(theirs).parts):
        return Verdict(correct=False, reason="string")  # 1,1,1 is not 1, whatever sets say
    return _symbolic(mine, theirs, allowance)


_cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
_cache_lock = threading.Lock()


def _symbolic(answer: str, gold: str, allowance: Allowance) -> Verdict:
    """The symbolic tier's verdict. Decided pairs are cached: samples of one problem repeat their
    answers.
    """
    pair = (answer, gold)
    with _cache_lock:
        if pair in _cache:
            _cache.move_to_end(pair)
            return _cache[pair]
    correct, reason = symbolic(answer, gold, allowance)
    verdict = Verdict(correct=correct, reason=reason)
    if reason == "symbolic":  # any other may come out otherwise next time
        with _cache_lock:
            _cache[pair] = verdict
            if len(_cache) > _CACHE_SIZE:
                _cache.popitem(last=False)
    return verdict
