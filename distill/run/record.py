"""A run's folder: its lines of metrics and its checkpoints, and how the run resumes from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tutelage.distill.config.run import RunConfig
from tutelage.distill.run import checkpoints
from tutelage.distill.run.journal import Journal, plain
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.resume import (
    refuse_other_student,
    refuse_other_teachers,
    write_config,
)
from tutelage.distill.run.routing import Routing
from tutelage.distill.student.learner import Learner
from tutelage.distill.teachers.fingerprint import student_digest
from tutelage.evaluation import run_folder
from tutelage.scheduler.policies import Step
from tutelage.scheduler.prefetch import Prefetch
from tutelage.scheduler.timetable import Timetable

NEEDED = ("step", "version", "position", "optimizer", "teachers", "best", "history", "ahead")
"""Keys that a checkpoint's state must have."""


class Record:
    """A run's folder, and the parts of the run whose state is kept there.

    `pending` is a step whose update is done, and that is neither evaluated nor written yet: (its
    number, its tasks, their metrics). A checkpoint keeps it, so that a resumed run still evaluates.
    """

    journal: Journal

    def __init__(
        self,
        config: RunConfig,
        *,
        tokenizer: Any,
        learner: Learner,
        timetable: Timetable,
        routing: Routing,
        prefetch: Prefetch,
        observers: Observer,
    ) -> None:
        self.folder = Path(config.run)
        self.pending: tuple[int, str, dict[str, Any]] | None = None
        self._config, self._tokenizer, self._learner = config, tokenizer, learner
        self._timetable, self._routing, self._prefetch = timetable, routing, prefetch
        self._observers = observers
        self._checkpoints = self.folder / run_folder.CHECKPOINTS
        self._best: tuple[float, int] | None = None  # (score, after how many steps)

    @contextmanager
    def open(self, stopping: Callable[[], bool]) -> Iterator[int]:
        """Restore the newest checkpoint, then record what is done inside; yields the first step to
        do.

        Whatever ends the run inside, the steps since the last checkpoint are saved, except in the
        middle of an update, or when a second Ctrl-C comes while the run is `stopping`.
        """
        start, position = self._restore()
        write_config(self.folder, self._config, step=start)
        for name, fingerprint in self._routing.references.items():
            fingerprint.write(self.folder / run_folder.TEACHERS / f"{name}.json")
        self.journal = Journal(self.folder, position=position)
        try:
            yield start
        except (Exception, KeyboardInterrupt) as error:
            again = isinstance(error, KeyboardInterrupt) and stopping()
            # a SaveError is that of a checkpoint: another try would meet the same full disk
            if not again and not isinstance(error, checkpoints.SaveError):
                try:
                    self.save_rest()
                except Exception as another:  # saving may need what just failed, such as a GPU
                    error.add_note(f"Nor could it be saved since the last checkpoint: {another}")
            error.add_note(self.standing())
            raise
        finally:
            self.journal.close()

    def _restore(self) -> tuple[int, int]:
        """(the first step to do, the bytes of metrics.jsonl that stand)."""
        found = checkpoints.load_newest(self._checkpoints, self._learner.student)
        if found is None:
            return 0, 0
        checkpoint, state = found
        if missing := [key for key in NEEDED if key not in state]:
            raise RuntimeError(
                f"{checkpoint}: its {run_folder.STATE} has no {missing[0]!r}: another version of"
                " tutelage saved it; resume with that one, or choose another run folder"
            )
        optimizer = state["optimizer"]
        if not self._learner.optimizer.fits(optimizer):  # optimizer.name changed, and was accepted
            warnings.warn(
                f"optimizer: the state in {checkpoint} is of another one: this one begins anew",
                stacklevel=2,
            )
            optimizer = self._learner.optimizer_state()
        self._learner.restore(optimizer, version=state["version"])
        refuse_other_student(self._config, self._tokenizer, checkpoint, state.get("student"))
        refuse_other_teachers(self._config, self._routing.references, checkpoint, state["teachers"])
        self._best, self.pending = state["best"], json.loads(state.get("pending", "null"))
        history = [Step(**step) for step in state["history"]]
        self._timetable.restore(history)  # before `prefetch.restore`, which counts steps from it
        if not self._config.accept_changes:  # planned steps may not fit a changed configuration
            planned = self._prefetch.restore(state["ahead"], self._routing.sound)
            self._timetable.restore(history, planned)
        return state["step"], state["position"]

    def write(self, scores: Mapping[str, float]) -> None:
        """The pending step's line, with the scores of an evaluation that followed it; a checkpoint,
        if one is due."""
        assert self.pending is not None
        step, tasks, metrics = self.pending
        metrics = metrics | dict(scores)
        with self.journal.undone():  # Ctrl-C between the two: the line is written again on resuming
            self.journal.write(step, tasks, metrics)
            self._observers.written(step, tasks, metrics)
        self.pending = None
        done, every = step + 1, self._config.checkpoint.every
        best = bool(scores) and self._is_best(done, scores)
        if best or done % every == 0 or done == self._config.steps:
            self._save(done)

    def _is_best(self, done: int, scores: Mapping[str, float]) -> bool:
        """Whether these scores' mean is the run's highest so far; then it is remembered."""
        mean = sum(scores.values()) / len(scores)
        if not self._config.checkpoint.best or (self._best and mean <= self._best[0]):
            return False
        self._best = mean, done
        return True

    def _save(self, done: int) -> None:
        checkpoints.save(
            self._checkpoints,
            step=done,
            student=self._learner.student,
            tokenizer=self._tokenizer,
            state={
                "step": done,
                "version": self._learner.version,
                # flushed first: no checkpoint may count lines that a power cut takes
                "position": self.journal.position,
                "optimizer": self._learner.optimizer_state(),
                "teachers": {name: one.digest for name, one in self._routing.references.items()},
                "student": student_digest(self._config.student.model, self._tokenizer),
                "best": self._best,
                "history": [asdict(step) for step in self._timetable.history],
                "ahead": self._prefetch.state(),
                "pending": json.dumps(self.pending, default=plain),
            },
            keep=self._config.checkpoint.keep,
            best=self._best[1] if self._best else None,
        )

    def save_rest(self) -> None:
        """Save the steps since the last checkpoint, unless an update was cut off."""
        done = len(self._timetable.history)
        # unequal: the update ended, and what it did is not in the history yet
        whole = self._learner.intact and self._learner.version == done
        newest = run_folder.newest(self._checkpoints)
        if done and whole and (newest is None or int(newest.name) != done):
            self._save(done)

    def standing(self) -> str:
        """What of this run is on the disk, in one line."""
        newest, done = run_folder.newest(self._checkpoints), len(self._timetable.history)
        lost = max(0, done - (int(newest.name) if newest else 0))
        steps = f"{lost} step{'s' * (lost != 1)}"
        if newest is None:
            said = f"no checkpoint yet: {steps} lost" if lost else "nothing was learned yet"
            return f"{self.folder}: {said}; the same command begins anew"
        said = f"; what came after it is lost, {steps}" if lost else ""
        return f"saved as {newest}{said}; the same command resumes from there"
