"""A teacher in a vLLM engine says what its weights say in our own engine.

On the CPU, in float32. Log-probabilities go down to -25 here, where one float32 step is 2e-6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.settings import serving
from tests.vllm.students import CONTEXT, VOCABULARY, WITHIN, make_student
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.teachers import TeacherConfig, VllmConfig
from tutelage.distill.doctor.numbers import self_distilled
from tutelage.distill.engines.vllm.start import EngineFailure
from tutelage.distill.models.loading import load_model, load_tokenizer
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import Needs, TeacherScores, build
from tutelage.distill.run.training import Run
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.distill.teachers.vllm import VllmTeacher, load_vllm_teacher
from tutelage.scheduler.episodes import Row


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model whose padding rows would win every draw, if they took part."""
    path = tmp_path_factory.mktemp("padded")
    make_student(seed=3).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def teacher(folder: str) -> VllmTeacher:
    """Its prompts are read 64 tokens at a time."""
    options = VllmConfig(kv_cache_gib=0.05, max_num_batched_tokens=256)
    config = TeacherConfig(model=folder, engine="vllm", vllm=options)
    return load_vllm_teacher("one", config, vocabulary=VOCABULARY)


@pytest.fixture(scope="session")
def own(folder: str) -> TransformersTeacher:
    model = load_model(folder, dtype="float32", device="cpu")
    return TransformersTeacher(model, vocabulary=VOCABULARY)


def _row(length: int, seed: int = 0) -> Row:
    """Half of its tokens are chosen, in several replies."""
    rng = np.random.default_rng(seed)
    turns_T = np.where(rng.random(length) < 0.5, 0, -1).astype(np.int32)
    turns_T[0], turns_T[-1] = -1, 0
    return Row(
        ids_T=rng.integers(VOCABULARY, size=length).astype(np.int32),
        turns_T=turns_T,
        behavior_logprobs_T=np.full(length, np.nan, dtype=np.float32),
        branches_T=np.zeros(length, dtype=np.int32),
    )


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """More tokens than one forward reads, and one row that fills the context."""
    return [_row(n, seed=n) for n in (2, 3, 17, 60, 61, 62, 130, CONTEXT)]


@pytest.mark.parametrize("k", [1, 8, 32, VOCABULARY])
def test_the_same_weights_say_the_same(
    teacher: VllmTeacher, own: TransformersTeacher, rows: list[Row], k: int
) -> None:
    for one, other in zip(
        teacher.score(rows, Needs(k=k)), own.score(rows, Needs(k=k)), strict=True
    ):
        assert torch.allclose(one.sampled_N, other.sampled_N, atol=WITHIN, rtol=0)
        assert torch.allclose(one.logprobs_NK, other.logprobs_NK, atol=WITHIN, rtol=0)
        _assert_same_sets(one, other)
        assert one.vocabulary == VOCABULARY


def _assert_same_sets(one: TeacherScores, other: TeacherScores) -> None:
    """Up to ties at the last place: an id that one set alone has is as probable as its last."""
    shared_NK = (one.ids_NK[:, :, None] == other.ids_NK[:, None, :]).any(-1)
    above_NK = one.logprobs_NK - one.logprobs_NK[:, -1:] > WITHIN
    assert bool((shared_NK | ~above_NK).all())


def test_the_exam_is_that_of_our_own_engine(teacher: VllmTeacher, own: TransformersTeacher) -> None:
    found = serving(teacher, digest="d").fingerprint
    exact = serving(own, digest="d").fingerprint
    assert np.allclose(found.logprobs, exact.logprobs, atol=WITHIN)


def test_student_supports_are_cuda_s(teacher: VllmTeacher, rows: list[Row]) -> None:
    """If this fails, vLLM has learnt it on the CPU: config's refusal can go."""
    assert not torch.cuda.is_available()
    asked = [np.zeros((int(row.action_mask_T.sum()), 2), dtype=np.int32) for row in rows]
    with pytest.raises(ValueError, match="V2 model runner alone, on a CUDA device"):
        teacher.score(rows, Needs(k=4, student_k=2), asked)


def test_a_failure_is_named_and_leaves_the_engine_usable(
    teacher: VllmTeacher, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = teacher._engine.step, iter(range(99))

    def full() -> Any:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return step()

    wanted = teacher.score(rows, Needs(k=4))
    monkeypatch.setattr(teacher._engine, "step", full)
    said = f"teachers.one: vllm broke in scoring {len(rows)} rows: OutOf.*gpu_memory_utilization"
    with pytest.raises(EngineFailure, match=said):
        teacher.score(rows, Needs(k=4))
    again = teacher.score(rows, Needs(k=4))
    assert all(torch.equal(a.ids_NK, b.ids_NK) for a, b in zip(again, wanted, strict=True))
    assert not teacher._engine.has_unfinished_requests()


# --- a shipped model as its own teacher ----------------------------------------------------------


@pytest.fixture(scope="session")
def start() -> Iterator[VllmTeacher]:
    """A second engine in this process."""
    options = VllmConfig(kv_cache_gib=0.2)
    config = TeacherConfig(model="builtin:start", engine="vllm", vllm=options)
    yield load_vllm_teacher("one", config, vocabulary=len(load_tokenizer("builtin:start")))


@pytest.mark.parametrize("objective", ["local_support", "sampled_token", "trust_region"])
def test_a_student_has_nothing_to_learn_from_itself(start: VllmTeacher, objective: str) -> None:
    model = load_model("builtin:start", dtype="float32", device="cpu")
    size = start.vocabulary
    rng = np.random.default_rng(0)
    rows = [
        Row(
            ids_T=rng.integers(size, size=60).astype(np.int32),
            turns_T=np.r_[-np.ones(20), np.zeros(40)].astype(np.int32),
            behavior_logprobs_T=np.full(60, -1.0, dtype=np.float32),
            branches_T=np.zeros(60, dtype=np.int32),
        )
        for _ in range(3)
    ]
    made = build(objective, k=16) if objective != "sampled_token" else build(objective)
    found = self_distilled("tasks.t", Student(model, vocabulary=size), start.score, rows, made)
    assert found.level == "ok", found
    numbers = [float(one) for one in re.findall(r"= (\d+e-?\d+)", found.text)]
    assert numbers and max(numbers) < WITHIN


def test_a_run_with_the_student_as_its_own_teacher(
    tmp_path: Path, start: VllmTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through rollouts, transport and learner: what is left is the rounding to float16."""
    from tutelage.distill.teachers import build

    closed: list[str] = []
    monkeypatch.setattr(start, "close", lambda: closed.append(start.name))  # others need it yet
    monkeypatch.setattr(build, "load_vllm_teacher", lambda *_, **__: start)
    data = {
        "run": str(tmp_path / "run"),
        "steps": 2,
        "student": {"model": "builtin:start", "threads": 1},
        "teachers": {"one": {"engine": "vllm", "model": "builtin:start"}},
        "tasks": {
            "math": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": "arithmetic"},
                "teacher": "one",
                "episodes": 4,
                "rollout": {"max_turns": 1, "max_new_tokens": 16},
            }
        },
        "objective": {"name": "local_support", "k": 16},
        "rollout": {"processes": 0},
        "optimizer": {"lr": 1e-30, "weight_decay": 0.0},
        "journal": {"tensorboard": False},
    }
    found: list[dict[str, Any]] = []
    with Run(parse_config(data, "test")) as run:
        run.observers.step = lambda step, task, metrics: found.append(metrics)  # type: ignore
        run.train()
    assert closed == [start.name]
    for line in found:
        assert line["loss/mean"] == pytest.approx(0, abs=1e-6)
        assert line["gap/mean"] == pytest.approx(0, abs=1e-5)


def test_the_doctor_finds_it_sound_and_another_one_not(
    start: VllmTeacher, own: TransformersTeacher
) -> None:
    from tutelage.distill.doctor.engines import Known, check_parity

    check: Callable[..., Any] = check_parity
    rows = (_row(40), _row(20, seed=1))
    for name, level in (("builtin:start", "ok"), ("builtin:household", "fault")):
        model = load_model(name, dtype="float32", device="cpu")
        scores = TransformersTeacher(model, vocabulary=start.vocabulary).score(rows, Needs(k=8))
        known = Known(reference=name, rows=rows, scores=tuple(scores))
        assert check("teachers.one", start.score, known, within=2e-3).level == level
