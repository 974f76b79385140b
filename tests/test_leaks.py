"""Whatever ends a run, nothing of it stays on the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

PATIENCE = 60.0  # seconds


def _alive(mark: str) -> list[str]:
    """Command lines of the processes that inherited the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
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


def _heeding() -> None:
    """A shell's background job, as CI may be, passes on that SIGINT is ignored, nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


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
    tmp_path: Path, tokenizer: Any, save_model: Callable[..., str], how: int, where: Any
) -> None:
    config = {
        "run": str(tmp_path / "run"),
        "steps": 100_000,
        "student": {"model": save_model(tmp_path / "student", tokenizer, seed=0), "threads": 1},
        "teachers": {"t": {"model": save_model(tmp_path / "teacher", tokenizer, seed=1)}},
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
    mark, memory = uuid.uuid4().hex, _shared()
    command = [sys.executable, "-m", "tutelage.distill.cli.main", "train", str(path)]
    environment = os.environ | {"TUTELAGE_MARK": mark, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_heeding,
        )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        assert _wait(lambda: metrics.exists() and metrics.stat().st_size), (
            tmp_path / "log"
        ).read_text()
        assert len(_alive(mark)) > 1  # the run and its environments: the mark does find them
        # a terminal's Ctrl-C, and its end, reach every process that was started there
        (os.killpg if how in (signal.SIGINT, signal.SIGHUP) else os.kill)(run.pid, how)
        run.wait(PATIENCE)
        assert run.returncode == (-9 if how == signal.SIGKILL else 128 + how)
        # After a SIGKILL Ray's own agents end when they miss their raylet, which can take minutes.
        spared = "Agent" if how == signal.SIGKILL else "\0"

        def ours() -> list[str]:
            return [line for line in _alive(mark) if spared not in line]

        assert _wait(lambda: not ours()), ours()
        # what others make meanwhile is nobody's for a moment only
        assert _wait(lambda: _shared() <= memory), _shared() - memory
        saved = (tmp_path / "run" / "checkpoints").is_dir()
        assert saved == (how != signal.SIGKILL)
        assert (tmp_path / "run" / ".lock").exists() == (how == signal.SIGKILL)
    finally:
        os.killpg(run.pid, signal.SIGKILL) if _alive(mark) else None
