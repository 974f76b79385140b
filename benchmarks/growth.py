"""Measures how a step grows with turns, episodes in flight, tasks and context.

    python benchmarks/growth.py [--quick] [--only turns episodes tasks context]

Each point is a run of its own, in a process of its own, with one thread: a random student of 2
layers that is its own teacher, in an environment that always goes on for `turns` turns and says
`words` words in each. One thing grows, everything else stays. Times are CPU seconds of a step (a
busy machine does not change them), the fastest of the measured ones. Memory is the peak during
steps beyond what the loaded run had before.

An exponent is the slope of log(cost) against log(what grows), by least squares, with the 95 %
interval of the fit: 1 is in proportion. `upper half` is the slope over the larger points alone,
where fixed costs hide less. Attention compares every token with every earlier one of its row: that
is the model's own arithmetic, and grows with the square of a row's length. What of the step is
spent in torch's kernel for it, forward and backward, is measured in the same step, and taken off in
`less attention`; the goal of 1.1 is for that, and for memory.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
from gymnasium import spaces

from tutelage.distill.config.loading import parse_config
from tutelage.distill.models.loading import load_tokenizer
from tutelage.distill.run import measures
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.training import Run
from tutelage.evaluation.run_folder import read_metrics

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip

REPLY = 6  # tokens
WARM = 1  # steps
COSTS = ("step", "rollout", "score", "update", "rest", "less attention", "MB")
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45}
"""Student's t by degrees of freedom."""

Point = dict[str, int]
SWEEPS: dict[str, list[Point]] = {
    "turns": [{"turns": n, "episodes": 16} for n in (1, 2, 5, 10, 20, 50)],
    "episodes": [{"episodes": n, "turns": 3} for n in (8, 16, 32, 64, 128, 256)],
    "tasks": [{"tasks": n, "episodes": 8, "turns": 3} for n in (1, 2, 4, 8, 16)],
    "context": [
        {"words": n, "episodes": 4, "turns": 1} for n in (250, 500, 1000, 2000, 4000, 8000)
    ],
}
"""The points of each sweep; it is named for what grows (of `context`, that is `words`)."""


class Talk(gymnasium.Env[str, str]):
    """Says random words, whatever it is told, for so many turns."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)
    num_episodes = 100_000

    def __init__(self, turns: int, words: int) -> None:
        self.observation_space = self.action_space = spaces.Text(1_000_000)
        self._turns, self._words = turns, words

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._done, self._random = 0, random.Random(seed)
        return self._say(), {"success": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._done += 1
        return self._say(), 0.0, self._done == self._turns, False, {"success": True}

    def _say(self) -> str:
        return " ".join(self._random.choices("0123456789", k=self._words))


gymnasium.register("Talk-v0", entry_point=f"{__name__}:Talk")


def save_model(folder: Path) -> str:
    """A random network whose rows may have 16K tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer("builtin:vocabulary")
    settings = AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config(folder: str, model: str, steps: int, point: Mapping[str, int]) -> Any:
    how = {"turns": 3, "words": 6, "episodes": 16, "tasks": 1} | point
    task = {
        "env": f"{__name__}:Talk-v0",
        "env_args": {"turns": how["turns"], "words": how["words"]},
        "teacher": "sage",
        "episodes": how["episodes"],
        "rollout": {
            "max_turns": how["turns"],
            "max_new_tokens": REPLY,
            "max_live": how["episodes"],
            "max_observation": 1_000_000,
            "processes": 0,
        },
    }
    settings = {
        "run": f"{folder}/run",
        "steps": steps,
        "student": {"model": model, "threads": 1},
        "teachers": {"sage": {"model": model}},
        "tasks": {f"task{n}": task for n in range(how["tasks"])},
        "objective": {"name": "local_support", "k": 16},
        "schedule": {"policy": "mixed"},
        "optimizer": {"lr": 1e-6},
        "evaluation": {"every": 0, "final": False},
        "checkpoint": {"every": 1_000_000},
        "journal": {"tensorboard": False},
    }
    return parse_config(settings, "growth.py")


class Attention:
    """Stands for torch's attention, and counts the CPU seconds of its forward and backward."""

    def __init__(self) -> None:
        self.seconds, self._plain = 0.0, F.scaled_dot_product_attention

    def __call__(self, *qkv: torch.Tensor, **how: Any) -> torch.Tensor:
        if any(each.requires_grad for each in qkv):
            return _Counted.apply(self, how, *qkv)  # type: ignore[no-any-return]
        return self.timed(lambda: self._plain(*qkv, **how))

    def timed(self, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        found = work()
        self.seconds += time.process_time() - begun
        return found


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Attention, how: Any, *qkv: torch.Tensor) -> torch.Tensor:
        ctx.owner, ctx.given = owner, [each.detach().requires_grad_() for each in qkv]
        with torch.enable_grad():
            ctx.found = owner.timed(lambda: owner._plain(*ctx.given, **how))
        return ctx.found.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (
            None,
            None,
            *ctx.owner.timed(lambda: torch.autograd.grad(ctx.found, ctx.given, grads)),
        )


class Watch(Observer):
    """Takes the peak of memory over all steps, and each step's attention."""

    def __init__(self, attention: Attention) -> None:
        self._attention, self.attention = attention, list[float]()
        self.peak = 0.0

    def start(self, config: Any, step: int) -> None:
        self._before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def written(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        self.peak = memory("VmHWM") - self._before
        self.attention.append(self._attention.seconds)
        self._attention.seconds = 0.0


def memory(key: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {key}")


def measure(model: str, point: Point, steps: int) -> dict[str, float]:
    """The costs of one point."""
    # a step's clock: CPU seconds of this process, whose only thread does everything
    measures.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    attention = F.scaled_dot_product_attention = Attention()  # type: ignore[assignment]
    watch = Watch(attention)
    with tempfile.TemporaryDirectory() as folder:
        with Run(config(folder, model, WARM + steps, point), watch=watch) as run:
            run.train()
        lines = read_metrics(Path(folder) / "run")[WARM:]
    least = min(lines, key=lambda line: line["time/step"])
    found = {part: least[f"time/{part}"] for part in ("step", "rollout", "score", "update")}
    found["rest"] = found["step"] - found["rollout"] - found["score"] - found["update"]
    found["less attention"] = found["step"] - watch.attention[least["step"]]
    found["tokens"] = sum(least[key] for key in least if key.endswith("tokens/seen"))
    return found | {"MB": watch.peak}


def apart(model: str, point: Point, steps: int) -> dict[str, float]:
    """`measure` in a process of its own: memory that one point took shall not serve the next."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (model, point, steps))


def slope(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(slope of log cost against log size, half the width of its 95 % interval)."""
    x, y = [math.log(size) for size in sizes], [math.log(max(cost, 1e-9)) for cost in costs]
    line = statistics.linear_regression(x, y)
    free = len(x) - 2
    if free < 1:
        return line.slope, math.nan
    off = sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return line.slope, T_95[free] * math.sqrt(off / free / spread)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def show(name: str, sizes: Sequence[int], found: Sequence[Mapping[str, float]]) -> None:
    """The sweep's points and exponents."""
    print(row(name, "tokens a step", *COSTS))
    print(row(*["---:"] * (2 + len(COSTS))))
    for size, costs in zip(sizes, found, strict=True):
        seconds = [f"{costs[cost]:.3f}" for cost in COSTS[:-1]]
        print(row(size, f"{costs['tokens']:.0f}", *seconds, f"{costs['MB']:.0f}"))
    half = len(sizes) // 2
    fits = [slope(sizes, [costs[cost] for costs in found]) for cost in COSTS]
    tops = [slope(sizes[half:], [costs[cost] for costs in found[half:]])[0] for cost in COSTS]
    print(row("exponent", "", *(f"{fit:.2f} ± {wide:.2f}" for fit, wide in fits)))
    print(row("upper half", "", *(f"{top:.2f}" for top in tops)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every other point, fewer steps")
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=[*SWEEPS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, load before: {os.getloadavg()[0]:.1f}; CPU seconds a step")
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder))
        for name in options.only:
            points = SWEEPS[name][-1::-2][::-1] if options.quick else SWEEPS[name]
            found = [apart(model, point, 1 if options.quick else 2) for point in points]
            print()
            show(name, [point.get(name) or point["words"] for point in points], found)


if __name__ == "__main__":
    main()
