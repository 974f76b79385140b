"""The teachers that a config names, checked and built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.distill.config.resolved import TaskSettings, support_of
from tutelage.distill.config.run import RunConfig
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


def make_teacher(name: str, config: RunConfig, vocabulary: int) -> TeacherService:
    section = config.teachers[name]
    if section.engine == "server":
        digest = digest_of_served(section.model)
    else:
        # The cache's keys depend on the digest. An engine's scores are the same but for entropy,
        # which vLLM does not give: with its name in the digest no engine reads another's.
        engine = "" if section.engine == "transformers" else section.engine
        digest = digest_of(section.model, dtype=section.dtype + engine)
    return TeacherService(
        name,
        load_teacher(name, config, vocabulary),
        digest=digest,
        dtype=section.dtype,
        cache=None if section.cache is None else Path(section.cache).expanduser(),
        sleeps=section.sleeps,
    )


def load_teacher(name: str, config: RunConfig, vocabulary: int) -> Teacher:
    """Start the teacher's engine, or connect to its server."""
    section = config.teachers[name]
    if section.engine == "server":
        return ServerTeacher(name, section, vocabulary=vocabulary)
    if section.engine == "vllm":
        return load_vllm_teacher(name, section, vocabulary=vocabulary)
    model = load_model(section.model, dtype=section.dtype, device=section.device)
    return TransformersTeacher(model.requires_grad_(False), vocabulary=vocabulary, name=name)
