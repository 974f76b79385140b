"""Compares the household environment with alfworld's own AlfredTWEnv (batch 1), in one run.

    python benchmarks/household_engine.py [--games 12] [--steps 12] [--data FOLDER]

Both play the same commands in the same games: generated ones, or the released ones of `--data` (a
folder that holds json_2.1.1, split train). All times are CPU seconds of this process, so that other
jobs on the machine don't count. Then the native engine plays 1,000 more episodes, to show whether
its memory stays flat.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

import tutelage.envs  # noqa: F401  # registers the ids
from tutelage.envs.household.env import HouseholdGameEnv
from tutelage.envs.household.games import make_game
from tutelage.envs.household.released import ReleasedGames
from tutelage.envs.household.world import read_world

EPISODES = 1000
AGAIN = 6  # games to reset a second time: one of each task type


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """CPU milliseconds of a new game and of the same game again, and steps a CPU second."""

    new_ms: float
    again_ms: float
    steps_per_s: float


class Clock:
    """Adds up the CPU time of calls."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - start
            self.calls += 1

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds / self.calls


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--games", type=int, default=12, help="games to play in both (default 12)")
    parser.add_argument("--steps", type=int, default=12, help="commands a game (default 12)")
    parser.add_argument("--data", type=Path, help="released games instead of generated ones")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or write_games(Path(folder), args.games)
        files = [str(file) for file in ReleasedGames("train", data).files][: args.games]
        stock, played = measure_stock(files, args.steps)
        native = measure_native(data, played)
        report(native, stock, len(played), args.steps)
        report_memory()


def write_games(folder: Path, count: int) -> Path:
    """Generated games of the released games' sizes, in the released layout."""
    for index in range(count):
        game = make_game(index, "train", "full")
        trial = folder / "json_2.1.1" / "train" / f"{game.task_type}-{index:04}" / "trial"
        trial.mkdir(parents=True)
        data = {
            "pddl_domain": game.domain,
            "grammar": game.grammar,
            "pddl_problem": game.problem,
            "solvable": True,
            "walkthrough": list(game.walkthrough),
        }
        (trial / "game.tw-pddl").write_text(json.dumps(data), encoding="utf-8")
        (trial / "traj_data.json").write_text(json.dumps(game.traj), encoding="utf-8")
    return folder


Episode = tuple[str, list[str], list[str]]  # game file, commands, what the stock engine answered


def measure_stock(files: list[str], steps: int) -> tuple[Figures, list[Episode]]:
    """AlfredTWEnv as alfworld's README runs it, with random admissible commands."""
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    folder = str(Path(files[0]).parents[2])
    config: dict[str, Any] = {
        "env": {
            "goal_desc_human_anns_prob": 0,
            "task_types": [1, 2, 3, 4, 5, 6],
            "domain_randomization": False,
            "expert_type": "handcoded",
        },
        "general": {"training_method": "dqn"},
        "rl": {"training": {"max_nb_steps_per_episode": 50}},
        "dataset": {"data_path": folder, "num_train_games": -1},
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        maker = AlfredTWEnv(config, train_eval="train")
    new, again, step = Clock(), Clock(), Clock()
    rng, episodes = random.Random(0), []
    argv = sys.argv  # Fast Downward's translator overwrites it
    maker.game_files = files
    env = maker.init_env(batch_size=1)
    for _ in files:
        _, infos = new(env.reset)
        file, commands, answers = infos["extra.gamefile"][0], [], []
        for _ in range(steps):
            commands.append(rng.choice(infos["admissible_commands"][0]))
            observations, _, done, infos = step(env.step, [commands[-1]])
            answers.append(observations[0])
            if done[0]:
                break
        episodes.append((file, commands, answers))
    for file in files[:AGAIN]:
        maker.game_files = [file]
        env = maker.init_env(batch_size=1)
        env.reset()
        again(env.reset)
    sys.argv = argv
    return Figures(new_ms=new.ms, again_ms=again.ms, steps_per_s=1e3 / step.ms), episodes


def measure_native(data: Path, episodes: list[Episode]) -> Figures:
    """The same commands in `tutelage/ALFWorld-v0`; the answers must be the same."""
    env = make(data)
    index = {str(file): i for i, file in enumerate(ReleasedGames("train", data).files)}
    new, again, step = Clock(), Clock(), Clock()
    read_world.cache_clear()  # making the games has read them
    for n, (file, commands, answers) in enumerate(episodes):
        new(env.reset, options={"index": index[file]})
        if n < AGAIN:
            again(env.reset, options={"index": index[file]})
        for command, answer in zip(commands, answers, strict=True):
            assert step(env.step, command)[0] == answer, f"{file}: {command}"
    return Figures(new_ms=new.ms, again_ms=again.ms, steps_per_s=1e3 / step.ms)


def make(data: Path) -> HouseholdGameEnv:
    env = gym.make("tutelage/ALFWorld-v0", path=data).unwrapped
    assert isinstance(env, HouseholdGameEnv)
    return env


def report(native: Figures, stock: Figures, games: int, steps: int) -> None:
    """The table."""
    rows = [
        ("new game, ms", stock.new_ms, native.new_ms, stock.new_ms / native.new_ms),
        ("same game again, ms", stock.again_ms, native.again_ms, stock.again_ms / native.again_ms),
        ("steps/s", stock.steps_per_s, native.steps_per_s, native.steps_per_s / stock.steps_per_s),
    ]
    print(f"{games} games, up to {steps} commands each, the same answers; CPU time, one core")
    print(f"{'':22}{'AlfredTWEnv':>14}{'tutelage':>14}{'ratio':>10}")
    for name, theirs, mine, ratio in rows:
        print(f"{name:22}{theirs:>14,.2f}{mine:>14,.2f}{ratio:>9,.0f}x")


def report_memory() -> None:
    """Resident memory while the native engine plays 1,000 episodes of the generated full size."""
    env = gym.make("tutelage/Household-v0", difficulty="full", max_steps=20)
    rng, marks, start = random.Random(1), {}, time.process_time()
    for episode in range(EPISODES + 1):
        if episode in (100, EPISODES // 2, EPISODES):
            marks[episode] = resident_mb()
        _, info = env.reset(options={"index": episode})
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(rng.choice(info["admissible_actions"]))
            done = terminated or truncated
    shown = ", ".join(f"{mb:.1f} MB after {episode}" for episode, mb in marks.items())
    seconds = time.process_time() - start
    print(f"memory of the native engine: {shown} episodes of new games ({seconds:.0f} s, made too)")


def resident_mb() -> float:
    """Resident set of this process, in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status says nothing of VmRSS")


if __name__ == "__main__":
    main()
