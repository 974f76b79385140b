"""Measures a step on a machine that others use: quiet, beside one busy process, beside three.

    python benchmarks/busy.py [--config FILE] [--steps 20] [--busy 0 1 3] [key=value ...]

In one run, rounds (a step of each task) with 0, 1 and 3 busy processes take turns, so that whatever
changes in the course of the run affects all three alike. The busy processes are Python loops, which
are stopped meanwhile. Prints Markdown: means over --steps steps of each kind, after one round of
each to warm up.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutelage.distill.config.loading import load_config
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.training import Run
from tutelage.evaluation.run_folder import read_metrics

import torch  # isort: skip

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
PARTS = ("rollout", "score", "update")


class Others:
    """Busy processes; `run` says how many of them run."""

    def __init__(self, most: int) -> None:
        loop = [sys.executable, "-c", "while True: pass"]
        self._processes = [subprocess.Popen(loop) for _ in range(most)]
        self.run(0)

    def run(self, many: int) -> None:
        for i, process in enumerate(self._processes):
            process.send_signal(signal.SIGCONT if i < many else signal.SIGSTOP)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def others(most: int) -> Iterator[Others]:
    found = Others(most)
    try:
        yield found
    finally:
        found.end()


class Turns(Observer):
    """Changes after every round of the tasks how many processes are busy."""

    def __init__(self, busy: Others, kinds: Sequence[int], turn: int) -> None:
        self._busy, self._kinds, self._turn = busy, kinds, turn

    def kind(self, step: int) -> int:
        """How many are busy during a step."""
        return self._kinds[step // self._turn % len(self._kinds)]

    def start(self, config: Any, step: int) -> None:
        self._busy.run(self.kind(step))

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        self._busy.run(self.kind(step + 1))


def measure(config: Path, kinds: Sequence[int], steps: int, pairs: list[str]) -> dict[int, Any]:
    """By kind, the records of its steps."""
    turn = len(load_config(config, pairs).tasks)
    turns = 1 + -(-steps // turn)  # the first warms up; the others are rounded up
    with tempfile.TemporaryDirectory() as folder, others(max(kinds)) as busy:
        settled = load_config(
            config,
            [
                *pairs,
                f"run={folder}/run",
                f"steps={turns * turn * len(kinds)}",
                "evaluation.every=0",
                "evaluation.final=false",
                "checkpoint.every=1000000",
                "journal.tensorboard=false",
            ],
        )
        watch = Turns(busy, kinds, turn)
        with Run(settled, watch=watch) as run:
            run.train()
        lines = read_metrics(Path(folder) / "run")
    found: dict[int, list[Any]] = {kind: [] for kind in kinds}
    for step, line in enumerate(lines):
        if step >= turn * len(kinds):
            found[watch.kind(step)].append(line)
    return found


def table(found: Mapping[int, Sequence[Any]]) -> str:
    """Seconds a step, and as multiples of the first kind's."""

    def mean(kind: int, part: str) -> float:
        return statistics.fmean(record[f"time/{part}"] for record in found[kind])

    base, *_ = found
    heads = ["busy processes", "s a step", "ratio", *(f"{part} (ratio)" for part in PARTS)]
    rows = [heads, ["---:"] * len(heads)]
    for kind in found:
        whole = mean(kind, "step")
        parts = [(mean(kind, part), mean(base, part)) for part in PARTS]
        rows.append(
            [
                str(kind),
                f"{whole:.3f}",
                f"{whole / mean(base, 'step'):.2f}",
                *(f"{own:.3f} ({own / quiet:.2f})" for own, quiet in parts),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def processor() -> str:
    """The processor's name, and the instructions of it that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("--steps", type=int, default=20, help="of each kind")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("pairs", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    found = measure(arguments.config, arguments.busy, arguments.steps, arguments.pairs)
    waits = {x: os.environ[x] for x in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if x in os.environ}
    said = ", ".join(f"{name}={value}" for name, value in waits.items()) or "OpenMP's own waiting"
    print(f"{processor()}; torch {torch.__version__}, {torch.get_num_threads()} threads, {said}")
    print(f"{len(found[arguments.busy[0]])} steps of each kind; load before: {load:.2f}\n")
    print(table(found))


if __name__ == "__main__":
    main()
