"""Threads wait for each other briefly, small forwards take one, and load decides nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models import threads
from tutelage.distill.models.student import Student
from tutelage.distill.models.threads import READ, WORK, cores, fitting, matrix_size
from tutelage.scheduler.engine import Request
from tutelage.scheduler.episodes import GREEDY

pytestmark = pytest.mark.slow


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def only_openmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a torch that loads its OpenMP, which takes no second, and ends."""
    folder = tmp_path_factory.mktemp("path")
    (library,) = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(
        f"import ctypes, os\nctypes.CDLL({str(library)!r})\nos._exit(0)\n"
    )
    return folder


def _openmp(folder: Path, code: str, **environment: str) -> str:
    """What OpenMP itself says of its settings, as torch loads it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; raise SystemExit('no torch was loaded')"],
        env=kept | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize(
    "code",
    [
        "import tutelage.distill.cli.main, torch",
        "import tutelage.distill.objectives",
        "import tutelage.envs.child, tutelage.distill.student.sharded",  # a learner's process
        "import tutelage.scheduler.cluster, torch",  # an actor
    ],
)
def test_a_waiting_thread_soon_sleeps(code: str, only_openmp: Path) -> None:
    assert "GOMP_SPINCOUNT = '1000'" in _openmp(only_openmp, code)


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
def test_who_says_how_threads_wait_is_obeyed(only_openmp: Path) -> None:
    code = "import tutelage.distill.objectives"
    assert "GOMP_SPINCOUNT = '7'" in _openmp(only_openmp, code, GOMP_SPINCOUNT="7")
    active = _openmp(only_openmp, code, OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in active and "SPINCOUNT = '1000'" not in active


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that the machine has: a container, a job or taskset gives fewer."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 9}, raising=False)
    assert cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cores() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # nested: not ours to read
    assert cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == 64


def test_a_small_forward_takes_one_thread(two_threads: None) -> None:
    size = WORK / 100
    for tokens, count in ((1, 1), (99, 1), (100, 2), (5000, 2)):
        with fitting(size, tokens):
            assert torch.get_num_threads() == count
        assert torch.get_num_threads() == 2
    with fitting(WORK / READ, 1):  # a large model reads its matrices even for one token
        assert torch.get_num_threads() == 2
    with fitting(math.inf, 1):  # on a GPU: as it is
        assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="inside"), fitting(size, 1):
        raise ValueError("inside")
    assert torch.get_num_threads() == 2


def test_the_size_is_that_of_hidden_matrices(make_model: Callable[..., Any]) -> None:
    """Hidden size 32: queries and outputs 32 x 32, keys and values 32 x 16, thrice 32 x 64 a layer.
    The embedding is looked up, not multiplied by."""
    sizes = [32 * 32] * 2 + [32 * 16] * 2 + [32 * 64] * 3
    for tied in (False, True):
        model = make_model(vocabulary=5000, tied=tied)
        assert matrix_size(Student(model, vocabulary=5000)) == sum(sizes) / len(sizes)


def test_rollouts_share_out_what_is_worth_it(
    two_threads: None, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of many tokens on both threads, the tokens after it on one."""
    student = Student(make_model(), vocabulary=101)
    monkeypatch.setattr(threads, "WORK", int(matrix_size(student) * 50))
    seen = []
    inner = student.decoder

    def decoder(ids_BT: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.append((ids_BT.numel(), torch.get_num_threads()))
        return inner(ids_BT, **given)

    engine = TransformersEngine(student)
    engine.load(None, 0)
    monkeypatch.setattr(student, "decoder", decoder)
    ids = tuple(range(1, 61))
    engine.submit(
        Request(session=0, ids=ids, max_new_tokens=3, stop_ids=frozenset(), sampling=GREEDY, seed=0)
    )
    while engine.pending:
        engine.step()
    assert seen == [(60, 2), (1, 1), (1, 1)]
    assert torch.get_num_threads() == 2
