"""What a run is put together from: its timetable, its workers and its teachers, here or on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tutelage.distill.config import ConfigError, RunConfig, TeacherConfig
from tutelage.distill.engine import TransformersEngine
from tutelage.distill.identity import digest_of, digest_of_served
from tutelage.distill.learner import Course, Learner
from tutelage.distill.models import load_model, load_student, load_tokenizer, student_tokenizer
from tutelage.distill.server_teacher import ServerTeacher, check_server
from tutelage.distill.teachers import Teacher, TeacherService, TransformersTeacher
from tutelage.distill.vllm.start import require_vllm
from tutelage.distill.vllm.teacher import load_vllm_teacher
from tutelage.scheduler.cluster import InProcess, Placement, RayCluster
from tutelage.scheduler.engine import Engine
from tutelage.scheduler.rollouts import EnvironmentPools, RolloutWorker, TaskRollout
from tutelage.scheduler.timetable import TaskPlan, Timetable

EVALUATION = "evaluation:"
"""Prefix of a task's name when it is played for evaluation, with its eval_args."""


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
            labels=not courses[name].objective.needs_teacher,
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


def check_supports(courses: Mapping[str, Course], vocabulary: int) -> None:
    """Raises ConfigError for a support larger than the vocabulary."""
    for task, course in courses.items():
        if (k := max(course.objective.k, course.objective.student_k)) > vocabulary:
            raise ConfigError(
                f"tasks.{task}: objective {course.objective.name!r} has k={k}, the tokenizer"
                f" {vocabulary} ids: lower objective.k"
            )


def check_teachers(config: RunConfig, tokenizer: Any) -> None:
    """Whether servers are there and can teach, and vLLM is installed, before a model loads.

    Raises:
        ConfigError: which teacher, and the cure. ServerError: a server that does not answer.
    """
    for name, teacher in config.teachers.items():
        if teacher.engine == "server":
            check_server(config, name, tokenizer)
        elif teacher.engine == "vllm" and config.cluster is None:
            require_vllm(f"teachers.{name}.engine")


def task_rollouts(config: RunConfig) -> dict[str, TaskRollout]:
    tasks = {}
    for name in config.tasks:
        tasks[name] = config.task_rollout(name)
        tasks[EVALUATION + name] = config.task_rollout(name, evaluation=True)
    return tasks


def make_placement(
    config: RunConfig, learner: Learner, tokenizer: Any, vocabulary: int, pools: EnvironmentPools
) -> Placement:
    if config.cluster is None:
        engine = TransformersEngine(learner.model, vocabulary=vocabulary)
        teachers = {
            name: _make_teacher(name, teacher, vocabulary)
            for name, teacher in config.teachers.items()
        }
        guides = _guides(config, teachers, vocabulary)
        worker = RolloutWorker(engine, tokenizer, task_rollouts(config), pools, guides)
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
        stalled=(Path(config.run) / "stalled").absolute(),
        make_worker=partial(_make_worker, config, vocabulary),
        make_teachers={
            name: partial(_make_teacher, name, teacher, vocabulary)
            for name, teacher in config.teachers.items()
        },
        weights=lambda: {
            name: tensor.detach().cpu().numpy()
            for name, tensor in learner.model.state_dict().items()
        },
    )


def _make_worker(config: RunConfig, vocabulary: int) -> RolloutWorker:
    """A rollout worker with its own copy of the student (in a Ray actor)."""
    model = load_student(config.student, seed=config.seed)
    tokenizer = load_tokenizer(student_tokenizer(config.student))
    engine = TransformersEngine(model, vocabulary=vocabulary)
    teachers = {
        name: _make_teacher(name, config.teachers[name], vocabulary)
        for name in _guiding(config).values()
    }
    guides = _guides(config, teachers, vocabulary)
    return RolloutWorker(engine, tokenizer, task_rollouts(config), guides=guides)


def _guiding(config: RunConfig) -> dict[str, str]:
    """The teachers that play prefixes, by task."""
    return {
        name: str(task.teacher)
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


def _make_teacher(name: str, config: TeacherConfig, vocabulary: int) -> TeacherService:
    if config.engine == "server":
        digest = digest_of_served(config.model)
    else:  # other engines' scores are no others, but hold no entropy: a cache keeps them apart
        engine = "" if config.engine == "transformers" else config.engine
        digest = digest_of(config.model, dtype=config.dtype + engine)
    return TeacherService(
        name,
        load_teacher(name, config, vocabulary),
        digest=digest,
        dtype=config.dtype,
        cache=None if config.cache is None else Path(config.cache).expanduser(),
        sleeps=config.sleeps,
    )


def load_teacher(name: str, config: TeacherConfig, vocabulary: int) -> Teacher:
    """A teacher in its engine."""
    if config.engine == "server":
        return ServerTeacher(name, config, vocabulary=vocabulary)
    if config.engine == "vllm":
        return load_vllm_teacher(name, config, vocabulary=vocabulary)
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    return TransformersTeacher(model.requires_grad_(False), vocabulary=vocabulary)
