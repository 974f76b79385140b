"""TensorBoard's event file, written without a thread."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.evaluation.files import Growing


class Curves:
    """TensorBoard's event file: a record a step, written here and now.

    TensorBoard's own writer hands every number to a thread, by a queue whose lock stays taken when
    Ctrl-C falls into it: the run then waits for that thread for ever.

    Args:
        folder: where the file goes, a new one. start: readers forget this step and later ones of
            older files.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self._file = Growing(folder / name)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of every curve, flushed."""
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in metrics.items()]
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Close."""
        self._file.close()


def plain(value: Any) -> Any:
    """What JSON does not know, as what it knows."""
    return value.item() if hasattr(value, "item") else str(value)


def number(value: float) -> float | None:
    """JSON has no NaN and no infinity: what was not sampled is null, and -inf is the largest
    negative float32.
    """
    if math.isnan(value):
        return None
    return round(value, 6) if math.isfinite(value) else -3.4e38
