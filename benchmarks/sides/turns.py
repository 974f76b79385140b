"""What each side of peers.py does between its steps: waits for its turn, and tells how it went.

peers.py starts a side with a file, its job in JSON, as the only argument. For each turn it writes a
line to the side's standard input, and the side answers with a line of JSON on its standard output.
Python alone is needed here, since a peer has an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


class Turns:
    """Call `begin` when everything is loaded, then `done` after each step."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is not for peers.py
        self._steps: list[Any] = []

    def begin(self) -> None:
        """Tell what loading took, and wait for the first turn."""
        self._say({"loaded_mb": _memory("VmRSS")})
        # Linux then counts VmHWM, the peak, anew: loading may take more than training
        Path("/proc/self/clear_refs").write_text("5")
        self._wait()

    def done(self, *, reply: float, prompt: float, parts: Mapping[str, float]) -> None:
        """Note a step; if it was its turn's last, tell of the turn and wait for the next one.
        reply, prompt: tokens, mean over the episodes. parts: seconds."""
        self._steps.append({"reply": reply, "prompt": prompt, "parts": dict(parts)})
        if len(self._steps) == JOB["steps"]:
            wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
            found = {"seconds": wall, "cpu": cpu, "peak_mb": _memory("VmHWM")}
            self._say({**found, "steps": self._steps})
            self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # there are no more turns, and nothing is to be kept
        self._steps = []
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _say(self, what: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


def _memory(what: str) -> float:
    """MiB of this process, by its name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))
