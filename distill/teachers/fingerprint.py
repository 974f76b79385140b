"""A teacher's fingerprint: the hash of its files, and its scores of a few fixed rows (self-test).

A teacher whose files changed between two sessions of a run silently teaches something else from
then on. A teacher that lost its weights (woken badly on a device, loaded without its shards) raises
no error either: its distribution is uniform, and the student learns noise. So every load and every
wake ends with the same short self-test, and every answer carries its result.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.models.dtypes import TOLERANCE
from tutelage.distill.models.loading import resolve
from tutelage.envs.errors import first_line
from tutelage.evaluation.files import write_json
from tutelage.scheduler.episodes import NO_ACTION, Row

FILES = ("*.safetensors", "*.bin", "*.index.json", "config.json")
"""The files in a teacher's folder that its scores depend on."""

ROWS, TOKENS = 2, 33
"""Of the self-test: two rows, each of one prompt token and 32 scored ones."""

UNIFORM = 1e-4
"""A teacher is refused when the self-test's mean entropy lies no more than this share below ln V.
Lost weights are zeros: their logits are all equal, and the share is 0 (1e-7 in float32). A model
that was never trained passes: logits of standard deviation s lower the entropy by about s^2 / 2
nats. An initial 0.02 with 32 hidden units lowers it by 0.006, at 2,048 ids a share of 8e-4; larger
models lie further below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The hash of a teacher's files, and the result of its self-test.

    digest: of weights, configuration and dtype; of a server, its model's name: only the self-test
    tells anything of its weights. logprobs, entropies: of the self-test's tokens, in nats.
    """

    name: str
    digest: str
    dtype: str
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]

    def distance(self, other: Fingerprint) -> float:
        """Mean difference of the two self-tests, in nats; infinite where a number is NaN or
        infinite."""
        pairs = [(self.logprobs, other.logprobs), (self.entropies, other.entropies)]
        if any(len(mine) != len(theirs) for mine, theirs in pairs):
            return math.inf
        off = np.abs(np.concatenate([np.subtract(mine, theirs) for mine, theirs in pairs]))
        found = float(off.mean())
        return found if math.isfinite(found) else math.inf

    def check_weights(self, vocabulary: int) -> None:
        """Raises ConfigError for a distribution that is uniform."""
        most = math.log(vocabulary)
        entropy = float(np.mean(self.entropies))
        if not entropy < (1 - UNIFORM) * most:  # not `>=`: NaN is refused too
            raise ConfigError(
                f"teachers.{self.name}: it prefers no token to another (its entropy is"
                f" {entropy:.4f} nats of at most ln V = {most:.4f}): its weights are lost; load"
                " them again and compare their hash"
            )

    def check_same(self, reference: Fingerprint) -> None:
        """Raises RuntimeError when a teacher of the same files now scores otherwise."""
        if (off := self.distance(reference)) > TOLERANCE[self.dtype]:
            raise RuntimeError(
                f"teachers.{self.name}: its weights were lost or changed: its self-test is"
                f" {off:.3g} nats from that of this run's beginning (allowed:"
                f" {TOLERANCE[self.dtype]}): load it again and run the same command;"
                " if its hash is still the same, the device is at fault"
            )

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Fingerprint | None:
        """What `write` wrote; None where there is no such file. A damaged one is None too, with a
        warning: then only the hash in the checkpoint tells whether the teacher is the same."""
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            data |= {
                name: tuple(float(x) for x in data[name]) for name in ("logprobs", "entropies")
            }
            return cls(**data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(
                f"{path} is damaged ({first_line(error)}): it is written anew; only the hash in the"
                " checkpoint tells whether the teacher is the same",
                stacklevel=2,
            )
            return None


def digest_of(reference: str, *, dtype: str = "") -> str:
    """SHA-256 of the names and bytes of a model's weight files, shards included, and of its
    configuration. reference: a folder, or a hub id whose snapshot is downloaded.

    It reads the weights once: seconds for some gigabytes.
    """
    folder = Path(resolve(reference))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(reference, local_files_only=True))
    total = hashlib.sha256(dtype.encode())
    paths = sorted({path for kind in FILES for path in folder.glob(kind)})  # glob has no order
    for path in paths:
        with path.open("rb") as file:
            total.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return total.hexdigest()


def student_digest(model: str | None, tokenizer: Any) -> str:
    """SHA-256 of what a student is beside its weights, which are in the checkpoints: config.json
    (if it has one on this machine), vocabulary and chat template.

    model: a folder or hub id.
    """
    total = hashlib.sha256()
    settings = None if model is None else Path(resolve(model)) / "config.json"
    if settings is not None and settings.is_file():
        total.update(settings.read_bytes())
    words = sorted(tokenizer.get_vocab().items())
    total.update(json.dumps([words, tokenizer.chat_template, tokenizer.eos_token_id]).encode())
    return total.hexdigest()


def digest_of_served(model: str) -> str:
    """SHA-256 of the name under which a server serves a model; its url may change."""
    return hashlib.sha256(f"server {model}".encode()).hexdigest()


def self_test_rows(vocabulary: int) -> list[Row]:
    """Fixed rows of random ids, whose tokens but the first are all scored."""
    rng = np.random.default_rng(20)  # another seed would make every stored fingerprint differ
    return [scored_row(rng.integers(vocabulary, size=TOKENS)) for _ in range(ROWS)]


def scored_row(ids: npt.ArrayLike) -> Row:
    """A row of these ids, of which all but the first are action tokens."""
    ids_T = np.asarray(ids, dtype=np.int32)
    turns_T = np.zeros_like(ids_T)
    turns_T[0] = NO_ACTION
    return Row(
        ids_T=ids_T,
        turns_T=turns_T,
        behavior_logprobs_T=np.full(len(ids_T), np.nan, dtype=np.float32),
        branches_T=np.zeros_like(ids_T),
    )
