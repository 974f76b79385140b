"""Handles Ctrl-C, SIGTERM and a closed terminal: the first saves after the current step, the second
ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Callable
from types import FrameType
from typing import Any

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal ends the command. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Signals:
    """Handles the signals that end a process, inside a `with` block in the main thread.

    stop: set it to what ends the work in order; while it is None there is nothing to save, and the
    first signal ends at once. number: of the first signal, or 0. A signal that was ignored when the
    process started (nohup, a shell's background job) stays ignored.
    """

    def __init__(self) -> None:
        self.stop: Callable[[], None] | None = None
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in ENDINGS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """The exit code, by the shell's convention, of a process that this signal ended."""
        return 128 + self.number

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        first, self.number = not self.number, self.number or number
        if self.stop is None or not first:
            ended = Ended(number)
            if first:
                ended.add_note("there was nothing to save; the same command begins this again")
            raise ended
        self.stop()
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        # not by print: the signal may have interrupted one, which holds the stream's lock
        with contextlib.suppress(OSError):
            os.write(2, f"\ntutelage: saving after this step{again}\n".encode())


def _leave_terminal() -> None:
    """Send further output to nowhere: printing to a terminal that is gone would raise. Where output
    goes to a file or a pipe, it still does."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            # not isatty, which says no of a terminal that has hung up
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
