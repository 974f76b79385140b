"""A tiny student beside a vLLM engine. Only `make test-vllm` comes here: the rest needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.vllm.students import NOISY, VOCABULARY, engine_of, make_student
from tutelage.distill.engines.vllm.engine import VllmEngine
from tutelage.scheduler.engine import Completion, Request

Play = Callable[..., list[Completion]]


@pytest.fixture(scope="session")
def student() -> Any:
    return make_student()


@pytest.fixture(scope="session")
def _engine(student: Any) -> Iterator[VllmEngine]:
    engine = engine_of(student)
    yield engine
    engine.close()


@pytest.fixture
def engine(_engine: VllmEngine, student: Any) -> Iterator[VllmEngine]:
    """Loaded with the student as it is, with nothing in flight before and after."""
    _engine.load(None, _engine.version + 1)
    yield _engine
    for session in list(_engine._of_session):
        _engine.release(session)


@pytest.fixture(scope="session")
def play() -> Play:
    """Submit requests with these options, and step until all are answered; in their order."""

    def run(engine: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        seeds = options.pop("seeds", range(len(prompts)))
        sessions = options.pop("sessions", range(len(prompts)))
        settings = {"max_new_tokens": 24, "stop_ids": frozenset({1}), "sampling": NOISY} | options
        for session, seed, ids in zip(sessions, seeds, prompts, strict=True):
            engine.submit(Request(session=session, ids=ids, seed=seed, **settings))
        found: dict[int, Completion] = {}
        for _ in range(10_000):
            found |= {one.session: one for one in engine.step()}
            if not engine.pending:
                break
        return [found[session] for session in sessions]

    return run


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Forty of unequal length."""
    rng = np.random.default_rng(7)
    return [rng.integers(2, VOCABULARY, size=rng.integers(1, 70)).tolist() for _ in range(40)]
