"""A teacher in a vLLM engine of this process: prompts go in as ids, numbers come out as arrays.

They are taken where vLLM's front end would unpack them into Python lists, one number after the
other (`keep_arrays`): that took 20 us a token, a third of a tiny model's time.

It says of each token its top K and the token's own log-probability (`prompt_logprobs`), and, on a
CUDA device, what it gives to ids that the student chose (`prompt_logprob_token_ids`, which vLLM's
V2 model runner alone computes). Padding rows of the embedding are cut off before the softmax, as in
TransformersTeacher.

vLLM computes the logits of all tokens of a forward at once on the CPU, of 1,024 on a GPU: the size
of a forward bounds the memory (`batched_tokens`).

Letters: N chosen tokens, K support size, J ids that the student asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.teachers import TeacherConfig, VllmConfig
from tutelage.distill.engines.vllm.start import (
    RELEASE,
    EngineFailure,
    broken,
    installed,
    start,
    stop,
)
from tutelage.distill.models.loading import load_settings, resolve
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.objectives.scores import CHUNK
from tutelage.distill.teachers.candidates import (
    BadCandidates,
    Candidates,
    check_linear,
    read_length,
)
from tutelage.scheduler.episodes import Row

LEAST_TOKENS = 256
"""Of a forward: no fewer than vLLM's sequences."""


class VllmTeacher:
    """Scores rows.

    Args:
        name: in the configuration. engine: vLLM's LLMEngine (`load_vllm_teacher`).
        vocabulary: ids that take probability.
    """

    model = None
    remote, retries = False, 0

    def __init__(self, name: str, engine: Any, *, vocabulary: int) -> None:
        self.name, self.vocabulary, self._engine = name, vocabulary, engine
        self._asked = 0  # requests so far: their ids must differ

    def score(
        self,
        rows: Sequence[Row],
        needs: Needs,
        asked: Sequence[npt.NDArray[np.int32]] | None = None,
    ) -> list[TeacherScores]:
        """See TransformersTeacher.score; without entropies.

        Raises:
            ValueError: the whole distribution is asked for, the student's ids where vLLM does not
                score them, or a row has branches.
            ConfigError: a row is longer than the engine's context.
            EngineFailure: the engine broke.
        """
        self._check(rows, needs)
        scores: list[TeacherScores | None] = [None] * len(rows)
        waiting: dict[str, tuple[int, list[Any]]] = {}
        try:
            for i, row in enumerate(rows):
                prompt = {
                    "type": "token",
                    "prompt_token_ids": row.ids_T[: read_length(row)].tolist(),
                }
                self._asked += 1
                name = str(self._asked)
                wanted = _wanted(row, needs.width, None if asked is None else asked[i])
                parts: list[Any] = []
                waiting[name] = i, parts
                keep_arrays(self._engine, self._engine.add_request(name, prompt, wanted), parts)
            while waiting:
                for output in self._engine.step():
                    if output.finished:
                        i, parts = waiting.pop(output.request_id)
                        own = None if asked is None else asked[i]
                        scores[i] = self._packed(output, parts, rows[i], needs.width, own)
        except BaseException as error:
            with suppress(Exception):  # the first error tells more
                self._engine.abort_request([*waiting])
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            raise EngineFailure(
                f"teachers.{self.name}: {broken(self._engine, f'scoring {len(rows)} rows', error)}"
            ) from error
        return [one for one in scores if one is not None]

    def sleep(self) -> None:
        """Leave the GPU: the weights go to the CPU's memory, the cache is dropped."""
        self._engine.sleep(level=1)

    def wake(self) -> None:
        """Come back to it."""
        self._engine.wake_up()

    def close(self) -> None:
        """Let go of what the engine holds."""
        if self._engine is not None:
            stop(self._engine)
        self._engine = None

    def _check(self, rows: Sequence[Row], needs: Needs) -> None:
        cure = f"set teachers.{self.name}.engine to transformers"
        if needs.full:
            raise ValueError(
                f"teachers.{self.name}: vLLM answers with its top K, and the whole distribution was"
                f" asked for: {cure}"
            )
        if needs.student_k and not self._engine.vllm_config.use_v2_model_runner:
            raise ValueError(
                f"teachers.{self.name}: vLLM scores the student's own ids with its V2 model runner"
                f" alone, on a CUDA device: {cure}, or choose support='teacher'"
            )
        check_linear(f"teachers.{self.name}", rows)
        room = self._engine.model_config.max_model_len - 1  # vLLM speaks one token itself
        longest = max((read_length(row) for row in rows), default=0)
        if longest > room:
            raise ConfigError(
                f"teachers.{self.name}: a row has {longest} tokens, and the engine has room for"
                f" {room}: set teachers.{self.name}.vllm.max_model_len to {longest + 1} or more, or"
                " shorten the episodes (rollout.max_turns, rollout.max_new_tokens,"
                " rollout.context)"
            )

    def _packed(
        self, output: Any, parts: list[Any], row: Row, k: int, ids_NJ: npt.NDArray[np.int32] | None
    ) -> TeacherScores:
        ids_TC, logprobs_TC = (torch.cat([part[n] for part in parts]).cpu() for n in (0, 1))
        # of every token but the first: itself, then the top K
        ends_T = np.arange(len(ids_TC) + 1, dtype=np.int64) * ids_TC.shape[1]
        found = Candidates(
            ids_C=ids_TC.flatten().numpy().astype(np.int32),
            logprobs_C=logprobs_TC.flatten().numpy(),
            starts_T=np.concatenate([ends_T[:1], ends_T[:-1]]),
            ends_T=ends_T,
        )
        try:
            scores = found.scores(row, k=k, vocabulary=self.vocabulary)
        except BadCandidates as error:
            raise ValueError(
                f"teachers.{self.name}: vLLM's answer is no score: {error}: check the weights"
                " (tutelage doctor) and dtype"
            ) from None
        if ids_NJ is None:
            return scores
        at_N = np.flatnonzero(row.action_mask_T)
        logprobs_NJ = output.prompt_token_id_logprobs[at_N - at_N[0]]
        return replace(
            scores,
            query_ids_NJ=torch.from_numpy(ids_NJ).long(),
            query_logprobs_NJ=torch.from_numpy(logprobs_NJ),
        )


def load_vllm_teacher(name: str, config: TeacherConfig, *, vocabulary: int) -> VllmTeacher:
    """Starts its engine.

    Raises: as `start`.
    """
    options = config.vllm or VllmConfig()
    settings = load_settings(config.model).get_text_config()
    more: dict[str, Any] = {"max_logprobs": vocabulary, "enable_chunked_prefill": True}
    if options.max_model_len is None:
        # A row may fill the context, and vLLM wants room for the token that it speaks, which it
        # never reads: no position beyond the model's is used.
        room = settings.max_position_embeddings + 1
        more |= {"max_model_len": room, "hf_overrides": {"model_max_length": room}}
    if options.max_num_batched_tokens is None and not torch.cuda.is_available():
        more["max_num_batched_tokens"] = batched_tokens(settings.vocab_size)
    engine = start(
        resolve(config.model),
        options,
        dtype=config.dtype,
        syncs=False,
        sleeps=config.sleeps,
        **more,
    )
    if settings.vocab_size > vocabulary:
        engine.apply_model(partial(cut_padding, vocabulary=vocabulary))
    return VllmTeacher(name, engine, vocabulary=vocabulary)


def keep_arrays(engine: Any, request: str, parts: list[Any]) -> None:
    """Let the request's (ids, log-probabilities, ...) be put into `parts`, as tensors. request:
    vLLM's own name of it.

    Raises:
        ConfigError: this vLLM has no such place.
    """
    try:
        processor = engine.output_processor.request_states[request].logprobs_processor
        assert callable(processor._update_prompt_logprobs)
    except AttributeError as error:
        raise ConfigError(
            f"vllm {installed()} keeps log-probabilities elsewhere ({error}): install vllm"
            f" {RELEASE}"
        ) from None
    processor._update_prompt_logprobs = parts.append


def batched_tokens(rows: int) -> int:
    """Tokens of a forward whose logits over so many embedding rows take no more than CHUNK."""
    return min(max(LEAST_TOKENS, CHUNK // rows), 2048)


def cut_padding(model: Any, *, vocabulary: int) -> None:
    """Let ids from `vocabulary` on take no probability, in one of vLLM's models."""
    plain = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = plain(*args, **kwargs)
        if logits is not None:  # the first worker alone has them
            logits[..., vocabulary:] = -torch.inf
        return logits

    model.compute_logits = compute_logits


def _wanted(row: Row, k: int, ids_NJ: npt.NDArray[np.int32] | None) -> Any:
    """vLLM's parameters of a row's request."""
    from vllm import SamplingParams

    more: dict[str, Any] = {}
    if ids_NJ is not None:
        at_N = np.flatnonzero(row.action_mask_T)
        # vLLM counts the tokens that predict: one before the chosen ones. -1: nothing is asked.
        ids_TJ = np.full((at_N[-1] + 1 - at_N[0], ids_NJ.shape[1]), -1, dtype=np.int32)
        ids_TJ[at_N - at_N[0]] = ids_NJ
        more = {"prompt_logprob_token_ids": ids_TJ, "prompt_logprob_start": int(at_N[0]) - 1}
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=k,
        flat_logprobs=True,
        detokenize=False,
        **more,
    )
