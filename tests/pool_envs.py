"""Environments with every kind of fault, for the tests of the pool. Ids: `pool_envs:Faulty-v0`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Faulty(gym.Env[str, str]):
    """Counts its steps and does what the action says; `end` ends it with the number of steps as
    reward.
    """

    observation_space = action_space = spaces.Text(1000)

    def __init__(self, flavour: str = "plain", num_episodes: int = 7) -> None:
        if flavour == "broken":
            raise FileNotFoundError("no games\nin /nowhere")
        self.num_episodes = num_episodes
        self.made = time.monotonic_ns()
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        index = (options or {}).get("index")
        return f"seed {seed} index {index}", {
            "success": False,
            "pid": os.getpid(),
            "made": self.made,
        }

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        self.steps += 1
        info: dict[str, Any] = {
            "success": False,
            "pid": os.getpid(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        match action.split():
            case ["hang"]:
                _ = 9**9**9  # holds the interpreter lock: no alarm handler or thread could end it
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["die", code]:
                os._exit(int(code))
            case ["raise"]:
                raise RuntimeError("the kitchen is on fire")
            case ["number"]:
                return 7, 0.0, False, False, info
            case ["nan"]:
                return "x", float("nan"), False, False, info
            case ["four"]:
                return "x", 0.0, False, info  # type: ignore[return-value]
            case ["clock"]:
                return f"it is {time.time_ns()}", 0.0, False, False, info
            case ["print"]:
                print("noise on stdout")
            case ["child"]:
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                info["child"] = child.pid
            case ["objects"]:
                info |= {
                    "env": self,
                    "commands": ["go", object(), "take"],
                    "score": np.float32(0.5),
                }
                info |= {
                    "array": np.arange(3),
                    "flag": np.bool_(True),
                    "nested": {"deep": (1, len)},
                }
            case ["end"]:
                del info["success"]
                return "done", float(self.steps), True, False, info
            case ["numpy"]:
                return (
                    np.str_("x"),
                    np.float32(1),
                    np.bool_(True),
                    np.bool_(False),
                    {"success": np.True_},
                )
        return f"step {self.steps}: {action}", 0.0, False, False, info


gym.register("Faulty-v0", entry_point=Faulty)
