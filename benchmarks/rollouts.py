"""Measures what rollouts reach of their engine's own speed, for the tiny students on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/rollouts.py [--live 32] [--rounds 5] [--model PATH]

The demo's tasks, household and math, are played through RolloutWorker, environments and all, with
episodes enough to keep `--live` in flight. In turn with them, in one process, so that other load
affects all alike, the same engine alone:

- decodes one long batch of as many rows at the rollouts' mean context, its prompts read before;
- reads prompts of as many tokens as a turn of the rollouts has to read, nothing else.

Two shares are printed, of the clock's time and of this process's CPU time:

of one long batch: tokens that go through the model in a second, sampled and read, over the long
batch's. "Sampled" counts the sampled ones alone (benchmarks/vllm_rollouts.py counts so): a turn of
5.6 tokens with 21 to read is then charged for reading what the long batch need not read, and a
decode step that becomes cheaper lowers this share though everything has become faster.

of the engine's limit: the time that the engine alone takes for the sampled tokens in a long batch
and for the read ones in full prefills, over the rollouts' time. What is missing to 100 % is all
that a rollout costs beside: batches that are not full, padding, environments, texts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from tutelage.distill.cli.main import CONFIGS
from tutelage.distill.config.loading import load_config
from tutelage.distill.config.resolved import rollouts_of
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models.loading import load_model, load_tokenizer
from tutelage.distill.models.student import Student
from tutelage.scheduler.engine import Request
from tutelage.scheduler.episodes import Episode, Order, SamplingParams
from tutelage.scheduler.rollouts import RolloutWorker

STUDENTS = {"household": "builtin:household", "math": "builtin:arithmetic"}
SAMPLING = SamplingParams(temperature=1.0, top_p=0.9)
LONG = 64
"""Tokens of a row of the long batch."""

ENGINES_OWN = 1_000_000
"""Sessions from this number on are none of the rollouts'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens, and the seconds for them by the clock and of this process's CPU."""

    sampled: int
    read: int
    clock: float
    cpu: float


def measured(engine: TransformersEngine, work: Callable[[], Any]) -> Spent:
    before = engine.generated_tokens, engine.prefilled_tokens
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(
        clock=time.perf_counter() - clock,
        cpu=time.process_time() - cpu,
        sampled=engine.generated_tokens - before[0],
        read=engine.prefilled_tokens - before[1],
    )


def run(engine: TransformersEngine, requests: Sequence[Request]) -> dict[int, list[int]]:
    """The replies by session."""
    for request in requests:
        engine.submit(request)
    found: dict[int, list[int]] = {}
    while engine.pending:
        found |= {one.session: one.ids for one in engine.step()}
    return found


def requests_of(engine: TransformersEngine, lengths: Sequence[int], new: int) -> list[Request]:
    """Random prompts of these lengths, continued by `new` tokens whatever they are."""
    rng = np.random.default_rng(0)
    return [
        Request(
            session=ENGINES_OWN + i,
            ids=rng.integers(10, 800, size=length).tolist(),
            max_new_tokens=new,
            stop_ids=frozenset(),
            sampling=SAMPLING,
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]


def decoding(engine: TransformersEngine, live: int, context: int) -> Spent:
    """One long batch, at this mean context, whose prompts are in the cache already."""
    lengths = [max(1, context - LONG // 2)] * live
    prompts = requests_of(engine, lengths, 1)
    first = run(engine, prompts)
    further = [
        Request(
            session=one.session,
            ids=[*one.ids, *first[one.session]],
            max_new_tokens=LONG,
            stop_ids=one.stop_ids,
            sampling=one.sampling,
            seed=one.seed,
        )
        for one in prompts
    ]
    spent = measured(engine, lambda: run(engine, further))
    _release(engine, live)
    return spent


def reading(engine: TransformersEngine, live: int, context: int, turn: int) -> Spent:
    """`live` turns of `turn` tokens, after this context, in one forward."""
    past = requests_of(engine, [max(1, context - turn)] * live, 1)
    first = run(engine, past)
    turns = [
        Request(
            session=one.session,
            ids=[*one.ids, *first[one.session], *one.ids[:1] * (turn - 1)],
            max_new_tokens=1,
            stop_ids=one.stop_ids,
            sampling=one.sampling,
            seed=one.seed,
        )
        for one in past
    ]
    spent = measured(engine, lambda: run(engine, turns))
    _release(engine, live)
    return spent


def _release(engine: TransformersEngine, live: int) -> None:
    for i in range(live):
        engine.release(ENGINES_OWN + i)


def shares(played: Spent, decoded: Spent, read: Spent, clock: str) -> list[float]:
    """Of one long batch (all tokens, sampled alone) and of the engine's limit; clock: which."""
    seconds, long = getattr(played, clock), getattr(decoded, clock) / decoded.sampled
    alone = played.sampled * long + played.read * getattr(read, clock) / read.read
    both = played.sampled + played.read
    return [both * long / seconds, played.sampled * long / seconds, alone / seconds]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--live", type=int, default=32, help="episodes in flight")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--model", help="another student for both tasks")
    chosen = options.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    overrides = [f"rollout.max_live={chosen.live}"]
    rollouts = rollouts_of(load_config(CONFIGS / "demo.yaml", overrides).resolve())
    names = ["of one long batch", "  sampled alone", "of the engine's limit"]
    for task, student in STUDENTS.items():
        model = load_model(chosen.model or student, dtype="float32", device="cpu")
        tokenizer = load_tokenizer(chosen.model or student)
        engine = TransformersEngine(Student(model, vocabulary=len(tokenizer)))
        worker = RolloutWorker(engine, tokenizer, rollouts)
        found = []
        try:
            for round_ in range(chosen.rounds + 1):
                engine.load(None, round_)  # as in training: nothing of the last round is cached
                orders = [
                    Order(task=task, number=i, seed=1000 * round_ + i, index=i)
                    for i in range(4 * chosen.live)
                ]
                outcomes: list[Any] = []
                played = measured(engine, lambda: outcomes.extend(worker.collect(orders)))  # noqa: B023
                rows = [row for one in outcomes if isinstance(one, Episode) for row in one.rows]
                turns = sum(len(one.turns) for one in outcomes if isinstance(one, Episode))
                context = int(
                    np.concatenate([np.flatnonzero(r.action_mask_T) for r in rows]).mean()
                )
                decoded = decoding(engine, chosen.live, context)
                read = reading(engine, chosen.live, context, max(1, played.read // turns))
                if round_ == 0:  # warms up
                    continue
                found.append((played, decoded, read))
        finally:
            worker.close()
        rate = (played.sampled + played.read) / played.cpu
        print(
            f"{task}: {turns} turns of {played.sampled / turns:.1f} tokens sampled and"
            f" {played.read / turns:.1f} read, at a mean context of {context}; {rate:.0f} tokens a"
            f" CPU second ({played.sampled / played.cpu:.0f} of them sampled), one long batch"
            f" {decoded.sampled / decoded.cpu:.0f}"
        )
        by = {clock: [shares(*each, clock) for each in found] for clock in ("clock", "cpu")}
        for at, name in enumerate(names):
            clock, cpu = (100 * median(each[at] for each in by[c]) for c in ("clock", "cpu"))
            print(f"    {name}: {clock:.0f} % by the clock, {cpu:.0f} % by CPU time", flush=True)


if __name__ == "__main__":
    main()
