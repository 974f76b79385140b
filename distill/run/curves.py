"""TensorBoard's event file, written without a thread."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.observers import Observer, curves
from tutelage.evaluation.files import Growing
from tutelage.evaluation.run_folder import TENSORBOARD


class TensorBoard(Observer):
    """Writes one point of every curve a step to RUN/tensorboard, at once.

    TensorBoard's own writer hands every number to a thread through a queue. When Ctrl-C interrupts
    the queue its lock stays taken, and the run waits for that thread for ever.
    """

    def __init__(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        self._writer = RecordWriter
        self._folder = Path()
        self._file: Growing | None = None

    def start(self, config: RunConfig, step: int) -> None:
        self._folder = Path(config.run) / TENSORBOARD

    def written(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        if self._file is None:
            self._open(step)
        values = [
            self._summary.Value(tag=k, simple_value=x) for k, x in curves(task, metrics).items()
        ]
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def _open(self, start: int) -> None:
        """Begin a new file, whose first event tells readers to forget this step and later ones."""
        # TensorBoard looks for `tfevents` in the name, and reads a folder's files by name: in time
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self._file = Growing(self._folder / name)
        self._records = self._writer(self._file)
        self._write(self._event(file_version="brain.Event:2"))  # without it START is not heeded
        session = self._session(status=self._session.START)
        self._write(self._event(step=start, session_log=session))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
