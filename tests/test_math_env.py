"""Math-v0: generated arithmetic is right, split, reproducible; the environment keeps Gymnasium's
contract.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from tutelage.envs.grading import judge
from tutelage.envs.math.arithmetic import KINDS, PRESETS, SPLITS, ArithmeticProblems, sizes
from tutelage.envs.math.env import MathEnv


def _meaning(question: str) -> int:
    """The answer, worked out from the question's text by other means than the generator's."""
    name, _, rest = question.partition(" ")
    match name:
        case "rev":
            return int(rest[::-1])
        case "sort":
            return int("".join(sorted(rest)))
        case "max":
            return max(map(int, rest.split()))
        case "ones":
            return rest.count("1")
        case "gcd":
            a, b = map(int, rest.split())
            return max(d for d in range(1, a + 1) if a % d == b % d == 0)
    if " mod " in question:
        a, b = map(int, question.split(" mod "))
        return a - b * (a // b)
    if "x" in question:
        left, right = question.split("=")
        return next(x for x in range(2000) if eval(left, {"x": x}) == int(right))
    if question.endswith(","):
        terms = list(map(int, question[:-1].split(",")))
        return 2 * terms[-1] - terms[-2]
    return int(eval(question.removesuffix("=")))


@pytest.mark.parametrize("preset", PRESETS)
def test_worked_solutions_are_right_at_every_step_and_grade_correct(preset: str) -> None:
    for split in SPLITS:
        problems = ArithmeticProblems(split, sizes(preset))
        for index in range(300):
            problem = problems[index]
            assert int(problem.answer) == _meaning(problem.question), problem
            assert judge(problem.solution, problem.answer, require_box=True).correct, problem
            work = problem.solution.partition("\\boxed")[0]
            for left, right in re.findall(r"([\d+*-]*\d[+*-]\d[\d+*-]*)=(\d+)", work):
                assert eval(left) == int(right), problem


def test_every_kind_is_drawn_and_another_problems_answer_rarely_scores() -> None:
    problems = ArithmeticProblems("train", sizes(kinds=list(KINDS)))
    drawn = [problems[index] for index in range(1000)]
    assert {problem.kind for problem in drawn} == set(KINDS)
    by_chance = [
        judge(b.solution, a.answer).correct
        for a, b in itertools.pairwise(drawn)
        if a.kind != b.kind
    ]
    assert sum(by_chance) < 0.05 * len(by_chance)


def test_easy_problems_fit_a_tiny_student() -> None:
    problems = ArithmeticProblems("train", sizes("easy"))
    drawn = [problems[index] for index in range(3000)]
    assert max(len(problem.question) for problem in drawn) <= 20
    assert max(len(problem.solution) for problem in drawn) <= 40
    assert len({problem.question for problem in drawn}) > 2000


def test_no_question_stands_in_two_splits_and_commuted_questions_share_one() -> None:
    table = sizes("easy")
    train = ArithmeticProblems("train", table)
    trained = {train[index].question for index in range(20_000)}
    held = {
        split: {problems[index].question for index in range(len(problems))}
        for split in ("valid", "test")
        for problems in [ArithmeticProblems(split, table)]
    }
    assert not held["valid"] & held["test"]
    for questions in held.values():
        assert len(questions) == 500
        assert not questions & trained
    swapped = {
        f"{b}+{a}="
        for a, b in (re.findall(r"\d+", q) for q in trained if re.match(r"\d+\+\d+=", q))
    }
    assert not swapped & (held["valid"] | held["test"])
    # and across presets: a question's split does not depend on who asks it
    medium = ArithmeticProblems("train", sizes("medium"))
    assert not {medium[index].question for index in range(5000)} & (held["valid"] | held["test"])


def test_the_same_index_is_the_same_problem_in_another_process() -> None:
    line = (
        "from tutelage.envs.math.arithmetic import *;"
        "p = [ArithmeticProblems(s, sizes()) for s in SPLITS];"
        "print([[q[i].question for i in (0, 7, 499)] for q in p])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", line],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    expected = [
        [problems[i].question for i in (0, 7, 499)]
        for problems in (ArithmeticProblems(split, sizes()) for split in SPLITS)
    ]
    assert outputs == {f"{expected}\n"}


def test_knobs_set_the_sizes() -> None:
    problems = ArithmeticProblems("train", sizes(kinds=["add"], digits=[5, 5]))
    assert all(re.fullmatch(r"\d{5}\+\d{5}=", problems[i].question) for i in range(50))
    problems = ArithmeticProblems("train", sizes(kinds="rev", length=9))
    assert all(re.fullmatch(r"rev \d{9}", problems[i].question) for i in range(50))


def test_small_held_out_splits_hold_each_question_once() -> None:
    problems = ArithmeticProblems("valid", sizes(kinds=["muladd"], digits=1))
    questions = [problems[index].question for index in range(len(problems))]
    assert 10 < len(questions) < 500
    assert len(set(questions)) == len(questions)


def test_check_env_passes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(MathEnv(expert=True), skip_render_check=True)


def test_the_same_seed_is_the_same_episode_and_an_index_picks_the_problem() -> None:
    env = MathEnv()
    assert env.reset(seed=3)[0] == env.reset(seed=3)[0]
    assert len({env.reset(seed=seed)[0] for seed in range(20)}) > 15
    assert env.reset(seed=1, options={"index": 5})[0] == env.reset(seed=2, options={"index": 5})[0]


def test_one_response_ends_the_episode_with_its_grade() -> None:
    env = MathEnv(expert=True, split="test")
    _, info = env.reset(options={"index": 0})
    assert info["success"] is False
    _, reward, terminated, truncated, after = env.step(info["expert_action"])
    assert (reward, terminated, truncated, after["success"]) == (1.0, True, False, True)
    assert after["task_type"] == info["task_type"] in PRESETS["easy"]
    env.reset(options={"index": 0})
    bare = env.step(info["answer"])
    assert (bare[1], bare[2], bare[4]["success"], bare[4]["reason"]) == (0.0, True, False, "no_box")
    with pytest.raises(gym.error.ResetNeeded):
        env.step("\\boxed{1}")


@pytest.mark.parametrize(
    "action", ["", "\ud800", "\x00" * 1000, "\\boxed{", "}" * 100_000, None, 7]
)
def test_a_malformed_response_is_wrong_and_raises_nothing(action: str) -> None:
    env = MathEnv()
    env.reset(seed=0)
    assert env.step(action)[1:4] == (0.0, True, False)


def test_the_prompt_template_is_filled_and_checked() -> None:
    env = MathEnv(prompt="Q: {problem} Answer in \\boxed{}.", split="valid")
    bare = MathEnv(split="valid").reset(options={"index": 3})[0]
    assert env.reset(options={"index": 3})[0] == f"Q: {bare} Answer in \\boxed{{}}."
    with pytest.raises(ValueError, match=r"no \{problem\}"):
        MathEnv(prompt="Solve it.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "did you mean 'test'"),
        ({"preset": "eazy"}, "did you mean 'easy'"),
        ({"kinds": ["ad"]}, "did you mean 'add'"),
        ({"digit": 3}, "did you mean 'digits'"),
        ({"digits": 0}, "whole number from 1 to 50"),
        ({"digits": [3, 2]}, "the lowest stands first"),
        ({"kinds": []}, "kinds is empty"),
        ({"kinds": ["seq"], "length": 1}, "seq needs at least 2"),
        ({"problem_column": "q"}, "an option of problem files"),
        *(({"timeout": t}, "in seconds, above 0") for t in (0, -1, math.nan, math.inf, "5")),
    ],
)
def test_mistakes_are_named_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MathEnv(**options)
    assert "\n" not in str(error.value)


def test_an_index_out_of_range_or_an_unknown_reset_option_is_refused() -> None:
    env = MathEnv(split="valid")
    with pytest.raises(ValueError, match=r"0\.\.499"):
        env.reset(options={"index": 500})
    with pytest.raises(ValueError, match="did you mean 'index'"):
        env.reset(options={"idx": 1})


@pytest.mark.parametrize("strict", [False, True])
def test_an_expression_answers_an_integer_unless_strict(tmp_path: Path, strict: bool) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "?", "answer": "120"}')
    env = MathEnv(str(problems), strict=strict)
    for said, right in (("\\binom{10}{3}", not strict), ("x=120", True), ("5!+1", False)):
        env.reset(seed=0)
        assert env.step(f"\\boxed{{{said}}}")[4]["success"] is right, said
