"""What the tests share: one thread, the tiny tokenizer, random models too small to be slow, and the
objectives with their options."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.distill.objectives import TeacherScores
from tutelage.scheduler.episodes import NO_ACTION, Row

torch.set_num_threads(1)

VOCABULARY = "builtin:vocabulary"

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("local_support", {"k": 4, "support": by, "renormalize": whole, "direction": direction})
        for by in ("teacher", "student", "teacher+sampled", "student+sampled")
        for whole in (True, False)
        for direction in ("reverse", "forward", "jsd")
    ),
    *(
        ("local_support", {"k": 3, "support": by, "renormalize": False, "tail": "sampled"} | clip)
        for by in ("teacher", "student")
        for clip in ({}, {"importance_clip": 0.9})
    ),
    *(("local_support", {"k": 6, "mass": 0.8, "renormalize": whole}) for whole in (True, False)),
    ("local_support", {"k": 5, "mass": 0.5, "support": "teacher+sampled"}),
    ("full_vocabulary", {}),
    ("full_vocabulary", {"direction": "forward"}),
    *(("full_vocabulary", {"direction": "jsd", "beta": beta}) for beta in (0.0, 0.2, 0.5, 1.0)),
    ("sampled_token", {}),
    ("sampled_token", {"clip": 0.05, "dual_clip": 1.5}),
    ("sampled_token", {"dual_clip": None, "reward_clip": 0.5}),
    ("sampled_token", {"gamma": 0.5}),
    ("sampled_token", {"gamma": 1.0, "clip": 0.5}),
    *(
        ("trust_region", {"k": 4, "outlier": outlier, "trust": trust, "tau": -0.5, "beta": 0.3})
        for outlier in ("forward_kl", "mask", "clip", "forward_kl_pg")
        for trust in ("ratio", "static")
    ),
    ("entropy_aware", {"k": 4, "tau": 1.2}),
    ("entropy_aware", {"k": 4, "tau": 1.2, "clip": 0.05, "dual_clip": 1.5}),
    *(("advantage_gated", {"k": 4, "tau": tau}) for tau in (-1.0, 0.0, 0.05, 1.0)),
    ("reward_clipped", {"floor": -0.5, "switch": 1.0}),  # all of the run in the first phase
    ("reward_clipped", {"floor": -0.5, "switch": 0.0, "share": 0.5}),  # in the second
    ("entropy_aware", {"k": 4, "tau": 1.2, "renormalize": True}),
    ("imitation", {"beta": 0.3}),
    *(
        (name, options | {"behavior": "sampling"})
        for name, options in (
            ("sampled_token", {"clip": 0.05, "dual_clip": 1.5}),
            ("sampled_token", {"gamma": 0.5}),
            ("trust_region", {"k": 4, "beta": 0.3}),
            ("entropy_aware", {"k": 4, "tau": 1.2}),
            ("advantage_gated", {"k": 4}),
            ("reward_clipped", {"floor": -0.5, "switch": 0.0, "share": 0.5}),
            ("local_support", {"k": 3, "renormalize": False, "tail": "sampled"}),
            ("local_support", {"k": 4, "support": "teacher+sampled"}),
            ("local_support", {"k": 4, "support": "student+sampled", "direction": "forward"}),
        )
    ),
]
"""Every objective with every option that changes its formula."""


@pytest.fixture(scope="session")
def stock_alfworld() -> None:
    """ALFWorld's own engine and expert, which ours are compared with. Where they could not be built
    these tests skip; CI says that they must be there."""
    try:
        for name in ("alfworld.agents.environment.alfred_tw_env", "textworld.envs.pddl"):
            importlib.import_module(name)
    except ImportError as error:
        said = f"ALFWorld's stock engine is not installed ({error}): make install says why"
        if os.environ.get("TUTELAGE_REQUIRE_ALFWORLD"):
            pytest.fail(said)
        pytest.skip(said)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny models' tokenizer, 2,048 ids."""
    from tutelage.distill.models.loading import load_tokenizer

    return load_tokenizer(VOCABULARY)


def _make_model(
    *,
    vocabulary: int = 101,
    padding: int = 0,
    seed: int = 0,
    layers: int = 2,
    scale: float = 0.3,
    tied: bool = False,
) -> Any:
    """A random Qwen2 of hidden size 32 (grouped queries), with `padding` embedding rows beyond the
    vocabulary. `scale` is wide enough for distributions far from uniform; `tied`: the embedding is
    the head too."""
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
        tie_word_embeddings=tied,
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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    """The folders of a student and two teachers: random, of the tiny vocabulary, far from each
    other."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: _save_model(folder / name, tokenizer, seed=seed)
        for seed, name in enumerate(["student", "one", "two"])
    }


def _make_row(parts: Sequence[tuple[str, Sequence[int]]], *, seed: int = 0) -> Row:
    """A row from ("prompt" | "said" | "branch", ids) parts. A branch belongs to the turn of the
    reply after it; what the student said has log-probabilities, drawn from `seed`."""
    rng = np.random.default_rng(seed)
    fields: list[tuple[int, int, float, int]] = []
    turn = 0
    for kind, ids in parts:
        chosen = NO_ACTION if kind == "prompt" else turn
        for token in ids:
            logprob = float(-rng.exponential()) if kind == "said" else float("nan")
            fields.append((token, chosen, logprob, turn + 1 if kind == "branch" else 0))
        turn += kind == "said"
    ids_T, turns_T, behavior_logprobs_T, branches_T = zip(*fields, strict=True)
    return Row(
        ids_T=np.asarray(ids_T, dtype=np.int32),
        turns_T=np.asarray(turns_T, dtype=np.int32),
        behavior_logprobs_T=np.asarray(behavior_logprobs_T, dtype=np.float32),
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


@pytest.fixture(params=OPTIONS, ids=lambda x: "-".join([x[0], *map(str, x[1].values())]))
def variant(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """(name, options): one of OPTIONS."""
    found: tuple[str, dict[str, Any]] = request.param
    return found


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """Normal numbers in float64, the same in every test."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 2.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal


@pytest.fixture
def sampled_ids_N() -> torch.Tensor:
    """Seven tokens of a vocabulary of eleven."""
    return torch.tensor([0, 3, 10, 3, 7, 1, 5])


def _make_scores(logits_NV: torch.Tensor, sampled_N: torch.Tensor, *, k: int) -> TeacherScores:
    """All that a teacher can say, in float64, so that finite differences mean something."""
    full_NV = logits_NV.log_softmax(-1)
    top = full_NV.topk(k, dim=-1)
    return TeacherScores(
        ids_NK=top.indices,
        logprobs_NK=top.values,
        sampled_N=full_NV.gather(1, sampled_N[:, None])[:, 0],
        vocabulary=logits_NV.shape[1],
        entropy_N=torch.special.entr(full_NV.exp()).sum(-1),
        full_NV=full_NV,
    )


def _gradient(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Of the sum of `loss(at)`."""
    point = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point).sum(), point)
    return gradient


@pytest.fixture(scope="session")
def make_scores() -> Callable[..., TeacherScores]:
    """See `_make_scores`."""
    return _make_scores


@pytest.fixture(scope="session")
def gradient() -> Callable[..., torch.Tensor]:
    """See `_gradient`."""
    return _gradient
