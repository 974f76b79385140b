"""What a vLLM engine is asked and how its answers are read, with a stand-in for the engine: vLLM
itself is met in tests/vllm, and its V2 model runner only on a CUDA device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.settings import serving
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.objectives import Needs
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.distill.teachers.vllm import VllmTeacher, batched_tokens, cut_padding
from tutelage.scheduler.episodes import Row

VOCABULARY = 101


class StandIn:
    """Does what vLLM's documentation says of its sampling parameters, one request a step, the last
    one first. Log-probabilities reach its front end in two parts, as tensors."""

    def __init__(self, model: Any, *, v2: bool = True, room: int = 512) -> None:
        self.model = model
        alone = SimpleNamespace(world_size=1)
        self.vllm_config = SimpleNamespace(use_v2_model_runner=v2, parallel_config=alone)
        self.model_config = SimpleNamespace(max_model_len=room)
        self.waiting: list[tuple[str, list[int], Any]] = []
        self.aborted: list[str] = []
        self.moves: list[str] = []
        self.output_processor = SimpleNamespace(request_states={})

    def add_request(self, request_id: str, prompt: Any, params: Any) -> str:
        self.waiting.append((request_id, prompt["prompt_token_ids"], params))
        processor = SimpleNamespace(_update_prompt_logprobs=lambda _: pytest.fail("unpacked"))
        state = SimpleNamespace(logprobs_processor=processor)
        self.output_processor.request_states[f"{request_id}-inside"] = state
        return f"{request_id}-inside"

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def sleep(self, level: int) -> None:
        self.moves.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.moves.append("wake")

    @torch.no_grad()
    def step(self) -> list[Any]:
        request_id, ids, params = self.waiting.pop()
        assert (params.max_tokens, params.flat_logprobs, params.detokenize) == (1, True, False)
        logprobs_TV = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        after_TV, ids_T1 = logprobs_TV[:-1], torch.tensor(ids[1:])[:, None]
        top = after_TV.topk(params.prompt_logprobs)
        ids_TC = torch.cat([ids_T1, top.indices], 1).int()
        logprobs_TC = torch.cat([after_TV.gather(1, ids_T1), top.values], 1)
        state = self.output_processor.request_states[f"{request_id}-inside"]
        for part in (slice(0, 3), slice(3, None)):
            state.logprobs_processor._update_prompt_logprobs((ids_TC[part], logprobs_TC[part]))
        answer = SimpleNamespace(request_id=request_id, finished=True)
        rows = getattr(params, "prompt_logprob_token_ids", None)
        if rows is not None:
            start = params.prompt_logprob_start
            assert len(rows) == len(ids) - 1 - start
            asked = torch.from_numpy(rows).long()
            found = logprobs_TV[start:-1].gather(1, asked.clamp(min=0))
            answer.prompt_token_id_logprobs = found.masked_fill(asked < 0, -torch.inf).numpy()
        unfinished = SimpleNamespace(request_id="another", finished=False)
        return [unfinished, answer]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture
def rows(make_row: Callable[..., Row]) -> list[Row]:
    turns = [("prompt", [7, 8]), ("said", [9, 10]), ("prompt", [12]), ("said", [13, 5])]
    return [
        make_row([("prompt", [1, 2, 3]), ("said", range(4, 13))]),
        make_row([*turns, ("prompt", [3, 3, 3])]),
    ]


def test_the_students_ids_are_scored_at_the_tokens_that_they_are_asked_at(
    rows: list[Row], make_model: Callable[..., Any]
) -> None:
    """Beside the top K, with gaps between the replies: as TransformersTeacher does."""
    rng = np.random.default_rng(0)
    asked = [rng.integers(101, size=(n, 6), dtype=np.int32) for n in (9, 4)]
    own = TransformersTeacher(make_model(seed=9), vocabulary=VOCABULARY)
    teacher = VllmTeacher("one", StandIn(make_model(seed=9)), vocabulary=VOCABULARY)
    exact = own.score(rows, Needs(k=4, student_k=6), asked)
    for one, other in zip(teacher.score(rows, Needs(k=4, student_k=6), asked), exact, strict=True):
        for name in ("ids_NK", "logprobs_NK", "sampled_N", "query_ids_NJ", "query_logprobs_NJ"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5), name


def test_what_the_engine_does_not_say_is_refused_with_the_cure(
    rows: list[Row], make_model: Callable[..., Any], make_row: Callable[..., Row]
) -> None:
    teacher = VllmTeacher("one", StandIn(make_model(), v2=False, room=12), vocabulary=VOCABULARY)
    asked = [np.zeros((9, 1), np.int32), np.zeros((4, 1), np.int32)]
    with pytest.raises(ValueError, match=r"V2 model runner alone, on a CUDA .*\.one\.engine to tr"):
        teacher.score(rows, Needs(k=4, student_k=6), asked)
    with pytest.raises(ValueError, match=r"whole distribution .*teachers\.one\.engine to transf"):
        teacher.score(rows, Needs(k=4, full=True))
    branched = make_row([("prompt", [5, 6]), ("branch", [7]), ("said", [9])])
    with pytest.raises(ValueError, match=r"teachers\.one: a row with an expert's branches"):
        teacher.score([branched], Needs(k=4))
    with pytest.raises(ConfigError, match=r"has 12 tokens, .* 11: .*vllm\.max_model_len to 13 or"):
        teacher.score(rows, Needs(k=4))


def test_a_vllm_that_has_changed_is_refused(
    rows: list[Row], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StandIn(make_model())
    monkeypatch.setattr(engine, "output_processor", SimpleNamespace())
    monkeypatch.setattr(engine, "add_request", lambda *_: "inside")
    monkeypatch.setattr("tutelage.distill.teachers.vllm.installed", lambda: "0.99")
    teacher = VllmTeacher("one", engine, vocabulary=VOCABULARY)
    with pytest.raises(ConfigError, match=r"vllm 0\.99 keeps log-prob.* elsewhere"):
        teacher.score(rows, Needs(k=4))


def test_numbers_that_are_none_are_refused(rows: list[Row], make_model: Callable[..., Any]) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    teacher = VllmTeacher("one", StandIn(model), vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match=r"teachers\.one: vLLM's answer is no score: token .* nan"):
        teacher.score(rows, Needs(k=4))


def test_a_failure_leaves_no_request_behind(
    rows: list[Row], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next answer would wait for what nobody asks any more."""
    engine = StandIn(make_model())
    teacher = VllmTeacher("one", engine, vocabulary=VOCABULARY)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        teacher.score(rows, Needs(k=4))
    assert engine.aborted == ["1", "2"]


def test_it_sleeps_between_answers_and_passes_its_exam_awake(
    rows: list[Row], make_model: Callable[..., Any]
) -> None:
    engine = StandIn(make_model(seed=9))
    teacher = VllmTeacher("one", engine, vocabulary=VOCABULARY)
    service = serving(teacher, digest="d", sleeps=True)
    service.score(rows, Needs(k=4))
    assert engine.moves == ["sleep 1", "wake", "sleep 1"]
    engine.model = make_model(seed=10)  # what a wake that lost its weights would leave
    with pytest.raises(RuntimeError, match=r"teachers\.one: its weights were lost or changed"):
        service.score(rows, Needs(k=4))


def test_padding_takes_no_probability() -> None:
    model = SimpleNamespace(compute_logits=lambda hidden: hidden.clone())
    cut_padding(model, vocabulary=3)
    assert model.compute_logits(torch.zeros(2, 5)).exp().tolist() == [[1, 1, 1, 0, 0]] * 2
    model.compute_logits = lambda hidden: None  # all but the first of several GPUs
    cut_padding(model, vocabulary=3)
    assert model.compute_logits(torch.zeros(2, 5)) is None


def test_a_forward_is_as_long_as_its_logits_may_be_large() -> None:
    assert [batched_tokens(rows) for rows in (2048, 32_000, 151_936)] == [2048, 1048, 256]
