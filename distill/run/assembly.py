"""What a run is put together from: its timetable, its workers and its teachers, here or on Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.engines.build import make_engine, vllm_engine, worker_weights
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models.conversations import spoken
from tutelage.distill.models.loading import (
    load_student,
    load_tokenizer,
    student_settings,
    student_tokenizer,
)
from tutelage.distill.student.learner import Learner
from tutelage.distill.student.lessons import Course
from tutelage.distill.teachers.build import make_teacher
from tutelage.distill.teachers.service import Answer, Ask, TeacherService
from tutelage.envs.plugins import beside, look_beside
from tutelage.evaluation.evaluate import EVALUATION
from tutelage.evaluation.run_folder import STALLED
from tutelage.scheduler.cluster import RayCluster
from tutelage.scheduler.engine import Engine
from tutelage.scheduler.placement import InProcess, Placement
from tutelage.scheduler.rollouts import EnvironmentPools, RolloutWorker, TaskRollout
from tutelage.scheduler.timetable import TaskPlan, Timetable


def make_timetable(config: RunConfig, courses: Mapping[str, Course]) -> Timetable:
    """The run's steps.

    Raises:
        ConfigError: the tasks' start, end and steps leave a step without any.
    """
    plans = {}
    for name, task in config.tasks.items():
        share, guidance = task.expert_share, task.guidance
        plans[name] = TaskPlan(
            episodes=task.episodes,
            group=task.group,
            teachers=task.teachers,
            labels=courses[name].objective.needs.generated_by == "expert",
            expert_share=share if isinstance(share, tuple) else (share, share),
            guided_share=guidance.share if guidance else 0.0,
            guided_until=guidance.until if guidance else 1.0,
            start=task.start,
            end=task.end,
            most=task.steps,
        )
    try:
        return Timetable(plans, steps=config.steps, seed=config.seed, make_policy=config.policy)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def task_rollouts(config: RunConfig) -> dict[str, TaskRollout]:
    tasks = {}
    for name in config.tasks:
        tasks[name] = config.task_rollout(name)
        tasks[EVALUATION + name] = config.task_rollout(name, evaluation=True)
    return tasks


def make_placement(
    config: RunConfig, learner: Learner, tokenizer: Any, vocabulary: int, pools: EnvironmentPools
) -> Placement[Ask, Answer]:
    if config.cluster is None:
        engine = make_engine(config, learner.copy, vocabulary)
        teachers = {
            name: make_teacher(name, teacher, vocabulary)
            for name, teacher in config.teachers.items()
        }
        guides = _guides(config, teachers, vocabulary)
        rollouts = task_rollouts(config)
        worker = RolloutWorker(engine, tokenizer, rollouts, pools, guides, **spoken(config))
        return InProcess(worker, teachers)
    return RayCluster(
        address=config.cluster.address,
        workers=config.cluster.workers,
        threads=config.cluster.threads,
        worker_resources=config.cluster.worker_resources,
        teacher_resources=config.cluster.teacher_resources,
        strategy=config.cluster.strategy,
        wheel=config.cluster.wheel,
        timeout=config.cluster.timeout,
        attempts=config.cluster.attempts,
        stalled=(Path(config.run) / STALLED).absolute(),
        make_worker=partial(_make_worker, config, vocabulary, beside()),
        make_teachers={
            name: partial(make_teacher, name, teacher, vocabulary)
            for name, teacher in config.teachers.items()
        },
        weights=partial(worker_weights, config, learner.copy, vocabulary),
    )


def _make_worker(config: RunConfig, vocabulary: int, modules: Sequence[str]) -> RolloutWorker:
    """A rollout worker with its own copy of the student (in a Ray actor). modules: folders with
    environments of the user's own, where the actor's machine has them."""
    for folder in modules:
        look_beside(folder)
    rollouts = task_rollouts(config)
    pools = EnvironmentPools(rollouts)
    pools.open(rollouts)  # what the node lacks shows before a model loads
    tokenizer = load_tokenizer(student_tokenizer(config.student))
    engine: Engine
    if config.rollout.engine == "vllm":
        # its weights come with the first sync
        engine = vllm_engine(config, student_settings(config.student), vocabulary)
    else:
        model = load_student(config.student, seed=config.seed)
        engine = TransformersEngine(model, vocabulary=vocabulary)
    teachers = {
        name: make_teacher(name, config.teachers[name], vocabulary)
        for name in set(_guiding(config).values()) & config.teachers.keys()
    }
    guides = _guides(config, teachers, vocabulary)
    return RolloutWorker(engine, tokenizer, rollouts, pools, guides, **spoken(config))


def _guiding(config: RunConfig) -> dict[str, str]:
    """The teachers that play prefixes, by task."""
    return {
        name: next(iter(task.teachers))
        for name, task in config.tasks.items()
        if task.guidance is not None and task.guidance.by == "teacher"
    }


def _guides(
    config: RunConfig, teachers: Mapping[str, TeacherService], vocabulary: int
) -> dict[str, Engine]:
    """An engine over the teacher's own weights for each task that it guides."""
    return {
        task: TransformersEngine(teachers[name].model, vocabulary=vocabulary)
        for task, name in _guiding(config).items()
        if name in teachers  # evaluation loads no teacher
    }
