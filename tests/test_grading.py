"""The grader: right on the pairs that public graders get wrong, and unharmed by hostile text."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.settings import pool as pool_of
from tutelage.envs.child import Child
from tutelage.envs.grading import Verdict, grade, judge, verdict
from tutelage.envs.grading import pool as grading_pool
from tutelage.envs.grading.numbers import numeral
from tutelage.envs.grading.pool import Allowance
from tutelage.envs.math import env as math_env
from tutelage.envs.math.env import MathEnv
from tutelage.envs.pool import Act, Failed, Reset

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="the symbolic tier needs math-verify: pip install 'tutelage[math]'",
)

EQUAL_EXACTLY = [
    ("(1-1)^2", "0"),
    ("(1-1)^{10}+3", "3"),
    ("42.", "42"),
    ("025", "25"),
    ("27.0", "27"),
    ("+7", "7"),
    ("−3", "-3"),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    ("4.5e33", "4.5\\times10^{33}"),
    ("6.02e23", "6.02 \\cdot 10^23"),
    ("10^{-3}", "0.001"),
    ("2^{10}", "1024"),
    (".5", "\\frac12"),
    ("\\dfrac{1}{2}", "0.5"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("\\frac{2}{4}", "1/2"),
    ("3\\frac{1}{2}", "7/2"),
    ("3 1/2", "3.5"),
    ("50\\%", "50"),
    ("50%", "0.5"),
    ("336^\\circ", "336"),
    ("90^{\\circ}", "90"),
    ("\\$5.00", "5"),
    ("5\\text{ cm}", "5"),
    ("42 apples", "42"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("(1, 2)", "(1,2)"),
    ("\\left(1,\\frac12\\right)", "(1, 0.5)"),
    ("2,1", "1, 2"),
    ("\\{1,2\\}", "1,2"),
    ("x=1 \\text{ or } x=2", "1, 2"),
    ("\\text{(A)}", "A"),
    ("\\varnothing", "\\emptyset"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("204_5", "204_5"),
    ("2006!", "2006!"),
]
EQUAL_BY_ALGEBRA = [
    ("1+x", "x+1"),
    ("q-p", "-(p-q)"),
    ("\\sqrt{50}", "5\\sqrt2"),
    ("x^2+2xy+y^2", "(x+y)^2"),
    ("\\sin 30^\\circ", "\\frac12"),
    ("x\\le 3", "(-\\infty,3]"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("\\pi/4", "\\frac{\\pi}{4}"),
]
DIFFERENT = [
    ("(1-1)^2", "1"),
    ("1/2006!", "1/2004!"),
    ("2^{-98}", "2^{-99}"),
    ("10^{-21}", "10^{-20}"),
    ("0.0000012", "0.0000014"),
    ("12346", "12345"),
    ("100001", "100000"),
    ("9007199254740993", "9007199254740992"),
    ("100", "1"),
    ("5", "500"),
    ("1%", "100%"),
    ("204_5", "204_6"),
    ("1,1,1", "1"),
    ("1,2", "12"),
    ("(1,2)", "(2,1)"),
    ("[0,1]", "[0,1)"),
    ("k>2", "k\\ge 2"),
    ("x=1, y=2", "y=1, x=2"),
    ("y=2x+1", "x=2x+1"),
    ("1", "2x+z=1"),
    ("C", "c"),
    ("5 feet", "5 inches"),
    ("x^2+y^2", "x^2-y^2"),
    ("1/0", "0"),
    ("1/0", "1/0.0000001"),
    ("The final answer is 42.", "42"),
    ("so 5 apples and 7 pears", "7"),
    ("nan", "1"),
    ("\\infty", "1"),
    ("", "1"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL_EXACTLY)
def test_equal_answers_are_accepted_without_algebra(answer: str, gold: str) -> None:
    for text in (answer, f"So it is $\\boxed{{{answer}}}$."):
        verdict = judge(text, gold, timeout=0)
        assert verdict.correct, verdict
        assert verdict.reason in ("exact", "string")


@needs_math_verify
@pytest.mark.parametrize(("answer", "gold"), EQUAL_BY_ALGEBRA)
def test_equal_expressions_are_accepted(answer: str, gold: str) -> None:
    verdict = judge(f"\\boxed{{{answer}}}", gold, timeout=30, wait=60)
    assert verdict.correct, verdict


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_answers_are_rejected(answer: str, gold: str) -> None:
    assert not grade(answer, gold, timeout=30)
    assert not grade(f"\\boxed{{{answer}}}", gold, timeout=30)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("\\boxed{3}. Wait, no: \\boxed{7}", True),
        ("\\boxed{7}. Wait, no: \\boxed{3}", False),
        ("<think>\\boxed{3}</think> It is \\boxed{7}.", True),
        ("<think>it is \\boxed{7}</think> done", False),
        ("<think>it is \\boxed{7}", False),  # the thought never ended
        ("it is \\boxed{7", False),
        ("\\boxed{7} or rather \\boxed{", False),  # finishing is not optional
        ("\\boxed{7} or rather \\boxed{}", False),
        ("\\boxed 7", True),
        ("\\fbox{7}", True),
        ("\\boxed{\\boxed{7}}", True),
        ("\\boxed{{7}}", True),
        ("\\boxed{\\text{seven}}", False),
        ("7", True),
    ],
)
def test_the_last_finished_box_after_the_thought_is_the_answer(response: str, right: bool) -> None:
    assert grade(response, "7") is right


def test_a_box_can_be_required_and_a_boxed_gold_is_unpacked() -> None:
    assert judge("7", "7", require_box=True) == Verdict(correct=False, reason="no_box")
    assert grade("7", "\\boxed{7}")


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_equal_themselves_however_written_and_nothing_else(
    a: Fraction, b: Fraction
) -> None:
    written = f"\\frac{{{2 * a.numerator}}}{{{2 * a.denominator}}}"
    assert numeral(written) == numeral(f"{a.numerator}/{a.denominator}") == a
    assert grade(written, str(a), timeout=0)
    assert grade(str(b), str(a), timeout=0) is (a == b)


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9
    )
)
def test_decimals_are_read_without_rounding(value: object) -> None:
    assert numeral(f"{value:f}") == Fraction(str(value))


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="\\{}()[]^_$,.-+/%!0123456789xe \n<>think boxedfrac", max_size=60),
    st.text(max_size=8),
)
def test_no_text_raises(prediction: str, gold: str) -> None:
    # a deadline already past: the exact tiers answer, the symbolic one says timeout
    assert judge(prediction, gold, timeout=0).correct in (True, False)
    assert judge(f"\\boxed{{{prediction}}}", gold, timeout=0).correct in (True, False)


@pytest.mark.parametrize("gold", ["", "   ", "\\boxed{}", "9" * 5000, None, 3.5])
def test_a_gold_that_cannot_be_read_is_said_so(gold: str) -> None:
    assert judge("\\boxed{7}", gold).reason in ("gold_unparseable", "not_text")


HOSTILE = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "{9^9}^{9^9}",
    "((9^9)^9)^9^9",
    "(10^8)!",
    "99!!!!",
    "2^{10^{10}}",
    "2^{99999999}",
    "\\binom{10^9}{10^8}",
    "\\sum_{i=1}^{10^9} i",
    "\\int_0^1 x^{x^x} dx",
    "1+" * 400 + "1",
    "\\frac{1}{" * 100 + "x" + "}" * 100,
    "(" * 900,
    "{" * 450 + "}" * 450,
    "\\sqrt{" * 120 + "2" + "}" * 120,
    "9" * 900,
    "1e99999",
    "1/" + "0" * 100,
    "x^{x^{x^{x^{x}}}}",
    "x^" * 490 + "x",
    "1=" * 490 + "x",
    "(x+1)^{9999}",
    "\\begin{matrix}" * 50,
    "__import__('os').system('touch {mark}')",
    "open('{mark}','w')",
    "\\text{import os; os.system('touch {mark}')}",
    "exec(\"open('{mark}','w')\")",
    "lambda: 0",
    "\ud800\udfff",
    "\x00\x1b[31m\u202e",
    "%s%s%n{0.__class__}",
    '"}\n{"correct": true}',
]


@needs_math_verify
def test_hostile_text_from_a_thread_is_refused_in_time_and_runs_nothing(tmp_path: Path) -> None:
    """Every text as the answer and as the gold, in a thread that is not the main one."""
    mark = tmp_path / "mark"
    worst = 0.0

    def attack() -> None:
        nonlocal worst
        grade("x+1", "1+x", timeout=30)  # the worker is up
        for text in HOSTILE:
            text = text.replace("{mark}", str(mark))
            for prediction, gold in ((f"\\boxed{{{text}}}", "y+\\sqrt{2}"), ("y+\\sqrt{2}", text)):
                began = time.monotonic()
                assert judge(prediction, gold, timeout=1.0).correct is False, text
                worst = max(worst, time.monotonic() - began)

    thread = threading.Thread(target=attack)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert 0 < worst < 2.0
    assert not mark.exists()
    assert judge("x+2", "2+x", timeout=30).correct


def test_a_very_long_response_is_read_from_its_end() -> None:
    began = time.monotonic()
    assert grade("blah \\boxed{3} " * 500_000 + "\\boxed{7}", "7")
    assert judge("\\boxed{" + "1" * 5_000_000, "7").reason == "too_long"
    assert judge("{" * 5_000_000, "7").reason == "no_box"
    assert not grade("\\boxed{" * 500_000, "7")
    assert time.monotonic() - began < 2


# --- how answers are written ----------------------------------------------------------------------

# (kind, answer, gold, right): one line or two of every kind of fault that was found.
WRITTEN = [
    ("and", "19, 46 and 82", "19, 46, \\text{ and } 82", True),
    ("and", "21, 36, and 82", "19, 46, \\text{ and } 82", False),
    ("and", "1, 2, 3, and 4", "1,2,3", False),
    ("semicolons", "x=1;x=2", "1,2", True),
    ("thousands", "1,000, 2,000", "1000, 2000", True),
    ("thousands", "10080", "10,\\!080", True),
    ("thousands", "2{ , }016{ , }532", "2016532", True),
    ("thousands", "1,234", "1.234", False),
    ("matrix", "\\begin{pmatrix} -2 \\\\ 3 \\end{pmatrix}",
     "\\begin{pmatrix}-2\\\\3\\end{pmatrix}", True),
    ("matrix", "\\begin{bmatrix} 9 \\\\ 3 \\end{bmatrix}",
     "\\begin{pmatrix} 6 \\\\ 3 \\end{pmatrix}", False),
    ("matrix", "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}",
     "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", False),
    ("tiny", "\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}", False),
    ("tiny", "1-\\frac{1}{2^{100}}", "1-\\frac{1}{2^{101}}", False),
    ("tiny", "2^{-100}+2^{-101}", "3\\cdot2^{-101}", True),
    ("tiny", "\\frac{1}{2006!}", "\\frac{1}{2004!}", False),
    ("scale", "5 million", "5", False),
    ("scale", "\\$2.5\\text{ million}", "2500000", True),
    ("scale", "2 thirds", "2", False),
    ("words", "7 is not a solution", "7", False),
    ("words", "5 or more", "5", False),
    ("words", "5 cubed", "5", False),
    ("units", "3 \\times 10^{8} m/s", "3e8", True),
    ("units", "10\\text{ mph}", "10\\text{ miles per hour}", True),
    ("units", "5 cm^2", "5\\text{ square centimeters}", True),
    ("units", "5 cm^2", "5\\text{ cm}", False),
    ("units", "5 cents", "\\$5", False),
    ("units", "14", "14 \\text{ right triangles}", True),
    ("units", "3万元", "30000", True),
    ("units", "5x", "5", False),
    ("units", "\\$5", "5\\%", False),
    ("units", "100°C", "100", True),
    ("modulus", "3 \\pmod 7", "3 \\pmod{7}", True),
    ("modulus", "n \\equiv 2 \\pmod{5}", "n\\equiv 2\\pmod{7}", False),
    ("modulus", "3 \\bmod 5", "4 \\bmod 5", False),
    ("braces", "\\frac\\pi 2", "\\frac{\\pi}{2}", True),
    ("braces", "\\frac{\\binom52}{32}", "\\frac{5}{16}", True),
    ("names", "m+n=53", "53", True),
    ("names", "f(2)=5", "5", True),
    ("names", "(x,y)=(1,2)", "(1,2)", True),
    ("names", "(x,y)=(2,1)", "(1,2)", False),
    ("names", "\\angle ABC=30^\\circ", "30", True),
    ("names", "x = (0,\\infty)", "(0,\\infty)", True),
    ("names", "2x=10", "10", False),
    ("names", "x+1=5", "5", False),
    ("names", "x=2,y=1", "(1,2)", False),
    ("unicode", "5√21", "5\\sqrt{21}", True),
    ("unicode", "10⁻³", "0.001", True),
    ("unicode", "2¾", "2.75", True),
    ("unicode", "（１，２）", "(1,2)", True),
    ("unicode", "7\u200b。", "7", True),
    ("sets", "x\\neq 2", "(-\\infty,2)\\cup(2,\\infty)", True),
    ("sets", "\\mathbb R\\setminus\\{2\\}", "x\\ne2", True),
    ("sets", "\\{x \\in \\mathbb{R} : x > 2\\}", "(2,\\infty)", True),
    ("sets", "x\\le-2\\text{ or }x\\ge2", "(-\\infty,-2]\\cup[2,\\infty)", True),
    ("sets", "x\\le-2\\text{ or }x\\ge2", "(-\\infty,-2)\\cup[2,\\infty)", False),
    ("sets", "[0,1]\\cup[1,2]", "[0,2]", True),
    ("sets", "(2,3)", "\\{2,3\\}", False),
    ("style", "{\\bf 13}", "13", True),
    ("style", "\\textcolor{blue}{\\boldsymbol{13}}", "13", True),
    ("style", "**73**", "73", True),
    ("complex", "(1+i)^2", "2i", True),
    ("complex", "\\frac{1}{1+i}", "\\frac{1+i}{2}", False),
    ("money", "-\\$1,\\!234.50", "-1234.5", True),
    ("choice", "\\textbf{(A)}\\ 5", "A", True),
    ("choice", "(B) 5", "A", False),
    ("choice", "AB", "A", False),
    ("repeating", "0.1\\overline{6}", "\\frac16", True),
    ("repeating", "0.(3)", "0.333\\ldots", True),
    ("repeating", "0.333", "\\frac13", False),
    ("time", "3:30 PM", "3:30\\text{ p.m.}", True),
    ("time", "15:30", "3:30 PM", True),
    ("time", "3:30 am", "3:30 pm", False),
    ("integer", "\\binom{10}{3}", "120", True),
    ("integer", "\\sqrt[3]{27}", "3", True),
    ("integer", "10!", "3628800", True),
    ("integer", "10!", "3628801", False),
    ("integer", "2^{53}", "9007199254740993", False),
    ("integer", "2^{53}+1", "9007199254740993", True),
    ("money", "\\$1,500", "1500", True),
    ("money", "x = \\$12,345.67", "12345.67", True),
    ("money", "\\text{\\$}36\\text{,}000", "36,\\!000", True),
    ("money", "1,500 USD", "\\$1500", True),
    ("money", "\\$1,500 per month", "1500", True),
    ("money", "\\$1, \\$500", "1500", False),
    ("money", "\\$1,500", "1501", False),
    ("units", "4\\ \\text{sec}", "4\\text{ seconds}", True),
    ("units", "9.8 m/sec^2", "9.8\\text{ m/s}^2", True),
    ("units", "4\\ \\text{sec}", "4\\text{ minutes}", False),
    ("units", "4\\operatorname{sec} x", "\\frac{4}{\\cos x}", True),
    ("units", "12 个苹果", "12", True),
    ("units", "12个以上", "12", False),
    ("units", "5\\text{ different ways}", "5", True),
    ("ordinals", "4^{\\text{th}}", "4", True),
    ("thousands", "1'000'000", "1000000", True),
    ("choice", "B=A", "A", False),
    ("choice", "A=B", "B", False),
    ("names", "1=2", "2", False),
    ("names", "2+3=6", "6", False),
    ("names", "m+n=20+33=53", "53", True),
    ("names", "\\frac{22}{7}=3.14", "3.14", True),
    ("braces", "{1 \\over 2}", "0.5", True),
    ("integer", "C(10,3)", "120", True),
    ("integer", "C_{10}^{3}", "120", True),
    ("integer", "{}_{10}C_{3}", "120", True),
    ("integer", "10C3", "120", True),
    ("integer", "P(5,2)", "20", True),
    ("integer", "A_5^2", "20", True),
    ("integer", "C_{10}^{3}", "121", False),
    ("integer", "P(5,2)", "(5,2)", True),
    ("integer", "5 squared", "25", True),
    ("integer", "5\\text{ factorial}", "120", True),
    ("integer", "5!=120", "120", True),
    ("modulus", "17 \\bmod 5", "2", True),
    ("modulus", "17 \\pmod 5", "2", False),
    ("ratio", "1\\text{ to }2", "1:2", True),
    ("sets", "]-1,3]", "(-1,3]", True),
    ("sets", "]-\\infty,1[\\cup]2,3]", "x<1\\text{ or }2<x\\le3", True),
    ("sets", "]-1,3]", "[-1,3]", False),
    ("sets", "a=0\\text{ or }a\\ge1", "\\{0\\}\\cup[1,\\infty)", True),
    ("complex", "2\\operatorname{cis}60^\\circ", "1+i\\sqrt3", True),
    ("choice", "\\text{(C)}\\text{ is wrong}", "\\text{(C)}", False),
    ("choice", "(C)+1", "(C)", False),
    ("choice", "(C)\\ -5", "C", True),
    ("choice", "A:B", "A", False),
    ("choice", "A \\approx B", "B", False),
    ("choice", "x \\in A", "A", False),
    ("approximate", "2 \\approx 3", "3", False),
    ("approximate", "\\frac73\\approx 2.33", "2.33", True),
    ("ratio", "75:00", "05:00", False),
    ("ratio", "5:00", "05:00", True),
    ("matrix", "\\begin{pmatrix}0\\\\0\\end{pmatrix}+1", "\\begin{pmatrix}0\\\\0\\end{pmatrix}",
     False),
    ("matrix", "\\begin{pmatrix}1&2\\end{pmatrix}^T", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
    ("algebra", "\\frac{1}{0}x+y", "\\frac13x+y", False),
    ("algebra", "\\frac 4 + 2 - \\sqrt2", "\\frac \\pi4 + 2 - \\sqrt2", False),
    ("algebra", "v_0 t - \\frac{1}{2} g t^2", "v_0t-gt^2/2", True),
    ("units", "65.3 GPa", "65.3", True),
    ("units", "4\\,\\mathrm{k\\Omega}", "4", True),
    ("units", "4 GPa", "4\\text{ MPa}", False),
    ("names", "(p,q)=(2,3)", "p=2,q=3", True),
    ("names", "(p,q)=(3,2)", "p=2,q=3", False),
    ("ordinals", "6th", "7th", False),
    ("names", "\\text{not }x=5", "5", False),
    ("names", "f(u)=x,f(x)=-x", "f(x)=x,f(x)=-x", False),
    ("names", "x = 2 + 3 = 6", "6", False),
    ("modulus", "15 \\bmod 10 = 5", "5", True),
    ("algebra", "\\sin^2", "\\sin^2 t", False),
    ("units", "12\\,{\\rm cm}", "12", True),
    ("sets", "\\{-1\\}\\cup\\{2\\}", "-1, 2", True),
    ("sets", "\\{-1\\}\\cup\\{2\\}", "-1, 3", False),
    ("sets", "[2,infty)", "[2,\\infty)", True),
    ("bases", "32\\text{ (base 5)}", "32_5", True),
    ("bases", "32 in base six", "32_5", False),
    ("algebra", "C(n,2)", "\\frac{n(n-1)}{2}", True),
    ("algebra", "C(n,3)", "\\frac{n(n-1)}{2}", False),
    ("algebra", "\\sqrt{x^2}", "x", False),
    ("algebra", "f(2x)", "2f(x)", False),
    ("algebra", "I(0)", "I(0)e^{-t}", False),
    ("algebra", "(-1)^n", "\\cos(n\\pi)", True),
    ("algebra", "1+e^{-100}", "1+e^{-101}", False),
]  # fmt: skip


@needs_math_verify
@pytest.mark.parametrize(("kind", "answer", "gold", "right"), WRITTEN)
def test_answers_are_read_as_they_are_written(
    kind: str, answer: str, gold: str, right: bool
) -> None:
    verdict = judge(f"\\boxed{{{answer}}}", gold, timeout=30, wait=60)
    assert verdict.correct is right, (kind, verdict)


FAULTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "faults"


@needs_math_verify
@pytest.mark.skipif(not FAULTS.exists(), reason="the project's data folder is not here")
@pytest.mark.parametrize("name", ["grading", "gold_spellings", "grading_held"])
def test_every_pair_that_was_found_is_right(name: str) -> None:
    rows = [json.loads(line) for line in (FAULTS / f"{name}.jsonl").read_text().splitlines()]
    wrong = []
    for row in rows:
        said = [row["response"]] if "response" in row else [f"\\boxed{{{row['answer']}}}"]
        if "bare" in row.get("form", ""):
            said.append(row["answer"])
        for text in said:
            if judge(text, row["gold"], timeout=30, wait=60).correct != row["expected"]:
                wrong.append((text, row["gold"]))
    assert wrong == [] and rows


def _benchmark() -> Any:
    """benchmarks/grading.py, which is no part of the package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "grading.py"
    spec = importlib.util.spec_from_file_location("grading_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


# Golds of many kinds, so that the test needs no data.
GOLDS = [
    "42", "-7", "3.25", "10,\\!080", "\\frac{3}{4}", "-\\frac{5}{12}", "5\\sqrt{21}",
    "2 + \\sqrt{3}",
    "(3, -1)", "\\left( 3, \\frac{\\pi}{2} \\right)", "(-\\infty, -2] \\cup [2, \\infty)",
    "1, 2, 4",
    "\\begin{pmatrix} -4 \\\\ -12 \\end{pmatrix}", "45^\\circ", "\\frac{\\pi}{6}", "x^2 + 2x + 1",
    "\\text{Tuesday}", "(A)", "12\\text{ feet}", "\\$115", "1 + \\sqrt{3} i",
    "2^{98}", "y = 2x + 1",
    "\\{1, 2, 3\\}", "0.56", "20\\%", "52_8", "x \\le 3", "\\binom{n}{2}", "-2, 1 + i, 1 - i",
]  # fmt: skip


@needs_math_verify
@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_accepts_itself_in_every_spelling_and_nothing_beside_it(gold: str) -> None:
    benchmark, dice = _benchmark(), random.Random(gold)
    tried = 0
    for kind, made in benchmark.spellings(gold):
        tried += 1
        assert judge(f"\\boxed{{{made}}}", gold, timeout=30, wait=60).correct, (kind, made)
    for kind, made in benchmark.slips(gold, dice):
        assert not judge(f"\\boxed{{{made}}}", gold, timeout=30, wait=60).correct, (kind, made)
    for other in GOLDS:
        if other != gold:
            assert not judge(f"\\boxed{{{other}}}", gold, timeout=30, wait=60).correct, other
    assert tried >= 10


def test_a_strict_integer_wants_a_numeral() -> None:
    for answer in ("10!", "\\sqrt{9}+3628797", "x=10!", "2^3\\cdot453600"):
        assert grade(f"\\boxed{{{answer}}}", "3628800", timeout=0)
        assert not grade(f"\\boxed{{{answer}}}", "3628800", timeout=0, strict=True)
    for answer in ("3,628,800", "x = 3628800", "3.6288e6", "3628800\\text{ ways}"):
        assert grade(f"\\boxed{{{answer}}}", "3628800", timeout=0, strict=True)


@pytest.mark.parametrize(
    "response", ["\\boxed\n{7}", "\\boxed\n  {\n7\n}", "\\boxed%\n{7}", "\\boxed {7}"]
)
def test_the_brace_of_a_box_may_stand_on_the_next_line(response: str) -> None:
    assert grade(response, "7", timeout=0)


# A part, over and over: what recursion, backtracking or expansion could explode on.
@pytest.mark.parametrize(
    "part",
    ["e ", "½", "√", "\\sin", "\\pm 1", "(", "|", "{", "$ ", "' ", "x^", "1/", "-", "a_", "2!", ",",
     "=", "<", "\\cup ", "cm ", "1 and ", "\\text{", "\\frac", "\\choose ", "**", " ", "\\\\",
     "km/h", "[1,", "C("],
)  # fmt: skip
def test_no_part_repeated_hangs_or_raises(part: str) -> None:
    """All of these come back: what backtracked or expanded without bound would hang the test."""
    nested = part * 35 + "x" + ")" * 35 + "+\\max(1,2)"
    long = part * (990 // len(part))
    for text in (long, part + " " * 950 + "x", "1" + part * 200 + "1", nested):
        for answer, gold in ((text, "5"), ("x<3", text), (text, "1,2"), (text, text)):
            assert judge(f"\\boxed{{{answer}}}", gold, timeout=0).correct in (True, False)


# --- the processes that do algebra ---------------------------------------------------------------


def _algebra(answer: str, gold: str, seconds: float = 30.0) -> tuple[bool, str]:
    """The workers' own word, past the guards and the cache, however busy this machine is."""
    return grading_pool.symbolic(answer, gold, Allowance.within(seconds, 60))


def _gone(pid: int) -> bool:
    """Not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


@needs_math_verify
def test_what_never_ends_is_killed_when_its_processor_time_is_used_up_and_replaced() -> None:
    """What the guards don't know of reaches the worker; here they are passed over."""
    assert _algebra("x+3", "3+x") == (True, "symbolic")
    before = set(grading_pool.worker_pids())
    assert _algebra("9^{9^{9}}", "x+1", seconds=0.3) == (False, "timeout")
    gone = before - set(grading_pool.worker_pids())
    assert gone and all(map(_gone, gone))
    assert len(grading_pool.worker_pids()) == len(before)  # its successor is on its way already
    assert _algebra("x+3", "3+x") == (True, "symbolic")


def test_one_allowance_is_all_that_several_requests_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers that say of each request that it took 2 s of their processor; 5 s are allowed."""
    said = {"correct": True, "reason": "symbolic", "seconds": 2.0}
    ready = {"ready": True, "seconds": 0.1}
    grading_pool.close()
    monkeypatch.setattr(
        grading_pool._Worker, "_answer", lambda self, _: said if self.ready else ready
    )
    monkeypatch.setattr(grading_pool, "available", lambda: True)
    allowance = Allowance.within(5.0, 60)
    verdicts = [grading_pool.symbolic("x+3", "3+x", allowance) for _ in range(4)]
    assert verdicts == [(True, "symbolic")] * 3 + [(False, "timeout")]
    grading_pool.close()


@needs_math_verify
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=str)
@pytest.mark.slow
def test_idle_workers_that_were_killed_or_stopped_cost_no_verdict(fault: int) -> None:
    """A right answer must not count as wrong because a process of ours is gone."""
    assert _algebra("x+3", "3+x") == (True, "symbolic")
    before = grading_pool.worker_pids()
    for pid in before:
        os.kill(pid, fault)
    assert _algebra("x+4", "4+x") == (True, "symbolic")
    asked = before[-1]
    assert asked not in grading_pool.worker_pids() and _gone(asked)
    grading_pool.close()  # the others, that may still be stopped


SLEEPY = """
import os, signal, sys
from tutelage.envs import child
from tutelage.envs.grading import worker

compare, mark = worker.compare, sys.argv[4]

def interrupted(answer, gold):
    if "z" in gold and os.path.exists(mark):
        os.unlink(mark)
        os.kill(os.getpid(), signal.{fault})
    return compare(answer, gold)

worker.compare = interrupted
child.main()
"""


def _stand_in(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    """Workers run `script`; arguments: behind the three of theirs."""
    popen = subprocess.Popen

    def started(command: list[str], **how: object) -> object:
        return popen([*command[:3], script, *command[4:], *arguments], **how)  # type: ignore[call-overload]

    grading_pool.close()
    monkeypatch.setattr(subprocess, "Popen", started)


@needs_math_verify
@pytest.mark.parametrize(("fault", "count"), [("SIGSTOP", 3), ("SIGKILL", 1), ("SIGTERM", 1)])
@pytest.mark.slow
def test_a_fault_in_the_middle_of_a_request_turns_no_right_answer_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, count: int
) -> None:
    """For each of these answers the worker is stopped or killed while it is at it."""
    mark = tmp_path / "mark"
    _stand_in(monkeypatch, SLEEPY.replace("{fault}", fault), str(mark))
    monkeypatch.setattr(grading_pool, "SILENCE", 0.1)
    for n in range(count):
        mark.touch()
        assert _algebra(f"z(x+{n})", f"zx+{n}z") == (True, "symbolic")
        assert not mark.exists()
    grading_pool.close()


@needs_math_verify
def test_a_worker_stopped_for_longer_than_its_request_says_what_it_would_have_said() -> None:
    """The protocol itself: no clock on the wall counts inside."""
    worker = Child("tutelage.envs.grading.worker:main", plain=True)
    assert worker.connection.receive(timeout=60)["ready"]
    os.kill(worker.pid, signal.SIGSTOP)
    for gold in ("x^2+x", "2\\sqrt{3}", "x\\sin y+x"):
        worker.connection.post({"answer": gold, "gold": gold, "seconds": 1.0})
    time.sleep(1.2)
    os.kill(worker.pid, signal.SIGCONT)
    said = [worker.connection.receive(timeout=60) for _ in range(3)]
    assert [(one["correct"], one["reason"]) for one in said] == [(True, "symbolic")] * 3
    worker.connection.hang_up()
    assert worker.exit_code(30) == 0
    worker.kill()


@needs_math_verify
@pytest.mark.slow
def test_a_stopped_worker_costs_its_request_a_replacement_and_nothing_else() -> None:
    """Stopped while it computes, by somebody who knows nothing of us; and two ask at once."""
    grading_pool.close()
    assert _algebra("x+3", "3+x") == (True, "symbolic")
    (asked,) = grading_pool.worker_pids()
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        endless = threads.submit(_algebra, "9^{9^{9}}", "x+1", 0.5)
        while grading_pool.worker_pids():  # until it is being asked
            time.sleep(0.01)
        os.kill(asked, signal.SIGSTOP)
        beside = threads.submit(_algebra, "x+4", "4+x")
        assert beside.result(60) == (True, "symbolic")
        assert endless.result(60) == (False, "timeout")
    assert _gone(asked)


@needs_math_verify
def test_a_stopped_keeper_costs_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot tell that its worker ran out of time; a fresh worker is asked, and says so."""
    grading_pool.close()
    monkeypatch.setattr(grading_pool, "SILENCE", 0.1)
    assert _algebra("x+3", "3+x") == (True, "symbolic")
    (worker,) = grading_pool._pool._free
    os.kill(worker.child._process.pid, signal.SIGSTOP)
    assert _algebra("9^{9^{9}}", "x+1", seconds=0.3) == (False, "timeout")


@pytest.mark.parametrize("reply", [42, {"correct": "yes", "reason": "symbolic"}, {}, "?"])
def test_a_worker_that_answers_nonsense_is_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, reply: Any
) -> None:
    """Three workers are tried; then the verdict says that there is none."""
    asked: list[grading_pool._Worker] = []

    def nonsense(self: grading_pool._Worker, deadline: float) -> Any:
        if self not in asked:
            asked.append(self)
        return reply if self.ready else {"ready": True, "seconds": 0.1}

    grading_pool.close()
    monkeypatch.setattr(grading_pool._Worker, "_answer", nonsense)
    assert _algebra("x+3", "3+x") == (False, "crash")
    assert len(asked) == grading_pool.TRIES
    assert all(_gone(worker.child.pid) for worker in asked)
    grading_pool.close()
    assert grading_pool._pool._count == 0


@needs_math_verify
@pytest.mark.slow
def test_an_answer_that_ends_its_own_process_is_wrong_and_one_that_is_killed_is_undecided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = (
        "import os\nfrom tutelage.envs import child\nfrom tutelage.envs.grading import worker\n"
        "compare = worker.compare\n"
        "def fatal(answer, gold):\n"
        "    if answer.isdigit(): os.kill(os.getpid(), int(answer))\n"
        "    return compare(answer, gold)\n"
        "worker.compare = fatal; child.main()"
    )
    _stand_in(monkeypatch, script)
    assert _algebra(str(int(signal.SIGSEGV)), "3+x") == (False, "crash")
    assert _algebra(str(int(signal.SIGKILL)), "3+x") == (False, "lost")
    assert Verdict(correct=False, reason="lost").undecided
    assert not Verdict(correct=False, reason="crash").undecided
    grading_pool.close()


SLOW = "import time; time.sleep({seconds})\nfrom tutelage.envs.child import main; main()"


@needs_math_verify
def test_a_worker_that_starts_slowly_makes_no_answer_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`judge` says in time that it could not ask; the environment waits, whatever its timeout."""
    _stand_in(monkeypatch, SLOW.replace("{seconds}", "1.2"))
    assert judge("\\boxed{x+501}", "501+x", timeout=0.2).reason == "starting"
    assert ("x+501", "501+x") not in verdict._cache
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "?", "answer": "501+x"}')
    env = MathEnv(str(problems), timeout=1.0)
    env.reset(seed=0)
    assert env.step("\\boxed{x+501}")[4]["reason"] == "symbolic"
    grading_pool.close()


@needs_math_verify
def test_a_grade_that_the_machine_has_no_time_for_is_an_episode_to_be_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Never a wrong answer: the pool plays it again, and at last it is dropped and counted."""
    _stand_in(monkeypatch, SLOW.replace("{seconds}", "600"))
    monkeypatch.setattr(math_env, "WAIT", 0.1)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "?", "answer": "601+x"}')
    with pool_of(
        "tutelage/Math-v0", {"problems": str(problems), "timeout": 0.1}, processes=0
    ) as pool:
        pool.send([Reset(episode=0, seed=0)])
        pool.receive()
        pool.send([Act(episode=0, action="\\boxed{x+601}")])
        (failed,) = pool.receive()
        assert isinstance(failed, Failed)
        assert (failed.reason, failed.attempts) == ("undecided", 1)
        assert failed.detail.startswith(
            "no grade within 0.1 s (starting): this machine is too busy"
        )
    assert ("x+601", "601+x") not in verdict._cache
    grading_pool.close()


@needs_math_verify
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("None", "ModuleNotFoundError: .*math_verify"),
        ("Is()", "ImportError: cannot import name 'parse'"),
        ("Is(parse=lambda text: [], verify=bool)", "TypeError: .*parsing_timeout"),
        ("Is(parse=real.parse, verify=lambda *_, **__: True)", r"it takes x\^2 for the same as"),
    ],
)
@pytest.mark.slow
def test_math_verify_that_does_not_work_as_it_is_installed_is_said_once_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    """Not a crash for every answer, and nothing of the kind is taken for a verdict."""
    script = (
        "import sys, math_verify as real; from types import SimpleNamespace as Is\n"
        f"sys.modules['math_verify'] = {module}\n"
        "from tutelage.envs.child import main; main()"
    )
    _stand_in(monkeypatch, script)
    monkeypatch.setattr(grading_pool, "_broken", [])
    with pytest.warns(UserWarning, match=rf"{said}.*pip install 'tutelage\[math\]'"):
        assert judge("\\boxed{x+701}", "701+x", wait=60).reason == "unavailable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge("\\boxed{x+702}", "702+x", wait=60).reason == "unavailable"
    assert grading_pool._pool._count == 0


@needs_math_verify
@pytest.mark.slow
def test_an_interrupted_exchange_leaves_no_process() -> None:
    """Ctrl-C while algebra is done: the worker goes, and the next request has another."""
    grading_pool.close()
    assert _algebra("x+3", "3+x") == (True, "symbolic")
    (asked,) = grading_pool.worker_pids()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _algebra("9^{9^{9}}", "x+1")
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert _gone(asked) and grading_pool.worker_pids() == [] and grading_pool._pool._count == 0
    assert _algebra("x+3", "3+x") == (True, "symbolic")


@needs_math_verify
def test_many_threads_share_few_workers() -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        pairs = [(f"x+{i}", f"{i}+x") for i in range(100)]
        assert all(threads.map(lambda pair: grade(*pair, timeout=60), pairs))
    assert len(grading_pool.worker_pids()) <= grading_pool.WORKERS


@needs_math_verify
def test_a_worker_retires_after_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    grading_pool.close()
    monkeypatch.setattr(grading_pool, "GRADES_PER_WORKER", 2)
    assert grade("x+101", "101+x", timeout=30)
    (first,) = grading_pool.worker_pids()
    assert grade("x+102", "102+x", timeout=30)
    (successor,) = grading_pool.worker_pids()  # it warms up before it is needed
    assert successor != first and _gone(first)


@needs_math_verify
@pytest.mark.slow
def test_no_worker_survives_its_process() -> None:
    line = (
        "from tutelage.envs.grading import grade, pool;"
        "assert grade('x+1', '1+x', timeout=30); print(*pool.worker_pids(), flush=True);{}"
    )
    for end in ("pass", "import os; os.kill(os.getpid(), 9)"):
        done = subprocess.run(
            [sys.executable, "-c", line.format(end)], capture_output=True, text=True
        )
        pids = done.stdout.split()
        assert pids
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        running = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        states = [
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in running
        ]
        assert all(state == "Z" for state in states)  # an orphan's zombie is init's to collect


def test_without_math_verify_the_reason_says_so_and_the_cure_is_warned_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grading_pool.available.cache_clear()
    monkeypatch.setattr(grading_pool.importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.warns(UserWarning, match=r"pip install 'tutelage\[math\]'"):
            assert judge("\\boxed{x+201}", "201+x").reason == "unavailable"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert judge("\\boxed{x+202}", "202+x").reason == "unavailable"
            assert grade("\\boxed{7}", "7")
    finally:
        grading_pool.available.cache_clear()


def test_grading_starts_no_process_for_numbers() -> None:
    line = (
        "import sys; from tutelage.envs.grading import grade, pool\n"
        "assert grade('so \\\\boxed{1/2}', '0.5');"
        "print(pool.worker_pids(), {'sympy', 'torch', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "[] set()\n"


def test_the_cache_does_not_keep_what_was_not_decided() -> None:
    judge("\\boxed{x+301}", "301+x", timeout=0)
    assert ("x+301", "301+x") not in verdict._cache
