"""The stack of a process that takes too long, in a file for whoever looks for the reason."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterable
from pathlib import Path


class Watchdog:
    """Writes every thread's stack to `path` when `seconds` pass between two calls of `rest`,
    `watch` and `close`. It stops nothing. A file that stayed empty is gone after `close`.

    One at a time in a process: Python keeps one such timer.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._seconds = path, seconds
        self._file = path.open("a", encoding="utf-8")

    def watch(self) -> None:
        """Time runs from here."""
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def rest(self) -> None:
        """Time stands still until `watch`."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Watch no more."""
        self.rest()
        self._file.close()
        sweep([self._path])


def sweep(paths: Iterable[Path]) -> None:
    """Remove those of these files that stayed empty, and their folder with the last of them."""
    for path in paths:
        with contextlib.suppress(OSError):  # somebody else's hands were in the folder
            if not path.stat().st_size:
                path.unlink()
                path.parent.rmdir()  # where it is empty
