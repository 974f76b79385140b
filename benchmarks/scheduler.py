"""What the schedule costs: per episode, over a run's length and over the number of tasks.

    python benchmarks/scheduler.py

No model and no environment: every step is planned, ordered and recorded as in a run. The exponent
is the slope of log(cost per episode) against log(episodes): 0 is flat.
"""

from __future__ import annotations

import math
import time
from functools import partial

from tutelage.scheduler.policies import POLICIES, Step, make_policy
from tutelage.scheduler.timetable import TaskPlan, Timetable

EPISODES = 16  # a step


def seconds(policy: str, *, tasks: int, episodes: int) -> float:
    """Of scheduling so many episodes."""
    names = [f"task{i}" for i in range(tasks)]
    # `mixed` has every task in every step
    steps = max(1, episodes // EPISODES // (tasks if policy == "mixed" else 1))
    begun = time.process_time()
    timetable = Timetable(
        {name: TaskPlan(episodes=EPISODES) for name in names},
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


def main() -> None:
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
