"""Builds the learner that a config names, in this process or over several."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.sections import StudentConfig
from tutelage.distill.models.loading import device_of, load_student
from tutelage.distill.models.student import Student
from tutelage.distill.models.threads import cores
from tutelage.distill.student.learner import Learner


def make_learner(config: RunConfig, vocabulary: int) -> Learner:
    """The config's learner.

    Raises:
        ConfigError: more processes than GPUs.
    """
    given: dict[str, Any] = {"config": config.optimizer, "steps": config.steps}
    if config.learner.processes == 1:
        student = load_student(config.student, seed=config.seed, vocabulary=vocabulary)
        return Learner(student, **given)
    here = torch.cuda.device_count()
    if device_of(config.student.device).type == "cuda" and here < config.learner.processes:
        raise ConfigError(
            f"learner.processes: {config.learner.processes} of them take a GPU each, and there are"
            f" {here}: lower it, or set student.device=cpu"
        )
    # imported late: a single process needs nothing of torch.distributed
    from tutelage.distill.student.sharded import Setup, start

    return start(
        Setup(
            make_student=partial(rank_student, config.student, config.seed, vocabulary),
            processes=config.learner.processes,
            timeout=config.learner.timeout,
            threads=learner_threads(config),
            **given,
        )
    )


def rank_student(student: StudentConfig, seed: int, vocabulary: int, rank: int) -> Student:
    """The student on the device of one of the learner's processes."""
    kind = device_of(student.device).type
    device = kind if kind == "cpu" else f"{kind}:{rank}"
    there = student.model_copy(update={"device": device})
    return load_student(there, seed=seed, vocabulary=vocabulary)


def learner_threads(config: RunConfig) -> int:
    """How many threads torch uses in each of the learner's processes."""
    # The ranks compute at the same time: together they get the cores, not each of them.
    return config.student.threads or max(1, cores() // config.learner.processes)
