"""Calls of an environment pool that wait for every answer, for the tests of the pools."""

from __future__ import annotations

from tutelage.envs.pool import Act, EnvironmentPool, Failed, Observed, Reset
from tutelage.envs.replay import ReplayingPool

Answers = dict[int, Observed | Failed]


def everything(pool: EnvironmentPool | ReplayingPool) -> Answers:
    """What is outstanding, by episode: one answer each."""
    answers: Answers = {}
    while pool.outstanding:
        for answer in pool.receive():
            assert answer.episode not in answers
            answers[answer.episode] = answer
    return answers


def reset(pool: EnvironmentPool | ReplayingPool, *episodes: int) -> Answers:
    """Begin these."""
    pool.send([Reset(episode=e, seed=100 + e, options={"index": e}) for e in episodes])
    return everything(pool)


def act(pool: EnvironmentPool | ReplayingPool, **actions: str) -> Answers:
    """One action an episode: `e3="look"` is episode 3's."""
    pool.send([Act(episode=int(name[1:]), action=action) for name, action in actions.items()])
    return everything(pool)
