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
    WITHIN,
    engine_of,
    make_student,
    said,
    shake,
    student_of,
)
from tests.vllm.test_teacher import _row
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.engines.vllm import sync
from tutelage.distill.engines.vllm.engine import VllmEngine
from tutelage.distill.engines.vllm.start import EngineFailure
from tutelage.distill.objectives import Needs
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.distill.teachers.vllm import VllmTeacher, load_vllm_teacher
from tutelage.scheduler.engine import Request

TWO = OPTIONS.model_copy(update={"tensor_parallel_size": 2})


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, VllmEngine]]:
    """(student with a tied embedding, its engine): they may move, and the last test kills."""
    student = make_student(seed=1, tied=True)
    engine = engine_of(student, TWO)
    yield student, engine
    engine.close()


def _workers() -> list[Any]:
    return [one for one in active_children() if one.name.startswith("VllmWorker")]


def _mapped(pid: int | str) -> list[str]:
    """The files that a process has in its memory, with their names."""
    return [
        line
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if ("/dev/shm/" in line and "/dev/shm/sem." not in line) or "tutelage-weights" in line
    ]


def test_weights_reach_every_worker_and_leave_nothing(
    pair: Any, play: Any, prompts: list[list[int]]
) -> None:
    student, engine = pair
    assert len(_workers()) == 2
    for version in range(3):
        shake(student, seed=version)
        engine.load(None, version)
        assert engine.version == version
        assert engine.gap < 1e-5
        for ids, reply in zip(prompts, play(engine, prompts), strict=True):
            own = said(student, ids, reply.ids)
            assert np.abs(own - np.asarray(reply.logprobs)).max() < WITHIN
    held = [line for pid in ("self", *(one.pid for one in _workers())) for line in _mapped(pid)]
    assert held
    assert not any("tutelage-weights" in line for line in held)
    assert all(line.endswith("(deleted)") for line in held)  # so workers that are killed leave none


def test_a_sync_that_fails_leaves_no_memory(pair: Any) -> None:
    student, engine = pair
    seen: list[str] = []

    class Refusing:
        vllm_config = engine._engine.vllm_config

        def collective_rpc(self, name: str, kwargs: Any = None, **_: Any) -> None:
            if name == "update_weights":
                seen.append(kwargs["update_info"]["path"])
                assert dict(sync.mapped(**kwargs["update_info"])).keys() == weights.keys()
                raise RuntimeError("no")

    weights = student_of(student).weights()
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


def test_a_teacher_of_two_workers_says_what_its_weights_say(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And padding takes no part in it. It starts and ends in silence, and leaves no process."""
    model = make_student(seed=3)
    model.save_pretrained(tmp_path)
    standing = set(_workers())
    config = TeacherConfig(model=str(tmp_path), engine="vllm", vllm=TWO)
    capfd.readouterr()
    teacher = load_vllm_teacher("one", config, vocabulary=VOCABULARY)
    own = TransformersTeacher(model, vocabulary=VOCABULARY)
    rows = [_row(length, seed=length) for length in (2, 17, 61, 130)]
    for one, other in zip(
        teacher.score(rows, Needs(k=8)), own.score(rows, Needs(k=8)), strict=True
    ):
        assert torch.allclose(one.sampled_N, other.sampled_N, atol=WITHIN, rtol=0)
        assert torch.allclose(one.logprobs_NK, other.logprobs_NK, atol=WITHIN, rtol=0)
    assert len(_workers()) == len(standing) + 2
    teacher.close()
    assert set(_workers()) == standing
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_is_killed_ends_the_engine(pair: Any) -> None:
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
                sampling=NOISY,
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
    teacher = VllmTeacher("two", engine._engine, vocabulary=VOCABULARY)
    said = r"teachers\.two: vllm broke in scoring 1 rows: its worker .*by SIGKILL"
    with pytest.raises(EngineFailure, match=said):
        teacher.score([_row(9)], Needs(k=1))
    engine.close()
    assert _workers() == []


def test_a_worker_that_hangs_ends_a_sync_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(make_student(), TWO)
    engine.load(None, 0)
    monkeypatch.setattr(sync, "PATIENCE", 1.0)
    os.kill(_workers()[0].pid, signal.SIGSTOP)
    with pytest.raises(EngineFailure, match=r"in taking weights .*TimeoutError"):
        engine.load(None, 1)
    engine.close()
    assert _workers() == []
