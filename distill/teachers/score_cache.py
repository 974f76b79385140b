"""Scores that were given before, on the disk: one file a row, by teacher and prefix.

For replays, and for runs and evaluations that are repeated or go on: fresh rollouts hardly ever
repeat a row. A hit has the bits that were stored; those depend, in float32's last digits, on the
batch that the row was first scored in. Nothing is ever deleted: the folder may be, at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.distill.objectives import Needs
from tutelage.distill.teachers.transport import CompactScores
from tutelage.scheduler.episodes import Row

FORMAT = b"tutelage scores 1"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""And a TypeError for arrays of other names, a RuntimeError for archives of other kinds."""


class ScoreCache:
    """A folder of rows' scores. Several processes may share it.

    Args:
        folder: made when first written to. teacher: the hash of the teacher's weights.
    """

    def __init__(self, folder: Path, *, teacher: str) -> None:
        self._folder, self._teacher = folder, teacher

    def key(self, row: Row, needs: Needs, *, query_ids_NJ: np.ndarray | None) -> str:
        """Of all that a row's scores depend on: the teacher, the ids up to the last chosen one,
        which were chosen, the branches, and what is needed."""
        action_mask_T = row.action_mask_T
        end = int(action_mask_T.nonzero()[0].max(initial=-1)) + 1
        found = hashlib.sha256(FORMAT)
        found.update(f"{self._teacher} k={needs.width} full={needs.full} {end}".encode())
        for array in (row.ids_T[:end], row.branches_T[:end], action_mask_T[:end]):
            found.update(array.astype(np.int32).tobytes())
        if query_ids_NJ is not None:
            found.update(f"{query_ids_NJ.shape}".encode() + query_ids_NJ.astype(np.int32).tobytes())
        return found.hexdigest()

    def get(self, key: str, *, teacher: str, vocabulary: int, count: int) -> CompactScores | None:
        """The `count` tokens' scores; None when they are not there, or their file is damaged."""
        try:
            data = self._path(key).read_bytes()
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                parts: dict[str, Any] = {name: arrays[name] for name in arrays.files}
            found = CompactScores(teacher=teacher, vocabulary=vocabulary, **parts)
            return found if len(found) == count == len(found.ids_NK) else None
        except (*UNREADABLE, TypeError, RuntimeError):
            return None

    def put(self, key: str, scores: CompactScores) -> None:
        """Store them, whole or not at all.

        Raises:
            OSError: with the folder and the cure.
        """
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **scores.arrays())
        path = self._path(key)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(buffer.getvalue())
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)  # half of it takes the room that is lacking
            raise OSError(
                f"teachers.{scores.teacher}.cache: {path} could not be written"
                f" ({error.strerror}): make room, delete the folder, or set cache: null"
            ) from error

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.npz"
