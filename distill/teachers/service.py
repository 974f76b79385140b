"""A teacher as a service: it wakes, passes its self-test, scores, and caches what it said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.teachers.fingerprint import Fingerprint, self_test_rows
from tutelage.distill.teachers.score_cache import ScoreCache
from tutelage.distill.teachers.transport import CompactScores
from tutelage.scheduler.episodes import Row


class Teacher(Protocol):
    """What scores rows, in whatever engine. model: its weights, where they are at hand. remote:
    they are somebody else's, and may become others between two answers. retries: how often it had
    to be asked again, so far."""

    vocabulary: int
    model: Any
    remote: bool

    @property
    def retries(self) -> int: ...

    def score(
        self,
        rows: Sequence[Row],
        needs: Needs,
        asked: Sequence[npt.NDArray[np.int32]] | None = None,
    ) -> list[TeacherScores]:
        """See TransformersTeacher.score."""

    def sleep(self) -> None:
        """Leave the device."""

    def wake(self) -> None:
        """Come back to it."""

    def close(self) -> None:
        """Let go of what the engine holds beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Rows for a teacher, and what its scores must hold.

    asked: of each row, the student's ids [N, J] at which they are needed.
    """

    teacher: str
    rows: Sequence[Row]
    needs: Needs
    asked: Sequence[npt.NDArray[np.int32]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a teacher says of some rows, and what it took.

    scores: one of each row, in order. identity: of the teacher as it was last loaded or woken; of a
    remote one, after these scores. hits: rows whose scores were on the disk. seconds: of the
    network's work. retries: how often it had to be asked again.
    """

    scores: tuple[CompactScores, ...]
    fingerprint: Fingerprint
    hits: int
    seconds: float
    retries: int = 0


class TeacherService:
    """A teacher at work: it has a name, passes its exam, remembers, and answers in compact form.
    The scheduler runs it in this process or as a Ray actor.

    Args:
        name: in the configuration. digest: of its weights. dtype: of its weights.
        cache: where scores are kept, or None.
        sleeps: between answers its weights lie in the CPU's memory, and its device is free.

    `identity` is as it was last loaded or woken.

    Raises:
        ConfigError: it has no weights (see identity.UNIFORM), or they give no numbers.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        *,
        digest: str,
        dtype: str,
        cache: Path | None,
        sleeps: bool,
    ) -> None:
        self.name, self.teacher, self._sleeps = name, teacher, sleeps
        self.model = teacher.model
        self._digest, self._dtype = digest, dtype
        self._cache = None if cache is None else ScoreCache(cache, teacher=digest)
        self.fingerprint = self._self_test()
        self.fingerprint.check_weights(teacher.vocabulary)
        self._asleep = False
        if sleeps:
            self.sleep()

    def answer(self, ask: Ask) -> Answer:
        """Its scores of the rows that it is asked about; where there are none, who it is."""
        return self.score(ask.rows, ask.needs, ask.asked)

    def score(
        self,
        rows: Sequence[Row],
        needs: Needs,
        asked: Sequence[npt.NDArray[np.int32]] | None = None,
    ) -> Answer:
        """See TransformersTeacher.score; the ids asked for are left out of the answer."""
        keys: list[str] = []
        found: list[CompactScores | None] = [None] * len(rows)
        if self._cache is not None:
            for i, row in enumerate(rows):
                own = None if asked is None else asked[i]
                keys.append(self._cache.key(row, needs, query_ids_NJ=own))
                found[i] = self._cache.get(
                    keys[i],
                    teacher=self.name,
                    vocabulary=self.teacher.vocabulary,
                    count=int(row.action_mask_T.sum()),
                )
        new = [i for i, scores in enumerate(found) if scores is None]
        retries = self.teacher.retries
        begun = time.perf_counter()
        if new:
            given = None if asked is None else [asked[i] for i in new]
            self.wake()
            try:
                fresh = self.teacher.score([rows[i] for i in new], needs, given)
            except FloatingPointError as error:
                raise RuntimeError(f"teachers.{self.name}: {error}") from error
            if self.teacher.remote:
                self.fingerprint = self._self_test()
            if self._sleeps:
                self.sleep()
            for i, scores in zip(new, fresh, strict=True):
                found[i] = packed = CompactScores.pack(scores, teacher=self.name)
                if self._cache is not None:
                    self._cache.put(keys[i], packed)
        return Answer(
            scores=tuple(scores for scores in found if scores is not None),
            fingerprint=self.fingerprint,
            hits=len(rows) - len(new),
            seconds=time.perf_counter() - begun if new else 0.0,
            retries=self.teacher.retries - retries,
        )

    def sleep(self) -> None:
        """Leave the device."""
        self.teacher.sleep()
        self._asleep = True

    def wake(self) -> None:
        """Come back to the device, if asleep, and pass the exam again.

        Raises:
            RuntimeError: it says something else than before it slept.
        """
        if not self._asleep:
            return
        self.teacher.wake()
        woken = self._self_test()
        woken.check_same(self.fingerprint)
        self._asleep = False

    def close(self) -> None:
        """Its work is done."""
        self.teacher.close()

    def _self_test(self) -> Fingerprint:
        try:
            answers = self.teacher.score(self_test_rows(self.teacher.vocabulary), Needs(k=1))
        except FloatingPointError as error:
            raise ConfigError(f"teachers.{self.name}: in its exam {error}") from error
        scores = TeacherScores.join(answers)
        # A top K tells no entropy. -log of the largest probability is one too, Renyi's of order
        # infinity: never above it, and ln V of a uniform distribution alone.
        entropy_N = -scores.logprobs_NK[:, 0] if scores.entropy_N is None else scores.entropy_N
        return Fingerprint(
            name=self.name,
            digest=self._digest,
            dtype=self._dtype,
            logprobs=tuple(scores.sampled_N.tolist()),
            entropies=tuple(entropy_N.tolist()),
        )
