"""The settings of each task: its own keys, and the run's for those that it does not have.

`RunConfig.resolve()` makes them once; every part of a run is given the piece that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.distill.config.faults import ConfigError, validated
from tutelage.distill.config.sections import (
    ObjectiveConfig,
    Objectives,
    OwnObjective,
    RolloutConfig,
    TaskConfig,
    build_objective,
    masked,
)
from tutelage.distill.objectives import Objective
from tutelage.evaluation.evaluate import EVALUATION
from tutelage.scheduler.episodes import SamplingParams
from tutelage.scheduler.rollouts import TaskRollout
from tutelage.scheduler.timetable import TaskPlan

OUTSIDE_PLAY = {"engine", "lost", "temperature", "top_p", "context"}
"""The keys of RolloutConfig that TaskRollout does not have, or has in a record of their own. All
others have the same name in both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """One task's settings.

    rollout, evaluation: how it is played in training, and when it is evaluated. lost: the greatest
    share of a step's episodes that may be lost. losses: the sections that `objective` was built
    from. schedule: in which steps it is played, and what each plays. guide: the teacher that plays
    its prefixes.
    """

    rollout: TaskRollout
    evaluation: TaskRollout
    lost: float
    objective: Objective
    losses: tuple[ObjectiveConfig, ...]
    mask_tokens: tuple[str, ...]
    weight: float
    schedule: TaskPlan
    guide: str | None


def resolved(
    name: str, task: TaskConfig, objective: Objectives, rollout: RolloutConfig, steps: int
) -> TaskSettings:
    """A task's settings. objective, rollout, steps: the run's.

    Raises:
        ValueError: keys of the task that do not go with each other or with the run's.
    """
    _check_turns(steps, name, task)
    if task.objective is not None:
        own = {"objective": task.objective}
        objective = validated(OwnObjective, own, f"tasks.{name}").objective
    built = build_objective(objective)
    merged = _merged(rollout.model_dump(), task.rollout)
    how = validated(RolloutConfig, merged, f"tasks.{name}.rollout")
    if how.engine != rollout.engine:
        raise ValueError(
            f"tasks.{name}.rollout.engine: all tasks are played by one engine: set the run's"
            " rollout.engine"
        )
    # The expert has no part in an evaluation: no need to compute its actions.
    seen = {key: value for key, value in task.env_args.items() if key != "expert"}
    return TaskSettings(
        rollout=played(how, task.env, task.env_args),
        evaluation=played(how, task.env, seen | task.eval_args),
        lost=how.lost,
        objective=built,
        losses=objective if isinstance(objective, tuple) else (objective,),
        mask_tokens=masked(objective),
        weight=task.weight,
        schedule=scheduled(task, labels=built.needs.generated_by == "expert"),
        # the only one: RunConfig refuses several with guidance
        guide=next(iter(task.teachers), None)
        if task.guidance is not None and task.guidance.by == "teacher"
        else None,
    )


def played(how: RolloutConfig, env: str, env_args: Mapping[str, Any]) -> TaskRollout:
    return TaskRollout(
        env=env,
        env_args=env_args,
        context=how.context.settings(),
        sampling=SamplingParams(temperature=how.temperature, top_p=how.top_p),
        **how.model_dump(exclude=OUTSIDE_PLAY),
    )


def scheduled(task: TaskConfig, *, labels: bool) -> TaskPlan:
    share, guidance = task.expert_share, task.guidance
    return TaskPlan(
        episodes=task.episodes,
        group=task.group,
        teachers=task.teachers,
        labels=labels,
        expert_share=share if isinstance(share, tuple) else (share, share),
        guided_share=guidance.share if guidance else 0.0,
        guided_until=guidance.until if guidance else 1.0,
        start=task.start,
        end=task.end,
        most=task.steps,
    )


def _check_turns(steps: int, name: str, task: TaskConfig) -> None:
    """Raises ValueError for a task that can never be played, or not in whole groups."""
    end = steps if task.end is None else min(task.end, steps)
    if task.start >= end:
        last = f"end, {task.end}" if end == task.end else f"the run's {steps} steps"
        raise ValueError(
            f"tasks.{name}.start: {task.start} is not before {last}: the task would never be"
            " played: lower it, or leave the task out"
        )
    if task.episodes % task.group:
        raise ValueError(
            f"tasks.{name}.group: {task.episodes} episodes are no whole number of groups of"
            f" {task.group}: set episodes to a multiple of it"
        )


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def rollouts_of(tasks: Mapping[str, TaskSettings]) -> dict[str, TaskRollout]:
    """How each task is played in training and in evaluation, under the names that orders use."""
    found: dict[str, TaskRollout] = {}
    for name, task in tasks.items():
        found |= {name: task.rollout, EVALUATION + name: task.evaluation}
    return found


def support_of(teacher: str, tasks: Mapping[str, TaskSettings]) -> int:
    """The largest number of its own ids that a teacher's tasks need for a token; at least 1."""
    own = (task for task in tasks.values() if teacher in task.schedule.teachers)
    return max([1, *(task.objective.needs.k for task in own)])


def check_supports(tasks: Mapping[str, TaskSettings], vocabulary: int) -> None:
    """Raises ConfigError for a support larger than the vocabulary."""
    for name, task in tasks.items():
        if (k := task.objective.needs.width) > vocabulary:
            raise ConfigError(
                f"tasks.{name}: objective {task.objective.name!r} has k={k}, the tokenizer"
                f" {vocabulary} ids: lower objective.k"
            )
