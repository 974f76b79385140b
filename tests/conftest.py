"""What the tests share: one thread, the tiny tokenizer, and random models too small to be slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.scheduler.episodes import NOT_CHOSEN, Row

torch.set_num_threads(1)

VOCABULARY = "builtin:vocabulary"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny models' tokenizer, 2,048 ids."""
    from tutelage.distill.models import load_tokenizer

    return load_tokenizer(VOCABULARY)


def _make_model(
    *, vocabulary: int = 101, padding: int = 0, seed: int = 0, layers: int = 2, scale: float = 0.3
) -> Any:
    """A random Qwen2 of hidden size 32 (grouped queries, untied head), with `padding` embedding
    rows beyond the vocabulary. `scale` is wide enough for distributions far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocabulary + padding,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=scale,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    return model.eval()


def _save_model(folder: Path, tokenizer: Any, *, seed: int, scale: float = 0.3) -> str:
    """A random model of the tiny vocabulary and its tokenizer in `folder`, which is returned."""
    _make_model(vocabulary=len(tokenizer), seed=seed, scale=scale).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _make_row(parts: Sequence[tuple[str, Sequence[int]]], *, seed: int = 0) -> Row:
    """A row from ("prompt" | "said" | "branch", ids) parts. A branch belongs to the turn of the
    reply after it; what the student said has log-probabilities, drawn from `seed`."""
    rng = np.random.default_rng(seed)
    fields: list[tuple[int, int, float, int]] = []
    turn = 0
    for kind, ids in parts:
        chosen = NOT_CHOSEN if kind == "prompt" else turn
        for token in ids:
            logprob = float(-rng.exponential()) if kind == "said" else float("nan")
            fields.append((token, chosen, logprob, turn + 1 if kind == "branch" else 0))
        turn += kind == "said"
    ids_T, turns_T, logprobs_T, branches_T = zip(*fields, strict=True)
    return Row(
        ids_T=np.asarray(ids_T, dtype=np.int32),
        turns_T=np.asarray(turns_T, dtype=np.int32),
        logprobs_T=np.asarray(logprobs_T, dtype=np.float32),
        branches_T=np.asarray(branches_T, dtype=np.int32),
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """See `_make_model`."""
    return _make_model


@pytest.fixture(scope="session")
def save_model() -> Callable[..., str]:
    """See `_save_model`."""
    return _save_model


@pytest.fixture(scope="session")
def make_row() -> Callable[..., Row]:
    """See `_make_row`."""
    return _make_row
