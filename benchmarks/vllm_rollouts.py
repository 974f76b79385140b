"""How near multi-turn rollouts come to what their engine can do at most, for vLLM and transformers.

    make .venv-vllm/.installed
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_rollouts.py

The built-in household student plays household episodes through RolloutWorker. Beside it stands the
same engine's steady rate: one long batch of as many requests as episodes were live, each on a prompt
as long as the episodes' were in the mean, sampling on and on. Both count sampled tokens a second,
in turns in one process, so that what else the machine does strikes both.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tutelage.distill.config import VllmConfig
from tutelage.distill.engine import TransformersEngine
from tutelage.distill.models import load_model, load_tokenizer
from tutelage.distill.vllm.engine import make_engine
from tutelage.scheduler.engine import Request
from tutelage.scheduler.episodes import Episode, Order, SamplingLaw
from tutelage.scheduler.rollouts import RolloutWorker, TaskRollout

STUDENT = "builtin:household"
LAW = SamplingLaw(temperature=1.0, top_p=0.9)
GAMES = {"split": "train", "difficulty": {"preset": "tiny", "rooms": ["kitchen", "bed"]}}


class Timed:
    """An engine that knows how long its own calls took."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds, self.steps = engine, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> Any:
        begun = time.perf_counter()
        found = self.engine.step()
        self.seconds += time.perf_counter() - begun
        self.steps += 1
        return found

    def submit(self, request: Request) -> None:
        begun = time.perf_counter()
        self.engine.submit(request)
        self.seconds += time.perf_counter() - begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """sampled, prompt: tokens; prompt counts those that the student read for the first time."""

    sampled: int
    prompt: int
    turns: int
    seconds: float
    in_engine: float
    steps: int
    context: int

    @property
    def rate(self) -> float:
        return self.sampled / self.seconds


def play(worker: RolloutWorker, engine: Timed, count: int, first: int) -> Rollouts:
    orders = [Order(task="household", number=i, seed=first + i, index=None) for i in range(count)]
    spent, steps, begun = engine.seconds, engine.steps, time.perf_counter()
    outcomes = worker.collect(orders)
    seconds = time.perf_counter() - begun
    rows = [row for one in outcomes if isinstance(one, Episode) for row in one.rows]
    lengths = [len(row.ids_T) for row in rows]
    sampled = sum(int(row.chosen_T.sum()) for row in rows)
    return Rollouts(
        sampled=sampled,
        prompt=sum(lengths) - sampled,
        turns=sum(len(one.turns) for one in outcomes if isinstance(one, Episode)),
        seconds=seconds,
        in_engine=engine.seconds - spent,
        steps=engine.steps - steps,
        context=int(np.mean(lengths)) // 2,
    )


def steady(engine: Any, live: int, context: int, new: int, vocabulary: int, seed: int) -> float:
    """Sampled tokens a second of one batch, from its first token's time on."""
    rng = np.random.default_rng(seed)
    for session in range(live):
        engine.submit(
            Request(
                session=1_000_000_000 + seed * live + session,
                ids=rng.integers(10, vocabulary, size=context).tolist(),
                max_new_tokens=new,
                stop_ids=frozenset(),
                law=LAW,
                seed=session,
            )
        )
    for _ in range(3):
        engine.step()  # the prompts
    begun = time.perf_counter()
    while engine.pending:
        for one in engine.step():
            engine.release(one.session)
    return live * (new - 3) / (time.perf_counter() - begun)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--live", type=int, default=64, help="episodes in flight")
    options.add_argument("--episodes", type=int, default=256, help="of one measurement")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--processes", type=int, default=1, help="of the environment")
    options.add_argument("--turns", type=int, default=18)
    options.add_argument("--tokens", type=int, default=12, help="at most, of a turn")
    options.add_argument("--engines", default="vllm,transformers")
    options.add_argument("--profile", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = load_model(STUDENT, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(STUDENT)
    size = len(tokenizer)
    for kind in chosen.engines.split(","):
        inner: Any
        if kind == "vllm":
            inner = make_engine(
                model.config,
                VllmConfig(),
                vocabulary=size,
                dtype="float32",
                max_live=chosen.live,
                learner=model,
            )
            inner.load(None, 0)
        else:
            inner = TransformersEngine(model, vocabulary=size)
        engine = Timed(inner)
        how = TaskRollout(
            env="tutelage/Household-v0",
            env_args=GAMES,
            law=LAW,
            max_turns=chosen.turns,
            max_new_tokens=chosen.tokens,
            max_live=chosen.live,
            processes=chosen.processes,
        )
        worker = RolloutWorker(engine, tokenizer, {"household": how})
        try:
            found = play(worker, engine, chosen.live, 0)  # warms up
            ratios = []
            for round_ in range(chosen.rounds):
                if chosen.profile:
                    import cProfile
                    import pstats

                    with cProfile.Profile() as profile:
                        play(worker, engine, chosen.episodes, 5000)
                    pstats.Stats(profile).sort_stats("tottime").print_stats(45)
                best = steady(inner, chosen.live, found.context, 200, size, round_)
                found = play(worker, engine, chosen.episodes, 1000 * (round_ + 1))
                ratios.append(found.rate / best)
                print(
                    f"{kind}: rollouts {found.rate:7.0f} sampled tokens/s"
                    f" ({found.sampled} sampled, {found.prompt} read, {found.turns} turns,"
                    f" {found.sampled / found.steps:.1f} sampled a step,"
                    f" {100 * found.in_engine / found.seconds:.0f} % of the time in the engine);"
                    f" one long batch {best:7.0f}; ratio {100 * ratios[-1]:.0f} %",
                    flush=True,
                )
            print(f"{kind}: ratio {100 * np.median(ratios):.0f} % (median)", flush=True)
        finally:
            worker.close()


if __name__ == "__main__":
    main()
