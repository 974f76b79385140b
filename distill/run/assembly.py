"""Puts a run's rollout workers and teachers together, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tutelage.distill.config.resolved import TaskSettings, rollouts_of
from tutelage.distill.config.run import RunConfig
from tutelage.distill.engines.build import make_engine, worker_engine, worker_weights
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models.conversations import spoken
from tutelage.distill.models.loading import load_tokenizer, student_tokenizer
from tutelage.distill.models.student import Student
from tutelage.distill.student.learner import Learner
from tutelage.distill.teachers.build import make_teacher
from tutelage.distill.teachers.service import Answer, Ask, TeacherService
from tutelage.envs.plugins import beside, look_beside
from tutelage.evaluation.run_folder import STALLED
from tutelage.scheduler.cluster import ClusterSettings, RayCluster
from tutelage.scheduler.engine import Engine
from tutelage.scheduler.placement import InProcess, Placement
from tutelage.scheduler.rollouts import EnvironmentPools, RolloutWorker, TaskRollout


def make_placement(
    config: RunConfig,
    tasks: Mapping[str, TaskSettings],
    learner: Learner,
    tokenizer: Any,
    vocabulary: int,
    pools: EnvironmentPools,
) -> Placement[Ask, Answer]:
    rollouts = rollouts_of(tasks)
    guiding = {name: task.guide for name, task in tasks.items() if task.guide in config.teachers}
    if config.cluster is None:
        engine = make_engine(config, rollouts, learner.student)
        teachers = {name: make_teacher(name, config, vocabulary) for name in config.teachers}
        guides = _guides(guiding, teachers, vocabulary)
        worker = RolloutWorker(engine, tokenizer, rollouts, pools, guides, **spoken(config))
        return InProcess(worker, teachers)
    return RayCluster(
        ClusterSettings(**config.cluster.model_dump()),
        # absolute: an actor has a working directory of its own
        stalled=(Path(config.run) / STALLED).absolute(),
        make_worker=partial(_make_worker, config, rollouts, guiding, vocabulary, beside()),
        make_teachers={
            name: partial(make_teacher, name, config, vocabulary) for name in config.teachers
        },
        weights=partial(worker_weights, config, learner.student),
    )


def _make_worker(
    config: RunConfig,
    rollouts: Mapping[str, TaskRollout],
    guiding: Mapping[str, str],
    vocabulary: int,
    modules: Sequence[str],
) -> RolloutWorker:
    """A rollout worker with its own copy of the student (in a Ray actor). guiding: by task, the
    teacher that plays prefixes. modules: folders with the user's own environments, which need not
    exist on the actor's machine."""
    for folder in modules:
        look_beside(folder)
    pools = EnvironmentPools(rollouts)
    pools.open(rollouts)  # what the node lacks shows before a model loads
    tokenizer = load_tokenizer(student_tokenizer(config.student))
    engine = worker_engine(config, rollouts, vocabulary)
    # A set: a teacher that guides several tasks is loaded once.
    teachers = {name: make_teacher(name, config, vocabulary) for name in set(guiding.values())}
    guides = _guides(guiding, teachers, vocabulary)
    return RolloutWorker(engine, tokenizer, rollouts, pools, guides, **spoken(config))


def _guides(
    guiding: Mapping[str, str], teachers: Mapping[str, TeacherService], vocabulary: int
) -> dict[str, Engine]:
    """An engine over the teacher's own weights for each task that it guides."""
    return {
        task: TransformersEngine(Student(teachers[name].model, vocabulary=vocabulary))
        for task, name in guiding.items()
    }
