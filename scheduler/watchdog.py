"""Writes the stack of a process that takes too long to a file, for whoever looks for the reason."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterable
from pathlib import Path


class Watchdog:
    """Writes every thread's stack to `path` when `seconds` pass after `watch` without another call
    of `watch`, `rest` or `close`. It stops nothing. `close` removes a file that stayed empty.

    One at a time in a process: faulthandler has one such timer.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._seconds = path, seconds
        # Appended: an actor that replaces a lost one writes to the same file.
        self._file = path.open("a", encoding="utf-8")

    def watch(self) -> None:
        """Start the time, or start it again."""
        # not a Python thread: it writes also while a C call holds the interpreter's lock
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def rest(self) -> None:
        """Stop the time until `watch`."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop for good."""
        self.rest()
        self._file.close()
        sweep([self._path])


def sweep(paths: Iterable[Path]) -> None:
    """Remove those of these files that stayed empty, and their folder if nothing else is in it."""
    for path in paths:
        with contextlib.suppress(OSError):  # already gone, or the folder is not empty
            if not path.stat().st_size:
                path.unlink()
                path.parent.rmdir()
