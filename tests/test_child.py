"""The child process that environments, the grader and the learner's ranks are: what it promises."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tutelage.envs.child import Child, Disconnected, InvalidMessage

SERVICE = """
import os, signal, sys, time

def main(connection):
    for what, value in connection:
        if what == "say":
            connection.send(value)
        elif what == "echo":
            connection.send((value, sys.stdin.read(), print("noise")))
        elif what == "start":
            if not os.fork():
                os.setsid()
                if not os.fork():
                    connection.send(os.getpid())
                    time.sleep(600)
                os._exit(0)
            os.wait()
        elif what == "hang":
            9**9**9
        elif what == "leave":
            sys.exit(value)
        elif what == "kill":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {value})
            os.kill(os.getpid(), value)
    open(os.environ["ENDED"], "w").close()
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    (tmp_path / "service.py").write_text(SERVICE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    children: list[Child] = []

    def start(**how: Any) -> Child:
        environment = os.environ | {"ENDED": str(tmp_path / "ended")}
        children.append(Child("service:main", environment=environment, **how))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.kill()  # twice is once


def _gone(pid: int) -> bool:
    """Not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


def test_large_messages_travel_and_prints_do_not(start: Callable[..., Child]) -> None:
    connection = start().connection
    large = os.urandom(3_000_000)
    connection.send(("echo", large), timeout=60)
    assert connection.receive(timeout=60) == (large, "", None)


def test_messages_that_cross_do_not_block(start: Callable[..., Child]) -> None:
    """Neither side reads while it sends, unless it takes in what the other sends meanwhile."""
    connection = start().connection
    for i in range(5):
        connection.send(("echo", bytes([i]) * 3_000_000), timeout=60)
    assert [connection.receive(timeout=60)[0][0] for _ in range(5)] == [0, 1, 2, 3, 4]


def test_only_plain_data_is_read_of_who_is_not_trusted(start: Callable[..., Child]) -> None:
    trusted, other = start().connection, start(plain=True).connection
    for connection in (trusted, other):
        connection.send(("say", 7))
        connection.send(("say", signal.SIGTERM))
        assert connection.receive(timeout=60) == 7
    assert trusted.receive(timeout=60) is signal.SIGTERM
    for _ in range(2):  # nothing after it can be trusted either
        with pytest.raises(InvalidMessage, match=r"cannot be read: signal\.Signals is not plain"):
            other.receive(timeout=60)


def test_every_wait_has_its_deadline(start: Callable[..., Child]) -> None:
    child = start()
    child.connection.send(("hang", None))
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        child.connection.receive(timeout=0.3)
    with pytest.raises(TimeoutError):  # more than its socket takes
        child.connection.send(("say", bytes(10_000_000)), timeout=0.3)
    assert 0.6 <= time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("how", "value", "said"),
    [
        ("leave", 0, "exit code 0"),
        ("leave", 7, "exit code 7"),
        ("kill", signal.SIGSEGV, "signal SIGSEGV"),
        ("kill", signal.SIGKILL, "signal SIGKILL"),
    ],
)
def test_a_death_is_noticed_and_named_after_the_last_words(
    start: Callable[..., Child], how: str, value: int, said: str
) -> None:
    child = start()
    assert child.ending(0.0) is None
    child.connection.send(("say", "farewell"))
    child.connection.send((how, value))
    assert child.connection.receive(timeout=60) == "farewell"
    with pytest.raises(Disconnected):
        child.connection.receive(timeout=60)
    assert child.ending() == said


def test_a_signal_that_the_parent_has_blocked_is_named_too(start: Callable[..., Child]) -> None:
    """Children inherit the mask; their keeper must end by the signal all the same."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        child = start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    child.connection.send(("kill", signal.SIGPROF))
    assert child.ending(60) == "signal SIGPROF"


def test_it_ends_with_all_that_it_started(start: Callable[..., Child]) -> None:
    child = start()
    child.connection.send(("start", None))
    daemon = child.connection.receive(timeout=60)
    child.connection.send(("hang", None))
    worker = child.pid
    assert not _gone(daemon) and not _gone(worker)
    child.kill()
    assert _gone(daemon) and _gone(worker)


@pytest.mark.parametrize("grace", [0.0, 60.0])
def test_who_is_given_time_puts_things_in_order(
    start: Callable[..., Child], tmp_path: Path, grace: float
) -> None:
    child = start()
    child.connection.send(("say", 1))
    assert child.connection.receive(timeout=60) == 1
    os.kill(child.pid, signal.SIGSTOP)
    if grace:
        os.kill(child.pid, signal.SIGCONT)
    child.kill(grace=grace)
    assert (tmp_path / "ended").exists() == bool(grace)
