"""Checkpoints: whole or not at all. Hugging Face format beside what the trainer needs to go on.

A checkpoint is written into a hidden folder, flushed to the disk, and renamed: a folder with a
number for its name is complete. Random states need not be saved: every random draw is a function of
(seed, step).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from tutelage.distill.config import ConfigError

STATE = "trainer.pt"
DAMAGED = (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)
"""What torch and safetensors raise over half a file. (ConfigError is none of these.)"""


def save(
    folder: Path,
    *,
    step: int,
    model: Any,
    tokenizer: Any,
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write `folder/NNNNNN`; delete the oldest beyond `keep`, but not that of step `best`.

    Raises:
        OSError: the disk is full or not writable; the part that was written is gone again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{step:06d}"
    partial = folder / f".{step:06d}.partial"
    for left in folder.glob(".*.partial"):  # by a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    try:
        model.save_pretrained(partial, max_shard_size="10000GB")  # one model.safetensors
        tokenizer.save_pretrained(partial)
        torch.save(_with_tensors(dict(state)), partial / STATE)
        _flush(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # torch reports a full disk as a RuntimeError of many wordings, safetensors as its own.
        if isinstance(error, OSError | RuntimeError) or "No space left" in str(error):
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(
                f"checkpoint {final} could not be saved ({_first_line(error)}; {free:.0f} MiB are"
                " free there): nothing half-written is left and earlier checkpoints are whole;"
                " free some space and run the same command again"
            ) from error
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _sync_folder(folder)
    for old in _complete(folder)[:-keep]:
        if best is None or int(old.name) != best:
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def load_newest(folder: Path, model: Any) -> tuple[Path, dict[str, Any]] | None:
    """Put the newest readable checkpoint's weights into `model`; (its folder, its state), or None
    where there is no checkpoint.

    A damaged one is set aside with a warning, and the one before it taken: what follows that is the
    same to the byte.

    Raises:
        RuntimeError: every checkpoint is damaged.
        ConfigError: the checkpoint is of another architecture or vocabulary.
    """
    while (checkpoint := newest(folder)) is not None:
        try:
            state = load_state(checkpoint)
            load_weights(checkpoint, model)
            return checkpoint, state
        except DAMAGED as error:
            fault = f"{checkpoint} is damaged ({_first_line(error)})"
        if len(_complete(folder)) == 1:
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


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, arrays as tensors."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    return state


def _with_tensors(value: Any) -> Any:
    """Arrays as tensors: torch loads nothing else without running code."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _with_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(item) for item in value)
    return value


def load_weights(checkpoint: Path, model: Any) -> None:
    """Put a checkpoint's weights into `model`.

    Raises:
        ConfigError: the checkpoint is of another architecture or vocabulary.
    """
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    own = model.state_dict()
    stored = {own[name].data_ptr() for name in weights if name in own}
    for name in sorted({*weights, *own}):
        there, here = weights.get(name), own.get(name)
        if there is None and here is not None and here.data_ptr() in stored:
            continue  # tied weights are stored once
        if there is None or here is None or there.shape != here.shape:
            raise ConfigError(
                f"{checkpoint}: {name} has shape {_shape(there)} there and {_shape(here)} in this"
                " run's student: the checkpoint is of another model or vocabulary; choose another"
                " run folder"
            )
    model.load_state_dict(weights, strict=False)
    model.tie_weights()


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    whole = [p for p in folder.iterdir() if p.name.isdigit() and (p / STATE).is_file()]
    return sorted(whole, key=lambda p: int(p.name))


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
