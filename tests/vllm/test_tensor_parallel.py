"""Two worker processes share a model: what they say, how weights reach them, and how they end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm.students import (
    NOISY,
    OPTIONS,
    VOCABULARY,
    engine_of,
    make_student,
    said,
    shake,
)
from tests.vllm.test_teacher import _row
from tutelage.distill.config import TeacherConfig
from tutelage.distill.teachers import TransformersTeacher
from tutelage.distill.vllm import sync
from tutelage.distill.vllm.engine import EngineFailure, VllmEngine
from tutelage.distill.vllm.teacher import load_vllm_teacher
from tutelage.scheduler.engine import Request

TWO = OPTIONS.model_copy(update={"tensor_parallel_size": 2})
WITHIN = 2e-5
SHARED = Path("/dev/shm")


@pytest.fixture(scope="module")
def before() -> set[str]:
    """What others have in shared memory."""
    return {path.name for path in SHARED.iterdir()}


@pytest.fixture(scope="module")
def pair(before: set[str]) -> Iterator[tuple[Any, VllmEngine]]:
    """(student with a tied embedding, its engine): they may move, and the last test kills."""
    student = make_student(seed=1, tied=True)
    engine = engine_of(student, TWO)
    yield student, engine
    engine.close()


def _workers() -> list[Any]:
    return [one for one in active_children() if one.name.startswith("VllmWorker")]


def _left(before: set[str]) -> set[str]:
    """In /dev/shm, of vLLM's workers."""
    return {
        path.name
        for path in SHARED.iterdir()
        if path.name not in before and path.name.startswith(("psm_", "vllm", "tutelage"))
    }


def test_weights_reach_every_worker_and_leave_nothing(
    pair: Any, play: Any, prompts: list[list[int]]
) -> None:
    student, engine = pair
    assert len(_workers()) == 2
    held = None
    for version in range(3):
        shake(student, seed=version)
        engine.load(None, version)
        assert engine.version == version
        assert engine.gap < 1e-5
        for ids, reply in zip(prompts, play(engine, prompts), strict=True):
            own = said(student, ids, reply.ids)
            assert np.abs(own - np.asarray(reply.logprobs)).max() < WITHIN
        files = {path.name for path in SHARED.iterdir()}
        assert held is None or files <= held  # by a sync, after the first
        held = files
    maps = [Path(f"/proc/{one.pid}/maps").read_text() for one in _workers()]
    maps.append(Path("/proc/self/maps").read_text())
    assert not any("tutelage-weights" in text for text in maps)


def test_a_sync_that_fails_leaves_no_memory(pair: Any) -> None:
    student, engine = pair
    seen: list[str] = []

    class Refusing:
        vllm_config = engine._engine.vllm_config

        def collective_rpc(self, name: str, kwargs: Any = None) -> None:
            if name == "update_weights":
                seen.append(kwargs["update_info"]["path"])
                assert dict(sync.mapped(**kwargs["update_info"])).keys() == weights.keys()
                raise RuntimeError("no")

    weights = sync.weights_of(student, VOCABULARY)
    with pytest.raises(RuntimeError, match="no"):
        sync.push(Refusing(), weights)
    assert seen
    assert not Path(seen[0]).exists()


def test_what_is_in_memory_is_what_was_sent() -> None:
    wide = torch.randn(6, 5)
    sent = {
        "part": wide[:4],
        "turned": wide.T,
        "half": torch.randn(3, dtype=torch.bfloat16),
        "one": torch.tensor(2.5),
    }
    with sync.in_memory(sent) as told:
        found = dict(sync.mapped(**told))
    assert all(torch.equal(found[name], tensor) for name, tensor in sent.items())
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in sent.items()
    }


def test_a_sync_that_loses_a_parameter_is_caught(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, engine = pair
    version = engine.version
    engine.load(None, version + 1)
    push = sync.push

    def partly(engine: Any, weights: Any) -> None:
        lost = "model.layers.1.mlp.down_proj.weight"
        push(engine, {name: weight for name, weight in weights.items() if name != lost})

    monkeypatch.setattr(sync, "push", partly)
    shake(student, seed=10)
    with pytest.raises(sync.SyncError, match=f"version {version + 2} did not reach the vllm"):
        engine.load(None, version + 2)
    monkeypatch.undo()
    engine.load(None, version + 2)


def test_a_teacher_of_two_workers_says_what_its_weights_say(tmp_path: Path) -> None:
    """And padding takes no part in it; killed, it says so."""
    model = make_student(seed=3)
    model.save_pretrained(tmp_path)
    standing = _workers()
    config = TeacherConfig(model=str(tmp_path), engine="vllm", vllm=TWO)
    teacher = load_vllm_teacher("one", config, vocabulary=VOCABULARY)
    own = TransformersTeacher(model, vocabulary=VOCABULARY)
    rows = [_row(length, seed=length) for length in (2, 17, 61, 130)]
    for one, other in zip(teacher.score(rows, k=8), own.score(rows, k=8), strict=True):
        assert torch.allclose(one.sampled_N, other.sampled_N, atol=WITHIN, rtol=0)
        assert torch.allclose(one.logprobs_NK, other.logprobs_NK, atol=WITHIN, rtol=0)
    os.kill(next(one.pid for one in _workers() if one not in standing), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"teachers\.one: vllm broke .*killed by SIGKILL"):
        for _ in range(100):
            teacher.score(rows, k=1)
    teacher.close()
    assert set(_workers()) == set(standing)


def test_a_worker_that_is_killed_ends_the_engine(
    pair: Any, before: set[str], prompts: list[list[int]]
) -> None:
    _, engine = pair
    workers = _workers()
    engine.load(None, engine.version + 1)
    for session in range(16):
        engine.submit(
            Request(
                session=session,
                ids=[3, 4, 5],
                seed=session,
                max_new_tokens=200,
                stop_ids=frozenset(),
                law=NOISY,
            )
        )
    engine.step()
    os.kill(workers[1].pid, signal.SIGKILL)
    since = time.monotonic()
    with pytest.raises(
        EngineFailure, match=r"in a step with 16 .*\(pid \d+\) is dead: killed by SIGKILL"
    ):
        while engine.pending:
            engine.step()
    assert time.monotonic() - since < 5.0  # vLLM's own monitor takes nine
    for session in range(16):
        engine.release(session)
    with pytest.raises(EngineFailure, match=r"in taking weights .*killed by SIGKILL"):
        engine.load(None, engine.version + 1)
    engine.close()
    assert _workers() == []
    assert _left(before) == set()
