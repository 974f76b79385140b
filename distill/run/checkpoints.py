"""Checkpoints: whole or not at all. Hugging Face format beside what the trainer needs to go on.

A checkpoint is written into a hidden folder, flushed to the disk, and renamed: a folder with a
number for its name is complete. Its SHA256SUMS holds the hash of every file (`sha256sum -c` knows
the format), and what is read is compared with it: a bit that flipped on the disk would train on.
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
    """A checkpoint that could not be written, and the cure; nothing of it is left."""


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
        SaveError: the disk is full or not writable; the part that was written is gone again.
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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # torch reports a full disk as a RuntimeError of many wordings, safetensors as its own.
        if isinstance(error, OSError | RuntimeError) or "No space left" in str(error):
            raise SaveError(
                f"checkpoint {final} could not be saved ({first_line(error)}{_room(folder)}):"
                " nothing half-written is left and earlier checkpoints are whole; free some space"
                " and run the same command again"
            ) from error
        raise
    replaced = folder / f".{step:06d}{REPLACED}"
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    _sync_folder(folder)
    for old in [p for p in complete(folder)[:-keep] if best is None or int(p.name) != best]:
        os.replace(old, folder / f".{old.name}{PARTIAL}")  # what has its number is whole
    tidy(folder)
    return final


def tidy(folder: Path) -> None:
    """Remove what was half-written, or half-deleted, when a run was killed. A checkpoint that was
    about to be replaced is put back."""
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

    A damaged one is set aside with a warning, and the one before it taken: what follows that is the
    same to the byte.

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
                f"{fault}, and there is no other to go on from: put it back from a copy, or"
                " delete the run folder to begin anew"
            )
        aside = folder / f".{checkpoint.name}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        warnings.warn(
            f"{fault}: set aside as {aside.name}; the run goes on from the one before it,"
            " which leads to the same; is the disk sound?",
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
        raise
    except Exception as error:
        raise Damaged(first_line(error)) from error
    return state


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, arrays as tensors."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    return state


def _sums(folder: Path) -> str:
    """The lines of SHA256SUMS."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths)


def _with_tensors(value: Any) -> Any:
    """Arrays as tensors: torch loads nothing else without running code."""
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
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
