"""The vLLM rollout engine: continuous batching over many sessions, each of which waits for its own
environment only.

A session has no state here. Its next turn sends all its ids again, and vLLM finds their keys and
values among the cached blocks.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.config.teachers import VllmConfig
from tutelage.distill.engines.vllm import sync
from tutelage.distill.engines.vllm.processes import end
from tutelage.distill.engines.vllm.start import EngineFailure, broken, require_vllm, start, stop
from tutelage.distill.models.student import Student
from tutelage.scheduler.engine import Completion, Request, Weights
from tutelage.scheduler.episodes import SamplingParams

WANTED = "rollout.engine=vllm"

PROBE_STEPS = 100
"""Steps that scoring the probe may take. It needs one; more if vLLM prefills it in chunks."""

Source = Callable[[], tuple[dict[str, torch.Tensor], sync.Probe]]
"""`sync.source` of the learner's student."""


class VllmEngine:
    """Generates with vLLM; `load` before the first request.

    Two runs are not bit-identical: a request's seed fixes its draws, but its log-probabilities
    depend in the last bits on which requests share its batch, and so on how fast environments
    answer; a draw that falls between two such values gives another token.

    Args:
        engine: a started LLMEngine; its weights are replaced before use.
        source: gives the weights of the learner in this process, for `load(None, ...)`; None: they
            come with the call.
        alone: whether this process exists for the engine alone. Then it ends when the engine
            breaks, and the code that started it starts another.
    """

    lockstep = False

    def __init__(self, engine: Any, *, source: Source | None, alone: bool = False) -> None:
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        self._params, self._final = VllmParams, RequestOutputKind.FINAL_ONLY
        self._engine, self._source, self._alone = engine, source, alone
        self._dtype = str(engine.model_config.dtype).removeprefix("torch.")
        self.version = -1
        self.max_context = int(engine.model_config.max_model_len)
        self._requests: dict[str, Request] = {}
        self._of_session: dict[int, str] = {}
        self._count = 0
        self._before: tuple[npt.NDArray[np.float32], sync.Probe] | None = None
        self.gap = float("nan")
        """Nats between engine and learner on the probe, at the last sync."""
        self.generated_tokens = self.prefilled_tokens = self.cached_tokens = 0

    @property
    def pending(self) -> int:
        return len(self._requests)

    def load(self, weights: Weights | None, version: int) -> None:
        """Take weights (None: from the learner in this process) and check that they arrived.

        Raises:
            SyncError: they did not.
        """
        if self.pending:
            raise RuntimeError(
                f"{self.pending} requests are in flight: load weights between rollouts"
            )
        if weights is None:
            if self._source is None:
                raise ValueError(f"version {version}: this engine shares no memory with a learner")
            tensors, probe = self._source()
        else:
            tensors, probe = sync.unpacked(weights)
        probe = probe.first(self.max_context - 1)  # vLLM must generate at least one token
        with self._guarded("taking weights"):
            sync.push(self._engine, tensors)
            # vLLM keeps keys and values by token ids alone, of whatever weights
            if not self._engine.reset_prefix_cache():
                raise sync.SyncError(
                    f"version {version}: vllm did not drop the prefix cache of the older weights"
                )
            found_T = self.score(probe.ids_T.tolist())
        self.gap = sync.check_arrival(
            found_T, probe, self._before, version=version, dtype=self._dtype
        )
        self._before, self.version = (found_T, probe), version

    def score(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Log-probabilities of a text's tokens after the first; nothing else may run."""
        params = self._params(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, temperature=0.0
        )
        self._engine.add_request("probe", {"prompt_token_ids": list(ids)}, params)
        for _ in range(PROBE_STEPS):
            if outputs := self._engine.step():
                flat = outputs[0].prompt_logprobs  # the first token has none
                return np.asarray(flat.logprobs, dtype=np.float32)
        raise EngineFailure(f"vllm scored no text of {len(ids)} ids in {PROBE_STEPS} steps")

    def submit(self, request: Request) -> None:
        if self.version < 0:
            raise RuntimeError(
                "the engine holds no weights yet: load them before the first request"
            )
        if request.session in self._of_session:
            raise ValueError(f"session {request.session} has a request in flight: await its reply")
        room = self.max_context - len(request.ids)
        if request.max_new_tokens < 1 or request.max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens={request.max_new_tokens} after {len(request.ids)} ids: the model's"
                f" context of {self.max_context} leaves 1 to {room}"
            )
        self._count += 1
        name = f"{request.session}/{self._count}"
        params = self._params(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            seed=request.seed % (1 << 63),  # vLLM takes a signed integer
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(request.stop_ids),
            ignore_eos=True,  # stop_ids are complete
            logprobs=0,  # the sampled token's only
            flat_logprobs=True,  # arrays, not an object per token
            detokenize=False,
            output_kind=self._final,
            skip_clone=True,  # vLLM would deep-copy the parameters of every request
        )
        self._engine.add_request(name, {"prompt_token_ids": list(request.ids)}, params)
        self._requests[name], self._of_session[request.session] = request, name

    def release(self, session: int) -> None:
        name = self._of_session.pop(session, None)
        if name is not None:
            del self._requests[name]
            self._engine.abort_request([name])

    def step(self) -> list[Completion]:
        if not self._requests:
            return []
        with self._guarded("a step"):
            outputs = self._engine.step()
        return [self._completed(output) for output in outputs if output.finished]

    def _completed(self, output: Any) -> Completion:
        request = self._requests.pop(output.request_id)
        del self._of_session[request.session]
        said = output.outputs[0]
        if said.finish_reason not in ("stop", "length"):
            raise EngineFailure(
                f"vllm ended session {request.session} with {said.finish_reason!r} after"
                f" {len(said.token_ids)} of {request.max_new_tokens} tokens"
            )
        ids = list(said.token_ids)
        cached = output.num_cached_tokens or 0
        self.generated_tokens += len(ids)
        self.cached_tokens += cached
        self.prefilled_tokens += len(request.ids) - cached
        return Completion(
            session=request.session,
            ids=ids,
            logprobs=list(said.logprobs.logprobs),
            stopped=ids[-1] in request.stop_ids,
            sampling_logprobs=_under_sampling(request.sampling, said.logprobs.logprobs),
        )

    def close(self) -> None:
        if self._engine is not None:
            stop(self._engine)
        self._engine = None

    def _guarded(self, doing: str) -> _Guard:
        return _Guard(self, doing)


def _under_sampling(sampling: SamplingParams, logprobs: Sequence[float]) -> list[float] | None:
    """The tokens' log-probabilities under the sampling parameters. vLLM tells only the whole
    policy's (`logprobs_mode`); None: the learner has to compute them."""
    if sampling.whole:
        return list(logprobs)
    return [0.0] * len(logprobs) if sampling.temperature == 0 else None


class _Guard:
    """Names an engine's failure; ends the process if the engine is alone in it."""

    def __init__(self, engine: VllmEngine, doing: str) -> None:
        self._engine, self._doing = engine, doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, sync.SyncError):
            return
        engine = self._engine
        doing = f"{self._doing} with {engine.pending} requests in flight"
        said = broken(engine._engine, doing, error)
        if engine._alone:
            print(said, file=sys.stderr, flush=True)
            try:
                end(engine._engine)
            finally:
                os._exit(1)
        raise EngineFailure(said) from error


def make_engine(
    settings: Any,
    options: VllmConfig,
    *,
    vocabulary: int,
    dtype: str,
    max_live: int,
    student: Student | None = None,
) -> VllmEngine:
    """An engine for a model of these settings (transformers' configuration object).

    Args:
        vocabulary: the tokenizer's ids; rows of the embedding beyond it are left out.
        dtype: of the learner's weights.
        max_live: requests in flight at once.
        student: the learner's, in this process; None: weights come from another process.

    Raises:
        ConfigError: vLLM is not installed, or the options do not fit.
        RuntimeError: it does not start.
    """
    require_vllm(WANTED)
    with tempfile.TemporaryDirectory(prefix="tutelage-vllm-") as folder:
        _write_settings(settings, vocabulary, Path(folder))
        engine = start(
            folder,
            options,
            dtype=dtype,
            syncs=True,
            load_format="dummy",  # random weights: the learner's come before the first request
            max_num_seqs=max_live,
        )
    if student is None:
        return VllmEngine(engine, source=None, alone=True)
    return VllmEngine(engine, source=partial(sync.source, student))


def _write_settings(settings: Any, vocabulary: int, folder: Path) -> None:
    """Write config.json as vLLM needs it: with its architecture, and without rows of padding."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # use_diff would leave out what is transformers' default
    data = json.loads(settings.to_json_string(use_diff=False))
    data["vocab_size"] = vocabulary
    data["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[settings.model_type]]
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
