"""What a run is put together from: its timetable, its workers and its teachers, here or on Ray."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from tutelage.distill.config import ConfigError, RunConfig, StudentConfig, TeacherConfig
from tutelage.distill.conversations import spoken
from tutelage.distill.engine import TransformersEngine
from tutelage.distill.footprint import student_footprint
from tutelage.distill.identity import digest_of, digest_of_served
from tutelage.distill.learner import Course, Learner
from tutelage.distill.models import (
    device_of,
    load_model,
    load_student,
    load_tokenizer,
    student_settings,
    student_tokenizer,
)
from tutelage.distill.server_teacher import ServerTeacher, check_server
from tutelage.distill.teachers import Teacher, TeacherService, TransformersTeacher
from tutelage.distill.threads import cores
from tutelage.distill.transport import array_of
from tutelage.distill.vllm import sync
from tutelage.distill.vllm.engine import WANTED
from tutelage.distill.vllm.engine import make_engine as make_vllm_engine
from tutelage.distill.vllm.start import require_vllm
from tutelage.distill.vllm.teacher import load_vllm_teacher
from tutelage.envs.plugins import beside, look_beside
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
            teachers=task.teachers,
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


def check_room(config: RunConfig) -> None:
    """Raises ConfigError where the disk has no room for one checkpoint: the weights, and what the
    optimizer keeps of each of them."""
    weights = student_footprint(config.student).weights(config.student.dtype) or 0
    need = weights * (3 if config.optimizer.name == "adamw" else 2)
    if (free := shutil.disk_usage(config.run).free) < need:
        raise ConfigError(
            f"run: {config.run} has {free / 2**20:,.0f} MiB free, and one checkpoint takes"
            f" {need / 2**20:,.0f} MiB: make room, or choose another folder"
        )


def task_rollouts(config: RunConfig) -> dict[str, TaskRollout]:
    tasks = {}
    for name in config.tasks:
        tasks[name] = config.task_rollout(name)
        tasks[EVALUATION + name] = config.task_rollout(name, evaluation=True)
    return tasks


def make_learner(config: RunConfig, vocabulary: int) -> Learner:
    """In this process, or over several.

    Raises:
        ConfigError: more of them than GPUs.
    """
    given: dict[str, Any] = {
        "vocabulary": vocabulary,
        "config": config.optimizer,
        "steps": config.steps,
    }
    if config.learner.processes == 1:
        return Learner(load_student(config.student, seed=config.seed), **given)
    here = torch.cuda.device_count()
    if device_of(config.student.device).type == "cuda" and here < config.learner.processes:
        raise ConfigError(
            f"learner.processes: {config.learner.processes} of them take a GPU each, and there are"
            f" {here}: lower it, or set student.device=cpu"
        )
    from tutelage.distill.data_parallel import DataParallelLearner, Setup

    return DataParallelLearner(
        Setup(
            make_model=partial(rank_model, config.student, config.seed),
            processes=config.learner.processes,
            timeout=config.learner.timeout,
            threads=learner_threads(config),
            **given,
        )
    )


def rank_model(student: StudentConfig, seed: int, rank: int) -> Any:
    """The student on the device of one of the learner's processes."""
    kind = device_of(student.device).type
    device = kind if kind == "cpu" else f"{kind}:{rank}"
    return load_student(student.model_copy(update={"device": device}), seed=seed)


def learner_threads(config: RunConfig) -> int:
    """Of torch in each of the learner's processes."""
    return config.student.threads or max(1, cores() // config.learner.processes)


def make_placement(
    config: RunConfig, learner: Learner, tokenizer: Any, vocabulary: int, pools: EnvironmentPools
) -> Placement:
    if config.cluster is None:
        engine = make_engine(config, learner.copy, vocabulary)
        teachers = {
            name: _make_teacher(name, teacher, vocabulary)
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
        stalled=(Path(config.run) / "stalled").absolute(),
        make_worker=partial(_make_worker, config, vocabulary, beside()),
        make_teachers={
            name: partial(_make_teacher, name, teacher, vocabulary)
            for name, teacher in config.teachers.items()
        },
        weights=partial(_weights, config, learner.copy, vocabulary),
    )


def _weights(config: RunConfig, model: Any, vocabulary: int) -> dict[str, npt.NDArray[Any]]:
    """What workers in other processes load."""
    if config.rollout.engine == "vllm":
        dtype = config.vllm.dtype or config.student.dtype
        weights = sync.weights_of(model, vocabulary)
        return sync.packed(weights, sync.probe_of(model, vocabulary), dtype=dtype)
    return {name: array_of(tensor) for name, tensor in model.state_dict().items()}


def check_rollout_engine(config: RunConfig) -> None:
    """Raises ConfigError for an engine that is not installed where it would run: here."""
    here = config.cluster is None or config.cluster.address == "local"
    if config.rollout.engine == "vllm" and here:
        require_vllm(WANTED)


def make_engine(config: RunConfig, model: Any, vocabulary: int) -> Engine:
    """The engine that plays, beside the learner's model in this process."""
    if config.rollout.engine == "vllm":
        return _vllm_engine(config, model.config, vocabulary, learner=model)
    return TransformersEngine(model, vocabulary=vocabulary)


def _vllm_engine(
    config: RunConfig, settings: Any, vocabulary: int, *, learner: Any = None
) -> Engine:
    return make_vllm_engine(
        settings,
        config.vllm,
        vocabulary=vocabulary,
        dtype=config.student.dtype,
        max_live=max(config.rollout_of(task).max_live for task in config.tasks),
        learner=learner,
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
        engine = _vllm_engine(config, student_settings(config.student), vocabulary)
    else:
        model = load_student(config.student, seed=config.seed)
        engine = TransformersEngine(model, vocabulary=vocabulary)
    teachers = {
        name: _make_teacher(name, config.teachers[name], vocabulary)
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
    return TransformersTeacher(model.requires_grad_(False), vocabulary=vocabulary, name=name)
