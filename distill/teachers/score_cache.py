"""A cache of scores on the disk: one file for each row.

It serves replays, and runs that are repeated or resumed; fresh rollouts hardly ever repeat a row.
A hit returns the bits that were stored. In float32's last digits they depend on the batch in which
the row was first scored. The cache deletes nothing; its folder may be deleted at any time.
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

FORMAT = b"tutelage scores 1"  # part of each key: another layout never meets files of this one
UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error),
    TypeError,  # CompactScores has no field of an array's name
    RuntimeError,  # zipfile: an encrypted archive
)
"""What numpy, zipfile and CompactScores raise for a damaged file."""


class ScoreCache:
    """A folder of rows' scores. Several processes may share it.

    Args:
        folder: created at the first write. teacher: the hash of the teacher's weights.
    """

    def __init__(self, folder: Path, *, teacher: str) -> None:
        self._folder, self._teacher = folder, teacher

    def key(self, row: Row, needs: Needs, *, query_ids_NJ: np.ndarray | None) -> str:
        """The hash of all that a row's scores depend on: the teacher, the ids up to the last
        action token, the action mask, the branches, and what the objective needs."""
        action_mask_T = row.action_mask_T
        end = int(action_mask_T.nonzero()[0].max(initial=-1)) + 1
        found = hashlib.sha256(FORMAT)
        found.update(f"{self._teacher} k={needs.width} full={needs.full} {end}".encode())
        for array in (row.ids_T[:end], row.branches_T[:end], action_mask_T[:end]):
            found.update(array.astype(np.int32).tobytes())
        if query_ids_NJ is not None:
            # with the shape: bytes alone do not tell [2, 3] from [3, 2]
            found.update(f"{query_ids_NJ.shape}".encode() + query_ids_NJ.astype(np.int32).tobytes())
        return found.hexdigest()

    def get(self, key: str, *, teacher: str, vocabulary: int, count: int) -> CompactScores | None:
        """The scores of `count` tokens; None when there are none, or their file is damaged."""
        try:
            # read whole first: np.load of a path keeps the file open, and reads it array by array
            data = self._path(key).read_bytes()
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                parts: dict[str, Any] = {name: arrays[name] for name in arrays.files}
            found = CompactScores(teacher=teacher, vocabulary=vocabulary, **parts)
            return found if len(found) == count == len(found.ids_NK) else None
        except UNREADABLE:
            return None

    def put(self, key: str, scores: CompactScores) -> None:
        """Write the scores atomically.

        Raises:
            OSError: with the file and the cure.
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
                partial.unlink(missing_ok=True)  # on a full disk it takes the room that is lacking
            raise OSError(
                f"teachers.{scores.teacher}.cache: {path} could not be written"
                f" ({error.strerror}): make room, delete the folder, or set cache: null"
            ) from error

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.npz"
