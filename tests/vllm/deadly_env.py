"""An environment that ends its own process in the middle of a batch, once. Its id is
`deadly_env:Deadly-v0`."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from tutelage.distill.engines.vllm.engine import VllmEngine

FATAL = 20
"""The step, of all the process's, at which it goes."""


class Deadly(gym.Env[str, str]):
    """Three turns. scar: a file that tells, once it has happened, how many requests were in
    flight; without one nothing happens."""

    observation_space = action_space = spaces.Text(1000)
    taken = 0

    def __init__(self, scar: str | None = None) -> None:
        self._scar, self._turns = scar, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._turns = 0
        return f"room {(options or {}).get('index')}", {"success": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._turns += 1
        Deadly.taken += 1
        if self._scar and Deadly.taken == FATAL and not Path(self._scar).exists():
            engines = [one for one in gc.get_objects() if type(one) is VllmEngine]
            Path(self._scar).write_text(str(sum(engine.pending for engine in engines)))
            os.kill(os.getpid(), signal.SIGKILL)
        return f"turn {self._turns}", 0.0, self._turns == 3, False, {"success": False}


gym.register("Deadly-v0", entry_point="deadly_env:Deadly")
