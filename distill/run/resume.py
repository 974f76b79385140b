"""May a run resume in its folder? What of its configuration, student and teachers may differ from
before, and what changed, key by key.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.reading import dump
from tutelage.distill.config.resolved import TaskSettings
from tutelage.distill.config.run import RunConfig
from tutelage.distill.teachers.fingerprint import Fingerprint, student_digest
from tutelage.evaluation import run_folder
from tutelage.evaluation.files import write_text

FREE_TO_CHANGE = (
    "run",
    "accept_changes",
    # Where and by how many processes it is computed. Other devices, numbers of processes and
    # micro-batches round otherwise: the run resumes, but is not bit-identical.
    "learner.*",
    # No dot: the section may also appear or disappear as a whole.
    "cluster*",
    *(f"vllm.{key}*" for key in ("gpu", "kv", "max", "tensor", "enforce")),  # not its dtype
    "student.device",
    "student.threads",
    "optimizer.micro_tokens",
    "optimizer.recompute",
    "*rollout.max_live",
    "*rollout.processes",
    # how long, how often and how much is lost before the run gives up
    "*rollout.timeout",
    "*rollout.attempts",
    "*rollout.lost",
    # Who teaches is known by the hash of its files and by its self-test, not by where it lies:
    # `refuse_other_teachers` compares those.
    "teachers.*.model*",
    "teachers.*.device*",
    "teachers.*.cache*",
    "teachers.*.sleeps*",
    "teachers.*.url*",
    "teachers.*.weights*",
    "teachers.*.api_key_env*",
    "teachers.*.timeout*",
    "teachers.*.attempts*",
    "teachers.*.concurrency*",
    "teachers.*.max_answer_mib*",
    "teachers.*.vllm*",
    # what is written, shown and evaluated
    "journal.*",
    "checkpoint.*",
    "evaluation.*",
    "tasks.*.eval_args*",
)
"""Patterns of the keys that do not decide what is learned."""

MISSING = object()


def refuse_changes(folder: Path, config: RunConfig, tasks: Mapping[str, TaskSettings]) -> None:
    """Compare a configuration with that of the run in the folder, which it is to resume.

    Raises:
        ConfigError: keys that decide what is learned have changed (all of them are named, with the
            cure); fewer steps are configured than are done; the folder's config.yaml is damaged.
    """
    newest = run_folder.newest(folder / run_folder.CHECKPOINTS)
    if newest is None:
        return
    if config.steps < (done := int(newest.name)):
        raise ConfigError(
            f"steps: {config.steps}, but {done} are done in {folder}: set it to {done} or more, or"
            " choose another run folder"
        )
    if config.accept_changes:
        return
    old = _read(folder)
    depending = depending_on_steps(config, tasks)
    free = FREE_TO_CHANGE if depending else (*FREE_TO_CHANGE, "steps")
    found = [
        f"{key}: {_shown(was)}, now {_shown(now)}" + (depending if key == "steps" else "")
        for key, was, now in differences(old, config)
        if not any(fnmatchcase(key, pattern) for pattern in free)
    ]
    if found:
        raise ConfigError(
            f"{folder / run_folder.CONFIG}: the run there was made with another configuration"
            f" ({'; '.join(found)}): put that back, choose another run folder, or resume with"
            " accept_changes=true"
        )


def write_config(folder: Path, config: RunConfig, *, step: int) -> None:
    """Write RUN/config.yaml, and a line of RUN/changes.jsonl for what differs from the one before.

    `accept_changes` is left out: it is a permission for one resumption, not for those to come.
    """
    path, record = folder / run_folder.CONFIG, folder / run_folder.CHANGES
    try:
        changed = {key: [_plain(was), _plain(now)] for key, was, now in _changes(folder, config)}
    except ConfigError as error:  # damaged; `refuse_changes` let it pass for accept_changes=true
        changed = {run_folder.CONFIG: [str(error), None]}
    if changed:
        line = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S %z"), "changes": changed}
        lines = record.read_text(encoding="utf-8") if record.exists() else ""
        write_text(record, lines + json.dumps(line) + "\n", private=True)
    once = config.model_copy(update={"accept_changes": False})
    text = dump(once.model_dump(mode="json"))
    write_text(path, text, private=True)  # an environment's argument may be a key


def _changes(folder: Path, config: RunConfig) -> list[tuple[str, Any, Any]]:
    if not (folder / run_folder.CONFIG).exists():
        return []
    return [one for one in differences(_read(folder), config) if one[0] != "accept_changes"]


def refuse_other_student(
    config: RunConfig, tokenizer: Any, checkpoint: Path, saved: str | None
) -> None:
    """Compare config.json, vocabulary and template of `student.model` with what `checkpoint` was
    saved with. The checkpoint has the weights; the rest is read from where the run began.

    Args:
        saved: their digest, from the checkpoint; None: an older version did not save it.
    """
    if config.accept_changes or saved in (None, student_digest(config.student.model, tokenizer)):
        return
    where = config.student.model or config.student.tokenizer
    raise ConfigError(
        f"student: {where!r} has another config.json, vocabulary or template than when"
        f" {checkpoint} was saved: put the old ones back (the checkpoint has copies), choose"
        " another run folder, or resume with accept_changes=true"
    )


def refuse_other_teachers(
    config: RunConfig,
    references: dict[str, Fingerprint],
    checkpoint: Path,
    saved: Mapping[str, str],
) -> None:
    """Compare each teacher's weights with those that the run had. From here on `references` hold
    the fingerprints of the run's first session, not this one's: small drifts cannot add up.

    Args:
        saved: the teachers' digests, from the checkpoint.
    """
    if config.accept_changes:
        return
    for name, fingerprint in references.items():
        if fingerprint.digest != saved.get(name):
            raise ConfigError(
                f"teachers.{name}: {config.teachers[name].model!r} holds other weights than when"
                f" {checkpoint} was saved: put the old ones back, choose another run folder, or"
                " resume with accept_changes=true"
            )
        first = Fingerprint.read(Path(config.run) / run_folder.TEACHERS / f"{name}.json")
        if first is not None:
            fingerprint.check_same(first)
            references[name] = first


def depending_on_steps(config: RunConfig, tasks: Mapping[str, TaskSettings]) -> str:
    """For a message, the keys whose effect on past steps depends on the number of steps to come:
    the learning rate's decay, and what follows the share of a task's steps that is done. Empty:
    there are none. (Which task has a step never depends on it.)"""
    found = ["optimizer.decay"] if config.optimizer.decay != "constant" else []
    for name, task in tasks.items():
        at_first, at_last = task.schedule.expert_share
        if task.schedule.labels and at_first != at_last:
            found.append(f"tasks.{name}.expert_share")
        if config.tasks[name].guidance is not None:
            found.append(f"tasks.{name}.guidance")
        if task.objective.needs.progress:
            found.append(f"tasks.{name}.objective ({task.objective.name})")
    return f", on which {', '.join(found)} depends" if found else ""


def differences(old: Mapping[str, Any], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, its old value, its new value) of all that differs; MISSING where one side lacks it.
    A key that did not exist when `old` was written counts as having its default."""
    try:
        filled = parse_config(dict(old), "").model_dump(mode="json")
    except ConfigError:  # an earlier version wrote it, with keys that no longer exist
        filled = dict(old)
    was, now = dict(_leaves(filled)), dict(_leaves(config.model_dump(mode="json")))
    return [
        (key, was.get(key, MISSING), now.get(key, MISSING))
        for key in dict.fromkeys([*was, *now])
        if was.get(key, MISSING) != now.get(key, MISSING)
    ]


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value that is not a mapping."""
    for key, value in section.items():
        if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            value = {str(place): one for place, one in enumerate(value)}  # losses of a sum
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value != {}:  # an empty section says no more than an absent one
            yield f"{prefix}{key}", value


def _read(folder: Path) -> Mapping[str, Any]:
    """Raises ConfigError for what is no configuration of a run."""
    try:
        return run_folder.read_config(folder)
    except run_folder.Damaged as fault:
        raise ConfigError(
            f"{folder / run_folder.CONFIG} is damaged ({fault}), so that the run cannot be compared"
            " with how it began: put it back from a copy, or resume with accept_changes=true, which"
            " writes it anew"
        ) from None


def _plain(value: Any) -> Any:
    return None if value is MISSING else value


def _shown(value: Any) -> str:
    """A value for a message: as in YAML, shortened."""
    if value is MISSING:
        return "not there"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
