"""Measures how near multi-turn rollouts come to their engine's limit, for vLLM and transformers.

    make .venv-vllm/.installed
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_rollouts.py

The built-in household student plays household episodes through RolloutWorker. This is compared, for
vLLM, with the same requests submitted all at once: the same prompts and tokens, the same number in
flight, but no turn to wait for; and for both engines with one long batch, which only samples, at
the rollouts' mean context. All are in sampled tokens a second and take turns in one process, so
that other load on the machine affects all of them. Each ratio is also printed by this process's CPU
time, which counts neither other processes nor waiting.

The shorter the replies, the more of the work is prefill of observations, which a long batch does
not have: the student's replies have 5.6 tokens on average. With `--reply N` every reply has N
tokens, whatever they mean.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.resolved import played as played_so
from tutelage.distill.config.sections import RolloutConfig
from tutelage.distill.config.teachers import VllmConfig
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.engines.vllm.engine import make_engine
from tutelage.distill.models.loading import load_model, load_tokenizer
from tutelage.distill.models.student import Student
from tutelage.scheduler.engine import Request
from tutelage.scheduler.episodes import Episode, Order, SamplingParams
from tutelage.scheduler.rollouts import RolloutWorker

STUDENT = "builtin:household"
SAMPLING = SamplingParams(temperature=1.0, top_p=0.9)
LONG = 200
GAMES = {"split": "train", "difficulty": {"preset": "tiny", "rooms": ["kitchen", "bed"]}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    sampled: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.sampled / self.seconds

    def over(self, other: Speed) -> tuple[float, float]:
        """Ratios of rates in per cent, by the clock and by CPU time."""
        by_cpu = (self.sampled / self.cpu) / (other.sampled / other.cpu)
        return 100 * self.rate / other.rate, 100 * by_cpu


class Stopwatch:
    def __init__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def speed(self, sampled: int) -> Speed:
        wall, cpu = self._begun
        return Speed(
            sampled=sampled, seconds=time.perf_counter() - wall, cpu=time.process_time() - cpu
        )


class Watched:
    """An engine that keeps its requests and how long its steps took.

    long: no reply ends before its limit.
    """

    def __init__(self, engine: Any, *, long: bool) -> None:
        self.engine, self._long = engine, long
        self.forget()

    def forget(self) -> None:
        self.requests: list[Request] = []
        self.seconds, self.steps = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> Any:
        begun = time.perf_counter()
        found = self.engine.step()
        self.seconds += time.perf_counter() - begun
        self.steps += 1
        return found

    def submit(self, request: Request) -> None:
        if self._long:
            request = replace(request, stop_ids=frozenset())
        self.requests.append(request)
        self.engine.submit(request)


def play(worker: RolloutWorker, engine: Watched, count: int, first: int) -> tuple[Speed, str, int]:
    """(the speed, details as text, the mean context of a sampled token)."""
    orders = [Order(task="household", number=i, seed=first + i, index=None) for i in range(count)]
    engine.forget()
    watch = Stopwatch()
    outcomes = [one for one in worker.collect(orders) if isinstance(one, Episode)]
    rows = [row for one in outcomes for row in one.rows]
    sampled = sum(int(row.action_mask_T.sum()) for row in rows)
    speed = watch.speed(sampled)
    read = sum(len(row.ids_T) for row in rows) - sampled
    text = (
        f"{len(engine.requests)} turns, {sampled} sampled, {read} read,"
        f" {sampled / engine.steps:.0f} sampled a step,"
        f" {100 * engine.seconds / speed.seconds:.0f} % of the time in steps"
    )
    before = [np.flatnonzero(row.action_mask_T) for row in rows]
    return speed, text, int(np.concatenate(before).mean())


def at_once(engine: Any, requests: Sequence[Request]) -> Speed:
    """The speed with all requests submitted at once."""
    watch = Stopwatch()
    for session, request in enumerate(requests):
        # far from the rollouts' session numbers: none of theirs is continued
        engine.submit(replace(request, session=1_000_000 + session))
    return watch.speed(_drain(engine))


def steady(engine: Any, requests: Sequence[Request]) -> Speed:
    """The speed of one batch whose prompts are in the cache already."""
    for request in requests:
        engine.submit(replace(request, max_new_tokens=1))
    first: dict[int, list[int]] = {}
    while engine.pending:
        first |= {one.session: one.ids for one in engine.step()}
    watch = Stopwatch()
    for request in requests:
        engine.submit(replace(request, ids=[*request.ids, *first[request.session]]))
    return watch.speed(_drain(engine))


def _drain(engine: Any) -> int:
    """Step until nothing is left; how many tokens were sampled."""
    sampled = 0
    while engine.pending:
        for one in engine.step():
            sampled += len(one.ids)
            engine.release(one.session)
    return sampled


def long_batch(live: int, context: int, vocabulary: int) -> list[Request]:
    """context: the mean of its sampled tokens."""
    rng = np.random.default_rng(0)
    return [
        Request(
            session=2_000_000 + seed,
            ids=rng.integers(10, vocabulary, size=context - LONG // 2).tolist(),
            max_new_tokens=LONG,
            stop_ids=frozenset(),
            sampling=SAMPLING,
            seed=seed,
        )
        for seed in range(live)
    ]


def percent(ratios: tuple[float, float]) -> str:
    return f"{ratios[0]:.0f} % by the clock, {ratios[1]:.0f} % by CPU time"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--live", type=int, default=64, help="episodes in flight")
    options.add_argument("--episodes", type=int, default=256, help="of one measurement")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--processes", type=int, default=1, help="of the environment")
    options.add_argument("--reply", type=int, help="tokens; default: the student's own, up to 12")
    options.add_argument("--turns", type=int, default=18, help="at most")
    options.add_argument("--engines", default="vllm,transformers")
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
                student=Student(model, vocabulary=size),
            )
            inner.load(None, 0)
        else:
            inner = TransformersEngine(Student(model, vocabulary=size))
        engine = Watched(inner, long=chosen.reply is not None)
        how = played_so(
            RolloutConfig(
                temperature=SAMPLING.temperature,
                top_p=SAMPLING.top_p,
                max_turns=chosen.turns,
                max_new_tokens=chosen.reply or 12,
                max_live=chosen.live,
                processes=chosen.processes,
            ),
            "tutelage/Household-v0",
            GAMES,
        )
        worker = RolloutWorker(engine, tokenizer, {"household": how})
        try:
            play(worker, engine, chosen.live, 0)  # warms up
            for round_ in range(chosen.rounds):
                inner.load(None, round_ + 1)  # as in training: nothing of the last round is cached
                played, text, context = play(worker, engine, chosen.episodes, 1000 * (round_ + 1))
                print(f"{kind}: rollouts {played.rate:.0f}/s ({text})")
                if kind == "vllm":
                    inner.load(None, round_ + 1)
                    whole = at_once(inner, engine.requests)
                    ratios = percent(played.over(whole))
                    print(f"    the same requests at once {whole.rate:.0f}/s: {ratios}")
                batch = steady(inner, long_batch(chosen.live, context, size))
                ratios = percent(played.over(batch))
                print(f"    one long batch {batch.rate:.0f}/s: {ratios}", flush=True)
        finally:
            worker.close()


if __name__ == "__main__":
    main()
