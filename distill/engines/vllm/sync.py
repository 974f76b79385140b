"""Brings the learner's weights into a running engine, and checks that they arrived.

A reload that does nothing raises no error, and one that does part of its work looks like learning.
So after every sync the engine scores a probe, a fixed text, and its log-probabilities must be the
learner's own.

Letters: T tokens of the probe, B bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tutelage.distill.engines.vllm.processes import has_workers
from tutelage.distill.models.dtypes import TOLERANCE
from tutelage.distill.models.student import Student
from tutelage.distill.models.weights import array_of, weight_of

PROBE_TOKENS = 64
IDS, LOGPROBS = "probe/ids", "probe/logprobs"
"""Keys of the probe among the weights: no parameter's name holds a slash."""

ALIGNED = 64
"""Tensors in the shared file begin at multiples of this many bytes: views by dtype need it."""

PATIENCE = 300.0
"""Seconds that a worker process has for its part of a sync: vLLM's own limit for a step."""

MOVED = 0.1
"""Share of the tolerance. If the learner's scores of the probe have moved by more, and the engine's
are bit-identical to the last sync's, the weights did not reach it."""


class SyncError(RuntimeError):
    """The engine does not hold the learner's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A text [T], and the learner's log-probability of each token after the first [T - 1]."""

    ids_T: npt.NDArray[np.int64]
    behavior_logprobs_T: npt.NDArray[np.float32]

    def first(self, tokens: int) -> Probe:
        """Its first tokens, at most so many."""
        return Probe(
            ids_T=self.ids_T[:tokens], behavior_logprobs_T=self.behavior_logprobs_T[: tokens - 1]
        )


def source(student: Student) -> tuple[dict[str, torch.Tensor], Probe]:
    """What a sync needs of the learner's student, as it is now."""
    return student.weights(), probe_of(student)


@torch.inference_mode()
def probe_of(student: Student) -> Probe:
    """The student's own scores of a text that takes ids from all over the vocabulary."""
    room = int(student.settings.get_text_config().max_position_embeddings)
    # a prime, so that a multiple of it hits all parts of any vocabulary
    ids_T = np.arange(1, min(PROBE_TOKENS, room - 1) + 1, dtype=np.int64) * 7919
    ids_T %= student.vocabulary
    next_T = torch.from_numpy(ids_T[1:]).to(student.device)
    own_TV = student.plain_logprobs(torch.from_numpy(ids_T))[:-1]
    own_T = own_TV.gather(1, next_T[:, None])[:, 0]
    return Probe(ids_T=ids_T, behavior_logprobs_T=own_T.cpu().numpy())


def packed(
    weights: Mapping[str, torch.Tensor], probe: Probe, *, dtype: str
) -> dict[str, npt.NDArray[Any]]:
    """Weights and probe as arrays in one mapping, for an engine in another process. dtype: the
    engine's, so that no bit is sent that it would drop."""
    arrays: dict[str, npt.NDArray[Any]] = {IDS: probe.ids_T, LOGPROBS: probe.behavior_logprobs_T}
    narrow = getattr(torch, dtype)
    return arrays | {name: array_of(weight.to(narrow)) for name, weight in weights.items()}


def unpacked(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, torch.Tensor], Probe]:
    """The inverse of `packed`, without a copy.

    Raises:
        SyncError: there is no probe among them.
    """
    if IDS not in arrays or LOGPROBS not in arrays:
        raise SyncError(
            "weights came without the learner's probe: send what `packed` makes of them"
        )
    weights = {
        name: weight_of(array) for name, array in arrays.items() if name not in (IDS, LOGPROBS)
    }
    return weights, Probe(ids_T=arrays[IDS], behavior_logprobs_T=arrays[LOGPROBS])


def push(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace the weights of a vLLM engine; no request may be in flight.

    A worker in this process gets the tensors by reference, on whichever device, and copies each
    into place. Workers in processes of their own (tensor_parallel_size > 1) map one shared copy in
    this machine's memory, through vLLM's weight-transfer API.

    Raises:
        TimeoutError: a worker does not answer.
    """
    if not has_workers(engine):
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        engine.apply_model(repack_head)
        return
    with in_memory(weights) as where:
        engine.collective_rpc("start_weight_update", timeout=PATIENCE)
        engine.collective_rpc("update_weights", timeout=PATIENCE, kwargs={"update_info": where})
        engine.collective_rpc("finish_weight_update", timeout=PATIENCE)


def repack_head(model: Any) -> None:
    """On the CPU, pack a head that is tied to the embedding again after a reload.

    There vLLM computes with a packed copy of each layer's weights, and packs a layer again when
    weights come for it. For a tied head none come: it would keep the old ones, without an error.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


@contextmanager
def in_memory(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """One copy of the weights that this machine's processes can map; yields `mapped`'s arguments.

    The file is in memory and in no folder (memfd): it goes when the context ends, or with this
    process, however that ends, and the size of /dev/shm does not limit it.
    """
    layout, end = [], 0
    for name, weight in weights.items():
        layout.append((name, str(weight.dtype).removeprefix("torch."), list(weight.shape), end))
        end += -(-weight.nbytes // ALIGNED) * ALIGNED  # rounded up
    file = os.memfd_create("tutelage-weights")
    try:
        os.truncate(file, end)
        where: dict[str, Any] = {
            "path": f"/proc/{os.getpid()}/fd/{file}",  # other processes of this user can open it
            "size": end,
            "layout": layout,
        }
        for name, room in mapped(**where, shared=True):
            room.copy_(weights[name])
        yield where
    finally:
        os.close(file)


def mapped(
    path: str, size: int, layout: Iterable[tuple[str, str, list[int], int]], *, shared: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a file. layout: the name, dtype, shape and first byte of each.

    size: of the file, in bytes. shared: whether writing to the tensors writes to the file.
    """
    bytes_B = torch.from_file(path, shared=shared, size=size, dtype=torch.uint8)
    for name, kind, shape, start in layout:
        dtype = getattr(torch, kind)
        stop = start + math.prod(shape) * dtype.itemsize
        yield name, bytes_B[start:stop].view(dtype).view(shape)


def check_arrival(
    found_T: npt.NDArray[np.float32],
    probe: Probe,
    before: tuple[npt.NDArray[np.float32], Probe] | None,
    *,
    version: int,
    dtype: str,
) -> float:
    """The mean distance in nats between engine and learner on the probe.

    found_T: the engine's log-probabilities. before: those and the probe at the last sync.

    Raises:
        SyncError: above the tolerance, or the engine did not move although the learner did.
    """
    gap, most = float(np.abs(found_T - probe.behavior_logprobs_T).mean()), TOLERANCE[dtype]
    if not gap <= most:  # so that a NaN fails too
        same = before is not None and np.array_equal(found_T, before[0])
        raise SyncError(
            f"weights of version {version} did not reach the vllm engine: on the probe of"
            f" {len(probe.ids_T)} tokens its log-probabilities are {gap:.2g} nats off the learner's"
            f" in the mean, and may be {most:g} in {dtype}"
            + (": they are what they were before, so the sync did nothing" if same else "")
            + "; use rollout.engine=transformers until it does"
        )
    # A small update that is lost stays within the tolerance. But an engine that other weights have
    # reached does not score bit-identically.
    if before is not None and np.array_equal(found_T, before[0]):
        moved = float(np.abs(probe.behavior_logprobs_T - before[1].behavior_logprobs_T).mean())
        if moved > MOVED * most:
            raise SyncError(
                f"weights of version {version} did not reach the vllm engine: on the probe the"
                f" learner moved by {moved:.2g} nats, and the engine not by a bit; use"
                " rollout.engine=transformers until it does"
            )
    return gap
