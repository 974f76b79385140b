"""Environments with every kind of fault, for the tests of the pool. Ids: `pool_envs:Faulty-v0`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

GARBAGE = {
    "text": b"hello, world",
    "long": b"tutelage" + (2**63).to_bytes(8, "big"),  # the mark, and no end
    "pickle": b"tutelage" + (9).to_bytes(8, "big") + b"not plain",
    "code": b"tutelage" + (24).to_bytes(8, "big") + b"cos\nsystem\n(S'false'\ntR.",
    "flood": b"tutelag" * 200_000,
}


class Beyond(BaseException):
    """What `except Exception` does not see."""


def _scribble(garbage: bytes) -> list[int]:
    """Into every file that is open, beyond the three that everybody knows."""
    written = []
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2:
            with contextlib.suppress(OSError):
                os.write(descriptor, garbage)
                written.append(descriptor)
    return written


def _daemon(*how: str) -> int:
    """A child of a child, whose parent has ended: its process id. how: setsid, exec, env."""
    told, tell = os.pipe()
    if (child := os.fork()) == 0:
        if "setsid" in how:
            os.setsid()
        if os.fork() == 0:
            os.write(tell, str(os.getpid()).encode())
            if "exec" in how:
                os.execve(
                    sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"], {}
                )
            time.sleep(600)
        os._exit(0)
    os.waitpid(child, 0)
    pid = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    return pid


class Faulty(gym.Env[str, str]):
    """Counts its steps and does what the action says; `end` ends it with the number of steps as
    reward.
    """

    observation_space = action_space = spaces.Text(1000)

    def __init__(self, flavour: str = "plain", num_episodes: Any = 7) -> None:
        if flavour == "broken":
            raise FileNotFoundError("no games\nin /nowhere")
        if flavour == "exits":
            sys.exit(0)
        if flavour == "is beyond":
            raise Beyond("not to be made")
        self.flavour = flavour
        self.num_episodes = num_episodes
        self.made = time.monotonic_ns()
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        match self.flavour:
            case "hangs":
                time.sleep(600)
            case "loops":
                _ = 9**9**9
            case "dies":
                os._exit(0)
            case "leaves":
                sys.exit(0)
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
            case ["exit"]:
                sys.exit(0)
            case ["beyond"]:
                raise Beyond
            case ["kill", name]:
                os.kill(os.getpid(), getattr(signal, name))
            case ["fork"]:
                info["child"] = os.fork()  # and both go on from here
            case ["signal_group"]:
                os.killpg(0, signal.SIGTERM)
            case ["daemon", *how]:
                info["child"] = _daemon(*how)
            case ["scribble", *kind]:
                info["written"] = _scribble(GARBAGE[kind[0]] if kind else b"hello, world\n" * 9)
            case ["shut"]:
                os.closerange(3, 256)
            case ["huge", count]:
                return "x" * int(count), 0.0, False, False, info
            case ["talk", count]:
                info["commands"] = ["y" * int(count)]
            case ["half"]:
                return "a knife \ud83d on the table", 0.0, False, False, info
            case ["half", "info"]:
                info["admissible_actions"] = ["look", "take \udc00"]
            case ["raise"]:
                raise RuntimeError("the kitchen \udc00 is on fire")
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

    def close(self) -> None:
        if self.flavour == "stays":
            raise Beyond("not to be closed")


gym.register("Faulty-v0", entry_point=Faulty)
