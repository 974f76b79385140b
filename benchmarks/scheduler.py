"""Measures what scheduling costs per episode, by a run's length, the number of tasks and workers.

    python benchmarks/scheduler.py

It has no model, no environment and no Ray: it plans, orders and records every step as a run does,
deals orders out to workers, and puts their outcomes in order. The exponent is the slope of log(cost
per episode) against log(episodes), or log(workers): 0 is flat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from tutelage.distill.config.resolved import scheduled
from tutelage.distill.config.sections import TaskConfig
from tutelage.scheduler.cluster import RayCluster
from tutelage.scheduler.episodes import Dropped, Order
from tutelage.scheduler.policies import POLICIES, Step, make_policy
from tutelage.scheduler.timetable import Timetable

EPISODES = 16  # a step


def seconds(policy: str, *, tasks: int, episodes: int) -> float:
    """CPU seconds of scheduling so many episodes."""
    names = [f"task{i}" for i in range(tasks)]
    # `mixed` trains every task in every step
    steps = max(1, episodes // EPISODES // (tasks if policy == "mixed" else 1))
    plan = scheduled(TaskConfig(env="-", episodes=EPISODES), labels=False)
    begun = time.process_time()
    timetable = Timetable(
        dict.fromkeys(names, plan),
        steps=steps,
        seed=0,
        make_policy=partial(make_policy, policy, names, weights={}, least=0.4),
    )
    for step, chosen in timetable.walk():
        for task in chosen:
            timetable.orders(task, 3553)
        found = {task: 1.0 + (step * 7 + i) % 5 for i, task in enumerate(chosen)}
        timetable.record(Step(active=timetable.active(), trained=chosen, tokens=found, gaps=found))
    return time.process_time() - begun


def dealing(workers: int, *, episodes: int, times: int) -> float:
    """Seconds of dealing out so many orders to workers that answer at once."""
    actor = SimpleNamespace(call=SimpleNamespace(remote=lambda *given, **stored: None))
    cluster = RayCluster.__new__(RayCluster)
    cluster._loaded = None, None
    cluster._workers = [SimpleNamespace(actor=actor)] * workers  # type: ignore[list-item]
    orders = [Order(task="t", number=i, seed=i, index=i) for i in range(episodes)]
    outcomes = {o.number: Dropped(order=o, reason="died", detail="", attempts=1) for o in orders}

    def answer(running: Sequence[Any]) -> list[Any]:
        return [[outcomes[order.number] for order in one.job.args[0]] for one in running]

    cluster._finish = answer  # type: ignore[method-assign]
    begun = time.process_time()
    for _ in range(times):
        assert len(cluster.start(orders).outcomes()) == episodes
    return (time.process_time() - begun) / times


def over_workers() -> None:
    counts, episodes = [1, 2, 4, 8, 16, 32, 64], 1024
    print(f"{'workers':20} " + " ".join(f"{count:>9}" for count in counts), "exponent")
    best = [min(dealing(n, episodes=episodes, times=20) for _ in range(5)) for n in counts]
    costs = [1e6 * seconds / episodes for seconds in best]
    slope = math.log(costs[-1] / costs[0]) / math.log(counts[-1])
    cells = " ".join(f"{cost:6.2f} us" for cost in costs)
    print(f"{'dealing out':20} {cells}   {slope:+.2f}")


def main() -> None:
    over_policies()
    over_workers()


def over_policies() -> None:
    print(
        f"{'policy':14} {'tasks':>5} " + " ".join(f"{10**p:>9,}" for p in range(2, 6)), "exponent"
    )
    for policy in POLICIES:
        for tasks in (1, 4, 16):
            costs = []
            for power in range(2, 6):
                repeat = 3 if power < 5 else 1
                best = min(seconds(policy, tasks=tasks, episodes=10**power) for _ in range(repeat))
                costs.append(1e6 * best / 10**power)
            slope = math.log(costs[-1] / costs[1]) / math.log(100)
            cells = " ".join(f"{cost:6.1f} us" for cost in costs)
            print(f"{policy:14} {tasks:5} {cells}   {slope:+.2f}")


if __name__ == "__main__":
    main()
