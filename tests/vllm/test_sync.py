"""Weights reach the engine, and where they do not it is said."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm.students import (
    NOISY,
    OPTIONS,
    VOCABULARY,
    WITHIN,
    engine_of,
    logprobs_of,
    make_student,
    said,
    shake,
    student_of,
)
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.teachers import VllmConfig
from tutelage.distill.engines.vllm import environment, sync

TEXT = [4, 8, 15, 16, 23, 42, 77, 99]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """(student, its engine): they may move."""
    student = make_student(seed=1, tied=request.param)
    engine = engine_of(student)
    engine.load(None, 0)
    yield student, engine
    engine.close()


def test_the_engine_computes_with_the_new_weights(pair: Any, play: Any) -> None:
    student, engine = pair
    prompt = list(range(2, 80))
    old = play(engine, [prompt])[0]  # and its prompt is in the cache
    for version in (1, 2):
        shake(student, seed=version)
        engine.load(None, version)
        assert engine.version == version
        assert engine.gap < 1e-5
        new = play(engine, [prompt])[0]
        assert np.abs(said(student, prompt, new.ids) - np.asarray(new.logprobs)).max() < WITHIN
        assert np.abs(said(student, prompt, old.ids) - np.asarray(old.logprobs)).max() > 0.05
        old = new


def test_every_layer_is_that_of_the_learner(pair: Any) -> None:
    student, engine = pair
    own = student_of(student).weights()
    for name in own:
        with torch.no_grad():
            own[name] += 0.3 * torch.randn(own[name].shape)
        engine.load(None, engine.version + 1)
        wanted_T = logprobs_of(student, TEXT)[:-1].gather(1, torch.tensor(TEXT)[1:, None])[:, 0]
        assert np.abs(engine.score(TEXT) - wanted_T.numpy()).max() < WITHIN, name


def test_a_sync_that_does_nothing_is_caught(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, engine = pair
    engine.load(None, 50)
    monkeypatch.setattr(sync, "push", lambda *_: None)
    engine.load(None, 51)  # nothing had to be done
    shake(student, seed=9, scale=0.01)
    with pytest.raises(sync.SyncError, match=r"version 52 did not reach.*the sync did nothing"):
        engine.load(None, 52)
    assert engine.version == 51
    monkeypatch.undo()
    engine.load(None, 53)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_lost_parameter_is_caught(pair: Any, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, engine = pair
    engine.load(None, 60)
    push = sync.push

    def partly(engine: Any, weights: Any) -> None:
        push(engine, {name: weight for name, weight in weights.items() if name != lost})

    monkeypatch.setattr(sync, "push", partly)
    shake(student, seed=10)
    with pytest.raises(sync.SyncError, match="version 61 did not reach the vllm engine"):
        engine.load(None, 61)
    monkeypatch.undo()
    engine.load(None, 62)


def test_a_tied_head_that_is_not_packed_again_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap itself: no weights come for a tied head, so a reload says nothing and leaves the
    CPU's packed copy of it alone."""
    student = make_student(seed=2, tied=True)
    engine = engine_of(student)
    monkeypatch.setattr(sync, "repack_head", lambda _: None)
    with pytest.raises(sync.SyncError, match="did not reach the vllm engine"):
        engine.load(None, 0)
    monkeypatch.undo()
    engine.load(None, 1)
    assert engine.gap < 1e-5
    engine.close()


def test_in_bfloat16_a_sync_that_does_nothing_is_caught_before_it_is_far_off(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(seed=3)
    engine = engine_of(student, VllmConfig(kv_cache_gib=0.05, dtype="bfloat16"))
    engine.load(None, 0)
    assert 1e-4 < engine.gap < 0.1
    shake(student, seed=1, scale=0.001)
    monkeypatch.setattr(sync, "push", lambda *_: None)
    with pytest.raises(sync.SyncError, match=r"the learner moved by 0.0\d+ nats, and the engine"):
        engine.load(None, 1)
    engine.close()


def test_another_process_gets_weights_and_probe_in_one(pair: Any) -> None:
    student, engine = pair
    shake(student, seed=20)
    weights, probe = sync.source(student_of(student))
    arrays = sync.packed(weights, probe, dtype="float32")
    source, engine._source = engine._source, None
    with pytest.raises(ValueError, match="version 70: this engine shares no memory"):
        engine.load(None, 70)
    engine.load(arrays, 70)
    engine._source = source
    wanted_T = logprobs_of(student, TEXT)[:-1].gather(1, torch.tensor(TEXT)[1:, None])[:, 0]
    assert np.abs(engine.score(TEXT) - wanted_T.numpy()).max() < WITHIN
    del arrays[sync.LOGPROBS]
    with pytest.raises(sync.SyncError, match="weights came without the learner's probe"):
        engine.load(arrays, 71)


def test_an_engine_with_less_context_than_the_probe_is_probed_as_far_as_it_goes() -> None:
    student = make_student()
    engine = engine_of(student, VllmConfig(kv_cache_gib=0.05, max_model_len=20))
    engine.load(None, 0)
    assert engine.gap < 1e-5
    shake(student, seed=3)
    engine._source = lambda: (student_of(make_student()).weights(), probe)
    probe = sync.probe_of(student_of(student))
    with pytest.raises(sync.SyncError, match="on the probe of 19 tokens"):
        engine.load(None, 1)
    engine.close()


def test_a_tied_embedding_is_sent_once_and_without_padding() -> None:
    for tied in (False, True):
        student = make_student(tied=tied)
        sent = student_of(student).weights()
        assert ("lm_head.weight" in sent) is not tied
        assert sent["model.embed_tokens.weight"].shape[0] == VOCABULARY
        assert (
            sent["model.embed_tokens.weight"].data_ptr()
            == student.get_input_embeddings().weight.data_ptr()
        )  # by reference
    assert set(sent) == {name for name, _ in student.named_parameters()}


def test_weights_travel_in_the_dtype_of_their_engine() -> None:
    """Two bytes a number for one in bfloat16, and the bits that it would have made of them."""
    student = make_student()
    weights, probe = sync.source(student_of(student))
    for dtype in (torch.float32, torch.bfloat16):
        sent = sync.packed(weights, probe, dtype=str(dtype).removeprefix("torch."))
        arrived, _ = sync.unpacked(sent)
        assert set(arrived) == set(weights)
        for name, weight in weights.items():
            assert sent[name].nbytes == weight.numel() * dtype.itemsize
            assert torch.equal(arrived[name], weight.to(dtype))


def test_nothing_is_said_by_an_engine_without_weights(play: Any) -> None:
    engine = engine_of(make_student(), student=None)
    with pytest.raises(RuntimeError, match="holds no weights yet"):
        play(engine, [[2, 3]], sampling=NOISY)
    engine.close()


def test_a_start_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    engine_of(make_student()).close()
    assert torch.equal(torch.rand(3), wanted)
    torch.set_num_threads(1)  # vLLM forbids it
    assert "skip" not in torch.set_num_threads.__name__
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with environment.undisturbed():  # as for workers on a GPU
        torch.set_num_threads(3)
        os.environ["OMP_NUM_THREADS"] = "3"
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_an_engine_that_finds_no_memory_says_which_option_gives_it() -> None:
    with pytest.raises(RuntimeError, match=r"does not start.*vllm\.kv_cache_gib"):
        engine_of(make_student(), VllmConfig(kv_cache_gib=1e-5))
    with pytest.raises(RuntimeError, match=r"does not start.*max_model_len"):
        engine_of(make_student(), VllmConfig(max_model_len=10_000))


def test_heads_that_the_workers_cannot_share_are_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"heads \(2\) must be divisible.*vllm\.tensor_parallel_"
    ):
        engine_of(make_student(), OPTIONS.model_copy(update={"tensor_parallel_size": 3}))


def test_a_release_without_what_is_called_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    monkeypatch.delattr(LLMEngine, "reset_prefix_cache")
    with pytest.raises(ConfigError, match=re.escape("has no LLMEngine.reset_prefix_cache")):
        engine_of(make_student())
