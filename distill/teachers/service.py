"""A teacher as a service: it wakes, passes its self-test, scores rows and caches their scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.teachers.fingerprint import Fingerprint, self_test_rows
from tutelage.distill.teachers.score_cache import ScoreCache
from tutelage.distill.teachers.transport import CompactScores, QueryIds
from tutelage.scheduler.episodes import Row


class Teacher(Protocol):
    """What scores rows, in whatever engine. model: its weights, if they are in this process.
    remote: the weights are on somebody else's server and may be replaced between two answers.
    retries: how many requests had to be sent again, so far."""

    vocabulary: int
    model: Any
    remote: bool

    @property
    def retries(self) -> int: ...

    def score(
        self, rows: Sequence[Row], needs: Needs, query_ids: QueryIds = None
    ) -> list[TeacherScores]:
        """See TransformersTeacher.score."""

    def sleep(self) -> None:
        """Leave the device."""

    def wake(self) -> None:
        """Return to the device."""

    def close(self) -> None:
        """Release what the engine holds beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Rows for a teacher, and what its scores must hold."""

    teacher: str
    rows: Sequence[Row]
    needs: Needs
    query_ids: QueryIds = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A teacher's scores of some rows, and what they cost.

    scores: one for each row, in order. fingerprint: taken when the teacher was last loaded or
    woken; of a remote teacher, after these scores. hits: rows whose scores came from the cache.
    seconds: spent on the other rows. retries: requests that had to be sent again.
    """

    scores: tuple[CompactScores, ...]
    fingerprint: Fingerprint
    hits: int
    seconds: float
    retries: int = 0


class TeacherService:
    """A teacher at work: it passes its self-test, caches scores, and answers in compact form. The
    scheduler runs it in this process or as a Ray actor.

    Args:
        name: in the configuration. digest: of its weights. dtype: of its weights.
        cache: the folder of the score cache, or None.
        sleeps: between answers its weights move to the CPU's memory, and its device is free.

    Raises:
        ConfigError: its weights are lost (see fingerprint.UNIFORM), or give NaN or infinity.
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
        """Its scores of the rows; with no rows, its fingerprint alone."""
        return self.score(ask.rows, ask.needs, ask.query_ids)

    def score(self, rows: Sequence[Row], needs: Needs, query_ids: QueryIds = None) -> Answer:
        """See TransformersTeacher.score; the answer leaves the query ids out."""
        keys: list[str] = []
        found: list[CompactScores | None] = [None] * len(rows)
        if self._cache is not None:
            for i, row in enumerate(rows):
                own = None if query_ids is None else query_ids[i]
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
            own_ids = None if query_ids is None else [query_ids[i] for i in new]
            self.wake()
            try:
                fresh = self.teacher.score([rows[i] for i in new], needs, own_ids)
            except FloatingPointError as error:
                raise RuntimeError(f"teachers.{self.name}: {error}") from error
            if self.teacher.remote:  # after the scores, so that it covers them; routing compares it
                self.fingerprint = self._self_test()
            if self._sleeps:
                self.sleep()
            # rounded before it is cached: a hit and a fresh answer have the same bits
            packed = CompactScores.pack(TeacherScores.join(fresh), teacher=self.name)
            for i, scores in zip(new, packed.split([len(one) for one in fresh]), strict=True):
                found[i] = scores
                if self._cache is not None:
                    self._cache.put(keys[i], scores)
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
        """Return to the device, if asleep, and pass the self-test again.

        Raises:
            RuntimeError: its self-test gives other numbers than before it slept.
        """
        if not self._asleep:
            return
        self.teacher.wake()
        woken = self._self_test()
        woken.check_same(self.fingerprint)
        self._asleep = False

    def close(self) -> None:
        """Release the engine: the teacher's work is done."""
        self.teacher.close()

    def _self_test(self) -> Fingerprint:
        try:
            answers = self.teacher.score(self_test_rows(self.teacher.vocabulary), Needs(k=1))
        except FloatingPointError as error:
            raise ConfigError(f"teachers.{self.name}: in its self-test {error}") from error
        scores = TeacherScores.join(answers)
        # A top K does not tell the entropy. -log of the largest probability stands in for it: the
        # Renyi entropy of order infinity, never above Shannon's, and ln V only if uniform.
        entropy_N = -scores.logprobs_NK[:, 0] if scores.entropy_N is None else scores.entropy_N
        return Fingerprint(
            name=self.name,
            digest=self._digest,
            dtype=self._dtype,
            logprobs=tuple(scores.sampled_N.tolist()),
            entropies=tuple(entropy_N.tolist()),
        )
