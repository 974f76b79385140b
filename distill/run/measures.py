"""A step's metrics beside the learner's own: of its episodes, its time and its memory."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tutelage.distill.student.examples import Example
from tutelage.scheduler.episodes import Dropped, Episode

CURES = {
    "rollout": "lower rollout.max_live (episodes in flight) or rollout.max_turns; with vllm,"
    " vllm.gpu_memory_utilization or vllm.max_num_batched_tokens",
    "score": "give the teacher dtype: bfloat16, another device, or sleeps: true; with vllm, lower"
    " its vllm.gpu_memory_utilization or vllm.max_num_batched_tokens",
    "update": "set optimizer.recompute: true, lower optimizer.micro_tokens, or share the student"
    " among learner.processes; `tutelage plan` tells what each part takes",
}
"""The cure for each part of a step that ran out of memory."""

UNGRADED = (
    "no_box", "too_long", "unreadable", "gold_unparseable", "refused", "timeout", "crash",
    "unavailable",
)  # fmt: skip
"""Verdicts of the math grader where it did not compare two answers; each has a metric,
`grading/...`."""


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block.

        Raises:
            RuntimeError: it ran out of memory; with the cure.
        """
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:
            # torch, vLLM and CUDA's libraries have a class of their own each: the words are common
            if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                said = f"the {name} ran out of memory: {str(error) or type(error).__name__}"
                raise RuntimeError(f"{said}; {CURES.get(name, CURES['rollout'])}") from error
            raise
        self._parts[name] = time.perf_counter() - begun

    def metrics(
        self, outcomes: Sequence[Episode | Dropped], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Metrics that may differ between two runs of one configuration: time/, perf/, memory/."""
        tokens = sum(len(example.row.ids_T) for example in examples)
        # ru_maxrss is in KiB on Linux
        peak = {"memory/peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if torch.cuda.is_available():
            peak["memory/peak_cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
        episodes = [outcome for outcome in outcomes if isinstance(outcome, Episode)]
        sampled = sum(episode.num_action_tokens for episode in episodes)
        return {
            **{f"time/{name}": round(seconds, 4) for name, seconds in self._parts.items()},
            "time/step": round(time.perf_counter() - self._begun, 4),
            "perf/rollout_tokens_per_s": round(sampled / max(self._parts["rollout"], 1e-9), 1),
            "perf/score_tokens_per_s": round(tokens / max(self._parts["score"], 1e-9), 1),
            "perf/update_tokens_per_s": round(tokens / max(self._parts["update"], 1e-9), 1),
            # under perf/: a retried episode is the same episode, and how often one is retried
            # depends on the machine
            "perf/episodes_retried": sum(episode.attempts > 1 for episode in episodes),
            **{name: round(amount, 1) for name, amount in peak.items()},
        }


def outcome_metrics(outcomes: Sequence[Episode | Dropped], version: int) -> dict[str, Any]:
    """Metrics of a task's episodes in one step; `episodes/lost`, if any were lost, says which
    and why. version: of the student that learns from them."""
    lost = [outcome for outcome in outcomes if isinstance(outcome, Dropped)]
    episodes = [outcome for outcome in outcomes if isinstance(outcome, Episode)]
    count = len(episodes)
    replies = [turn for episode in episodes for turn in episode.turns]
    # a guided episode's success is partly the guide's: it counts only where all are guided
    alone = [episode for episode in episodes if not episode.order.guide] or episodes
    return {
        "reward/success": sum(episode.success for episode in alone) / len(alone),
        "episodes/guided": sum(episode.order.guide > 0 for episode in episodes) / count,
        "episodes/played": count,
        "episodes/dropped": len(lost),
        **({"episodes/lost": [one.name for one in lost]} if lost else {}),
        **_grading(episodes, lost),
        "episodes/turns": sum(len(episode.turns) for episode in episodes) / count,
        "episodes/staleness": sum(version - episode.version for episode in episodes) / count,
        "episodes/unfinished": sum(episode.ended != "terminated" for episode in episodes) / count,
        "episodes/cut_off": sum(not turn.complete for turn in replies) / max(1, len(replies)),
        "episodes/malformed": sum(not turn.valid for turn in replies) / max(1, len(replies)),
        # action tokens; files of old runs have this name
        "tokens/chosen": sum(episode.num_action_tokens for episode in episodes),
        "tokens/seen": sum(len(row.ids_T) for episode in episodes for row in episode.rows),
    }


def _grading(episodes: Sequence[Episode], lost: Sequence[Dropped]) -> dict[str, int]:
    """How many answers were not compared, by reason, where the environment tells verdicts."""
    verdicts = Counter(episode.verdict for episode in episodes if episode.verdict)
    undecided = sum(one.reason == "undecided" for one in lost)
    if not undecided and not verdicts.keys() & {"string", "exact", "symbolic", *UNGRADED}:
        return {}
    return {f"grading/{one}": verdicts[one] for one in UNGRADED} | {"grading/undecided": undecided}


def step_line(
    found: Mapping[str, Mapping[str, Any]], timings: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """(the step's tasks, joined by `+`; its metrics, prefixed with their task's name where several
    tasks share the step). found: metrics by task."""
    if len(found) == 1:
        ((task, metrics),) = found.items()
        return task, {**metrics, **timings}
    named = {f"{task}/{name}": x for task, metrics in found.items() for name, x in metrics.items()}
    return "+".join(found), named | dict(timings)


def teacher_gap(metrics: Mapping[str, float]) -> float:
    """How far the student is from its teacher (log pi - log q), for the schedule's policy `gap`."""
    # gap/mean is log q - log pi; a task without teacher has none, and its loss stands in
    return -metrics["gap/mean"] if "gap/mean" in metrics else metrics["loss/mean"]
