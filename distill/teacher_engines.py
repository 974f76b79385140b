"""What a teacher's engine takes and what it can say, checked before anything loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage.distill.credentials import check_url, check_variable
from tutelage.distill.objectives import Objective

if TYPE_CHECKING:
    from tutelage.distill.config import TeacherConfig

ENGINES_WITH = {
    "device": ("transformers",),  # vLLM takes CUDA_VISIBLE_DEVICES
    "cache": ("transformers", "vllm"),  # a server's weights may change under their name
    "sleeps": ("transformers", "vllm"),
    "vllm": ("vllm",),
    "url": ("server",),
    "weights": ("server",),
    "api_key_env": ("server",),
    "timeout": ("server",),
    "attempts": ("server",),
    "concurrency": ("server",),
    "max_answer_mib": ("server",),
}
"""A teacher's keys that not every engine has."""


FREE_TO_CHANGE = (
    "model",  # a folder that was moved: the hash of its files is compared
    "device",
    "cache",
    "sleeps",
    "url",
    "weights",
    "api_key_env",
    "timeout",
    "attempts",
    "concurrency",
    "max_answer_mib",
    "vllm",
)
"""Keys that may differ when a run goes on: who teaches is the hash's and the exam's to say."""


def check_keys(teacher: TeacherConfig) -> None:
    """Raises ValueError for a key of another engine, and for a server without its url."""
    for key, engines in ENGINES_WITH.items():
        default = type(teacher).model_fields[key].default
        if teacher.engine not in engines and getattr(teacher, key) != default:
            raise ValueError(
                f"{key} is for engine: {' or '.join(engines)}, and this teacher's is"
                f" {teacher.engine}: change one of them"
            )
    if teacher.vllm is not None and teacher.vllm.dtype is not None:
        raise ValueError(
            f"vllm.dtype: {teacher.vllm.dtype!r}: a teacher's is its own dtype: set that one"
        )
    if teacher.engine == "server":
        if teacher.url is None:
            raise ValueError("engine: server needs url, such as http://host:8000 (it is None)")
        check_url("url", teacher.url)
        if teacher.api_key_env is not None:
            check_variable(teacher.api_key_env)


def check_sleep(key: str) -> None:
    """Raises ValueError where vLLM cannot sleep. key: of the configuration."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"{key}: vLLM's sleep frees a CUDA device, and this machine has none: set it to false,"
            " or engine to transformers"
        )


def lacking(teacher: TeacherConfig, objective: Objective, *, here: bool) -> str | None:
    """What the objective needs and the teacher's engine does not say; None: it says all. here: it
    runs on this machine, whose devices count."""
    if teacher.engine == "transformers":
        return None
    top = f"engine: {teacher.engine} answers with its top K alone"
    if objective.needs_full:
        return f"the teacher's whole distribution, and {top}"
    if objective.needs_entropy:
        return f"the teacher's entropy over the whole vocabulary, and {top}"
    if objective.student_k and teacher.engine == "server":
        return f"the teacher at the student's own ids, and {top}"
    if objective.student_k and here and not torch.cuda.is_available():
        return (
            "the teacher at the student's own ids, which vLLM scores on CUDA alone, and this"
            " machine has no such device"
        )
    return None
