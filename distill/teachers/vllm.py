"""A teacher in a vLLM engine of this process: rows go in as token ids, scores come out as tensors.

vLLM's front end would turn every log-probability into Python objects, one after the other: 20 us a
token, a third of a tiny model's time. `keep_arrays` takes the tensors before that.

For each token vLLM gives the top K and the token's own log-probability (`prompt_logprobs`). On a
CUDA device it also scores query ids (`prompt_logprob_token_ids`), which only its V2 model runner
does. Padding rows of the embedding are cut off before the softmax, as in TransformersTeacher.

vLLM computes the logits of all tokens of a forward at once on the CPU, and of 1,024 tokens on a
GPU: on the CPU the size of a forward bounds the memory (`batched_tokens`).

Letters: N action tokens, K support size, J query ids, V vocabulary.
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
from tutelage.distill.teachers.transport import QueryIds
from tutelage.scheduler.episodes import Row

LEAST_TOKENS = 256
"""Of a forward: vLLM refuses fewer than its max_num_seqs."""


class VllmTeacher:
    """Scores rows by a vLLM engine.

    Args:
        name: in the configuration. engine: vLLM's LLMEngine (`load_vllm_teacher`).
        vocabulary: ids that get probability.
    """

    model = None
    remote, retries = False, 0

    def __init__(self, name: str, engine: Any, *, vocabulary: int) -> None:
        self.name, self.vocabulary, self._engine = name, vocabulary, engine
        self._requests = 0  # so far: each needs a name of its own

    def score(
        self, rows: Sequence[Row], needs: Needs, query_ids: QueryIds = None
    ) -> list[TeacherScores]:
        """See TransformersTeacher.score; without entropies.

        Raises:
            ValueError: the whole distribution is asked for, or query ids where vLLM does not score
                them, or a row has branches.
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
                self._requests += 1
                name = str(self._requests)
                params = _params(row, needs.width, None if query_ids is None else query_ids[i])
                parts: list[Any] = []
                waiting[name] = i, parts
                # add_request returns vLLM's own name of it, which is not the one that it is given
                keep_arrays(self._engine, self._engine.add_request(name, prompt, params), parts)
            while waiting:
                for output in self._engine.step():
                    if output.finished:
                        i, parts = waiting.pop(output.request_id)
                        own = None if query_ids is None else query_ids[i]
                        scores[i] = self._scores(output, parts, rows[i], needs.width, own)
        except BaseException as error:
            with suppress(Exception):  # the first error tells more
                self._engine.abort_request([*waiting])
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise  # the caller's mistake (ConfigError is a ValueError), or Ctrl-C
            raise EngineFailure(
                f"teachers.{self.name}: {broken(self._engine, f'scoring {len(rows)} rows', error)}"
            ) from error
        return [one for one in scores if one is not None]

    def sleep(self) -> None:
        """Leave the GPU: the weights move to the CPU's memory, the key-value cache is dropped."""
        self._engine.sleep(level=1)  # level 2 would drop the weights too

    def wake(self) -> None:
        """Return to it."""
        self._engine.wake_up()

    def close(self) -> None:
        """Release what the engine holds."""
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
        # vLLM must generate at least one token
        room = self._engine.model_config.max_model_len - 1
        longest = max((read_length(row) for row in rows), default=0)
        if longest > room:
            raise ConfigError(
                f"teachers.{self.name}: a row has {longest} tokens, and the engine has room for"
                f" {room}: set teachers.{self.name}.vllm.max_model_len to {longest + 1} or more, or"
                " shorten the episodes (rollout.max_turns, rollout.max_new_tokens,"
                " rollout.context)"
            )

    def _scores(
        self, output: Any, parts: list[Any], row: Row, k: int, ids_NJ: npt.NDArray[np.int32] | None
    ) -> TeacherScores:
        """What vLLM gave for a row. parts: of each forward that read a piece of it."""
        ids_TC, logprobs_TC = (torch.cat([part[n] for part in parts]).cpu() for n in (0, 1))
        # A line for every token but the first, of k + 1 candidates: itself, then the top K. The
        # first token gets the empty range 0 to 0.
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
        logprobs_NJ = output.prompt_token_id_logprobs[at_N - at_N[0]]  # from the first action on
        return replace(
            scores,
            query_ids_NJ=torch.from_numpy(ids_NJ).long(),
            query_logprobs_NJ=torch.from_numpy(logprobs_NJ),
        )


def load_vllm_teacher(name: str, config: TeacherConfig, *, vocabulary: int) -> VllmTeacher:
    """A teacher whose engine is started here.

    Raises: as `start`.
    """
    options = config.vllm or VllmConfig()
    settings = load_settings(config.model).get_text_config()
    more: dict[str, Any] = {"max_logprobs": vocabulary, "enable_chunked_prefill": True}
    if options.max_model_len is None:
        # A row may fill the context, and vLLM must have room for the token that it generates. It
        # never feeds that token back, so no position beyond the model's is used.
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
    """Have vLLM put the request's tensors (ids, log-probabilities, ...) into `parts`, in place of
    unpacking them. request: vLLM's own name of it.

    Raises:
        ConfigError: another release of vLLM, which keeps them elsewhere.
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
    """Tokens of a forward whose logits over so many embedding rows are no more than CHUNK numbers
    (but for LEAST_TOKENS)."""
    return min(max(LEAST_TOKENS, CHUNK // rows), 2048)  # 2,048: its own default


def cut_padding(model: Any, *, vocabulary: int) -> None:
    """Give ids from `vocabulary` on no probability, in a model of vLLM's."""
    plain = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = plain(*args, **kwargs)
        if logits is not None:  # with tensor parallelism only the first worker has them
            logits[..., vocabulary:] = -torch.inf
        return logits

    model.compute_logits = compute_logits


def _params(row: Row, k: int, ids_NJ: npt.NDArray[np.int32] | None) -> Any:
    """vLLM's SamplingParams of a row's request."""
    from vllm import SamplingParams

    more: dict[str, Any] = {}
    if ids_NJ is not None:
        at_N = np.flatnonzero(row.action_mask_T)
        # vLLM counts positions by the token that predicts: one before the action token. -1: no
        # query there, since observations may stand between a row's actions.
        ids_TJ = np.full((at_N[-1] + 1 - at_N[0], ids_NJ.shape[1]), -1, dtype=np.int32)
        ids_TJ[at_N - at_N[0]] = ids_NJ
        more = {"prompt_logprob_token_ids": ids_TJ, "prompt_logprob_start": int(at_N[0]) - 1}
    return SamplingParams(
        max_tokens=1,  # vLLM must generate at least one token
        temperature=0.0,
        prompt_logprobs=k,
        flat_logprobs=True,
        detokenize=False,
        **more,
    )
