"""Kills or stops a run's processes at random moments, and checks that the result is the same.

    python benchmarks/chaos.py                                    # everything, in half an hour
    python benchmarks/chaos.py --placements here --kinds grader environment --times 10

A small run of households and mathematics trains once undisturbed. Then it trains again and again,
each time with one fault at a random moment: a process of one kind gets SIGKILL (it dies) or SIGSTOP
(it hangs). If the command itself dies, it is started again and resumes. In the end metrics.jsonl
(except time/*, perf/* and memory/*) and the weights must be bit-identical to the undisturbed run's,
and no process or shared memory may be left.

Kinds: learner, the run itself; environment and grader, processes of the environments; on Ray also
worker and teacher (actors), raylet, and gcs, Ray's head. Placements: here (one process), ray (its
own cluster on this machine), nodes (it joins a cluster of three nodes; a raylet is a whole node).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STEPS = 16
MAY_DIFFER = ("time/", "perf/", "memory/")
PATIENCE = 90.0  # seconds within which the processes of a run must have ended after it
MOST_SECONDS = 240.0  # of one start of the command
SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}
KINDS = {
    "here": ("learner", "environment", "grader"),
    "ray": ("learner", "environment", "grader", "worker", "teacher", "raylet", "gcs"),
    "nodes": ("learner", "worker", "teacher", "raylet"),
}
ONLY_KILLED = ("learner", "raylet", "gcs")
"""Kinds that are not stopped: only people can end a learner that hangs, and Ray takes half a minute
to notice a stopped raylet."""


def make_config(folder: Path, cluster: dict[str, Any] | None) -> Path:
    """Households of several turns, and sums whose answers only the symbolic grader can judge."""
    rng = random.Random(0)
    problems = folder / "problems.jsonl"
    sums = [(rng.randrange(10, 99), rng.randrange(10, 99)) for _ in range(400)]
    lines = [{"problem": f"{a}+{b}=", "answer": f"{a + b - 1}+1"} for a, b in dict.fromkeys(sums)]
    problems.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = {
        "run": str(folder / "run"),
        "steps": STEPS,
        "student": {"model": "builtin:start", "threads": 1},
        "teachers": {
            "housekeeper": {"model": "builtin:household"},
            "calculator": {"model": "builtin:arithmetic"},
        },
        "tasks": {
            "household": {
                "env": "tutelage/Household-v0",
                "env_args": {"difficulty": "tiny"},
                "teacher": "housekeeper",
                "episodes": 8,
                "rollout": {"max_turns": 8, "max_new_tokens": 12, "processes": 2},
            },
            "math": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": str(problems), "prompt": "{problem}", "timeout": 10.0},
                "teacher": "calculator",
                "episodes": 24,
                "rollout": {"max_turns": 1, "max_new_tokens": 40},
            },
        },
        "objective": {"k": 16},
        "rollout": {"top_p": 0.9, "timeout": 12.0},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 5},
        "journal": {"tensorboard": False},
        "cluster": cluster,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


# --- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    born: str  # with the pid, unique
    command: str
    marked: bool


def everything(mark: str) -> dict[int, Process]:
    """The processes of this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            if state == "Z":
                continue  # it has ended
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="ignore")
            marked = mark.encode() in (folder / "environ").read_bytes()
        except OSError:
            continue  # it ended, or is the kernel's
        pid = int(folder.name)
        found[pid] = Process(pid, int(parent), rest[17], command, marked)
    return found


def family(mark: str) -> list[Process]:
    """The processes that inherited the mark, and all that these started."""
    all_ = everything(mark)

    def ours(process: Process | None) -> bool:
        while process is not None and process.pid != os.getpid():
            if process.marked:
                return True
            process = all_.get(process.parent)
        return False

    return [process for process in all_.values() if ours(process)]


def of_kind(kind: str, processes: list[Process], learner: int, sparing: set[int]) -> list[Process]:
    """sparing: nodes that must stay, by their raylet's process id."""
    words = {
        "environment": "tutelage.envs.worker",
        "grader": "tutelage.envs.grading.worker",
        "raylet": "raylet/raylet ",
        "gcs": "gcs_server ",
    }
    if kind == "learner":
        return [process for process in processes if process.pid == learner]
    if kind in words:
        return [p for p in processes if words[kind] in p.command and p.pid not in sparing]
    playing = {p.parent for p in processes if words["environment"] in p.command}
    actors = [process for process in processes if process.command.startswith("ray::_Actor")]
    if not any(actor.pid in playing for actor in actors):
        return []  # too early: which actor is a worker shows once its environments have started
    return [actor for actor in actors if (actor.pid in playing) == (kind == "worker")]


def shared_memory(processes: list[Process]) -> set[str]:
    """Files under /dev/shm that these have mapped."""
    found = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {line.split()[5] for line in lines if " /dev/shm/" in line}
    return found


# --- one run with one fault ----------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    placement: str
    kind: str
    fault: str
    struck: bool = False
    moment: tuple[int, float] = (0, 0.0)  # steps, and seconds more
    deaths: int = 0
    seconds: float = 0.0
    dropped: int = 0
    retried: int = 0
    replaced: int = 0
    same_metrics: bool = False
    same_weights: bool = False
    leaks: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


class Case:
    """A run in a folder of its own, started until it ends well."""

    def __init__(self, folder: Path, mark: str, cluster: dict[str, Any] | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.mark = folder, mark
        self.command = [sys.executable, "-m", "tutelage.distill.cli.main", "train"]
        self.command.append(str(make_config(folder, cluster)))
        self.memory: set[str] = set()

    def play(self, out: Outcome, rng: random.Random, sparing: set[int]) -> None:
        """Start the command until it ends well. The fault's moment is a number of steps (in a
        quarter of the cases 0: while it starts) and a random time more, so that it does not depend
        on how busy the machine is."""
        after = rng.randrange(STEPS) if rng.random() < 0.75 or out.fault == "hang" else 0
        out.moment = (after, rng.uniform(0.0, 1.0 if after else 8.0))
        begun = time.monotonic()
        for _ in range(4):
            code = self._start(out, rng, sparing)
            if code == 0:
                break
            out.deaths += 1
            out.said.append(f"{code}: {self._last_words()}")
        out.seconds = time.monotonic() - begun

    def _start(self, out: Outcome, rng: random.Random, sparing: set[int]) -> int:
        environment = os.environ | {"TUTELAGE_MARK": self.mark, "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("a") as log:
            run = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log)
        deadline, at = time.monotonic() + MOST_SECONDS, math.inf
        while run.poll() is None:
            now = time.monotonic()
            if now > deadline:
                run.kill()
                out.said.append(f"still running after {MOST_SECONDS:.0f} s")
            if at == math.inf and self._steps() >= out.moment[0]:
                at = now + out.moment[1]
            if not out.struck and now >= at:
                processes = family(self.mark)
                if found := of_kind(out.kind, processes, run.pid, sparing):
                    self.memory |= shared_memory(processes)
                    os.kill(rng.choice(found).pid, SIGNALS[out.fault])
                    out.struck = True
            time.sleep(0.2 if out.struck else 0.02)
        return run.returncode

    def _steps(self) -> int:
        path = self.folder / "run" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _last_words(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        said = [line for line in lines if line.startswith("tutelage: ")]
        return (said or lines or [""])[0 if said else -1][:300]

    def read(self, out: Outcome, reference: Case | None) -> None:
        lines = self.metrics(free=True)
        out.dropped = sum(int(line["episodes/dropped"]) for line in lines)
        out.retried = sum(int(line["perf/episodes_retried"]) for line in lines)
        # each process counts for itself: the count begins at 0 with every start
        counts = [0, *(int(line["perf/actors_replaced"]) for line in lines)]
        out.replaced = sum(max(0, b - a) for a, b in itertools.pairwise(counts))
        if reference is not None:
            out.same_metrics = self.metrics() == reference.metrics()
            out.same_weights = self.weights() == reference.weights()

    def metrics(self, *, free: bool = False) -> list[dict[str, Any]]:
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [json.loads(line) for line in lines]
        if free:
            return kept
        return [{k: repr(v) for k, v in x.items() if not k.startswith(MAY_DIFFER)} for x in kept]

    def weights(self) -> str:
        path = self.folder / "run" / "checkpoints" / f"{STEPS:06d}" / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"

    def leaks(self, *, shared_cluster: bool) -> list[str]:
        """Kill what is left after PATIENCE seconds; what that was."""

        def left() -> list[Process]:
            # Ray's agents end when they miss their raylet, minutes after a SIGKILL of the run
            found = [p for p in family(self.mark) if "gent" not in p.command]
            if shared_cluster:  # its own processes stay
                found = [p for p in found if "tutelage." in p.command or "::_Actor" in p.command]
            return found

        deadline = time.monotonic() + PATIENCE
        while (found := left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = [process.command[:80] for process in found]
        for process in found if shared_cluster else family(self.mark):
            os.kill(process.pid, signal.SIGKILL)
        return names + [path for path in self.memory if os.path.exists(path) and not shared_cluster]


class Nodes:
    """A Ray cluster of three nodes on this machine; `refill` replaces lost ones."""

    def __init__(self, mark: str) -> None:
        from ray.cluster_utils import Cluster

        os.environ["TUTELAGE_MARK"] = mark  # of raylets, and of what they start
        os.environ["OMP_NUM_THREADS"] = "1"
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        del os.environ["TUTELAGE_MARK"]
        self._mark = mark
        self.refill()

    def refill(self) -> None:
        os.environ["TUTELAGE_MARK"] = self._mark
        for node in list(self._cluster.worker_nodes):
            if not node.live_processes() or node.dead_processes():
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < 2:
            self._cluster.add_node(num_cpus=1, resources={"far": 4})
        del os.environ["TUTELAGE_MARK"]

    @property
    def config(self) -> dict[str, Any]:
        far = {"far": 1}
        return {
            "address": self._cluster.address,
            "timeout": 25.0,
            "worker_resources": far,
            "teacher_resources": far,
        }

    def head(self) -> set[int]:
        """The process id of the head's raylet: the head is not lost."""
        return {
            process.pid
            for kind, process in self._cluster.head_node.live_processes()
            if kind == "raylet"
        }

    def close(self) -> None:
        self._cluster.shutdown()


# --- the table -----------------------------------------------------------------------------------


def rows(outcomes: list[Outcome]) -> Iterator[list[str]]:
    yield [
        *("placement", "kind", "fault", "runs", "struck", "died", "s/run"),
        *("dropped", "retried", "replaced", "identical", "leaks"),
    ]
    keys = dict.fromkeys((o.placement, o.kind, o.fault) for o in outcomes)
    for key in keys:
        own = [o for o in outcomes if (o.placement, o.kind, o.fault) == key]
        whole = [o for o in own if not o.dropped]  # a dropped episode changes the update
        same = sum(o.same_metrics and o.same_weights for o in whole)
        yield [
            *key,
            str(len(own)),
            str(sum(o.struck for o in own)),
            str(sum(o.deaths for o in own)),
            f"{sum(o.seconds for o in own) / len(own):.0f}",
            str(sum(o.dropped for o in own)),
            str(sum(o.retried for o in own)),
            str(sum(o.replaced for o in own)),
            f"{same} of {len(whole)}",
            str(sum(bool(o.leaks) for o in own)),
        ]


def show(outcomes: list[Outcome]) -> None:
    table = list(rows(outcomes))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--placements", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--faults", nargs="+", choices=SIGNALS, default=[*SIGNALS])
    parser.add_argument("--times", type=int, default=3, help="of each kind and fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="then no further run begins")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    reference = Case(options.folder.absolute() / "reference", uuid.uuid4().hex, None)
    out = Outcome("here", "", "", struck=True)
    reference.play(out, random.Random(), set())
    if out.deaths:
        raise SystemExit(f"the undisturbed run failed: {out.said}")
    print(f"undisturbed: {out.seconds:.0f} s", flush=True)
    for placement in options.placements:
        mark = uuid.uuid4().hex
        nodes = Nodes(mark) if placement == "nodes" else None
        cluster = {
            "here": None,
            "ray": {"address": "local", "timeout": 25.0},
            "nodes": nodes and nodes.config,
        }[placement]
        cases = [
            (kind, fault)
            for kind in KINDS[placement]
            for fault in SIGNALS
            if (not options.kinds or kind in options.kinds) and fault in options.faults
            if fault == "kill" or kind not in ONLY_KILLED
        ]
        if placement != "here":
            cases = [("none", "none"), *cases]
        try:
            # kinds take turns, so that all have equally many runs when the time is over
            for i, (kind, fault) in itertools.product(range(options.times), cases):
                if time.monotonic() > end or (kind == "none" and i):
                    continue
                name = f"{placement}-{kind}-{fault}-{i}"
                rng = random.Random(f"{options.seed} {name}")
                own = mark if nodes else uuid.uuid4().hex
                case = Case(options.folder.absolute() / name, own, cluster)
                found = Outcome(placement, kind, fault, struck=kind == "none")
                case.play(found, rng, nodes.head() if nodes else set())
                case.read(found, reference)
                found.leaks = case.leaks(shared_cluster=nodes is not None)
                if nodes:
                    nodes.refill()
                outcomes.append(found)
                print(f"{time.strftime('%T')} {name}:", found, flush=True)
                if found.same_weights and found.same_metrics and not found.leaks:
                    shutil.rmtree(case.folder)
        finally:
            if nodes:
                nodes.close()
    show(outcomes)
    whole = [o for o in outcomes if not o.dropped]
    sys.exit(any(o.leaks for o in outcomes) or not all(o.same_metrics for o in whole))


if __name__ == "__main__":
    main()
