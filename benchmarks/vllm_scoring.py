"""Compares a vLLM teacher's scoring with vLLM's plain prefill of the same prompts: the ratio shows
what top-K log-probabilities and their packing cost.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_scoring.py [--vocabulary 2048]

Both take turns in one process; medians. The weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.teachers import TeacherConfig, VllmConfig
from tutelage.distill.objectives import Needs
from tutelage.distill.teachers.vllm import VllmTeacher, load_vllm_teacher
from tutelage.scheduler.episodes import Row


def make_model(folder: str, vocabulary: int, context: int, hidden: int, layers: int) -> None:
    """A random Qwen2 in `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)


def make_rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Rows whose tokens, but for the first, count as sampled."""
    rng = np.random.default_rng(0)
    turns_T = np.zeros(length, dtype=np.int32)
    turns_T[0] = -1
    return [
        Row(
            ids_T=rng.integers(vocabulary, size=length).astype(np.int32),
            turns_T=turns_T,
            behavior_logprobs_T=np.full(length, np.nan, dtype=np.float32),
            branches_T=np.zeros(length, dtype=np.int32),
        )
        for _ in range(count)
    ]


def prefill(engine: Any, rows: Sequence[Row]) -> None:
    """The prompts alone."""
    from vllm import SamplingParams

    for i, row in enumerate(rows):
        prompt = {"type": "token", "prompt_token_ids": row.ids_T.tolist()}
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        engine.add_request(f"plain {i}", prompt, params)
    while engine.has_unfinished_requests():
        engine.step()


def seconds(work: Callable[[], Any], engine: Any) -> float:
    """Of `work`, with nothing in the prefix cache."""
    engine.reset_prefix_cache()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def peak() -> float:
    """Megabytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = options.vocabulary, options.length, options.hidden, options.layers
        make_model(folder, *sizes)
        config = TeacherConfig(model=folder, engine="vllm", vllm=VllmConfig())
        teacher: VllmTeacher = load_vllm_teacher("one", config, vocabulary=options.vocabulary)
    engine = teacher._engine
    rows = make_rows(options.rows, options.length, options.vocabulary)
    tokens = options.rows * options.length
    plain, scored = [], []
    loaded = peak()
    for turn in range(options.rounds + 1):
        times = (
            seconds(lambda: prefill(engine, rows), engine),
            seconds(lambda: teacher.score(rows, Needs(k=options.k)), engine),
        )
        if turn:  # the first warms up
            plain.append(times[0])
            scored.append(times[1])
    ratios = [a / b for a, b in zip(plain, scored, strict=True)]
    print(
        f"V={options.vocabulary}, hidden {options.hidden}, {options.layers} layers, {options.rows}"
        f" rows of {options.length}, K={options.k}, forwards of"
        f" {engine.vllm_config.scheduler_config.max_num_batched_tokens} tokens"
    )
    print(f"prefill {tokens / statistics.median(plain):,.0f} tokens/s")
    print(f"scoring {tokens / statistics.median(scored):,.0f} tokens/s")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"peak memory {loaded:,.0f} MB loaded, {peak():,.0f} MB after scoring")
    if options.profile:
        profile = cProfile.Profile()
        engine.reset_prefix_cache()
        profile.runcall(teacher.score, rows, Needs(k=options.k))
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
