"""Scores of a student: every game once, fixed seeds, greedy and sampled, with intervals."""

from __future__ import annotations

import datetime
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from statistics import fmean
from typing import Any

import numpy as np

from tutelage.evaluation.metrics import wilson
from tutelage.scheduler.episodes import GREEDY, Dropped, Episode, Order, SamplingParams
from tutelage.scheduler.rollouts import TaskRollout
from tutelage.scheduler.timetable import ENDLESS

Collect = Callable[[Sequence[Order], SamplingParams], list[Episode | Dropped]]

EVALUATION = "evaluation:"
"""Prefix of a task's name when it is played for evaluation, in environments made with eval_args."""

EVALUATION_SEED = 20_251_107
"""Fixed: every model plays the same games with the same draws, whatever seed trained it.

Each game has draws of its own. If all shared one seed, one unlucky number would hit every game, and
the intervals, which assume independent games, would be too narrow."""


def orders(
    task: str, *, episodes: int | str, num_games: int | None, samples: int = 1
) -> list[Order]:
    """Games 0..n-1, each `samples` times. episodes: how many games, or `all` of the split.

    Raises:
        ValueError: `all` of an environment that does not say how many it has, or has no end.
    """
    if episodes == "all":
        if num_games is None:
            raise ValueError(
                f"task {task!r}: evaluation.episodes is 'all', but the environment does not say how"
                " many it has: give a number"
            )
        if num_games >= ENDLESS:  # generated games: evaluation would take for ever
            raise ValueError(
                f"task {task!r}: evaluation.episodes is 'all', and the environment has {num_games}:"
                " give a number"
            )
        count = num_games
    else:
        count = int(episodes) if num_games is None else min(int(episodes), num_games)
    return [
        Order(task=task, number=game * samples + s, seed=_seed(game, s), index=game)
        for game in range(count)
        for s in range(samples)
    ]


def _seed(game: int, sample: int) -> int:
    entropy = np.random.SeedSequence([EVALUATION_SEED, game, sample])
    return int(entropy.generate_state(1)[0])


def evaluate_tasks(
    tasks: Mapping[str, TaskRollout],
    collect: Collect,
    *,
    modes: Sequence[str],
    episodes: int | str,
    num_games: Callable[[str], int | None],
    progress: Callable[[str, str, int, int], None],
    scored: Callable[[str, str, Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Scores by task and mode. num_games: called with the name under which a task is played.
    `progress(task, mode, done, total)` is called as episodes are played, `scored(task, mode,
    score)` after each score."""
    scores: dict[str, Any] = {}
    for task, how in tasks.items():
        played = EVALUATION + task
        # with one sample a game the success rate of single answers is pass@1
        scores[task] = {"metric": "pass@1" if how.max_turns == 1 else "success rate"}
        for mode in modes:
            found = evaluate(
                played,
                collect,
                sampling=GREEDY if mode == "greedy" else how.sampling,
                episodes=episodes,
                num_games=num_games(played),
                progress=partial(progress, task, mode),
            )
            scores[task][mode] = found
            scored(task, mode, found)
    return scores


def evaluate(
    task: str,
    collect: Collect,
    *,
    sampling: SamplingParams,
    episodes: int | str,
    num_games: int | None,
    progress: Callable[[int, int], None] | None = None,
    part: int = 64,
) -> dict[str, Any]:
    """Play the games and summarise; `progress(done, total)` is called first and after every `part`
    episodes."""
    wanted = orders(task, episodes=episodes, num_games=num_games)
    outcomes: list[Episode | Dropped] = []
    tell = progress or (lambda done, total: None)
    tell(0, len(wanted))
    # in parts: between two of them progress is shown, and a stop is heard
    for start in range(0, len(wanted), part):
        outcomes += collect(wanted[start : start + part], sampling)
        tell(len(outcomes), len(wanted))
    return summarise(outcomes) | {
        "seed": EVALUATION_SEED,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }


def summarise(outcomes: Sequence[Episode | Dropped]) -> dict[str, Any]:
    """Success rate with its Wilson interval, overall and per task type. Dropped episodes are
    counted apart: their environment failed, not the student. An episode that a limit cut off is
    a failure like any other.
    """
    played = [outcome for outcome in outcomes if isinstance(outcome, Episode)]
    if not played:
        raise RuntimeError(
            f"all {len(outcomes)} evaluation episodes were dropped"
            + (f": {outcomes[0].reason}: {outcomes[0].detail}" if outcomes else "")  # type: ignore[union-attr]
        )
    # A score of 0 would look like the student's: it was never asked.
    if all(episode.ended == "context" and not episode.turns for episode in played):
        raise ValueError(
            f"evaluation of task {played[0].order.task!r}: none of {len(played)} prompts leaves"
            " room for a reply in the student's context: shorten them (env_args,"
            " rollout.context), or take a student with a longer one"
        )
    by_type: dict[str, list[Episode]] = defaultdict(list)
    for episode in played:
        by_type[episode.task_type].append(episode)
    turns = fmean(len(episode.turns) for episode in played)
    replies = [turn for episode in played for turn in episode.turns]
    verdicts = Counter(episode.verdict for episode in played if episode.verdict)
    return {
        **_rate(played),
        "dropped": len(outcomes) - len(played),
        "turns": round(turns, 2),
        "cut_off": round(sum(not turn.complete for turn in replies) / max(1, len(replies)), 4),
        "malformed": round(sum(not turn.valid for turn in replies) / max(1, len(replies)), 4),
        "unfinished": round(
            sum(episode.ended != "terminated" for episode in played) / len(played), 4
        ),
        **({"verdicts": dict(sorted(verdicts.items()))} if verdicts else {}),
        "by_type": {name: _rate(episodes) for name, episodes in sorted(by_type.items())},
    }


def _rate(episodes: Sequence[Episode]) -> dict[str, Any]:
    wins = sum(episode.success for episode in episodes)
    low, high = wilson(wins, len(episodes))
    return {
        "value": wins / len(episodes),
        "n": len(episodes),
        "interval": [round(low, 4), round(high, 4)],
    }


def score_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores as `eval/TASK/MODE` for a step's line of metrics."""
    return {
        f"eval/{task}/{mode}": found["value"]
        for task, modes in scores.items()
        for mode, found in modes.items()
        if mode != "metric"
    }


def record(
    model: str, weights: str | None, scores: Mapping[str, Any], date: datetime.date | None
) -> dict[str, Any]:
    """The contents of eval.json. weights: their hash. date: the one that the prompts showed."""
    names = ("tutelage", "torch", "transformers", "gymnasium", "numpy")
    return {
        "model": model,
        "weights": weights,
        "scores": scores,
        **({} if date is None else {"date": date.isoformat()}),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
    }
