"""Problem files are asked as they stand, and each mistake is one line that names its place."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest

from tutelage.envs.grading import grade
from tutelage.envs.math.env import PAPER_PROMPT, MathEnv
from tutelage.envs.math.problems import load

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "math"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data sets at {SHARED}")
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs pip install 'tutelage[math]'"
)


def _write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@needs_shared
@pytest.mark.parametrize(
    ("name", "rows"), [("gsm8k_test", 1319), ("math500", 500), ("aime24", 30), ("svamp", 1000)]
)
def test_the_public_sets_load_and_their_golds_grade_correct(name: str, rows: int) -> None:
    env = MathEnv(str(SHARED / f"{name}.jsonl"), expert=True)
    assert rows * 0.9 < env.num_episodes <= rows  # some sets repeat a problem
    for index in range(0, env.num_episodes, 7):
        prompt, info = env.reset(options={"index": index})
        assert prompt.startswith("Math problem: ")
        assert prompt.endswith(PAPER_PROMPT.partition("{problem}")[2])
        _, reward, terminated, _, after = env.step(info["expert_action"])
        assert (reward, terminated, after["reason"]) in (
            (1.0, True, "exact"),
            (1.0, True, "string"),
        )
        assert after["task_type"] == name


@needs_shared
def test_contest_golds_are_read_by_the_exact_tier() -> None:
    """Leading zeros (AIME24) and floats (AMC23)."""
    for name in ("aime24", "amc23"):
        problems = load(str(SHARED / f"{name}.jsonl"))
        assert all(grade(str(int(float(p.answer))), p.answer, timeout=0) for p in problems)


@needs_shared
def test_a_split_in_the_path() -> None:
    path = str(SHARED / "gsm8k_{split}.jsonl")
    test, train = load(path, split="test"), load(path, split="train")
    assert (len(test), len(train)) == (1319, 7473)
    assert not {p.question for p in test} & {p.question for p in train}


def test_columns_are_named_by_the_user(tmp_path: Path) -> None:
    path = _write(tmp_path / "own.jsonl", {"q": "1+1?", "a": 2, "why": "count", "level": "easy"})
    (problem,) = load(
        path, problem_column="q", answer_column="a", solution_column="why", kind_column="level"
    )
    assert (problem.question, problem.answer, problem.kind) == ("1+1?", "2", "easy")
    assert problem.solution == "<think>\ncount\n</think>\n\\boxed{2}"


@pytest.mark.parametrize(
    ("gold_format", "text"),
    [("gsm8k", "48/2 = <<48/2=24>>24\n#### 1,072"), ("boxed", "so \\boxed{1} no, \\boxed{1072}")],
)
def test_golds_inside_worked_solutions(tmp_path: Path, gold_format: str, text: str) -> None:
    path = _write(tmp_path / "own.jsonl", {"problem": "?", "answer": text})
    assert grade("1072", load(path, gold_format=gold_format)[0].answer)


def test_repeats_are_left_out_and_conflicts_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"problem": p, "answer": a} for p, a in (("x", "1"), ("y", "2"), ("x", "1"), ("y", "3"))
    ]
    with caplog.at_level(logging.WARNING):
        problems = load(_write(tmp_path / "own.jsonl", *rows))
    assert [(p.question, p.answer) for p in problems] == [("x", "1"), ("y", "2")]
    assert "own.jsonl:4: 3 after 2" in caplog.text
    assert ":3" not in caplog.text.replace(":4: 3", "")


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"problem": "x", "answer": "1"}]))
    assert load(str(path))[0].answer == "1"


@needs_datasets
def test_parquet_and_dataset_folders_hold_the_same_problems(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"problem": ["x", "y"], "answer": ["1", "\\pi"]})
    rows.to_parquet(tmp_path / "own.parquet")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "folder")
    expected = [("x", "1"), ("y", "\\pi")]
    for source in ("own.parquet", "folder"):
        assert [(p.question, p.answer) for p in load(str(tmp_path / source))] == expected
    with pytest.raises(ValueError, match=r"unknown split 'test'.*known: train"):
        load(str(tmp_path / "folder"), split="test")
    with pytest.raises(ValueError, match=r"row 0: no column 'question'.*present: problem, answer"):
        load(str(tmp_path / "own.parquet"), problem_column="question")


@needs_datasets
def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"own\.parquet: not readable as parquet"):
        load(str(tmp_path / "own.parquet"))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, r"own\.jsonl holds no problem"),
        (b"\n\n", {}, r"own\.jsonl holds no problem"),
        (b'{"problem": "x", "answer": "1"}\n{"problem": "y"', {}, r"own\.jsonl:2: not JSON"),
        (b'{"problem": "x", "answer": "1"}\n\xff\xfe\n', {}, r"own\.jsonl:2: not JSON"),
        (b"[1, 2]\n", {}, r"own\.jsonl:1: .*no JSON object"),
        (b"[" * 100_000 + b"\n", {}, r"own\.jsonl:1: not JSON"),
        (b'{"problems": "x", "answer": "1"}\n', {}, "mean 'problems'.*present: problems, answer"),
        (b'{"problem": "x", "answer": null}\n', {}, r":1: column 'answer' holds None"),
        (b'{"problem": "  ", "answer": "1"}\n', {}, r":1: column 'problem' is empty"),
        (b'{"problem": "x", "answer": NaN}\n', {}, r":1: column 'answer' holds nan.*empty"),
        (b'{"problem": "x", "answer": -Infinity}\n', {}, r":1: column 'answer' holds -inf"),
        (b'{"problem": "x", "answer": 1e999}\n', {}, r":1: column 'answer' holds inf"),
        (b'{"problem": "x", "answer": "NaN"}\n', {}, r":1: column 'answer' holds 'NaN'.*empty"),
        (b'{"problem": "<NA>", "answer": "1"}\n', {}, r":1: column 'problem' holds '<NA>'"),
        (b'{"problem": "x", "answer": ["1", "2"]}\n', {}, r":1: column 'answer' holds \['1', '2"),
        (b'{"problem": "x", "answer": true}\n', {}, r":1: column 'answer' holds True"),
        (b'{"problem": "x", "answer": "1", "answer": "2"}\n', {}, r":1: .*'answer' is given twice"),
        (b"problem,answer\n1+1,2\n", {}, r"own\.jsonl:1: not JSON"),
        (b"\x1f\x8b\x08\x00", {}, r"own\.jsonl is compressed \(gzip\): unpack it"),
        ('{"problem": "x", "answer": "1"}\n'.encode("utf-16"), {}, r"own\.jsonl is UTF-16"),
        (b'{"problem": "x \\ud83d", "answer": "1"}\n', {}, r":1: column 'problem' has half of a"),
        (b'{"problem": "x", "answer": "\\udc00"}\n', {}, r":1: column 'answer' has half of a"),
        (b'{"problem": "x", "answer": "1"}\n', {"gold_format": "gsm8k"}, "no '####'"),
        (b'{"problem": "x", "answer": "1"}\n', {"gold_format": "gsm9k"}, "did you mean 'gsm8k'"),
        (b'{"problem": "x", "answer": "1"}\n', {"split": "test"}, "has no split 'test'"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_that_names_its_place(
    tmp_path: Path, content: bytes, options: dict, message: str
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        MathEnv(str(path), **options)
    assert "\n" not in str(error.value)


def test_a_mark_before_the_first_row_and_foreign_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"problem": "x", "answer": 1}\r\n\r\n{"problem": "y", "answer": 2.5}\r\n'
    )
    assert [(p.question, p.answer) for p in load(str(path))] == [("x", "1"), ("y", "2.5")]


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    _write(tmp_path / "gsm8k_train.jsonl", {"problem": "x", "answer": "1"})
    with pytest.raises(FileNotFoundError, match=r"did you mean .*gsm8k_train\.jsonl"):
        load(str(tmp_path / "gsm8k_trian.jsonl"))
    with pytest.raises(FileNotFoundError, match="no problem file at /no/such/folder/x"):
        load("/no/such/folder/x")


def test_without_the_extra_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "own.parquet").touch()
    with pytest.raises(ImportError, match=r"pip install 'tutelage\[math\]'"):
        load(str(tmp_path / "own.parquet"))


def test_options_of_the_other_source_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "own.jsonl", {"problem": "x", "answer": "1"})
    with pytest.raises(ValueError, match="digits is an option of generated arithmetic"):
        MathEnv(path, digits=2)
