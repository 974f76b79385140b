"""Checkpoints, written whole or not at all: a Hugging Face folder with the trainer's state in it.

A checkpoint is written into a hidden folder, flushed to the disk, and renamed: a folder with a
number for its name is complete. Its SHA256SUMS holds the hash of every file (`sha256sum -c` knows
the format), and loading compares: a bit that flipped on the disk would be trained on unnoticed.
Random states need not be saved: every random draw is a function of (seed, step).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.models.student import Student
from tutelage.envs.errors import first_line
from tutelage.evaluation.files import WriteError, write_text
from tutelage.evaluation.run_folder import (
    STATE,
    SUMS,
    Damaged,
    check,
    complete,
    newest,
    sha256,
)

PARTIAL, REPLACED = ".partial", ".replaced"


class SaveError(WriteError):
    """A checkpoint could not be written; the message has the cure, and nothing of it is left."""


def save(
    folder: Path,
    *,
    step: int,
    student: Student,
    tokenizer: Any,
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write `folder/NNNNNN`; delete the oldest beyond `keep`, but not that of step `best`.

    Raises:
        SaveError: the disk is full or not writable; what was written of it is deleted.
    """
    final = folder / f"{step:06d}"
    partial = folder / f".{step:06d}{PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        student.save(partial)
        tokenizer.save_pretrained(partial)
        torch.save(_with_tensors(dict(state)), partial / STATE)
        write_text(partial / SUMS, _sums(partial))
        _flush(partial)
    # Also Ctrl-C, which may come in the middle of a large file.
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # torch reports a full disk as a RuntimeError of many wordings, safetensors as an error
        # class of its own.
        if isinstance(error, OSError | RuntimeError) or "No space left" in str(error):
            raise SaveError(
                f"checkpoint {final} could not be saved ({first_line(error)}{_room(folder)}):"
                " nothing half-written is left and earlier checkpoints are whole; free some space"
                " and run the same command again"
            ) from error
        raise
    replaced = folder / f".{step:06d}{REPLACED}"
    if final.exists():  # rename() replaces no folder that has files in it
        os.replace(final, replaced)
    os.replace(partial, final)
    _sync_folder(folder)
    for old in [p for p in complete(folder)[:-keep] if best is None or int(p.name) != best]:
        # renamed first: killed in the midst of deleting, no numbered folder is incomplete
        os.replace(old, folder / f".{old.name}{PARTIAL}")
    tidy(folder)
    return final


def tidy(folder: Path) -> None:
    """Remove what a killed run left half-written or half-deleted. A checkpoint that it had moved
    aside, and not yet replaced, is put back."""
    for left in folder.glob(f".*{REPLACED}"):
        final = folder / left.name.removeprefix(".").removesuffix(REPLACED)
        if not final.exists():
            os.replace(left, final)
    for left in (*folder.glob(f".*{PARTIAL}"), *folder.glob(f".*{REPLACED}")):
        shutil.rmtree(left, ignore_errors=True)


def _room(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    except OSError:
        return ""


def load_newest(folder: Path, student: Student) -> tuple[Path, dict[str, Any]] | None:
    """Let the student take the newest readable checkpoint's weights; (its folder, its state), or
    None where there is no checkpoint.

    A damaged one is set aside with a warning, and the one before it taken: the steps between the
    two are repeated, bit-identical.

    Raises:
        RuntimeError: every checkpoint is damaged.
        ConfigError: the checkpoint is of another architecture or vocabulary.
    """
    while (checkpoint := newest(folder)) is not None:
        try:
            return checkpoint, _load(checkpoint, student)
        except Damaged as error:
            fault = f"{checkpoint} is damaged ({error})"
        if len(complete(folder)) == 1:
            raise RuntimeError(
                f"{fault}, and there is no other to resume from: put it back from a copy, or"
                " delete the run folder to begin anew"
            )
        aside = folder / f".{checkpoint.name}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        warnings.warn(
            f"{fault}: set aside as {aside.name}; the run resumes from the one before"
            " it, and repeats the steps since; is the disk sound?",
            stacklevel=2,
        )
    return None


def _load(checkpoint: Path, student: Student) -> dict[str, Any]:
    """Raises Damaged for what cannot be read, whatever torch and safetensors make of it."""
    check(checkpoint)
    try:
        state = load_state(checkpoint)
        student.load(checkpoint)
    except ConfigError:
        raise  # of another architecture: setting it aside would not help
    except Exception as error:
        raise Damaged(first_line(error)) from error
    return state


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, arrays as tensors."""
    # weights_only: a checkpoint from elsewhere must not run code of its own
    state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    return state


def _sums(folder: Path) -> str:
    """The lines of SHA256SUMS."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths)


def _with_tensors(value: Any) -> Any:
    """Arrays as tensors: torch.load with weights_only refuses NumPy's."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _with_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(item) for item in value)
    return value


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder: after a power cut a rename may be undone otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
