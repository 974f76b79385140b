"""Reads mathematics problems from files and data sets: JSONL, parquet, `datasets` folders, the hub.

Everything is read and checked once, at the start: the error for a broken row names its place before
anything is trained, not in the middle of a run.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.envs.errors import first_line, one_line
from tutelage.envs.grading import MAX_ANSWER, extract
from tutelage.envs.math import dapo
from tutelage.envs.names import nearest, unknown

log = logging.getLogger(__name__)

_SUFFIXES = {".jsonl", ".json", ".parquet"}
GOLD_FORMATS = ("plain", "gsm8k", "boxed")
LAYOUTS = ("plain", "dapo")

Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages, and its columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question, its gold answer, its kind, and a worked solution that ends in the box."""

    question: str
    answer: str
    kind: str
    solution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column holds what. Without `kind` the task type is the data set's name."""

    problem: str = "problem"
    answer: str = "answer"
    solution: str | None = None
    kind: str | None = None


def load(
    source: str,
    *,
    split: str = "train",
    problem_column: str = "problem",
    answer_column: str = "answer",
    solution_column: str | None = None,
    kind_column: str | None = None,
    gold_format: str = "plain",
    layout: str = "plain",
) -> list[Problem]:
    """All problems of a source, in its order, each text once.

    Args:
        source: a .jsonl, .json (one array) or .parquet file, a folder written by `datasets`, or the
            name of a data set on the hub (`owner/name` or `owner/name:configuration`).
        split: the hub's or folder's split; in a file's path it stands for `{split}`.
        gold_format: plain: the column is the answer; gsm8k: it follows the last `####`; boxed: it
            stands in the last box of the column.
        layout: plain: each row has the columns; dapo: rows of DAPO-Math-17K as it is published, of
            which the English part is taken, without its wrapper (see dapo.py).

    Raises FileNotFoundError, ValueError or ImportError (the extra `tutelage[math]` is missing), in
    one line.
    """
    if gold_format not in GOLD_FORMATS:
        raise ValueError(unknown("gold_format", gold_format, GOLD_FORMATS))
    if layout not in LAYOUTS:
        raise ValueError(unknown("layout", layout, LAYOUTS))
    columns = Columns(
        problem=problem_column, answer=answer_column, solution=solution_column, kind=kind_column
    )
    place, rows = _open(source, split)
    if layout == "dapo":
        rows = dapo.english(place, rows)
    name = re.split(r"[/:]", place)[-1].split(".")[0]  # the task type, without a column for it
    problems = _unique(place, _read(rows, columns, gold_format, name))
    if not problems:
        raise ValueError(f"{place} holds no problem")
    return problems


def _read(
    rows: Iterable[Row], columns: Columns, gold_format: str, name: str
) -> Iterator[tuple[str, Problem]]:
    wanted = (columns.problem, columns.answer, columns.solution, columns.kind)
    for where, row in rows:
        for column in wanted:
            if column is not None and column not in row:
                raise ValueError(_missing(where, column, row))
        question = _text(where, columns.problem, row[columns.problem])
        answer = _gold(where, _text(where, columns.answer, row[columns.answer]), gold_format)
        worked = columns.solution and _text(where, columns.solution, row[columns.solution])
        kind = columns.kind and _text(where, columns.kind, row[columns.kind])
        thought = f"<think>\n{worked}\n</think>\n" if worked else ""
        yield (
            where,
            Problem(
                question=question,
                answer=answer,
                kind=kind or name,
                solution=f"{thought}\\boxed{{{answer}}}",
            ),
        )


def _missing(where: str, column: str, row: Mapping[str, Any]) -> str:
    near = nearest(column, map(str, row))
    hint = f" (did you mean {near!r}?)" if near else ""
    present = ", ".join(map(str, row)) or "none"
    return f"{where}: no column {column!r}{hint}; columns present: {present}"


NOTHING = frozenset({"nan", "null", "<na>", "nat"})
"""How tables spell an empty cell once it has become text."""


def _text(where: str, column: str, value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{where}: column {column!r} holds {value}, which is no text: a cell that was empty"
            " (pandas writes NaN)? fill it, or leave the row out"
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {value!r:.60}, not text")
    if not value.strip():
        raise ValueError(f"{where}: column {column!r} is empty")
    if value.strip().lower() in NOTHING:
        raise ValueError(
            f"{where}: column {column!r} holds {value!r}: a cell that was empty? fill it, or leave"
            " the row out"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: column {column!r} has half of a surrogate pair, {value[error.start]!r}, at"
            f" character {error.start}, which no tokenizer takes: correct or drop the row"
        ) from None
    return value.strip()


def _gold(where: str, text: str, gold_format: str) -> str:
    if gold_format == "gsm8k":
        _, mark, answer = text.rpartition("####")
        if not mark:
            raise ValueError(f"{where}: no '####' in the answer, as gold_format=gsm8k wants")
        text = answer.strip()
    if gold_format == "boxed":
        found = extract(text, require_box=True)
        if not isinstance(found, str):
            raise ValueError(f"{where}: no \\boxed in the answer, as gold_format=boxed wants")
        text = found.strip()
    if not text or len(text) > MAX_ANSWER:
        cure = " (a worked solution? set gold_format to gsm8k or boxed)" if text else ""
        raise ValueError(f"{where}: an answer of {len(text)} characters can't be graded{cure}")
    return text


def _unique(place: str, placed: Iterable[tuple[str, Problem]]) -> list[Problem]:
    """The first problem of each text. A warning tells of repeats with another answer."""
    kept: dict[str, Problem] = {}
    repeats, conflicts = 0, []
    for where, problem in placed:
        first = kept.setdefault(problem.question, problem)
        if first is not problem:
            repeats += 1
            if first.answer != problem.answer:
                conflicts.append(f"{where}: {problem.answer} after {first.answer}")
    if repeats:
        log.info("%s: %d repeated problems left out", place, repeats)
    if conflicts:
        log.warning(
            "%s: %d repeated problems have another answer (the first is kept): %s",
            place,
            len(conflicts),
            "; ".join(conflicts[:5]),
        )
    return list(kept.values())


# --- sources -------------------------------------------------------------------------------------


def _open(source: str, split: str) -> tuple[str, Iterator[Row]]:
    """The source's full name and its rows."""
    path = Path(source.replace("{split}", split)).expanduser()
    if path.is_dir():
        return str(path), _folder(path, split)
    # A path with a known suffix that is not there is a mistyped path, no data set's name.
    if path.suffix in _SUFFIXES or path.exists():
        if "{split}" not in source and split != "train":
            raise ValueError(
                f"{path} is one file and has no split {split!r}: write {{split}} into its path, "
                "or leave split out"
            )
        _check_file(path)
        reader = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}.get(path.suffix)
        if reader is None:
            raise ValueError(f"{path}: unknown kind of file; known: {', '.join(sorted(_SUFFIXES))}")
        return str(path), reader(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        raise FileNotFoundError(f"no problem file at {source}")
    return source, _hub(source, split)


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    beside = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
    hint = f": did you mean {path.parent / near[0]}?" if near else ""
    raise FileNotFoundError(f"no problem file at {path}{hint}")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                _check_bytes(path, line)
            if line.strip():
                yield _object(f"{path}:{number}", line)


_FOREIGN = {
    b"\x1f\x8b": "compressed (gzip): unpack it",
    b"PK\x03\x04": "an archive (zip): unpack it",
    b"\xff\xfe": "UTF-16: write it in UTF-8",
    b"\xfe\xff": "UTF-16: write it in UTF-8",
    b"PAR1": "parquet: name it .parquet",
}


def _check_bytes(path: Path, begin: bytes) -> None:
    """Raises ValueError where a file begins as another format does."""
    for mark, cure in _FOREIGN.items():
        if begin.startswith(mark):
            raise ValueError(f"{path} is {cure}")


def _object(where: str, line: bytes) -> Row:
    row = _parsed(where, line)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {line[:40]!r} is no JSON object")
    return where, row


def _parsed(where: str, text: bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {first_line(error)}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key stands in it twice: json would keep the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its key {twice!r} is given twice")
    return found


def _json(path: Path) -> Iterator[Row]:
    text = path.read_bytes()
    _check_bytes(path, text)
    rows = _parsed(str(path), text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: not an array of objects (one object a line makes a .jsonl file)")
    yield from ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def _parquet(path: Path) -> Iterator[Row]:
    _datasets()
    # It comes with `datasets`, whose own loader would copy the file into a cache.
    import pyarrow.parquet  # type: ignore[import-untyped]

    def rows() -> Iterator[Mapping[str, Any]]:
        try:
            # A part at a time: a file that repeats itself can hold millions of rows.
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except Exception as error:  # pyarrow raises kinds of its own for what is not parquet
            raise ValueError(f"{path}: not readable as parquet: {first_line(error)}") from None

    yield from _table(str(path), rows())


def _table(place: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield f"{place} row {number}", row


def _folder(path: Path, split: str) -> Iterator[Row]:
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path}: not a data set folder: {first_line(error)}") from None
    yield from _table(str(path), _pick(str(path), found, split))


def _hub(name: str, split: str) -> Iterator[Row]:
    datasets = _datasets()
    repository, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # network, missing name, gated: each with its own class
        raise FileNotFoundError(
            f"no file and no data set on the hub named {name!r}: {one_line(error):.300}"
        ) from None
    yield from _table(name, _pick(name, found, split))


def _pick(place: str, found: Any, split: str) -> Iterable[Mapping[str, Any]]:
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise ValueError(f"{place}: {unknown('split', split, found)}")
    return found[split]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        cure = "pip install 'tutelage[math]'"
        raise ImportError(f"parquet files and data sets need an extra: {cure}") from None
    return datasets
