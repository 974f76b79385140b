"""Writes metrics.jsonl, one JSON object a step, and episodes/NNNNNN.jsonl.

Two runs of one configuration may differ only in the fields under time/, perf/ and memory/.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.distill.student.examples import Example
from tutelage.evaluation import run_folder
from tutelage.evaluation.files import Growing, write_text
from tutelage.scheduler.episodes import Dropped, Episode


class Journal:
    """Appends to a run folder.

    Args:
        folder: the run's. position: how many bytes of metrics.jsonl are kept (a resumed run cuts
            off what was written after its checkpoint).
    """

    def __init__(self, folder: Path, *, position: int = 0) -> None:
        self.folder = folder
        self._path = folder / run_folder.METRICS
        self._lines = Growing(self._path, length=self._standing(position))
        self.undone = self._lines.undone

    def _standing(self, position: int) -> int:
        """How many bytes are kept: whole lines, and never more than there are."""
        found = self._path.read_bytes() if self._path.exists() else b""
        if len(found) >= position and (not position or found[position - 1 : position] == b"\n"):
            return position
        warnings.warn(
            f"{self._path} has {len(found)} bytes, and the checkpoint knows of {position}: lines of"
            " steps that were done are lost or changed; the run continues without them",
            stacklevel=3,
        )
        return found[:position].rfind(b"\n") + 1

    @property
    def position(self) -> int:
        """Bytes of metrics.jsonl, once all are flushed to the disk."""
        self._lines.sync()
        return self._lines.length

    def write(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        """One line of metrics. task: several are joined by `+`, and their metrics' names begin
        with theirs."""
        record = {"step": step, "task": task, **dict(sorted(metrics.items()))}
        # Python would write NaN as a bare word, which is no JSON: other readers stop there.
        line = json.dumps(record, allow_nan=False, default=plain) + "\n"
        self._lines.write(line.encode())

    def write_episodes(
        self,
        step: int,
        outcomes: Sequence[Episode | Dropped],
        examples: Sequence[Example],
        version: int,
    ) -> None:
        """The step's episodes with ids, masks, sampled and teacher log-probabilities. version: of
        the student that learns from them."""
        # a mixed step has several tasks, each of which numbers its episodes from 0
        of_episode: dict[tuple[str, int], list[Example]] = defaultdict(list)
        for example in examples:
            of_episode[example.task, example.number].append(example)
        records = [
            _dropped(one)
            if isinstance(one, Dropped)
            else _episode(one, of_episode[one.order.task, one.order.number], version)
            for one in outcomes
        ]
        path = run_folder.episodes_of(self.folder, step)
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))

    def close(self) -> None:
        """Close."""
        self._lines.close()


def _dropped(outcome: Dropped) -> dict[str, Any]:
    order = outcome.order
    return {
        "task": order.task,
        "seed": order.seed,
        "index": order.index,
        "dropped": outcome.reason,
        "detail": outcome.detail,
        "attempts": outcome.attempts,
    }


def _episode(episode: Episode, examples: Sequence[Example], version: int) -> dict[str, Any]:
    order = episode.order
    return {
        "task": order.task,
        "seed": order.seed,
        "index": order.index,
        "teacher": order.teacher,
        "actor": order.actor,
        "guide": round(order.guide, 6),
        "task_type": episode.task_type,
        "success": episode.success,
        "reward": episode.reward,
        "ended": episode.ended,
        **({"verdict": episode.verdict} if episode.verdict else {}),
        "version": episode.version,
        "staleness": version - episode.version,
        "attempts": episode.attempts,
        "temperature": episode.sampling.temperature,
        "top_p": episode.sampling.top_p,
        "turns": [
            {
                "observation": turn.observation,
                "action": turn.action,
                **({} if turn.expert_action is None else {"expert_action": turn.expert_action}),
            }
            for turn in episode.turns
        ],
        "final_observation": episode.final_observation,
        "rows": [_row(example) for example in examples],
    }


def _row(example: Example) -> dict[str, Any]:
    row = example.row
    actions = row.action_mask_T.nonzero()[0]
    teacher: list[float | None] = [None] * len(row.ids_T)
    if example.scores is not None:
        for at, value in zip(actions, example.scores.sampled_N.tolist(), strict=True):
            teacher[at] = number(value)
    return {
        "ids": row.ids_T.tolist(),
        "turn": row.turns_T.tolist(),
        "mask": [int(m) for m in example.mask_T],  # action tokens less the special ones
        "branch": row.branches_T.tolist() if row.branches_T.any() else None,
        "sampled_logprob": [number(value) for value in row.behavior_logprobs_T.tolist()],
        # under the sampling parameters; files of old runs have this name
        "law_logprob": [number(value) for value in row.sampling_T.tolist()],
        "teacher_logprob": teacher,
    }


def plain(value: Any) -> Any:
    """A value that JSON does not know: a NumPy or torch number as a number, the rest as text."""
    return value.item() if hasattr(value, "item") else str(value)


def number(value: float) -> float | None:
    """A log-probability as JSON, which has no NaN and no infinity: null where nothing was sampled,
    the largest negative float32 for -inf."""
    if math.isnan(value):
        return None
    return round(value, 6) if math.isfinite(value) else -3.4e38
