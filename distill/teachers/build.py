"""The teachers that a config names, checked and built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.distill.config.resolved import TaskSettings, support_of
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.engines.vllm.start import require_vllm
from tutelage.distill.models.loading import load_model
from tutelage.distill.teachers.fingerprint import digest_of, digest_of_served
from tutelage.distill.teachers.server import ServerTeacher, check_server
from tutelage.distill.teachers.service import Teacher, TeacherService
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.distill.teachers.vllm import load_vllm_teacher


def check_teachers(config: RunConfig, tasks: Mapping[str, TaskSettings], tokenizer: Any) -> None:
    """Check, before any model loads, that servers answer and can teach, and that vLLM is installed.

    Raises:
        ConfigError: which teacher, and the cure. ServerError: a server that does not answer.
    """
    for name, teacher in config.teachers.items():
        if teacher.engine == "server":
            check_server(name, teacher, tokenizer, k=support_of(name, tasks))
        elif teacher.engine == "vllm" and config.cluster is None:  # else other machines need it
            require_vllm(f"teachers.{name}.engine")


def make_teacher(name: str, config: TeacherConfig, vocabulary: int) -> TeacherService:
    if config.engine == "server":
        digest = digest_of_served(config.model)
    else:
        # The cache's keys depend on the digest. An engine's scores are the same but for entropy,
        # which vLLM does not give: with its name in the digest no engine reads another's.
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
    """Start the teacher's engine, or connect to its server."""
    if config.engine == "server":
        return ServerTeacher(name, config, vocabulary=vocabulary)
    if config.engine == "vllm":
        return load_vllm_teacher(name, config, vocabulary=vocabulary)
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    return TransformersTeacher(model.requires_grad_(False), vocabulary=vocabulary, name=name)
