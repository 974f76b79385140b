"""A teacher behind a real `vllm serve`: parity, its own words for refusals, and its death."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.models.loading import load_model, load_tokenizer, resolve
from tutelage.distill.objectives import Needs
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.training import Run
from tutelage.distill.teachers import exchange, http_client
from tutelage.distill.teachers.server import ServerTeacher
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.scheduler.episodes import Row

MODEL, ROOM, START_SECONDS = "builtin:arithmetic", 256, 150


class Served:
    """`vllm serve` in a process group of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        options = f"--served-model-name sums --host 127.0.0.1 --port {self.port} --dtype float32"
        options += f" --enforce-eager --max-model-len {ROOM} --max-logprobs 8 --max-num-seqs 16"
        options += " --max-num-batched-tokens 256"
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        settings |= {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self.process = subprocess.Popen(
            [*server, "--model", resolve(MODEL), *options.split()],
            env=os.environ | settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.5)
        pytest.fail(f"vllm serve did not start in {START_SECONDS} s: {self.process.poll()}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def _teacher(served: Served, **options: Any) -> ServerTeacher:
    settings = {"attempts": 2, "dtype": "float32"} | options
    config = TeacherConfig(engine="server", url=served.url, model="sums", **settings)
    return ServerTeacher("one", config, vocabulary=len(load_tokenizer(MODEL)))


def _row(length: int) -> Row:
    rng = np.random.default_rng(length)
    turns_T = np.where(rng.random(length) < 0.5, 0, -1).astype(np.int32)
    turns_T[0], turns_T[-1] = -1, 0
    return Row(
        ids_T=rng.integers(len(load_tokenizer(MODEL)), size=length).astype(np.int32),
        turns_T=turns_T,
        behavior_logprobs_T=np.full(length, np.nan, dtype=np.float32),
        branches_T=np.zeros(length, dtype=np.int32),
    )


def test_it_says_what_its_weights_say(served: Served) -> None:
    """Log-probabilities go down to -40 on random ids, where one float32 step is 4e-6."""
    model = load_model(MODEL, dtype="float32", device="cpu")
    teacher = _teacher(served)
    own = TransformersTeacher(model, vocabulary=teacher.vocabulary)
    rows = [_row(n) for n in (2, 20, 90, 131, ROOM - 1)] * 3
    for k in (1, 8):
        for one, other in zip(
            teacher.score(rows, Needs(k=k)), own.score(rows, Needs(k=k)), strict=True
        ):
            assert torch.allclose(one.sampled_N, other.sampled_N, atol=5e-5, rtol=0)
            assert torch.allclose(one.logprobs_NK, other.logprobs_NK, atol=5e-5, rtol=0)
            assert (one.ids_NK == other.ids_NK).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize(
    ("length", "k", "said"),
    [
        (20, 9, r"fewer than the 9 log-probabilities .* start it with --max-logprobs 9"),
        (ROOM, 4, rf"cannot read a row of {ROOM} tokens and one more.* --max-model-len {ROOM + 1}"),
        (ROOM + 40, 4, rf"cannot read a row of {ROOM + 40} tokens.* --max-model-len {ROOM + 41}"),
    ],
)
def test_what_it_refuses_is_understood(served: Served, length: int, k: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _teacher(served).score([_row(length)], Needs(k=k))


def test_it_is_checked_before_a_run(served: Served) -> None:
    tokenizer = load_tokenizer(MODEL)
    _teacher(served).check(tokenizer, k=8)
    with pytest.raises(ConfigError, match="--max-logprobs 16"):
        _teacher(served).check(tokenizer, k=16)
    shorter = ServerTeacher(
        "one",
        TeacherConfig(engine="server", url=served.url, model="numbers"),
        vocabulary=len(tokenizer),
    )
    with pytest.raises(ConfigError, match=r"serves 'sums', not 'numbers'"):
        shorter.check(tokenizer, k=8)

    class Other:
        """The same ids for other texts."""

        def __len__(self) -> int:
            return len(tokenizer)

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def decode(self, ids: list[int]) -> str:
            return str(tokenizer.decode([i + 1 for i in ids[:-1]]))

    with pytest.raises(ConfigError, match="has another vocabulary"):
        _teacher(served).check(Other(), k=8)


def _config(served: Served, folder: Path) -> RunConfig:
    data = {
        "run": str(folder),
        "steps": 3,
        "student": {"model": "builtin:start", "threads": 1},
        "teachers": {
            "one": {
                "engine": "server",
                "url": served.url,
                "model": "sums",
                "dtype": "float32",
                "attempts": 60,
            }
        },
        "tasks": {
            "math": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": "arithmetic"},
                "teacher": "one",
                "episodes": 6,
                "rollout": {"max_turns": 1, "max_new_tokens": 12},
            }
        },
        "objective": {"name": "local_support", "k": 8},
        "rollout": {"processes": 0},
        "journal": {"tensorboard": False},
    }
    return parse_config(data, "test")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_outlives_its_servers_death(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL with the second step's rows in flight, and a new start: the run waits, and ends as if
    nothing had happened."""
    monkeypatch.setattr(http_client, "LONGEST_PAUSE", 2.0)
    rows_sent: list[int] = []

    class Killer(Observer):
        def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
            if step == 0:
                monkeypatch.setattr(exchange._Network, "write", deadly)

    write = exchange._Network.write

    def deadly(network: exchange._Network, buffer: bytes, timeout: float | None = None) -> None:
        write(network, buffer, timeout)
        rows_sent.append(1)
        if len(rows_sent) == 3:
            served.kill()
            served.start()

    for name, watch in (("whole", None), ("killed", Killer())):
        with Run(_config(served, tmp_path / name), watch=watch) as run:
            run.train()
    whole, killed = (_lines(tmp_path / name) for name in ("whole", "killed"))
    assert len(killed) == 3
    for one, other in zip(whole, killed, strict=True):
        assert one["loss/mean"] == pytest.approx(other["loss/mean"], rel=1e-3)
    assert sum(line["perf/teacher_retries"] for line in killed) > 0
    assert sum(line["perf/teacher_retries"] for line in whole) == 0
