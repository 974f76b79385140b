"""Measures the grader on answers that are right and answers that are wrong: a Markdown table.

    python benchmarks/grading.py [--golds 400] [--seed 0] [--list]

It reads `../shared/data`: the faults that were found (`faults/*.jsonl`), and the golds of the
public sets (`math/*.jsonl`). From the golds it makes other spellings, which are right, golds with
another digit or sign, which are wrong, and pairs of different golds, which are wrong. Every answer
is boxed. It calls nothing of the grader but `judge`, so that it can measure older graders, too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tutelage.envs.grading import judge

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TIMEOUT = 5.0

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_VULGAR = {"1/2": "½", "1/3": "⅓", "2/3": "⅔", "1/4": "¼", "3/4": "¾", "1/5": "⅕", "1/8": "⅛"}
_SUPERSCRIPTS = dict(zip("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True))
_FULL_WIDTH = {ord(c): ord(c) + 0xFEE0 for c in "0123456789"}


def _words(gold: str) -> bool:
    return re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}|\\(?:text|mbox)", gold) is not None


def _numeral(gold: str) -> bool:
    return _NUMBER.fullmatch(gold) is not None or _FRACTION.fullmatch(gold) is not None


def _value(gold: str) -> bool:
    """One value without words, names or relations: a name or a unit can stand beside it."""
    return not _words(gold) and re.search(r"[,=<>|&;:%$]|\\[lgn]e|\\in|\\pm|_", gold) is None


def _when(found: bool, text: str) -> str | None:
    return text if found else None


def _sub(pattern: str, to: str | Callable[[re.Match[str]], str], gold: str) -> str | None:
    made = re.sub(pattern, to, gold)
    return made if made != gold else None


def _grouped(mark: str) -> Callable[[str], str | None]:
    def made(gold: str) -> str | None:
        if _INTEGER.fullmatch(gold) is None or len(gold.lstrip("-")) < 4:
            return None
        return f"{int(gold):,}".replace(",", mark)

    return made


def _vulgar(match: re.Match[str]) -> str:
    return match[1] + _VULGAR.get(f"{match[2]}/{match[3]}", match.group()[len(match[1]) :])


def _superscript(match: re.Match[str]) -> str:
    return "".join(_SUPERSCRIPTS[digit] for digit in match[1] or match[2])


def _tight(gold: str) -> str | None:
    made = re.sub(r"(?<!\\)(?<![A-Za-z\d]) +| +(?![A-Za-z\d])", "", gold)
    return made if made != gold and "\\text" not in gold else None


def _and(gold: str) -> str | None:
    """`1, 2` as `1 \\text{ and } 2`, for plain lists of values."""
    parts = re.split(r"\s*(?<!\{),(?!\\!)\s*", gold)
    if len(parts) < 2 or re.search(r"[(\[{}\]),:=|]", re.sub(r"\{[^{}]*\}|,", "", gold)):
        return None
    if any(re.fullmatch(r"\d{3}", part) for part in parts[1:]) or _words(gold):
        return None
    return ", ".join(parts[:-1]) + ", \\text{ and } " + parts[-1]


def _without_unit(gold: str) -> str | None:
    match = re.fullmatch(r"([^A-Za-z]+?)\s*\\(?:text|mbox)\s*\{[a-z. ]+\}", gold)
    return match[1] if match and not re.search(r"million|thousand|and|or", gold) else None


def _paired(gold: str) -> bool:
    return "\\left" not in gold and gold.count("(") == gold.count(")") > 0 and "[" not in gold


SPELLINGS: dict[str, Callable[[str], str | None]] = {
    "as it is": lambda g: g,
    "\\dfrac": lambda g: _sub(r"\\frac", r"\\dfrac", g),
    "\\tfrac": lambda g: _sub(r"\\frac", r"\\tfrac", g),
    "\\frac12": lambda g: _sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", g),
    "a/b": lambda g: _sub(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", g),
    "wide spaces": lambda g: _when(
        not _words(g), re.sub(r"(?<=[\d)}])([+*-]|,(?!\\!))(?=[\d\\(])", r" \1 ", g)
    ),
    "no spaces": _tight,
    "thin spaces": lambda g: _when(not _words(g), f"\\, {g} \\;"),
    "\\left( \\right)": lambda g: _when(
        _paired(g), g.replace("(", "\\left(").replace(")", "\\right)")
    ),
    "dollars": lambda g: _when("$" not in g, f"${g}$"),
    "\\( \\)": lambda g: f"\\( {g} \\)",
    "\\displaystyle": lambda g: f"\\displaystyle {g}",
    "\\mathbf": lambda g: _when("\\text" not in g, f"\\mathbf{{{g}}}"),
    "\\text": lambda g: _when(_numeral(g) or g.isalpha(), f"\\text{{{g}}}"),
    "\\boxed": lambda g: f"\\boxed{{{g}}}",
    "\\color": lambda g: f"\\color{{blue}}{{{g}}}",
    "braces": lambda g: f"{{{g}}}",
    "a line of its own": lambda g: f"\n  {g}\n",
    "**bold**": lambda g: _when(_numeral(g) or g.isalpha(), f"**{g}**"),
    "full stop": lambda g: f"{g}.",
    "zero-width": lambda g: f"\u200b{g}\ufeff",
    "x =": lambda g: _when(_value(g), f"x = {g}"),
    "f(2) =": lambda g: _when(_value(g), f"f(2)={g}"),
    "m+n =": lambda g: _when(_value(g) and g != "0", f"m+n={g}"),
    "x = (tuple)": lambda g: _when(re.fullmatch(r"\([^=<>]*,[^=<>]*\)", g) is not None, f"x = {g}"),
    "\\theta =": lambda g: _when(_value(g) and ("circ" in g or "pi" in g), f"\\theta = {g}"),
    "units": lambda g: _when(_numeral(g), f"{g} units"),
    "\\text{ cm}^2": lambda g: _when(_numeral(g), f"{g}\\text{{ cm}}^2"),
    "km/h": lambda g: _when(_numeral(g), f"{g} km/h"),
    "元": lambda g: _when(_INTEGER.fullmatch(g) is not None, f"{g}元"),
    "\\$": lambda g: _when(re.fullmatch(r"\d+(\.\d+)?", g) is not None, f"\\${g}"),
    "without its unit": _without_unit,
    "−": lambda g: _sub("-(?=[\\d\\\\a-z(])", "−", _when("\\begin{" not in g, g) or ""),
    "√": lambda g: _sub(r"\\sqrt\{(\d+)\}", r"√\1", g),
    "√( )": lambda g: _sub(r"\\sqrt\{(\d+)\}", r"√(\1)", g),
    "sqrt( )": lambda g: _sub(r"\\sqrt\{(\d+)\}(?![\d(])", r"sqrt(\1)", g),
    "π": lambda g: _sub(r"\\pi(?![A-Za-z])\s*", "π", g),
    "½": lambda g: _sub(_FRACTION.pattern, _vulgar, g) if not re.search(r"\d\\frac", g) else None,
    "x²": lambda g: _sub(r"\^(\d)(?!\d)|\^\{(\d+)\}", _superscript, g),
    "∞": lambda g: _sub(r"\\infty\b", "∞", g),
    "∪": lambda g: _sub(r"\\cup\b", "∪", g),
    "≤": lambda g: _sub(r"\\leq?\b", "≤", g),
    "full width": lambda g: _sub(r"^.*\d.*$", lambda m: m.group().translate(_FULL_WIDTH), g),
    "full-width brackets": lambda g: _sub(
        r"^\(([\d\s.,-]+)\)$", lambda m: f"（{m[1].replace(',', '，')}）", g
    ),
    "1,234": _grouped(","),
    "1{,}234": _grouped("{,}"),
    "1,\\!234": _grouped(",\\!"),
    "1\\,234": _grouped("\\,"),
    "1234": lambda g: _sub(r"(?<=\d)(?:,\\!|\{,\}|,)(?=\d{3}(?!\d))", "", g) if _numeral(
        re.sub(r",\\!|\{,\}|,|\\\$", "", g)) and len(re.findall(",", g)) < 3 else None,
    "5.0": lambda g: _when(_INTEGER.fullmatch(g) is not None, f"{g}.0"),
    "5.20": lambda g: _when(re.fullmatch(r"-?\d+\.\d+", g) is not None, f"{g}0"),
    "+5": lambda g: _when(_numeral(g) and g[0] != "-", f"+{g}"),
    "°": lambda g: _sub(r"\^\{?\\circ\}?", "°", g),
    "^{\\circ}": lambda g: _sub(r"\^\\circ", r"^{\\circ}", g),
    "degrees": lambda g: _sub(r"^(-?[\d.]+)\^\{?\\circ\}?$", r"\1\\text{ degrees}", g),
    "no degree": lambda g: _sub(r"^(-?[\d.]+)\^\{?\\circ\}?$", r"\1", g),
    ", and": _and,
    "semicolons": lambda g: _when(_and(g) is not None, re.sub(r"(?<!\{),(?!\\!)", ";", g)),
    "bmatrix": lambda g: _sub("pmatrix", "bmatrix", g),
    "\\\\ apart": lambda g: _sub(r"\s*\\\\\s*", r" \\\\ ", _when("matrix" in g, g) or ""),
    "\\lbrace": lambda g: _sub(
        r"\\[{}]", lambda m: "\\lbrace " if m.group() == "\\{" else "\\rbrace ", g
    ),
}  # fmt: skip


def spellings(gold: str) -> Iterator[tuple[str, str]]:
    """(kind, the gold in another spelling), for every kind of spelling that the gold allows."""
    for kind, spell in SPELLINGS.items():
        if made := spell(gold):
            yield kind, made


def slips(gold: str, dice: random.Random) -> Iterator[tuple[str, str]]:
    """(kind, an answer that is wrong): another digit, another sign, a part of a list left out."""
    digits = [m.start() for m in re.finditer(r"\d", gold)]
    if digits:
        at = dice.choice(digits)
        other = dice.choice([digit for digit in "123456789" if digit != gold[at]])
        yield "another digit", gold[:at] + other + gold[at + 1 :]
    if re.fullmatch(r"[\d.]*[1-9][\d.]*|\\frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}", gold):
        yield "another sign", f"-{gold}"
    if re.fullmatch(r"[^(\[{}]+(, ?[^(\[{}]+)+", gold) and not re.search(r"\d,\d{3}|\\!", gold):
        yield "one left out", gold.rpartition(",")[0]
    if re.fullmatch(r"\(.*,.*\)", gold) and "infty" not in gold:
        yield "other brackets", f"[{gold[1:-1]}]"
    if re.fullmatch(r"-?\d+", gold):
        yield "million", f"{gold} million"
        yield "a tiny bit more", f"{gold}.{'0' * 20}1"


@dataclass
class Tally:
    tried: int = 0
    right: int = 0
    accepted: int = 0  # wrong answers
    slowest: float = 0.0
    missed: list[tuple[str, str, str]] = field(default_factory=list)


def golds() -> list[str]:
    """Every gold of the public sets once."""
    found = set()
    for path in sorted((DATA / "math").glob("*.jsonl")):
        for line in path.read_text().strip().split("\n"):
            found.add(str(json.loads(line)["answer"]))
    return sorted(gold for gold in found if gold.strip())


def known() -> Iterator[tuple[str, str, str, bool]]:
    """(kind, response, gold, right) of the faults that were found, and of what must hold."""
    for name in ("grading", "gold_spellings", "grading_held"):
        for line in (DATA / "faults" / f"{name}.jsonl").read_text().strip().split("\n"):
            row = json.loads(line)
            kind = row.get("fault") or f"{name}: {row['kind'].partition(' ')[0]}"
            said = row.get("response") or f"\\boxed{{{row['answer']}}}"
            yield kind if name != "grading_held" else "held", said, row["gold"], row["expected"]


def generated(chosen: list[str], dice: random.Random) -> Iterator[tuple[str, str, str, bool]]:
    for gold in chosen:
        for kind, made in spellings(gold):
            yield f"spelling: {kind}", f"\\boxed{{{made}}}", gold, True
        for kind, made in slips(gold, dice):
            yield f"wrong: {kind}", f"\\boxed{{{made}}}", gold, False
        other = dice.choice(chosen)
        if other != gold:
            yield "wrong: another gold", f"\\boxed{{{other}}}", gold, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--golds", type=int, default=400, help="how many golds to write anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print every pair that is not right")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    everything = golds()
    chosen = dice.sample(everything, min(arguments.golds, len(everything)))
    tallies: dict[str, Tally] = defaultdict(Tally)
    judge("\\boxed{x+1}", "1+x", timeout=60)  # the workers are up
    for kind, said, gold, right in (*known(), *generated(chosen, dice)):
        tally = tallies[kind]
        began = time.perf_counter()
        verdict = judge(said, gold, timeout=TIMEOUT)
        tally.slowest = max(tally.slowest, time.perf_counter() - began)
        tally.tried += 1
        tally.right += verdict.correct == right
        tally.accepted += verdict.correct and not right
        if verdict.correct != right:
            tally.missed.append((said, gold, verdict.reason))
    print("| kind | tried | right | wrong accepted | slowest |\n|---|---:|---:|---:|---:|")
    total = Tally()
    for kind, tally in tallies.items():
        _row(kind, tally)
        total.tried += tally.tried
        total.right += tally.right
        total.accepted += tally.accepted
        total.slowest = max(total.slowest, tally.slowest)
    _row("**all**", total)
    if arguments.list:
        for kind, tally in tallies.items():
            for said, gold, reason in tally.missed:
                print(f"{kind}: {said!r} against {gold!r}: {reason}", file=sys.stderr)


def _row(kind: str, tally: Tally) -> None:
    name = kind.replace("|", "\\|")
    print(
        f"| {name} | {tally.tried} | {tally.right} | {tally.accepted} |"
        f" {1000 * tally.slowest:.0f} ms |"
    )


if __name__ == "__main__":
    main()
