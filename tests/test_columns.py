"""What travels between processes comes back as it was, in a few big arrays that nobody copies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tutelage.distill.objectives import Needs
from tutelage.distill.teachers.service import Ask
from tutelage.scheduler.columns import columns, restored
from tutelage.scheduler.episodes import Dropped, Episode, Order, Row, SamplingParams, Turn

ARRAYS = ("ids_T", "turns_T", "behavior_logprobs_T", "branches_T", "sampling_logprobs_T")
EPISODES = 256


@pytest.fixture(scope="module")
def episodes(make_row: Callable[..., Row]) -> list[Episode]:
    """A step's: no two of one length or text."""
    return [
        Episode(
            order=Order(task="t", number=i, seed=7 * i, index=i, teacher="sage" if i % 2 else None),
            rows=tuple(
                make_row([("prompt", range(1, 3 + i)), ("said", [4, 5 + turn])], seed=i)
                for turn in range(i % 3)  # none, where nothing was said
            ),
            turns=(Turn(observation=f"see {i}", action="go", expert_action="no" if i else None),),
            success=i % 3 == 0,
            reward=0.5 * i,
            task_type="look",
            ended="terminated" if i % 2 else "max_turns",
            sampling=SamplingParams(top_p=0.9),
            version=3,
        )
        for i in range(EPISODES)
    ]


def _message(values: list[Any]) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """As Ray writes it: everything but the arrays, and the arrays where they lie."""
    arrays: list[pickle.PickleBuffer] = []
    return pickle.dumps(columns(values), protocol=5, buffer_callback=arrays.append), arrays


def _there_and_back(values: list[Any]) -> list[Any]:
    head, arrays = _message(values)
    return restored(pickle.loads(head, buffers=arrays))


def test_episodes_come_back_as_they_were(episodes: list[Episode]) -> None:
    lost = [
        Dropped(
            order=Order(task="t", number=n, seed=n, index=n), reason="died", detail="", attempts=3
        )
        for n in (900, 901)
    ]
    sent = [lost[0], *episodes, lost[1]]
    assert repr(_there_and_back(sent)) == repr(sent)  # numpy compares arrays one by one
    assert repr(_there_and_back([sent, [], sent[:1]])) == repr([sent, [], sent[:1]])


@pytest.mark.parametrize(
    "value",
    [
        *(None, 3, "text", [], (), [[]], ([], [1]), {"k": (1,)}, [1, "a", None]),
        [np.float32(2), np.arange(3)],  # another type each
        [np.arange(3), np.arange(3.0)],  # another dtype each
        [np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((0, 3))],
        [np.array(1), np.array(2)],
        [np.array([{}, None], dtype=object)],
        [np.zeros((0, 5), dtype=np.int32), np.ones((2, 5), dtype=np.int32)],
        (SamplingParams(), SamplingParams(top_p=0.5), Needs(k=3)),
    ],
)
def test_any_value_comes_back(value: Any) -> None:
    (back,) = _there_and_back([value])
    assert type(back) is type(value) and repr(back) == repr(value)


def test_what_a_record_holds_is_not_checked_again(make_row: Callable[..., Row]) -> None:
    """It was when it was made; the check of its values is half of the time that a hop takes."""
    row = make_row([("prompt", [1]), ("said", [2])])
    row.turns_T[0] = 0  # "a row must begin with a prompt"
    (back,) = _there_and_back([row])
    assert back.turns_T.tolist() == [0, 0]


def test_a_step_is_one_array_for_each_field(episodes: list[Episode]) -> None:
    head, arrays = _message([episodes])
    sizes = [sum(getattr(r, name).nbytes for e in episodes for r in e.rows) for name in ARRAYS]
    assert sorted(a.raw().nbytes for a in arrays) == sorted(sizes)
    assert len(head) < 150 * EPISODES  # the texts and numbers, and no token
    rows = [row for episode in episodes for row in episode.rows]
    asked = [np.arange(2 * n, dtype=np.int32).reshape(n, 2) for n in range(len(rows))]
    _, arrays = _message([Ask(teacher="t", rows=rows, needs=Needs(k=1), query_ids=asked)])
    assert len(arrays) == len(ARRAYS) + 1
