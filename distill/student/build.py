"""The learner that a config names, built: in this process, or over several."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.sections import StudentConfig
from tutelage.distill.models.loading import device_of, load_student
from tutelage.distill.models.threads import cores
from tutelage.distill.student.learner import Learner


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
    from tutelage.distill.student.sharded import DataParallelLearner, Setup

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
