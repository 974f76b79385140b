"""vLLM as an engine: what it samples, and what it says of what it sampled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm.students import CONTEXT, NOISY, VOCABULARY, WITHIN, logprobs_of, said, student_of
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.engines.vllm.start import EngineFailure
from tutelage.scheduler.engine import Request
from tutelage.scheduler.episodes import GREEDY, SamplingParams


def test_log_probabilities_are_those_of_a_plain_forward_at_temperature_one(
    engine: Any, student: Any, prompts: Any, play: Any
) -> None:
    replies = play(engine, prompts)
    gaps = [
        np.abs(said(student, prompt, reply.ids) - np.asarray(reply.logprobs)).max()
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    assert max(gaps) < WITHIN
    assert sum(len(reply.ids) for reply in replies) > 300


def test_of_the_laws_own_it_says_what_it_knows(engine: Any, prompts: Any, play: Any) -> None:
    """The whole policy's and a greedy one's: the learner says the others."""
    assert all(reply.sampling_logprobs is None for reply in play(engine, prompts[:2]))
    for reply in play(engine, prompts[:2], sampling=SamplingParams()):
        assert reply.sampling_logprobs == reply.logprobs
    for reply in play(engine, prompts[:2], sampling=GREEDY):
        assert reply.sampling_logprobs == [0.0] * len(reply.ids)


def test_the_most_probable_ids_are_those_of_a_plain_forward(engine: Any, student: Any) -> None:
    """As sets, but for ids that are as probable as the last one."""
    ids, k = np.random.default_rng(1).integers(2, VOCABULARY, size=200).tolist(), 8
    params = engine._params(max_tokens=1, prompt_logprobs=k, flat_logprobs=True, detokenize=False)
    engine._engine.add_request("top", {"prompt_token_ids": ids}, params)
    found: list[Any] = []
    while not found:
        found = engine._engine.step()
    flat = found[0].prompt_logprobs
    for t, after_V in enumerate(logprobs_of(student, ids)[:-1], start=1):
        here = slice(flat.start_indices[t] + 1, flat.end_indices[t])  # after the prompt's own
        mine = dict(zip(flat.token_ids[here], flat.logprobs[here], strict=True))
        last = float(after_V.topk(k).values[-1])
        assert set(after_V.topk(k).indices.tolist()) ^ set(mine) <= {
            i for i in range(VOCABULARY) if abs(float(after_V[i]) - last) < WITHIN
        }
        assert all(abs(mine[i] - float(after_V[i])) < WITHIN for i in mine)


def test_rows_of_padding_are_no_tokens(engine: Any, student: Any, prompts: Any, play: Any) -> None:
    """They hold nearly all the probability of the whole embedding."""
    with torch.no_grad():
        logits_V = student(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
    assert float(logits_V.softmax(-1)[VOCABULARY:].sum()) > 0.9
    replies = play(engine, prompts, sampling=SamplingParams(temperature=2.0, top_p=1.0))
    assert max(max(reply.ids) for reply in replies) < VOCABULARY
    first = play(engine, [prompts[0]], sampling=GREEDY, max_new_tokens=1)[0]
    assert first.logprobs[0] == pytest.approx(
        float(logprobs_of(student, prompts[0])[-1].max()), abs=WITHIN
    )


def test_nothing_outside_the_nucleus_is_sampled(
    engine: Any, student: Any, prompts: Any, play: Any
) -> None:
    outside = near = 0
    for prompt, reply in zip(prompts, play(engine, prompts), strict=True):
        after_TV = logprobs_of(student, [*prompt, *reply.ids])[len(prompt) - 1 : -1]
        probs_TV = (after_TV / NOISY.temperature).softmax(-1)
        for probs_V, token in zip(probs_TV, reply.ids, strict=True):
            above = float(probs_V[probs_V > probs_V[token]].sum())
            outside += above >= NOISY.top_p + 1e-5
            near += above > NOISY.top_p / 2
    assert outside == 0
    assert near > 20  # there were such that a smaller nucleus would have left out


def test_a_token_comes_as_often_as_the_law_says(engine: Any, student: Any, play: Any) -> None:
    prompt, draws = [5, 6, 7, 8], 3000
    replies = play(
        engine,
        [prompt] * draws,
        max_new_tokens=1,
        sampling=SamplingParams(temperature=0.7, top_p=0.9),
    )
    counts = Counter(reply.ids[0] for reply in replies)
    probs_V = (logprobs_of(student, prompt)[-1] / 0.7).softmax(-1)
    order_V = probs_V.argsort(descending=True)
    kept_V = order_V[probs_V[order_V].cumsum(0) - probs_V[order_V] < 0.9]
    sampling = {int(i): float(probs_V[i] / probs_V[kept_V].sum()) for i in kept_V}
    assert set(counts) <= set(sampling)
    distance = sum(abs(counts[i] / draws - p) for i, p in sampling.items()) / 2
    assert distance < 1.5 * np.sqrt(len(sampling) / (2 * np.pi * draws))  # 1.0 in the mean at most


def test_greedy_is_that_of_the_other_engine(
    engine: Any, student: Any, prompts: Any, play: Any
) -> None:
    other = TransformersEngine(student_of(student))
    ours, theirs = (play(one, prompts, sampling=GREEDY) for one in (engine, other))
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    assert [one.stopped for one in ours] == [one.stopped for one in theirs]


def test_a_seed_is_a_reply(engine: Any, prompts: Any, play: Any) -> None:
    alone = play(engine, prompts[:1], seeds=[2**64 - 1])[0]
    again = play(engine, prompts[:1], seeds=[2**64 - 1])[0]
    crowded = play(engine, [prompts[0], *prompts], seeds=[2**64 - 1, *range(40)])[0]
    other = play(engine, prompts[:1], seeds=[3])[0]
    assert alone.ids == again.ids == crowded.ids != other.ids
    assert alone.logprobs == pytest.approx(crowded.logprobs, abs=WITHIN)


def test_the_next_turn_finds_the_last_one_in_the_cache(
    engine: Any, student: Any, play: Any
) -> None:
    ids = list(range(2, 72))
    known, before = ids, engine.cached_tokens
    for turn in range(3):
        reply = play(engine, [ids], sessions=[5], max_new_tokens=30)[0]
        assert np.abs(said(student, ids, reply.ids) - np.asarray(reply.logprobs)).max() < WITHIN
        hits = engine.cached_tokens - before
        # whole blocks of 32 of what was there after the last turn, but for its last token
        assert hits == (0 if turn == 0 else 32 * ((len(known) - 1) // 32))
        known, before = [*ids, *reply.ids], engine.cached_tokens
        ids = [*known, 9, 8, 7]


def test_more_prompts_than_one_forward_takes(engine: Any, student: Any, play: Any) -> None:
    """Some must wait whole: a part of a prompt ends vLLM on the CPU where requests have seeds."""
    room = engine._engine.vllm_config.scheduler_config.max_num_batched_tokens
    rng = np.random.default_rng(3)
    prompts = rng.integers(2, VOCABULARY, size=(room // 200 + 20, 200)).tolist()
    replies = play(engine, prompts, max_new_tokens=4)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert np.abs(said(student, prompt, reply.ids) - np.asarray(reply.logprobs)).max() < WITHIN


def test_any_stop_id_ends_a_reply_and_stays(engine: Any, prompts: Any, play: Any) -> None:
    stops = frozenset(range(2, 40))
    replies = play(engine, prompts, stop_ids=stops)
    assert all(reply.stopped for reply in replies)
    assert all(reply.ids[-1] in stops for reply in replies)
    assert not any(token in stops for reply in replies for token in reply.ids[:-1])
    free = play(engine, prompts, stop_ids=frozenset())  # the model's own EOS, 1, is a token
    assert all(len(reply.ids) == 24 and not reply.stopped for reply in free)
    assert any(1 in reply.ids[:-1] for reply in free)


def test_a_reply_may_fill_the_context(engine: Any, student: Any, play: Any) -> None:
    prompt = [3] * (CONTEXT - 5)
    reply = play(engine, [prompt], max_new_tokens=5, stop_ids=frozenset())[0]
    assert len(reply.ids) == 5
    assert np.abs(said(student, prompt, reply.ids) - np.asarray(reply.logprobs)).max() < WITHIN
    with pytest.raises(ValueError, match=r"max_new_tokens=6 after 251 ids.*context of 256.*1 to 5"):
        play(engine, [prompt], max_new_tokens=6)
    assert engine.pending == 0


def test_what_is_released_is_forgotten(engine: Any, prompts: Any, play: Any) -> None:
    whole = play(engine, prompts[:3], stop_ids=frozenset())
    for session, ids in enumerate(prompts[:3]):
        engine.submit(
            Request(
                session=session,
                ids=ids,
                max_new_tokens=24,
                stop_ids=frozenset(),
                sampling=NOISY,
                seed=session,
            )
        )
    for _ in range(4):
        assert engine.step() == []
    engine.release(1)
    engine.release(1)
    assert engine.pending == 2
    found = {}
    while engine.pending:
        found |= {one.session: one.ids for one in engine.step()}
    assert found == {0: whole[0].ids, 2: whole[2].ids}
    assert play(engine, [prompts[1]], sessions=[1], seeds=[1], stop_ids=frozenset())[0].ids == (
        whole[1].ids
    )
    engine.load(None, engine.version + 1)  # no block is held any more


def test_one_request_a_session(engine: Any, play: Any) -> None:
    request = Request(
        session=4, ids=[2, 3], max_new_tokens=3, stop_ids=frozenset(), sampling=GREEDY, seed=0
    )
    engine.submit(request)
    with pytest.raises(ValueError, match="session 4 has a request in flight"):
        engine.submit(request)
    with pytest.raises(RuntimeError, match="1 requests are in flight: load weights between"):
        engine.load(None, 99)


def test_a_step_that_breaks_says_what_was_lost(
    engine: Any, prompts: Any, play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(engine._engine, "step", broken)
    said = r"a step with 40 requests in flight: OutOfMemoryError: tried.*gpu_memory_utilization"
    with pytest.raises(EngineFailure, match=said):
        play(engine, prompts)


def test_an_engine_in_a_process_of_its_own_takes_it_along(
    engine: Any, play: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """So that Ray sees a dead actor, and starts another."""
    left: list[int] = []

    def exit_(code: int) -> None:
        left.append(code)
        raise SystemExit

    def broken() -> None:
        raise RuntimeError("worker died")

    monkeypatch.setattr("os._exit", exit_)
    monkeypatch.setattr(engine, "_alone", True)
    monkeypatch.setattr(engine._engine, "step", broken)
    with pytest.raises(SystemExit):
        play(engine, [[2, 3]])
    assert left == [1]
    assert "vllm broke in a step with 1 requests in flight" in capsys.readouterr().err
