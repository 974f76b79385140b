"""Builds the rollout engine that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutelage.distill.config.run import RunConfig
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.engines.vllm import sync
from tutelage.distill.engines.vllm.engine import WANTED
from tutelage.distill.engines.vllm.engine import make_engine as make_vllm_engine
from tutelage.distill.engines.vllm.start import require_vllm
from tutelage.distill.models.loading import load_initial, student_settings
from tutelage.distill.models.student import Student
from tutelage.distill.models.weights import array_of
from tutelage.scheduler.engine import Engine, Weights
from tutelage.scheduler.rollouts import TaskRollout


def worker_weights(config: RunConfig, student: Student) -> Weights:
    """The weights as workers in other processes load them."""
    if config.rollout.engine == "vllm":
        return sync.packed(*sync.source(student), dtype=config.rollout_dtype)
    return {name: array_of(tensor) for name, tensor in student.weights().items()}


def check_rollout_engine(config: RunConfig) -> None:
    """Raises ConfigError for an engine that would run on this machine and is not installed."""
    # a cluster elsewhere may have what this machine has not
    here = config.cluster is None or config.cluster.address == "local"
    if config.rollout.engine == "vllm" and here:
        require_vllm(WANTED)


def make_engine(config: RunConfig, rollouts: Mapping[str, TaskRollout], student: Student) -> Engine:
    """The engine for these tasks' rollouts, beside the learner in this process."""
    if config.rollout.engine == "vllm":
        settings, vocabulary = student.settings, student.vocabulary
        return _vllm_engine(config, rollouts, settings, vocabulary, student=student)
    return TransformersEngine(student)


def worker_engine(
    config: RunConfig, rollouts: Mapping[str, TaskRollout], vocabulary: int
) -> Engine:
    """The engine that plays these in a process of its own, with its own copy of the student."""
    if config.rollout.engine == "vllm":
        # made from the settings alone: the first sync brings the weights
        return _vllm_engine(config, rollouts, student_settings(config.student), vocabulary)
    model = load_initial(config.student, seed=config.seed)
    return TransformersEngine(Student(model, vocabulary=vocabulary))


def _vllm_engine(
    config: RunConfig,
    rollouts: Mapping[str, TaskRollout],
    settings: Any,
    vocabulary: int,
    *,
    student: Student | None = None,
) -> Engine:
    return make_vllm_engine(
        settings,
        config.vllm,
        vocabulary=vocabulary,
        dtype=config.student.dtype,
        max_live=max(rollout.max_live for rollout in rollouts.values()),
        student=student,
    )
