"""What stands in vLLM's worker processes, where tensor_parallel_size is above 1.

vLLM imports this module in each of them before it builds the model (EXTENSION is the engine's
worker_extension_cls), and that prepares the worker: its linear layers stay as the checkpoint has
them, it knows how to read the learner's weights, and it ends with the process that started it.
Elsewhere the import does nothing.
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

from tutelage.distill.engines.vllm.patches import keep_unpacked
from tutelage.distill.engines.vllm.sync import mapped

EXTENSION = f"{__name__}.Extension"

PARTING = 10.0
"""Seconds that a worker has to end by itself once its parent is gone."""


class Extension:
    """What vLLM adds to its worker: nothing but this import."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """What a receiver is told before the first weights."""


@dataclass(frozen=True, slots=True)
class Written:
    """Where weights stand, as `sync.in_memory` tells it."""

    path: str
    size: int
    places: list[tuple[str, str, list[int], int]]


def receiver() -> type:
    """A vLLM weight-transfer engine that maps what the learner wrote, and copies this worker's part
    of it into place."""
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
            # vLLM's own would wait for an accelerator, which the CPU has not: copies from the file
            # are done when they return
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Written) -> None:
            where = update_info
            self.model.load_weights(mapped(where.path, where.size, where.places))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    return Receiver


RECEIVER = "tutelage"
"""Under which vLLM knows it."""


def _prepare() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    _say_why_not()
    _end_with_the_parent()
    _find_memory_gone()
    if current_platform.is_cpu():
        keep_unpacked()
    WeightTransferEngineFactory.register_engine(RECEIVER, receiver())


def _end_with_the_parent() -> None:
    """vLLM has a worker leave its queue when the parent is gone; one that waits for another worker
    inside a collective never looks there."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        time.sleep(PARTING)
        os._exit(1)

    Thread(target=watch, daemon=True, name="ParentWatch").start()


def _find_memory_gone() -> None:
    """Let the worker end where `processes.watch` has removed what it would remove itself."""
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    plain = ShmRingBuffer.__del__

    def end(self: Any) -> None:
        with suppress(FileNotFoundError):
            plain(self)

    ShmRingBuffer.__del__ = end


class _Words(logging.Handler):
    """The parent learns that a start failed and not why: one line of it goes to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and (error := record.exc_info[1]):
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split()) or place.line
            sys.stderr.write(  # in one piece: the others say the same
                f"{multiprocessing.current_process().name}: {type(error).__name__} in {place.name}"
                f" ({place.filename}:{place.lineno}): {said}\n"
            )
            sys.stderr.flush()


def _say_why_not() -> None:
    logger = logging.getLogger("vllm.v1.executor.multiproc_executor")
    if not logger.isEnabledFor(logging.ERROR):
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        logger.addHandler(_Words(logging.ERROR))


if multiprocessing.current_process().name.startswith("VllmWorker"):
    _prepare()
