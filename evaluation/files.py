"""Writes files of a run folder whole or not at all, whatever fails in the middle.

A file that is replaced is written beside its place, flushed to the disk and renamed. A file that
grows, grows by whole records: the part that a full disk let through is cut off again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutelage.envs.errors import first_line

CURE = "the run's checkpoints are whole; make room and run the same command again"


class WriteError(OSError):
    """A file could not be written; the message has the cure, and nothing half-written is left."""


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a file's contents. private: only its owner may read it, since it may hold a key.

    Raises:
        WriteError: names the file and the cure; the file is as it was.
    """
    # in the same folder: a rename from another disk would be a copy. With the pid: two processes
    # may write the same file, eval.json, at once.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    flags, mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666
    with _named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, flags, mode)
            try:
                put(descriptor, text.encode())
                os.fsync(descriptor)  # a rename may reach the disk before the contents do
            finally:
                os.close(descriptor)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def check_place(path: Path) -> None:
    """Raises ValueError where a file could not be written; called before the work of which it keeps
    the result."""
    trial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_text(trial, "")
        trial.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # succeeds only if it is empty: made by the trial
        fault = "it is a folder" if path.is_dir() else ""
    except OSError as error:
        fault = first_line(error.__cause__ or error)
    if fault:
        raise ValueError(f"{path} cannot be written ({fault}): name another place, or make room")


def put(descriptor: int, data: bytes) -> None:
    """Write all of the bytes: one os.write may take only a part of them, on a full disk."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


class Growing:
    """A file that grows by records. length: how many of its bytes are kept; the rest is cut off.

    Raises:
        WriteError: names the file and the cure; earlier records are intact.
    """

    def __init__(self, path: Path, *, length: int = 0) -> None:
        self._path, self.length = path, length
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # O_APPEND: after a truncation the next write begins at the new end
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._descriptor, length)

    def write(self, record: bytes) -> None:
        """Append one record."""
        with self.undone(), _named(self._path):
            put(self._descriptor, record)
            self.length += len(record)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Take back what the block wrote if it raises."""
        length = self.length
        try:
            yield
        except BaseException:  # Ctrl-C, too, may cut a record in two
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, length)
            self.length = length
            raise

    def sync(self) -> None:
        """Wait until it is on the disk."""
        with _named(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close; may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make an OSError inside, such as a full disk's, a WriteError with the file and the cure."""
    try:
        yield
    except WriteError:  # an OSError itself: named already
        raise
    except OSError as error:
        raise WriteError(f"{path} could not be written ({error.strerror}): {CURE}") from error
