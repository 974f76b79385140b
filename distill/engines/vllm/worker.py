"""Prepares vLLM's worker processes, where tensor_parallel_size is above 1.

vLLM imports this module in each of them before it builds the model (EXTENSION is the engine's
worker_extension_cls). The import prepares the worker: it can read the learner's weights, and it
ends with the process that started it. In any other process the import does nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

from tutelage.distill.engines.vllm.sync import mapped, repack_head

EXTENSION = f"{__name__}.Extension"

PARTING = 10.0
"""Seconds that a worker has to end by itself once its parent is gone."""


class Extension:
    """vLLM wants a class to mix into its worker. This one is empty: the import is what counts."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """vLLM's init_info of a transfer engine: ours needs none."""


@dataclass(frozen=True, slots=True)
class Written:
    """Where weights are: the arguments of `sync.mapped`."""

    path: str
    size: int
    layout: list[tuple[str, str, list[int], int]]


def receiver() -> type:
    """A vLLM weight-transfer engine that maps the learner's weights and copies this worker's part
    of them into place."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    class Receiver(WeightTransferEngine):
        init_info_cls, update_info_cls = Nothing, Written

        def init_transfer_engine(self, init_info: Nothing) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # vLLM's own method also waits for an accelerator, which the CPU is not; copies from the
            # file are done when they return
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Written) -> None:
            where = update_info
            self.model.load_weights(mapped(where.path, where.size, where.layout))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            repack_head(self.model)

        def shutdown(self) -> None:
            pass

    return Receiver


RECEIVER = "tutelage"
"""The receiver's name in vLLM's registry."""


def _prepare() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    _report_failed_starts()
    _end_with_the_parent()
    _accept_removed_memory()
    WeightTransferEngineFactory.register_engine(RECEIVER, receiver())


def _end_with_the_parent() -> None:
    """End this worker when its parent has ended. vLLM's own worker notices that only at its queue,
    where one that waits for another worker inside a collective never looks."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        time.sleep(PARTING)  # vLLM's own orderly end goes first
        os._exit(1)

    Thread(target=watch, daemon=True, name="ParentWatch").start()


def _accept_removed_memory() -> None:
    """Let the worker end without an error where `processes.watch` has removed its shared memory."""
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    plain = ShmRingBuffer.__del__

    def end(self: Any) -> None:
        with suppress(FileNotFoundError):
            plain(self)

    ShmRingBuffer.__del__ = end


class _Words(logging.Handler):
    """Writes an error's cause to stderr in one line: vLLM tells the parent that a start failed, but
    not why."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and (error := record.exc_info[1]):
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split()) or place.line
            sys.stderr.write(  # in one piece: the other workers write theirs at the same time
                f"{multiprocessing.current_process().name}: {type(error).__name__} in {place.name}"
                f" ({place.filename}:{place.lineno}): {said}\n"
            )
            sys.stderr.flush()


def _report_failed_starts() -> None:
    logger = logging.getLogger("vllm.v1.executor.multiproc_executor")
    if not logger.isEnabledFor(logging.ERROR):  # else the user has vLLM's log, which says it
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        logger.addHandler(_Words(logging.ERROR))


if multiprocessing.current_process().name.startswith("VllmWorker"):
    _prepare()
