"""The environment pool: faults stay bounded, episodes come back, nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool_calls import act, everything, reset
from tests.settings import pool as pool_of
from tutelage.envs.child import MAX_MESSAGE
from tutelage.envs.pool import Act, EnvironmentPool, Failed, Observed, Reset

pytestmark = pytest.mark.runs

FAULTY = "pool_envs:Faulty-v0"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture(params=[0, 2], ids=["inline", "processes"])
def pool(request: pytest.FixtureRequest) -> Iterator[EnvironmentPool]:
    with pool_of(FAULTY, {}, processes=request.param, timeout=20) as made:
        yield made


def _alive(pid: int) -> bool:
    """A zombie is not gone: it counts."""
    return Path(f"/proc/{pid}").exists()


def test_every_episode_gets_its_own_answers(pool: EnvironmentPool) -> None:
    first = reset(pool, *range(6))
    assert [first[e].observation for e in range(6)] == [
        f"seed {100 + e} index {e}" for e in range(6)
    ]
    for step in (1, 2, 3):
        answers = act(pool, **{f"e{e}": f"look {e}" for e in range(6)})
        assert [answers[e].observation for e in range(6)] == [
            f"step {step}: look {e}" for e in range(6)
        ]
    assert pool.receive() == []  # nothing outstanding: it does not wait
    assert pool.probe == {"num_episodes": 7}


def test_the_load_is_spread_and_each_process_has_one_thread() -> None:
    with pool_of(FAULTY, {}, processes=2) as pool:
        answers = reset(pool, *range(6))
        pids = [answer.info["pid"] for answer in answers.values()]
        assert sorted(map(pids.count, set(pids))) == [3, 3]
        assert os.getpid() not in pids
        assert act(pool, e0="look")[0].info["threads"] == "1"


def test_success_is_always_a_bool_and_only_plain_values_travel(pool: EnvironmentPool) -> None:
    reset(pool, 1, 2, 3)
    ended = act(pool, e1="look")[1], act(pool, e1="end")[1]
    assert [answer.info["success"] for answer in ended] == [
        False,
        True,
    ]  # derived: reward at the end
    info = act(pool, e2="objects")[2].info
    assert info["commands"] == ["go", "take"]
    assert (info["score"], info["array"], info["flag"]) == (0.5, [0, 1, 2], True)
    assert info["nested"] == {"deep": (1,)}
    assert "env" not in info
    answer = act(pool, e3="numpy")[3]
    assert isinstance(answer, Observed)
    assert (type(answer.reward), answer.terminated, answer.info["success"]) == (float, True, True)


@pytest.mark.parametrize(
    ("action", "reason", "detail"),
    [
        ("raise", "raised", r"RuntimeError: the kitchen \udc00 is on fire"),
        ("number", "garbage", "the observation is 7, not text"),
        ("nan", "garbage", "the reward is nan"),
        ("four", "garbage", "not Gymnasium's five values"),
        ("exit", "raised", "SystemExit: 0"),
        ("beyond", "raised", "pool_envs.Beyond"),
        ("huge 1000001", "garbage", "has 1000001 characters, and rollout.max_observation allows"),
        ("half", "garbage", r"half of a surrogate pair, '\ud83d', at character 8"),
        ("half info", "garbage", r"info has half of a surrogate pair, '\udc00', at character 9"),
    ],
)
def test_a_fault_of_an_environment_ends_its_own_episode_only(
    pool: EnvironmentPool, action: str, reason: str, detail: str
) -> None:
    reset(pool, 0, 1, 2)
    answers = act(pool, e0="look", e1=action, e2="look")
    failed = answers[1]
    assert isinstance(failed, Failed)
    assert failed.reason == reason
    assert detail in failed.detail
    assert isinstance(answers[0], Observed)
    assert isinstance(answers[2], Observed)
    assert pool.restarts == 0
    with pytest.raises(ValueError, match="not live"):
        pool.send([Act(episode=1, action="look")])
    assert reset(pool, 1)[1].observation == "seed 101 index 1"


@pytest.mark.parametrize("processes", [0, 1])
def test_what_an_environment_raises_when_it_is_closed_ends_nothing(processes: int) -> None:
    with pool_of(FAULTY, {"flavour": "stays"}, processes=processes, timeout=20) as pool:
        reset(pool, 0, 1)
        answers = act(pool, e0="raise", e1="look")
        assert isinstance(answers[0], Failed) and "on fire" in answers[0].detail
        assert isinstance(answers[1], Observed) and pool.restarts == 0


def test_an_observation_may_be_as_long_as_the_limit_says(pool: EnvironmentPool) -> None:
    reset(pool, 0)
    assert len(act(pool, e0="huge 1000000")[0].observation) == 1_000_000


def test_an_ended_episodes_instance_is_used_again_and_a_faulty_one_is_not(
    pool: EnvironmentPool,
) -> None:
    made = reset(pool, 0)[0].info["made"]
    act(pool, e0="end")
    assert reset(pool, 1)[1].info["made"] == made
    act(pool, e1="raise")
    assert reset(pool, 2)[2].info["made"] != made


def test_a_died_process_loses_its_episodes_and_the_pool_goes_on() -> None:
    with pool_of(FAULTY, {}, processes=2, timeout=20) as pool:
        first = reset(pool, 0, 1, 2, 3)
        victim = first[0].info["pid"]
        lost = {e for e, answer in first.items() if answer.info["pid"] == victim}
        answers = act(pool, e0="die 3")  # the other lost one has nothing outstanding
        assert set(answers) == lost
        assert all(isinstance(a, Failed) and a.reason == "died" for a in answers.values())
        assert "exit code 3" in answers[0].detail
        assert pool.restarts == 1
        again = reset(pool, *lost)
        assert [again[e].observation for e in sorted(lost)] == [
            f"seed {100 + e} index {e}" for e in sorted(lost)
        ]
        assert not _alive(victim)
        assert all(isinstance(a, Observed) for a in act(pool, e0="look", e1="look").values())


def test_a_process_killed_between_batches_is_noticed() -> None:
    with pool_of(FAULTY, {}, processes=1, timeout=20) as pool:
        reset(pool, 0)
        os.kill(pool.pids()[0], 9)
        time.sleep(0.2)
        failed = act(pool, e0="look")[0]
        assert isinstance(failed, Failed)
        assert (failed.reason, failed.detail) == ("died", "signal SIGKILL")
        assert isinstance(reset(pool, 0)[0], Observed)


def test_a_hung_process_is_replaced_within_the_timeout() -> None:
    with pool_of(FAULTY, {}, processes=2, timeout=1.5) as pool:
        reset(pool, 0, 1)
        began = time.monotonic()
        answers = act(pool, e0="hang", e1="look")
        assert 1.4 < time.monotonic() - began < 4
        failed = answers[0]
        assert isinstance(failed, Failed)
        assert failed.reason == "timeout"
        assert isinstance(answers[1], Observed)
        assert isinstance(reset(pool, 0)[0], Observed)


def test_many_slow_answers_are_not_silence() -> None:
    """Eight steps of 0.3 s take longer than the timeout of one; none of them hangs."""
    with pool_of(FAULTY, {}, processes=1, timeout=1.5) as pool:
        reset(pool, *range(8))
        answers = act(pool, **{f"e{e}": "sleep 0.3" for e in range(8)})
        assert all(isinstance(answer, Observed) for answer in answers.values())
        assert pool.restarts == 0


def test_an_answer_to_an_abandoned_episode_is_not_taken_for_a_new_ones() -> None:
    with pool_of(FAULTY, {}, processes=1, timeout=20) as pool:
        reset(pool, 0)
        pool.send([Act(episode=0, action="sleep 0.2")])
        pool.abandon([0])
        assert pool.outstanding == 0
        assert reset(pool, 0)[0].observation == "seed 100 index 0"
        assert act(pool, e0="look")[0].observation == "step 1: look"


def test_receive_without_block_returns_at_once() -> None:
    with pool_of(FAULTY, {}, processes=1, timeout=20) as pool:
        reset(pool, 0)
        pool.send([Act(episode=0, action="sleep 0.5")])
        began = time.monotonic()
        assert pool.receive(block=False) == []
        assert time.monotonic() - began < 0.2
        assert pool.outstanding == 1
        assert isinstance(everything(pool)[0], Observed)


def test_large_messages_in_both_directions_do_not_block() -> None:
    with pool_of(FAULTY, {}, processes=1, timeout=20, max_observation=2_000_000) as pool:
        reset(pool, *range(10))
        for _ in range(2):
            answers = act(pool, **{f"e{e}": "x" * 1_000_000 for e in range(10)})
            assert all(len(answer.observation) > 1_000_000 for answer in answers.values())


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("env_id", "args", "message"),
    [
        ("pool_envs:Falty-v0", {}, r"pool_envs:Falty-v0: .*Faulty"),
        (FAULTY, {"flavour": "broken"}, "no games in /nowhere"),
        (FAULTY, {"flavor": "plain"}, "flavor"),
        (FAULTY, {"flavour": "exits"}, r"it calls sys.exit\(0\) while it is made"),
        (FAULTY, {"flavour": "is beyond"}, "not to be made"),
        *(
            (FAULTY, {"num_episodes": count}, f"num_episodes is {said}: .*a whole number above 0")
            for count, said in [
                (0, "0"),
                (-1, "-1"),
                (7.0, "7.0"),
                ("7", "'7'"),
                (True, "True"),
                ([7], r"\[7\]"),
            ]
        ),
        ("no_such_package_here:Env-v0", {}, "no_such_package_here"),
        ("tutelage.envs.math.env:Nothing-v0", {}, "Nothing"),
    ],
)
def test_a_wrong_id_or_argument_is_one_error_at_construction(
    processes: int, env_id: str, args: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pool_of(env_id, args, processes=processes)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(env_id)


def test_close_leaves_no_process_not_even_an_environments_own() -> None:
    pool = pool_of(FAULTY, {}, processes=2, timeout=20)
    reset(pool, 0, 1)
    children = [answer.info["child"] for answer in act(pool, e0="child", e1="child").values()]
    pids = pool.pids()
    assert all(map(_alive, pids + children))
    pool.close()
    assert not any(map(_alive, pids))
    assert _gone(children)
    pool.close()  # twice is once
    with pytest.raises(ValueError, match="closed"):
        pool.send([Reset(episode=0, seed=0)])


def _gone(pids: list[int]) -> bool:
    """Grandchildren are reaped by init, which may take a moment; a zombie does not run any more."""
    for _ in range(50):
        states = [
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            for pid in pids
            if _alive(pid)
        ]
        if all(state == "Z" for state in states):
            return True
        time.sleep(0.1)
    return False


DAEMONS = ["daemon", "daemon setsid", "daemon setsid exec"]


def _daemons(pool: EnvironmentPool) -> list[int]:
    """Of a live episode 0."""
    return [act(pool, e0=how)[0].info["child"] for how in DAEMONS]


@pytest.mark.parametrize("end", ["close", "hang", "die 0", "kill SIGSEGV", "kill SIGKILL", "shut"])
def test_what_an_environment_started_ends_with_it_wherever_it_went(end: str) -> None:
    """Children of children whose parent has ended, in other sessions, without our environment's
    variables, who hold the worker's connection open; whatever ends the worker."""
    with pool_of(FAULTY, {}, processes=1, timeout=1.0) as pool:
        reset(pool, 0)
        daemons = _daemons(pool)
        assert all(map(_alive, daemons))
        if end == "close":
            pool.close()
        else:
            assert isinstance(act(pool, e0=end)[0], Failed)
        assert not any(map(_alive, daemons))  # and none is a zombie


def test_a_worker_ends_as_its_environment_made_it_end() -> None:
    """The keeper between them hides neither exit code nor signal."""
    with pool_of(FAULTY, {}, processes=1, timeout=20) as pool:
        for end, said in (
            ("die 0", "exit code 0"),
            ("die 7", "exit code 7"),
            ("kill SIGSEGV", "signal SIGSEGV"),
            ("signal_group", "signal SIGTERM"),
        ):
            reset(pool, 0)
            failed = act(pool, e0=end)[0]
            assert isinstance(failed, Failed)
            assert (failed.reason, failed.detail) == ("died", said)


def test_a_fork_that_goes_on_as_its_parent_does_answers_once(pool: EnvironmentPool) -> None:
    """In this process the child would have gone on with the whole run."""
    reset(pool, 0)
    child = act(pool, e0="fork")[0].info["child"]
    assert child and _gone([child])
    assert act(pool, e0="look")[0].observation == "step 2: look"
    if pool.pids() == []:
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["text", "long", "pickle", "code", "flood"])
def test_garbage_on_the_connection_costs_the_process_and_nothing_else(kind: str) -> None:
    with pool_of(FAULTY, {}, processes=2, timeout=20) as pool:
        first = reset(pool, 0, 1)
        assert first[0].info["pid"] != first[1].info["pid"]
        answers = act(pool, e0=f"scribble {kind}", e1="look")
        assert isinstance(answers[1], Observed)
        failed = answers[0]
        assert isinstance(failed, Failed)
        assert failed.reason == "died"
        assert {
            "text": "its environment wrote b'hello, world",
            "long": "a message of 9223372036854775808 bytes",
            "pickle": "a message that cannot be read",
            "code": "os.system is not plain data",
            "flood": "its environment wrote b'tutelagtutelag",
        }[kind] in failed.detail
        assert isinstance(reset(pool, 0)[0], Observed)
        assert pool.restarts == 1


def test_no_message_is_longer_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many large answers come in several; one that is larger alone is its environment's fault."""
    size = MAX_MESSAGE // 3
    with pool_of(FAULTY, {}, processes=1, timeout=60, max_observation=size) as pool:
        reset(pool, *range(5))
        answers = act(pool, **{f"e{e}": f"huge {size}" for e in range(5)})
        assert [len(answers[e].observation) for e in range(5)] == [size] * 5
        answers = act(pool, e0=f"talk {MAX_MESSAGE}", e1="look")
        assert isinstance(answers[1], Observed)
        assert isinstance(answers[0], Failed)
        assert answers[0].reason == "garbage"
        assert answers[0].detail.endswith(f"bytes, more than {MAX_MESSAGE}")
        assert pool.restarts == 0


def test_a_reset_that_hangs_is_a_fault_like_any_other() -> None:
    with pool_of(FAULTY, {"flavour": "hangs"}, processes=1, timeout=0.5) as pool:
        failed = reset(pool, 0)[0]
        assert isinstance(failed, Failed)
        assert (failed.reason, failed.detail) == ("timeout", "no answer within 0.5 s")


def test_processes_end_with_a_parent_that_is_killed_even_while_they_hang() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tutelage.envs.pool import *\n"
        "import time\n"
        f"pool = EnvironmentPool({FAULTY!r}, {{}}, processes=2, timeout=30.0,"
        " max_observation=1000)\n"
        "pool.send([Reset(episode=0, seed=0)]); pool.receive()\n"
        "pool.send([Act(episode=0, action='daemon setsid exec')])\n"
        "(answer,) = pool.receive()\n"
        "pool.send([Act(episode=0, action='hang')])\n"
        "print(*pool.pids(), answer.info['child'], flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = list(map(int, parent.stdout.readline().split()))
    assert all(map(_alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(pids)


def test_a_pool_made_in_a_thread_outlives_it() -> None:
    """Linux's parent-death signal follows the starting thread; a pool must not."""
    made: list[EnvironmentPool] = []
    thread = threading.Thread(target=lambda: made.append(pool_of(FAULTY, {}, processes=1)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    with made[0] as pool:
        assert isinstance(reset(pool, 0)[0], Observed)
        assert pool.restarts == 0


def test_workers_import_neither_torch_nor_ray() -> None:
    line = "import tutelage.envs.worker, sys; print({'torch', 'ray', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
