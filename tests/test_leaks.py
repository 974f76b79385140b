"""Whatever ends a run, nothing of it stays on the machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

PATIENCE = 120.0  # seconds

BEGIN = """
import os, signal, sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2 import Qwen2ForCausalLM
import tutelage.distill.run.progress, tutelage.distill.run.training
from tutelage.distill.cli.main import main

for line in sys.stdin:
    config, log = line.split()
    run = os.fork()
    if not run:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        # a shell's background job, as CI may be, passes on that SIGINT is ignored, nohup SIGHUP
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        main(["train", config])
    print(run, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]), flush=True)
"""
"""Begins the run of each line, with a log, in a session of its own; says its process, and how that
ended. It has loaded already what every run loads, for longer than these live."""


@pytest.fixture(scope="module")
def beginner() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that begins runs, and a mark in its environment, which all of theirs inherit."""
    mark = uuid.uuid4().hex
    made = subprocess.Popen(
        [sys.executable, "-c", BEGIN],
        env=os.environ | {"TUTELAGE_MARK": mark, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield made, mark
    made.communicate()


def _alive(mark: str) -> dict[int, str]:
    """Command lines of the processes that inherited the mark."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_text().replace("\0", " ")
                    found[int(folder.name)] = command
            except OSError:
                continue  # it ended, or is the kernel's
    return found


def _shared() -> set[str]:
    """Files of shared memory that no living process holds."""
    held = set[str]()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                held |= {*(folder / "maps").read_text().split()}
                held |= {os.readlink(link) for link in (folder / "fd").iterdir()}
            except OSError:
                continue  # it ended
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in held}


def _wait(until: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if until():
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize(
    "where",
    [{}, {"cluster": {"address": "local", "workers": 1}}, {"learner": {"processes": 2}}],
    ids=["here", "ray", "learners"],
)
@pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=str
)
def test_no_process_and_no_shared_memory_outlives_a_run(
    tmp_path: Path,
    models: dict[str, str],
    beginner: tuple[subprocess.Popen[str], str],
    how: int,
    where: Any,
) -> None:
    config = {
        "run": str(tmp_path / "run"),
        "steps": 100_000,
        "student": {"model": models["student"], "threads": 1},
        "teachers": {"t": {"model": models["one"]}},
        "tasks": {
            "math": {
                "env": "tutelage/Math-v0",
                "teacher": "t",
                "episodes": 2,
                "rollout": {"max_turns": 1, "max_new_tokens": 4},
            }
        },
        "objective": {"k": 8},
        **where,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    (begins, mark), memory, ended = beginner, _shared(), ""
    before = _alive(mark)  # who begins the runs, and what another one's end is known to leave
    assert begins.stdin is not None and begins.stdout is not None

    def ours() -> list[str]:
        return [line for pid, line in _alive(mark).items() if pid not in before]

    print(path, tmp_path / "log", file=begins.stdin, flush=True)
    run = int(begins.stdout.readline())
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        assert _wait(lambda: metrics.exists() and metrics.stat().st_size), (
            tmp_path / "log"
        ).read_text()
        assert len(ours()) > 1  # the run and its environments: the mark does find them
        # a terminal's Ctrl-C, and its end, reach every process that was started there
        (os.killpg if how in (signal.SIGINT, signal.SIGHUP) else os.kill)(run, how)
        ended = begins.stdout.readline()
        assert int(ended) == (-9 if how == signal.SIGKILL else 128 + how)
        # After a SIGKILL Ray's own agents end when they miss their raylet, which can take minutes.
        spared = "Agent" if how == signal.SIGKILL else "\0"
        assert _wait(lambda: not [line for line in ours() if spared not in line]), ours()
        # what others make meanwhile is nobody's for a moment only
        assert _wait(lambda: _shared() <= memory), _shared() - memory
        saved = (tmp_path / "run" / "checkpoints").is_dir()
        assert saved == (how != signal.SIGKILL)
        assert (tmp_path / "run" / ".lock").exists() == (how == signal.SIGKILL)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run, signal.SIGKILL)
        ended = ended or begins.stdout.readline()
