"""Measures this project beside TRL's GKD trainer, in turn, on the same work.

    python benchmarks/peers.py [--shapes small large] [--rounds 7] [--threads 1] [--busy 0]
    python benchmarks/peers.py --shapes smollm2 --smollm2 FOLDER
    python benchmarks/peers.py --tutelage FOLDER ...              # other checkouts beside this one

TRL is installed into an environment of its own, once (--environment). Both play and learn the same
problems in the same order, on-policy, sampling with the same parameters, with AdamW, and with one
model as student and teacher: small and large are the shipped builtin:arithmetic, smollm2 is what
prototypes/smollm2.py made. The learning rate is next to nothing, so that replies stay as long as
they are. Ours is a run as `tutelage train` makes it: scheduler, environment, grader, journal and
diagnostics included, local_support for its objective. TRL's is the generalized JSD over the whole
vocabulary, in the settings in which it was fastest (sides/trl_gkd.py), and logs nothing.

Each side is a process that loads, takes a turn to warm up, and then one in each round, while the
others wait; every second round has the opposite order. Ratios are those of a round's turns, by the
clock, and by the processes' CPU time, which other load on the machine changes less. A step lasts
from the end of the one before it to its own. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
from busy import others, processor

import tutelage.envs  # noqa: F401  (its environments)
from tutelage.distill.config.loading import parse_config
from tutelage.distill.models.loading import load_model, load_tokenizer

HERE = Path(__file__).resolve().parent
PINS = (
    "trl==1.16.0",
    "torch==2.13.0",
    "transformers==5.19.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
)
"""Of TRL's environment; torch and transformers are those that this project is tested with."""

TINY = "builtin:arithmetic"
TRL = "TRL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """episodes, tokens: of a step, and of a reply at most. model: None is --smollm2. steps: of a
    turn. micro: TRL's rows of one forward and backward; fewer and more were slower. system: the
    system message."""

    episodes: int
    tokens: int
    model: str | None
    steps: int
    micro: int
    system: str | None = None


SHAPES = {
    "small": Shape(episodes=32, tokens=32, model=TINY, steps=2, micro=32),
    "large": Shape(episodes=128, tokens=64, model=TINY, steps=1, micro=64),
    "smollm2": Shape(
        episodes=8,
        tokens=64,
        model=None,
        steps=1,
        micro=4,
        # with it replies end at the limit: the lengths of 8 would differ from side to side
        system="Tell a very long story about what the user writes, in many paragraphs.",
    ),
}


@dataclass(slots=True)
class Side:
    """A process that takes turns."""

    process: subprocess.Popen[str]
    errors: Path
    loaded: float = 0.0  # MiB
    turns: list[dict[str, Any]] = field(default_factory=list)

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            said = self.errors.read_text(encoding="utf-8")
            sys.exit(f"a side ended:\n{said[-4000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def trl_python(folder: Path) -> Path:
    """The interpreter of an environment with TRL, which is installed if it is not there."""
    python, mark, pins = folder / "bin" / "python", folder / "installed", "\n".join(PINS)
    if not mark.is_file() or mark.read_text(encoding="utf-8") != pins:
        print(f"installing {', '.join(PINS)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, *PINS], check=True)
        mark.write_text(pins, encoding="utf-8")
    return python


def saved(model: str, folder: Path) -> str:
    """A shipped model as a folder that other libraries load; a folder as it is."""
    if not model.startswith("builtin:"):
        return model
    load_model(model, dtype="float32", device="cpu").save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def config_of(shape: Shape, model: str, run: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """A run as a user would configure it, but for evaluations and checkpoints, which it lacks."""
    return {
        "run": str(run),
        "steps": shape.steps * (chosen.rounds + 1) + 1,  # the last is never begun
        "student": {"model": model, "threads": chosen.threads},
        "teachers": {"teacher": {"model": model}},
        "tasks": {
            "math": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": "arithmetic"},
                "teacher": "teacher",
                "episodes": shape.episodes,
                "rollout": {
                    "max_turns": 1,
                    "max_new_tokens": shape.tokens,
                    "context": {"system": shape.system},
                },
            }
        },
        "rollout": {"temperature": 1.0, "top_p": chosen.top_p},
        "optimizer": {"name": "adamw", "lr": chosen.lr},
        "checkpoint": {"every": 1_000_000},
    }


def conversations(config: Mapping[str, Any], shape: Shape) -> list[list[dict[str, str]]]:
    """Problem and answer of every episode of the run, in its order."""
    checked = parse_config(dict(config), "peers.py")
    timetable, task = checked.timetable(checked.resolve()), checked.tasks["math"]
    env = gymnasium.make(task.env, **task.env_args)
    opening = [] if shape.system is None else [{"role": "system", "content": shape.system}]
    found = []
    for turn in range(checked.steps):
        for order in timetable.orders("math", env.get_wrapper_attr("num_episodes"), turn):
            problem, info = env.reset(seed=order.seed, options={"index": order.index})
            found.append(
                [
                    *opening,
                    {"role": "user", "content": problem},
                    {"role": "assistant", "content": info["answer"]},
                ]
            )
    return found


@contextmanager
def started(
    shape: Shape, model: str, pythons: Mapping[str, Path], chosen: argparse.Namespace
) -> Iterator[dict[str, Side]]:
    """Every side, loaded."""
    with tempfile.TemporaryDirectory() as kept, ExitStack() as stack:
        folder, sides = Path(kept), dict[str, Side]()
        plain = saved(model, folder / "model")
        for number, (name, python) in enumerate(pythons.items()):
            config = config_of(shape, model, folder / f"run{number}", chosen)
            job = {"steps": shape.steps, "threads": chosen.threads, "config": config}
            if name == TRL:
                job |= {
                    "model": plain,
                    "conversations": conversations(config, shape),
                    "episodes": shape.episodes,
                    "micro": shape.micro,
                    "max_new_tokens": shape.tokens,
                    "most": config["steps"],
                    "lr": chosen.lr,
                    "top_p": chosen.top_p,
                    "beta": chosen.beta,
                    "folder": str(folder / "trl"),
                }
            sides[name] = _start(python, name, job, folder / f"job{number}.json")
            stack.callback(sides[name].end)
        for side in sides.values():
            side.loaded = side.answer()["loaded_mb"]
        yield sides


def _start(python: Path, name: str, job: Mapping[str, Any], path: Path) -> Side:
    path.write_text(json.dumps(job), encoding="utf-8")
    errors = path.with_suffix(".err")
    script = HERE / "sides" / ("trl_gkd.py" if name == TRL else "tutelage_run.py")
    threads = str(job["threads"])
    # what either would otherwise warn of, or do beside its work
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with errors.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [python, script, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **quiet, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
    return Side(process, errors)


def measure(
    shape: Shape, model: str, pythons: Mapping[str, Path], chosen: argparse.Namespace
) -> dict[str, Side]:
    """Every side after its turns."""
    with started(shape, model, pythons, chosen) as sides, others(chosen.busy) as busy:
        for side in sides.values():
            side.turn()  # warms up
        busy.run(chosen.busy)
        for round_ in range(chosen.rounds):
            order = [*sides.values()]
            for side in order[:: -1 if round_ % 2 else 1]:
                side.turns.append(side.turn())
    prompts = {name: mean(side, "prompt") for name, side in sides.items()}
    if max(prompts.values()) - min(prompts.values()) > 0.01:
        sys.exit(f"the sides had different prompts (mean tokens: {prompts})")
    return sides


def mean(side: Side, what: str) -> float:
    return statistics.fmean(step[what] for turn in side.turns for step in turn["steps"])


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the least and the greatest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def rows_of(name: str, shape: Shape, sides: Mapping[str, Side]) -> list[list[str]]:
    """Of the table of rates."""
    rows, peer = [], sides[TRL].turns
    for who, side in sides.items():
        rates = [shape.episodes * shape.steps / turn["seconds"] for turn in side.turns]
        pairs = list(zip(peer, side.turns, strict=True))
        wall, cpu = ([a[by] / b[by] for a, b in pairs] for by in ("seconds", "cpu"))
        peak = max(turn["peak_mb"] for turn in side.turns)
        rows.append(
            [
                name,
                who,
                spread(rates, 1),
                "1" if who == TRL else spread(wall, 2),
                "1" if who == TRL else spread(cpu, 2),
                f"{mean(side, 'reply'):.1f}",
                f"{mean(side, 'prompt'):.1f}",
                f"{peak:.0f} (+{peak - side.loaded:.0f})",
            ]
        )
    return rows


def parts_of(name: str, shape: Shape, sides: Mapping[str, Side]) -> list[list[str]]:
    """Of the table of parts."""
    rows = []
    for who, side in sides.items():
        steps = [step["parts"] for turn in side.turns for step in turn["steps"]]
        parts = {part: 1000 * statistics.fmean(s[part] for s in steps) for part in steps[0]}
        wall, cpu = (
            1000 * statistics.fmean(turn[by] / shape.steps for turn in side.turns)
            for by in ("seconds", "cpu")
        )
        parts["rest"] = wall - sum(parts.values())
        said = ", ".join(f"{part} {ms:.0f}" for part, ms in parts.items())
        rows.append([name, who, f"{wall:.0f}", f"{cpu:.0f}", said])
    return rows


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(chosen: argparse.Namespace, load: float) -> str:
    """On what was measured, and beside what."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    has = [name for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX-512")) if flag in info]
    busy = f"{chosen.busy} busy processes beside" if chosen.busy else "no busy process of ours"
    return (
        f"{processor()} (the processor has {' and '.join(has) or 'neither AVX2 nor AVX-512'});"
        f" {chosen.threads} threads; {busy}; load before: {load:.2f}.\n{', '.join(PINS)}."
        f" top_p {chosen.top_p}, beta {chosen.beta}; {chosen.rounds} rounds; medians [least,"
        " greatest]."
    )


def report(found: Mapping[str, Mapping[str, Side]], said: str) -> str:
    rates = [row for name in found for row in rows_of(name, SHAPES[name], found[name])]
    parts = [row for name in found for row in parts_of(name, SHAPES[name], found[name])]
    heads = ["shape", "side", "samples/s", f"times {TRL}, by pairs", "by CPU time"]
    heads += ["reply tokens", "prompt tokens", "peak MiB (after loading)"]
    return "\n\n".join(
        [
            said,
            table(heads, rates),
            table(["shape", "side", "ms a step", "CPU ms", "parts of the ms"], parts),
        ]
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--busy", type=int, default=0, help="busy processes beside")
    options.add_argument("--smollm2", type=Path, help="the folder of the shape smollm2")
    options.add_argument(
        "--tutelage", type=Path, nargs="+", default=[], help="checkouts, installed"
    )
    options.add_argument("--top-p", type=float, default=0.9, help="of both sides' sampling")
    options.add_argument("--beta", type=float, default=1.0, help="of TRL's JSD: reverse KL is 1")
    options.add_argument("--lr", type=float, default=1e-9)
    options.add_argument(
        "--environment", type=Path, default=Path("~/.cache/tutelage/peers").expanduser()
    )
    options.add_argument("--out", type=Path, help="a file for what is printed")
    chosen = options.parse_args()
    pythons = {"this": Path(sys.executable)}
    pythons |= {str(path): path / ".venv" / "bin" / "python" for path in chosen.tutelage}
    pythons[TRL] = trl_python(chosen.environment)
    load, found = os.getloadavg()[0], {}
    for name in chosen.shapes:
        model = SHAPES[name].model or (chosen.smollm2 and str(chosen.smollm2))
        if model is None:
            print(f"SKIPPED: {name}, for want of --smollm2 FOLDER", file=sys.stderr)
            continue
        found[name] = measure(SHAPES[name], model, pythons, chosen)
    text = report(found, setting(chosen, load))
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
