"""DAPO-Math-17K as it is published: repeats, wrappers, the Chinese part, and what is left of it."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tutelage.envs.math.dapo import english
from tutelage.envs.math.env import PAPER_PROMPT, MathEnv
from tutelage.envs.math.problems import load

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs pip install 'tutelage[math]'"
)

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the"
    " form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def _row(problem: str, answer: Any, *, wrapped: bool = True, index: str = "0") -> dict[str, Any]:
    """The published layout, field for field."""
    return {
        "data_source": "math_dapo",
        "prompt": [
            {"content": WRAPPED.format(problem=problem) if wrapped else problem, "role": "user"}
        ],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


PUBLISHED = [
    _row("Solve $x+1=2$.\n\nGive $x$.", "1"),  # begins like the wrapper, and keeps its beginning
    _row("求 $x+1=3$ 的解。", "2"),
    _row("Find $2+2$（in ℤ）。", "4"),  # full-width marks are no Chinese
    _row("Remember: what is $3+3$?", "6", wrapped=False),
    _row("Solve $x+1=2$.\n\nGive $x$.", "7", index="9"),  # disagrees with the first
] * 3


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


EXPECTED = [
    ("Solve $x+1=2$.\n\nGive $x$.", "1"),
    ("Find $2+2$（in ℤ）。", "4"),
    ("Remember: what is $3+3$?", "6"),
]


def test_the_english_part_is_bare_and_each_problem_stands_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _jsonl(tmp_path / "dapo-math-17k.jsonl", PUBLISHED)
    with caplog.at_level(logging.WARNING):
        problems = load(path, layout="dapo")
    assert [(problem.question, problem.answer) for problem in problems] == EXPECTED
    assert {problem.kind for problem in problems} == {"dapo-math-17k"}
    assert "left out 10 repeated rows and 1 Chinese problems" in caplog.text
    assert "dapo-math-17k.jsonl:5: 7 after 1" in caplog.text  # whose answer is right is unknown


@needs_datasets
def test_the_parquet_file_is_read_the_same(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(PUBLISHED).to_parquet(tmp_path / "dapo.parquet")
    problems = load(str(tmp_path / "dapo.parquet"), layout="dapo")
    assert [(problem.question, problem.answer) for problem in problems] == EXPECTED


def test_the_environment_asks_in_its_own_words(tmp_path: Path) -> None:
    env = MathEnv(_jsonl(tmp_path / "dapo.jsonl", PUBLISHED), layout="dapo", expert=True)
    prompt, info = env.reset(options={"index": 1})
    assert prompt == PAPER_PROMPT.replace("{problem}", EXPECTED[1][0])
    assert "Answer:" not in prompt
    assert env.step(info["expert_action"])[1] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "2+2?"}, r"dapo\.jsonl:2: 'prompt' holds '2\+2\?', not a list of one message"),
        ({"prompt": []}, "not a list of one message"),
        ({"prompt": [{"role": "system", "content": "x"}] * 2}, "not a list of one message"),
        ({"prompt": [{"role": "user"}]}, "not a list of one message"),
        ({"reward_model": {"style": "rule"}}, r":2: 'reward_model' holds .*without a 'ground_tru"),
        ({"reward_model": None}, "without a 'ground_truth'"),
        ({"reward_model": {"ground_truth": " "}}, r":2: column 'answer' is empty"),
    ],
)
def test_a_row_of_another_layout_is_named_not_skipped(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = _jsonl(tmp_path / "dapo.jsonl", [_row("1+1?", "2"), _row("2+2?", "4") | changes])
    with pytest.raises(ValueError, match=message):
        load(path, layout="dapo")


def test_numbers_are_answers_and_unknown_layouts_are_not(tmp_path: Path) -> None:
    ((_, row),) = english("here", [("here:1", _row("1+1?", 2))])
    assert row == {"problem": "1+1?", "answer": "2"}
    with pytest.raises(ValueError, match="did you mean 'dapo'"):
        load(_jsonl(tmp_path / "dapo.jsonl", PUBLISHED), layout="dabo")
