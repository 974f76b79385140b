"""Episodes outlive their process: the player sees nothing of it, until an attempt too many."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool_calls import act, everything, reset
from tests.settings import pool as pool_of
from tutelage.envs.pool import Act, EnvironmentPool, Failed, Observed, Reset
from tutelage.envs.replay import ReplayingPool

pytestmark = pytest.mark.runs

FAULTY = "pool_envs:Faulty-v0"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture
def pool() -> Iterator[EnvironmentPool]:
    with pool_of(FAULTY, {}, processes=1, timeout=2.0) as made:
        yield made


def _said(answers: dict[int, Observed | Failed]) -> dict[int, str]:
    return {
        episode: answer.observation if isinstance(answer, Observed) else answer.reason
        for episode, answer in sorted(answers.items())
    }


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_a_lost_process_is_seen_nowhere(pool: EnvironmentPool, fault: int) -> None:
    """The environment counts its steps: a lost state would begin at one again."""
    sturdy = ReplayingPool(pool, attempts=3)
    reset(sturdy, 0, 1)
    act(sturdy, e0="a", e1="b")
    act(sturdy, e0="c")
    os.kill(pool.pids()[0], fault)
    assert _said(act(sturdy, e0="d")) == {0: "step 3: d"}  # the other owes nothing
    assert _said(act(sturdy, e0="e", e1="f")) == {0: "step 4: e", 1: "step 2: f"}
    assert [sturdy.attempt(0), sturdy.attempt(1)] == [2, 1]
    assert pool.restarts == 1


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the last one may have hit it too
        os.kill(pid, signal.SIGKILL)


def test_any_number_of_kills_at_any_moment_changes_no_answer() -> None:
    """Against the same episodes in peace; kills come between sending and receiving, too."""
    rng = random.Random(3)
    with pool_of(FAULTY, {}, processes=2, timeout=20) as pool:
        sturdy = ReplayingPool(pool, attempts=20)
        reset(sturdy, *range(6))
        for step in range(1, 9):
            if rng.random() < 0.4:
                _kill(rng.choice(pool.pids()))
            sturdy.send([Act(episode=e, action=f"sleep 0.0{e}") for e in range(6)])
            if rng.random() < 0.4:
                _kill(rng.choice(pool.pids()))
            assert _said(everything(sturdy)) == {e: f"step {step}: sleep 0.0{e}" for e in range(6)}
        assert pool.restarts >= 3


def test_who_kills_a_process_is_lost_alone(pool: EnvironmentPool) -> None:
    """Whose fault it was shows in the last attempt: nothing else is on the way then."""
    sturdy = ReplayingPool(pool, attempts=3)
    reset(sturdy, *range(5))
    act(sturdy, **{f"e{e}": "look" for e in range(5)})
    answers = act(sturdy, e0="look", e1="die 3", e2="look", e3="die 4", e4="look")
    assert _said(answers) == {
        0: "step 2: look", 1: "died", 2: "step 2: look", 3: "died", 4: "step 2: look"
    }  # fmt: skip
    for episode, code in ((1, 3), (3, 4)):
        failed = answers[episode]
        assert isinstance(failed, Failed) and failed.attempts == 3
        assert failed.detail == f"exit code {code}"
    assert _said(act(sturdy, e0="a", e2="b", e4="c")) == {
        0: "step 3: a", 2: "step 3: b", 4: "step 3: c"
    }  # fmt: skip
    assert pool.restarts == 4  # twice together, and once for each


def test_an_environment_that_raises_is_led_there_again_in_a_fresh_instance(
    pool: EnvironmentPool,
) -> None:
    sturdy = ReplayingPool(pool, attempts=3)
    reset(sturdy, 0, 1)
    answers = act(sturdy, e0="raise", e1="nan")
    assert _said(answers) == {0: "raised", 1: "garbage"}
    assert {a.attempts for a in answers.values() if isinstance(a, Failed)} == {3}
    assert pool.restarts == 0


def test_an_environment_that_does_not_repeat_itself_has_to_begin_anew(
    pool: EnvironmentPool,
) -> None:
    """`clock` answers with the time of day: an action that follows from it cannot be kept."""
    sturdy = ReplayingPool(pool, attempts=3)
    reset(sturdy, 0, 1)
    act(sturdy, e0="clock", e1="look")
    os.kill(pool.pids()[0], signal.SIGKILL)
    answers = act(sturdy, e0="look", e1="look")
    assert _said(answers) == {0: "differs", 1: "step 2: look"}
    failed = answers[0]
    assert isinstance(failed, Failed) and failed.attempts == 2
    assert sturdy.outstanding == 0
    pool_again = sturdy  # the same episode, begun anew with the attempts that it has had
    pool_again.send([Reset(episode=0, seed=100, options={"index": 0}, attempt=failed.attempts)])
    assert _said(everything(pool_again)) == {0: "seed 100 index 0"}
    assert sturdy.attempt(0) == 2


def test_what_was_abandoned_is_not_led_anywhere(pool: EnvironmentPool) -> None:
    sturdy = ReplayingPool(pool, attempts=3)
    reset(sturdy, 0, 1)
    sturdy.send([Act(episode=0, action="sleep 0.2"), Act(episode=1, action="look")])
    sturdy.abandon([0])
    assert sturdy.outstanding == 1
    os.kill(pool.pids()[0], signal.SIGKILL)
    assert _said(everything(sturdy)) == {1: "step 1: look"}
    assert pool.outstanding == 0
