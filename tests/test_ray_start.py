"""Ray as a run starts it: nobody else's orders, nobody else's eyes, and an end to every wait."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tutelage.scheduler import ray_start
from tutelage.scheduler.ray_start import connected

pytestmark = pytest.mark.runs

OUTSIDER = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=20))
"""


def _ask(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What another process gets from the cluster's head."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", OUTSIDER, address],
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def local() -> Iterator[dict[str, Any]]:
    """A Ray of this process's own, and the environment that its workers see."""
    import ray

    with connected("local", attempts=2):
        node = ray._private.worker._global_node  # type: ignore[attr-defined]

        @ray.remote
        class Worker:
            def environment(self) -> dict[str, str]:
                import os

                return {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}

        yield {
            "address": ray.get_runtime_context().gcs_address,
            "folder": Path(node._session_dir).parent.parent,
            "inside": ray.get(Worker.remote().environment.remote()),  # type: ignore[attr-defined]
            "pids": _children(),
        }


def _children() -> list[int]:
    """Ray's processes that this one started, and theirs."""
    found, new = set[int](), {os.getpid()}
    while new:
        new = {
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and _parent(path) in new
        } - found
        found |= new
    return sorted(found)


def _parent(path: Path) -> int | None:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _listening(pids: list[int]) -> set[str]:
    """Local addresses, in hexadecimal as the kernel writes them, on which these listen."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue  # it ended
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestLocal:
    def test_a_process_without_the_token_is_refused(self, local: dict[str, Any]) -> None:
        for wrong in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
            found = _ask(local["address"], **wrong)
            assert found.returncode and "AuthenticationError" in found.stderr, found
        token = local["inside"]["RAY_AUTH_TOKEN"]
        found = _ask(local["address"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        assert found.returncode == 0 and found.stdout.startswith("[")

    def test_the_token_is_random_and_its_workers_alone(self, local: dict[str, Any]) -> None:
        assert local["inside"]["RAY_AUTH_MODE"] == "token"
        assert len(local["inside"]["RAY_AUTH_TOKEN"]) == 64
        assert "RAY_AUTH_TOKEN" not in os.environ  # environments that start later have it not
        token = local["inside"]["RAY_AUTH_TOKEN"].encode()
        for path in local["folder"].rglob("*"):
            assert not path.is_file() or token not in path.read_bytes(), path
        for pid in local["pids"]:
            try:
                assert token not in Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue  # it ended

    def test_it_listens_on_the_loopback_address_alone(self, local: dict[str, Any]) -> None:
        found = _listening(local["pids"])
        assert found and found <= LOOPBACK

    def test_its_files_are_the_users_alone(self, local: dict[str, Any]) -> None:
        assert stat.S_IMODE(local["folder"].stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_second_one_has_another_token_and_no_files_stay() -> None:
    """In a process of its own: that Ray reads its settings once must not matter."""
    code = """
import os, ray
from tutelage.scheduler.ray_start import connected
@ray.remote
class Worker:
    def token(self):
        import os
        return os.environ["RAY_AUTH_TOKEN"]
for _ in range(2):
    with connected("local", attempts=2):
        print(ray.get(Worker.remote().token.remote()))
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # sockets' names must be short
        found = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
        )
        first, second = found.stdout.split()
        assert len(first) == len(second) == 64 and first != second
        assert not os.listdir(folder)


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What `ray.init` raises, call by call."""
    import ray

    faults: list[Exception] = []

    def fail(*_: Any, **__: Any) -> None:
        if faults:
            raise faults.pop(0)

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return faults


class TestFaults:
    def test_one_that_starts_late_is_tried_again_and_both_are_said(
        self, init: list[Exception], capfd: pytest.CaptureFixture[str]
    ) -> None:
        init += [Exception("The current node timed out during startup. This"), OSError("no room")]
        with connected("local", attempts=3):
            pass
        told = capfd.readouterr().err.splitlines()
        assert [line.partition(" (")[2][:12] for line in told] == ["The current ", "no room); tr"]

    def test_sigterm_still_reaches_whoever_heard_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ray sets a handler of its own, which exits."""
        import ray

        def own(*_: Any) -> None:
            """The run's."""

        monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
        before = signal.signal(signal.SIGTERM, own)
        try:
            with connected("local", attempts=1):
                assert signal.getsignal(signal.SIGTERM) is own
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_one_that_never_starts_is_an_error_with_its_cures(self, init: list[Exception]) -> None:
        init += [Exception("too slow"), Exception("\n two lines\nthe last")]
        with (
            pytest.raises(RuntimeError, match=r"2 tries and 0 s \(the last\).*ulimit -n.*dev/shm"),
            connected("local", attempts=2),
        ):
            pass

    def test_a_long_wait_is_said_and_where(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import threading

        import ray

        said, say = threading.Event(), ray_start._say

        def tell(what: str) -> None:
            say(what)
            said.set()

        monkeypatch.setattr(ray_start, "PATIENCE", 0.01)
        monkeypatch.setattr(ray_start, "_say", tell)
        monkeypatch.setattr(ray, "init", lambda **_: said.wait(20))
        with connected("local", attempts=1):
            pass
        assert capfd.readouterr().err.startswith("tutelage: cluster: Ray is starting on this mach")

    @pytest.mark.parametrize(
        "cause",
        [
            RuntimeError("RPC error: InvalidAuthToken: Authentication token is missing"),
            RuntimeError("Unauthenticated: no"),
        ],
    )
    def test_a_cluster_that_wants_a_token_says_how_to_give_it(
        self, init: list[Exception], cause: Exception
    ) -> None:
        fault = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
        fault.__cause__ = cause
        init += [fault, OSError("never asked again")]
        with (
            pytest.raises(RuntimeError, match=r"auto wants a token.*RAY_AUTH_TOKEN_PATH"),
            connected("auto", attempts=3),
        ):
            pass
        assert len(init) == 1

    def test_a_cluster_without_any_is_told_of(
        self, init: list[Exception], capfd: pytest.CaptureFixture[str]
    ) -> None:
        with connected("ray://there:1", attempts=1):
            pass
        assert "ray://there:1: this cluster asks for no token" in capfd.readouterr().err

    def test_a_ray_that_knows_no_tokens_is_refused(
        self, init: list[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray._raylet

        monkeypatch.delattr(ray._raylet, "get_authentication_mode")
        with (
            pytest.raises(RuntimeError, match=r"has no token authentication.*ray>=2\.52"),
            connected("local", attempts=1),
        ):
            pass

    def test_no_place_for_its_files(
        self, init: list[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
        with (
            pytest.raises(RuntimeError, match=r"can be made in /proc/nowhere .*RAY_TMPDIR"),
            connected("local", attempts=1),
        ):
            pass
