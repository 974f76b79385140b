"""A teacher's keys, and what each engine supports; checked before anything loads."""

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
"""The keys that only some engines have."""


def check_keys(teacher: TeacherConfig) -> None:
    """Raises ValueError for a key of another engine, and for a server without its url."""
    # One class with this table, not a union discriminated on `engine`: a key of another engine
    # would be an unknown one there, and the message could not name the engine that has it.
    for key, engines in ENGINES_WITH.items():
        # by value, not by model_fields_set: the config.yaml of a run folder gives every key
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
    """What an objective needs that the teacher's engine cannot give; None: nothing. here: the
    teacher runs on this machine, so its devices matter."""
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
    """How a vLLM engine is started; keys that vLLM has too have its names."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """The type of weights and arithmetic in vLLM; none: as in student.dtype. Not for a teacher's
    engine, whose type is the teacher's own dtype."""
    gpu_memory_utilization: Part = 0.45
    """The share of the GPU's memory that vLLM takes for weights and key-value cache together: the
    learner, or a teacher, has the other half."""
    kv_cache_gib: Above0 | None = None
    """GiB of key-value cache in each of vLLM's processes; none: what gpu_memory_utilization leaves,
    and on the CPU 1 GiB, which holds 260,000 tokens of the tiny models."""
    max_model_len: Positive | None = None
    """The most tokens of a row; none: the model's context."""
    max_num_batched_tokens: Positive | None = None
    """The most tokens of one forward; none: vLLM's own choice."""
    tensor_parallel_size: Positive = 1
    """How many GPUs share the model, each with a process of its own."""
    enforce_eager: bool | None = None
    """true: run without CUDA graphs and compilation. None: false on a GPU, true on the CPU, where
    compiling takes longer than it gains."""

    def cache_bytes(self, *, on_cpu: bool) -> int | None:
        """`kv_cache_gib` in bytes; None: what gpu_memory_utilization leaves."""
        size = 1.0 if self.kv_cache_gib is None and on_cpu else self.kv_cache_gib
        return None if size is None else int(size * (1 << 30))


class TeacherConfig(Section):
    """The model that scores the student's tokens. Some keys are for some engines only; with another
    one they are refused."""

    model: Place
    """The teacher: a folder, a hub id or builtin:NAME; with engine=server the name under which the
    server offers the model."""
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """What runs the teacher. transformers, vllm: this program. server: an OpenAI-compatible server
    that is already running, such as `vllm serve`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the teacher's weights and arithmetic. With engine=server it only says what type
    the server uses, and so how far self-tests may differ (default: bfloat16)."""
    device: Device = "auto"
    """engine=transformers: the teacher's device: auto (cuda where there is one), cpu, cuda or
    cuda:N."""
    cache: Place | None = None
    """engine=transformers or vllm: a folder that keeps scores for later runs of the same rows.
    None: no cache, since a student's own rows hardly ever repeat."""
    sleeps: bool = False
    """engine=transformers or vllm: move the weights to the CPU's memory between answers. It is
    slower, and leaves the GPU to the others."""
    vllm: VllmConfig | None = None
    """engine=vllm: how vLLM is started; none: the defaults."""
    url: str | None = None
    """engine=server, required: the server's address, such as http://host:8000."""
    weights: Place | None = None
    """engine=server: a folder or hub id of the same model, with which `tutelage doctor` compares
    the server's scores."""
    api_key_env: str | None = None
    """engine=server: the name of the environment variable that holds the server's API key."""
    timeout: Above0 = 300.0
    """engine=server: seconds that one answer may take."""
    attempts: Positive = 8
    """engine=server: how often a request is sent before the run stops. The pauses between 8
    attempts last 91 s, enough for a server to restart."""
    concurrency: Positive = 8
    """engine=server: the most rows that are sent at the same time."""
    max_answer_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 256.0
    """engine=server: the largest answer in MiB; a longer one is refused. 32,000 tokens with k=64
    take about 180."""

    @model_validator(mode="before")
    @classmethod
    def _server_dtype(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("engine") == "server":
            return {"dtype": "bfloat16"} | data  # what servers usually run
        return data

    @model_validator(mode="after")
    def _own_keys(self) -> TeacherConfig:
        check_keys(self)
        return self

    @property
    def files(self) -> str | None:
        """Where its weights are to be had; None: the server alone has them."""
        return self.weights if self.engine == "server" else self.model

    @property
    def tokenizer(self) -> str | None:
        """Where its tokenizer is, which must be the student's; None: the server alone has it."""
        return self.files
