"""Compares the learner over processes of one thread each with one process of as many threads.

    python benchmarks/data_parallel.py [--processes 2] [--hidden 512] [--rows 16] [--length 256]

The same updates on the CPU: full forward, backward and AdamW step of -log pi, 2,048 ids. Medians
of updates that take turns, so that a busy machine is as busy for both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.sections import OptimizerConfig, StudentConfig
from tutelage.distill.models.loading import prepare_process
from tutelage.distill.objectives import build
from tutelage.distill.student.build import rank_student
from tutelage.distill.student.examples import Example, TaskObjective
from tutelage.distill.student.learner import Learner
from tutelage.distill.student.sharded import Setup, start
from tutelage.scheduler.episodes import NO_ACTION, Row

VOCABULARY = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    student = StudentConfig(model=_save(options), device="cpu")
    shared: dict[str, Any] = {"config": OptimizerConfig(), "steps": 100}
    make_student = partial(rank_student, student, 0, VOCABULARY)
    count = options.processes
    over = start(
        Setup(make_student=make_student, processes=count, timeout=600.0, threads=1, **shared)
    )
    alone = Learner(make_student(0), **shared)
    examples, task_objectives = (
        _examples(options),
        {"t": TaskObjective(objective=build("imitation"), weight=1.0)},
    )
    seconds: dict[int, list[float]] = {1: [], count: []}
    for step in range(1 + options.repeat):  # the first warms up
        for ranks, learner in ((1, alone), (count, over)):
            prepare_process(count // ranks)  # threads: with the ranks, `count` for both
            begun = time.perf_counter()
            found = learner.update(examples, task_objectives, seed=step, diagnose=False)["t"][
                "loss/mean"
            ]
            seconds[ranks].append(time.perf_counter() - begun)
            print(
                f"update {step}, {ranks} process(es): loss {found:.6f}, {seconds[ranks][-1]:.2f} s"
            )
    over.close()
    tokens = options.rows * options.length
    one, many = (statistics.median(own[1:]) for own in seconds.values())
    print(f"1 process, {count} threads: {tokens / one:,.0f} tokens/s")
    print(f"{count} processes, 1 thread each: {tokens / many:,.0f} tokens/s, x{one / many:.2f}")


def _save(options: argparse.Namespace) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder


def _examples(options: argparse.Namespace) -> list[Example]:
    rng = np.random.default_rng(0)
    turns_T = np.zeros(options.length, dtype=np.int32)
    turns_T[0] = NO_ACTION
    rows = [
        Row(
            ids_T=rng.integers(VOCABULARY, size=options.length).astype(np.int32),
            turns_T=turns_T,
            behavior_logprobs_T=np.full(options.length, np.nan, dtype=np.float32),
            branches_T=np.zeros(options.length, dtype=np.int32),
        )
        for _ in range(options.rows)
    ]
    return [Example(task="t", row=row, scores=None, mask_T=row.action_mask_T) for row in rows]


if __name__ == "__main__":
    main()
