"""Measures a step of the demo in one process and on Ray, and how much of it is neither rollouts,
nor scoring, nor the update.

    python benchmarks/placement.py [--steps 40] [--warm 10] [--repeats 3]

The demo's configuration runs with one thread in every process, in turn: in this process, on Ray
with one worker, with two, and with one that prefetches the next step's episodes during the update
(schedule.max_staleness: 1; the overhead of calls cannot be measured there). Prints medians over the
repetitions of means over the steps after the warm-up (CPU: of all processes together). Below:

scheduler  the timetable: which task is next, the orders, the record
routing    matching scores to episodes, and checking that every answer is the right teacher's
transport  packing and unpacking scores; on Ray also sending weights to the workers and loading
           them there, and what a call takes beyond the work of the slowest actor: orders, rows,
           episodes and scores, written, sent and read
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from chaos import family

MODES: dict[str, tuple[dict[str, Any] | None, int]] = {
    "in-process": (None, 0),
    "Ray, 1 worker": ({"address": "local", "workers": 1, "threads": 1}, 0),
    "Ray, 2 workers": ({"address": "local", "workers": 2, "threads": 1}, 0),
    "Ray, 1, ahead": ({"address": "local", "workers": 1, "threads": 1}, 1),
}
"""Where it runs, and schedule.max_staleness."""

PARTS = ("sync", "rollout", "score", "update", "journal", "step")


# --- in the process of one run -------------------------------------------------------------------


class Timers:
    """Seconds by name, since the last `clear`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time every call of `owner.method`."""
        inner = getattr(owner, method)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begun

        setattr(owner, method, timed)

    def wrap_steps(self, owner: Any, method: str, name: str) -> None:
        """Time every step of a generator."""
        inner = getattr(owner, method)

        def timed(*args: Any) -> Iterator[Any]:
            steps = inner(*args)
            while True:
                begun = time.perf_counter()
                found = next(steps, None)
                self.seconds[name] += time.perf_counter() - begun
                if found is None:
                    return
                yield found

        setattr(owner, method, timed)


def in_actor() -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Wraps a function that makes a worker or teacher, so that its work is timed. (Ray pickles what
    is defined inside a function by value: actors cannot import this file.)"""

    class Timed:
        def __init__(self, held: Any) -> None:
            import time

            self._held, self._clock, self.seconds = held, time.perf_counter, dict[str, float]()
            if hasattr(held, "load"):  # it is called from inside `play`
                held.load = self._timed("load")

        def __getattr__(self, method: str) -> Any:
            return self._timed(method)

        def _timed(self, method: str) -> Any:
            inner = getattr(self._held, method)

            def timed(*args: Any, **kwargs: Any) -> Any:
                begun = self._clock()
                found = inner(*args, **kwargs)
                spent = self._clock() - begun
                self.seconds[method] = self.seconds.get(method, 0.0) + spent
                return found

            return timed

        def timings(self, clear: bool) -> dict[str, float]:
            found = dict(self.seconds)
            if clear:
                self.seconds.clear()
            return found

    def wrap(make: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            from tutelage.distill.teachers.transport import CompactScores

            held = Timed(make())
            pack, clock = CompactScores.pack, held._clock

            def packing(scores: Any, *, teacher: str) -> Any:
                begun = clock()
                found = pack(scores, teacher=teacher)
                held.seconds["pack"] = held.seconds.get("pack", 0.0) + clock() - begun
                return found

            CompactScores.pack = packing  # type: ignore[method-assign,assignment]
            return held

        return timed

    return wrap


def processor_seconds(mark: str) -> float:
    """CPU seconds that all processes of the run have used so far."""
    ticks = 0
    for process in family(mark):
        try:
            text = Path(f"/proc/{process.pid}/stat").read_text()
        except OSError:
            continue
        ticks += sum(map(int, text.rpartition(")")[2].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def run_one(mode: str, steps: int, warm: int, mark: str) -> dict[str, float]:
    """Seconds a step, by part."""
    from tutelage.distill.cli.main import CONFIGS
    from tutelage.distill.config.loading import load_config
    from tutelage.distill.run import assembly, routing, training
    from tutelage.distill.run.observers import Observer
    from tutelage.distill.teachers.fingerprint import Fingerprint
    from tutelage.distill.teachers.transport import CompactScores
    from tutelage.evaluation.run_folder import read_metrics
    from tutelage.scheduler.cluster import ClusterSettings, RayCluster, _Job
    from tutelage.scheduler.timetable import Timetable

    cluster, staleness = MODES[mode]
    timers = Timers()
    timers.wrap_steps(Timetable, "walk", "scheduler")
    for method in ("plan", "orders", "record"):
        timers.wrap(Timetable, method, "scheduler")
    timers.wrap(routing, "_ledger", "routing")
    timers.wrap(Fingerprint, "check_same", "routing")
    timers.wrap(routing, "unpack_answer", "transport")
    timers.wrap(CompactScores, "pack", "transport")
    for method in ("sync", "start", "_played", "score"):
        timers.wrap(RayCluster, method, method)
    wrap = in_actor()

    def timed_cluster(settings: ClusterSettings, **options: Any) -> RayCluster:
        options["make_worker"] = wrap(options["make_worker"])
        options["make_teachers"] = {k: wrap(v) for k, v in options["make_teachers"].items()}
        return RayCluster(settings, **options)

    assembly.RayCluster = timed_cluster  # type: ignore[assignment,misc]

    def inner(run: Any, *, clear: bool) -> dict[str, list[dict[str, float]]]:
        if cluster is None:
            return {"workers": [], "teachers": []}
        placed: Any = run.placement

        def ask(member: Any) -> dict[str, float]:
            found: dict[str, float]
            (found,) = placed._run([_Job(member, "timings", (clear,))])
            return found

        return {
            "workers": [ask(one) for one in placed._workers],
            "teachers": [ask(one) for one in placed._teachers.values()],
        }

    class Warm(Observer):
        run: Any
        processor = 0.0

        def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
            if step == warm - 1:
                inner(self.run, clear=True)
                timers.seconds.clear()
                self.processor = processor_seconds(mark)

    watch = Warm()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run={folder}/run",
            f"steps={steps + warm}",
            "student.threads=1",
            "evaluation.every=0",
            "checkpoint.every=100000",
            f"cluster={json.dumps(cluster)}",
            f"schedule.max_staleness={staleness}",
        ]
        with training.Run(load_config(CONFIGS / "demo.yaml", overrides), watch=watch) as run:
            watch.run = run
            run.train()
            processor = processor_seconds(mark) - watch.processor
            work = inner(run, clear=False)
        records = read_metrics(Path(folder) / "run")[warm:]
    found = {part: statistics.fmean(r[f"time/{part}"] for r in records) for part in PARTS}
    found["CPU"] = processor / steps
    found |= {name: timers.seconds[name] / steps for name in ("scheduler", "routing", "transport")}
    if staleness:
        found["transport"] = math.nan
    elif cluster is not None:
        played = max(w.get("play", 0.0) - w.get("load", 0.0) for w in work["workers"])
        scored = sum(one.get("answer", 0.0) - one.get("pack", 0.0) for one in work["teachers"])
        called = sum(timers.seconds[name] for name in ("sync", "start", "_played", "score"))
        found["transport"] += (called - played - scored) / steps
    return found


# --- all of them ---------------------------------------------------------------------------------


def show(results: Mapping[str, list[dict[str, float]]]) -> None:
    names = [*PARTS, "CPU", "scheduler", "routing", "transport"]
    median = {
        mode: {name: statistics.median(run[name] for run in runs) for name in names}
        for mode, runs in results.items()
    }
    base = next(iter(median.values()))
    print(f"{'ms a step':16}" + "".join(f"{mode:>16}" for mode in median))
    for name in names:
        print(f"{name:16}" + "".join(f"{1000 * found[name]:16.1f}" for found in median.values()))
    ratios = {mode: found["step"] / base["step"] for mode, found in median.items()}
    print(f"{'step, ratio':16}" + "".join(f"{ratio:16.3f}" for ratio in ratios.values()))
    cpu = {mode: found["CPU"] / base["CPU"] for mode, found in median.items()}
    print(f"{'CPU, ratio':16}" + "".join(f"{ratio:16.3f}" for ratio in cpu.values()))
    for part in ("scheduler", "routing", "transport"):
        cells = (f"{found[part] / found['step']:16.2%}" for found in median.values())
        print(f"{part + ', share':16}" + "".join(cells))
    sums = (sum(f[p] for p in ("scheduler", "routing", "transport")) for f in median.values())
    cells = (f"{s / f['step']:16.2%}" for s, f in zip(sums, median.values(), strict=True))
    print(f"{'together':16}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        mark = os.environ["TUTELAGE_MARK"]
        print(json.dumps(run_one(options.only, options.steps, options.warm, mark)))
        return
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(options.repeats):
        for mode in MODES:
            environment = os.environ | {"TUTELAGE_MARK": uuid.uuid4().hex, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--only", mode]
            command += ["--steps", str(options.steps), "--warm", str(options.warm)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{mode} failed")
            results[mode].append(json.loads(done.stdout.strip().splitlines()[-1]))
            step, load = results[mode][-1]["step"], os.getloadavg()[0]
            print(f"{mode}: {1000 * step:.0f} ms a step (load {load:.1f})", flush=True)
    show(results)


if __name__ == "__main__":
    main()
