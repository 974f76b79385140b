"""Names what is in a run folder and reads it: its configuration, its lines of metrics, which of its
checkpoints are whole.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from tutelage.evaluation.files import first_line

CONFIG, CHANGES, METRICS, SCORES = "config.yaml", "changes.jsonl", "metrics.jsonl", "eval.json"
FILES = (CONFIG, CHANGES, METRICS, SCORES)
"""A folder that has METRICS is a run's."""

CHECKPOINTS, EPISODES, TEACHERS = "checkpoints", "episodes", "teachers"
TENSORBOARD, STALLED = "tensorboard", "stalled"
FOLDERS = (CHECKPOINTS, EPISODES, TEACHERS, TENSORBOARD, STALLED)

STATE, WEIGHTS, SUMS = "trainer.pt", "model.safetensors", "SHA256SUMS"
"""Files of a checkpoint."""


class Damaged(Exception):
    """Part of a file or checkpoint is missing, or not as it was saved; says what in one line."""


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run there.

    Raises:
        Damaged: it is missing, or is not the configuration of a run.
    """
    try:
        found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Damaged(first_line(error)) from error
    if not isinstance(found, Mapping) or "tasks" not in found:
        raise Damaged("no keys of a run")
    return dict(found)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the run there, in the steps' order."""
    with (folder / METRICS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def episodes_of(folder: Path, step: int) -> Path:
    """The file of a step's episodes."""
    return folder / EPISODES / f"{step:06d}.jsonl"


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def check(checkpoint: Path, *, without: Container[str] = ()) -> None:
    """Compare every file that was saved with its hash, at about 1 GB/s. Files that were added later
    do no harm: training loads none of them. without: files that the caller is not going to read.

    Raises:
        Damaged: which file.
    """
    try:
        wanted = listed_sums(checkpoint)
    except FileNotFoundError:
        warnings.warn(
            f"{checkpoint} has no {SUMS}, as those of earlier versions: it is taken as it is",
            stacklevel=2,
        )
        return
    except (OSError, ValueError) as error:
        raise Damaged(f"{SUMS}: {first_line(error)}") from error
    if not {STATE, WEIGHTS} <= wanted.keys():  # a list that was cut off would prove nothing
        raise Damaged(f"{SUMS} is no list of its files")
    for name, digest in wanted.items():
        if name in without:
            continue
        try:
            found = sha256(checkpoint / name)
        except (OSError, ValueError) as error:
            raise Damaged(f"{name}: {first_line(error)}") from error
        if found != digest:
            raise Damaged(f"{name} is not what {SUMS} says")


def listed_sums(folder: Path) -> dict[str, str]:
    """The hash of each file by its name, as SHA256SUMS has them."""
    found = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")  # two spaces, as sha256sum writes
        if not name:
            raise ValueError("a line that names no file")
        found[name] = digest
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    whole = [p for p in folder.iterdir() if p.name.isdigit() and (p / STATE).is_file()]
    return sorted(whole, key=lambda p: int(p.name))  # by number: 1000000 comes after 999999
