"""A student small enough for vLLM on the CPU, and what a plain forward says of it.

Its heads are as small as vLLM's CPU attention takes (32), and its embedding has rows of padding
that would win every draw if they took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.teachers import VllmConfig
from tutelage.distill.engines.vllm.engine import VllmEngine, make_engine
from tutelage.distill.models.student import Student
from tutelage.scheduler.episodes import SamplingParams

VOCABULARY, PADDING, CONTEXT = 101, 11, 256
OPTIONS = VllmConfig(kv_cache_gib=0.05)
WITHIN = 1e-4
"""Nats between vLLM and transformers, of one token. Measured: up to 2.0e-5, and another one in each
run, as memory happens to lie; these random networks say log-probabilities down to -40, where one
float32 step is 4e-6. What does not arrive is off by 1e-2 and more."""

NOISY = SamplingParams(temperature=1.3, top_p=0.8)


def make_student(*, seed: int = 0, tied: bool = False) -> Any:
    """A random model whose distributions are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCABULARY + PADDING,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCABULARY:] *= 30.0
    return model


def student_of(model: Any) -> Student:
    return Student(model, vocabulary=VOCABULARY)


def shake(model: Any, *, seed: int, scale: float = 0.05) -> None:
    """What an update does: every weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)


def engine_of(model: Any, options: VllmConfig = OPTIONS, **other: Any) -> VllmEngine:
    arguments = {"vocabulary": VOCABULARY, "dtype": "float32", "max_live": 64}
    arguments["student"] = student_of(model)
    return make_engine(model.config, options, **arguments | other)


@torch.no_grad()
def logprobs_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The plain forward: row t tells of token t + 1, over the tokenizer's ids [T, V]."""
    logits_TV = model(input_ids=torch.tensor([list(ids)])).logits[0, :, :VOCABULARY]
    return logits_TV.log_softmax(-1)


def said(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> np.ndarray:
    """The plain forward's log-probabilities of a reply."""
    after_TV = logprobs_of(model, [*prompt, *reply])[len(prompt) - 1 : -1]
    return after_TV.gather(1, torch.tensor(reply)[:, None])[:, 0].numpy()
