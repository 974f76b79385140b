"""What a teacher's engine takes and what it can say, checked before anything loads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from tutelage.distill.config.credentials import check_url, check_variable
from tutelage.distill.config.values import Above0, Device, Part, Place, Positive, Section
from tutelage.distill.objectives import Needs

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


def lacking(teacher: TeacherConfig, needs: Needs, *, here: bool) -> str | None:
    """What an objective needs and the teacher's engine does not say; None: it says all. here: it
    runs on this machine, whose devices count."""
    if teacher.engine == "transformers":
        return None
    top = f"engine: {teacher.engine} answers with its top K alone"
    if needs.full:
        return f"the teacher's whole distribution, and {top}"
    if needs.entropy:
        return f"the teacher's entropy over the whole vocabulary, and {top}"
    if needs.student_k and teacher.engine == "server":
        return f"the teacher at the student's own ids, and {top}"
    if needs.student_k and here and not torch.cuda.is_available():
        return (
            "the teacher at the student's own ids, which vLLM scores on CUDA alone, and this"
            " machine has no such device"
        )
    return None


class VllmConfig(Section):
    """How a vLLM engine is started; its own names for what it has names for."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """None: the model's own in this run."""
    gpu_memory_utilization: Part = 0.45
    """Of the GPU, weights and cache together: the learner, or a teacher, has the other half."""
    kv_cache_gib: Above0 | None = None
    """Of each process that computes; none: what the key above leaves, and on the CPU 1, which holds
    260,000 tokens of the tiny models."""
    max_model_len: Positive | None = None
    """Tokens of a row; none: the model's context."""
    max_num_batched_tokens: Positive | None = None
    """Of one forward; none: as vLLM finds best."""
    tensor_parallel_size: Positive = 1
    """GPUs, each with its process, that share the model."""
    enforce_eager: bool | None = None
    """True: no CUDA graphs; none: graphs on a GPU, and none on the CPU, where compiling takes
    longer than it gains."""

    def cache_bytes(self, *, on_cpu: bool) -> int | None:
        """Of `kv_cache_gib`; None: what gpu_memory_utilization leaves."""
        size = 1.0 if self.kv_cache_gib is None and on_cpu else self.kv_cache_gib
        return None if size is None else int(size * (1 << 30))


class TeacherConfig(Section):
    """Who scores. Every engine has some of the keys below; what belongs to another is refused."""

    model: Place
    """A folder, a hub id or builtin:NAME; of a server: the name under which it serves."""
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """server: an OpenAI-compatible one, such as `vllm serve`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and arithmetic. A server has its own: how far the self-test may be off (bfloat16
    unless said)."""
    device: Device = "auto"
    """transformers: auto (cuda where there is one), cpu, cuda or cuda:N."""
    cache: Place | None = None
    """transformers, vllm: a folder for scores; none: a student's own rows hardly ever repeat."""
    sleeps: bool = False
    """transformers, vllm: between answers it leaves the device to others: slower, less memory."""
    vllm: VllmConfig | None = None
    """vllm: how its engine is started; none: the defaults."""
    url: str | None = None
    """server: such as http://host:8000."""
    weights: Place | None = None
    """server: a folder or hub id of the same model here, to compare it with."""
    api_key_env: str | None = None
    """server: the environment variable that holds the key."""
    timeout: Above0 = 300.0
    """server: seconds of one answer."""
    attempts: Positive = 8
    """server: at one answer; the pauses between 8 of them last 91 s: a restart."""
    concurrency: Positive = 8
    """server: rows in flight."""
    max_answer_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 256.0
    """server: of one answer; a longer one is refused. 32,000 tokens with K = 64 take some 180."""

    @model_validator(mode="before")
    @classmethod
    def _server_dtype(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("engine") == "server":
            return {"dtype": "bfloat16"} | data
        return data

    @model_validator(mode="after")
    def _own_keys(self) -> TeacherConfig:
        check_keys(self)
        return self

    @property
    def files(self) -> str | None:
        """Where its weights and its tokenizer are to be had; None: the server alone has them."""
        return self.weights if self.engine == "server" else self.model
