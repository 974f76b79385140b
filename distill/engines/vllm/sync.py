"""The learner's weights into a running engine, and the proof that they arrived.

A reload that does nothing raises no error, and one that does part of its work looks like learning.
So after every sync the engine scores a probe, a fixed text, and must find what the learner itself
found on it.

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
"""Where a probe travels beside the weights: no parameter's name holds a slash."""

ALIGNED = 64
"""Bytes: where a tensor in memory begins is a multiple."""

PATIENCE = 300.0
"""Seconds that a worker process has for its part of a sync: vLLM's own limit of a step."""

MOVED = 0.1
"""Share of the tolerance by which the learner must have moved before an engine that says exactly
what it said before is taken for one that was not reached."""


class SyncError(RuntimeError):
    """The engine does not hold the learner's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A text, and the learner's log-probability of each token after the first [T - 1]."""

    ids_T: npt.NDArray[np.int64]
    behavior_logprobs_T: npt.NDArray[np.float32]

    def first(self, tokens: int) -> Probe:
        """No more than so many of its tokens."""
        return Probe(
            ids_T=self.ids_T[:tokens], behavior_logprobs_T=self.behavior_logprobs_T[: tokens - 1]
        )


def source(student: Student) -> tuple[dict[str, torch.Tensor], Probe]:
    """What a sync takes of the learner's student, as it is now."""
    return student.weights(), probe_of(student)


@torch.inference_mode()
def probe_of(student: Student) -> Probe:
    """The student's own scores of a text that takes ids from all over the vocabulary."""
    room = int(student.settings.get_text_config().max_position_embeddings)
    ids_T = np.arange(1, min(PROBE_TOKENS, room - 1) + 1, dtype=np.int64) * 7919
    ids_T %= student.vocabulary
    said_T = torch.from_numpy(ids_T[1:]).to(student.device)
    own_TV = student.plain_logprobs(torch.from_numpy(ids_T))[:-1]
    own_T = own_TV.gather(1, said_T[:, None])[:, 0]
    return Probe(ids_T=ids_T, behavior_logprobs_T=own_T.cpu().numpy())


def packed(
    weights: Mapping[str, torch.Tensor], probe: Probe, *, dtype: str
) -> dict[str, npt.NDArray[Any]]:
    """As arrays in one mapping, for an engine in another process; dtype: the engine's, so that no
    bit travels which it would drop."""
    arrays: dict[str, npt.NDArray[Any]] = {IDS: probe.ids_T, LOGPROBS: probe.behavior_logprobs_T}
    narrow = getattr(torch, dtype)
    return arrays | {name: array_of(weight.to(narrow)) for name, weight in weights.items()}


def unpacked(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, torch.Tensor], Probe]:
    """What `packed` packed; the arrays are read where they lie.

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
    """Replace the weights of a vLLM engine; nothing may be in flight.

    The worker in this process takes the tensors by reference and copies each into place, on
    whichever device they are. Workers in processes of their own (tensor_parallel_size > 1) map one
    copy in this machine's memory, through vLLM's weight-transfer API.

    Raises:
        TimeoutError: one of them does not answer.
    """
    if not has_workers(engine):
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        return
    with in_memory(weights) as told:
        engine.collective_rpc("start_weight_update", timeout=PATIENCE)
        engine.collective_rpc("update_weights", timeout=PATIENCE, kwargs={"update_info": told})
        engine.collective_rpc("finish_weight_update", timeout=PATIENCE)


@contextmanager
def in_memory(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """One copy of the weights that this machine's processes can map; what `mapped` wants to know.

    The file stands in memory and in no folder: it goes when the context is left, and with this
    process, whatever ends it; and the size of /dev/shm does not bound it.
    """
    places, end = [], 0
    for name, weight in weights.items():
        places.append((name, str(weight.dtype).removeprefix("torch."), list(weight.shape), end))
        end += -(-weight.nbytes // ALIGNED) * ALIGNED
    file = os.memfd_create("tutelage-weights")
    try:
        os.truncate(file, end)
        told: dict[str, Any] = {
            "path": f"/proc/{os.getpid()}/fd/{file}",
            "size": end,
            "places": places,
        }
        for name, room in mapped(**told, shared=True):
            room.copy_(weights[name])
        yield told
    finally:
        os.close(file)


def mapped(
    path: str, size: int, places: Iterable[tuple[str, str, list[int], int]], *, shared: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a file: names, dtypes, shapes and first bytes of them are in `places`.

    size: of the file, in bytes. shared: what is written into them goes into the file.
    """
    bytes_B = torch.from_file(path, shared=shared, size=size, dtype=torch.uint8)
    for name, kind, shape, start in places:
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

    before: what was found and wanted at the last sync.

    Raises:
        SyncError: above the tolerance, or nothing moved in the engine though the learner did.
    """
    gap, most = float(np.abs(found_T - probe.behavior_logprobs_T).mean()), TOLERANCE[dtype]
    if not gap <= most:
        same = before is not None and np.array_equal(found_T, before[0])
        raise SyncError(
            f"weights of version {version} did not reach the vllm engine: on the probe of"
            f" {len(probe.ids_T)} tokens its log-probabilities are {gap:.2g} nats off the learner's"
            f" in the mean, and may be {most:g} in {dtype}"
            + (": they are what they were before, so the sync did nothing" if same else "")
            + "; use rollout.engine=transformers until it does"
        )
    if before is not None and np.array_equal(found_T, before[0]):
        moved = float(np.abs(probe.behavior_logprobs_T - before[1].behavior_logprobs_T).mean())
        if moved > MOVED * most:
            raise SyncError(
                f"weights of version {version} did not reach the vllm engine: on the probe the"
                f" learner moved by {moved:.2g} nats, and the engine not by a bit; use"
                " rollout.engine=transformers until it does"
            )
    return gap
