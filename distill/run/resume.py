"""May a run resume in its folder: what of its configuration, student and teachers may be another,
and what changed, key by key.
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
    # where and by how many it is computed: other numbers of processes, other parts of a batch,
    # other devices round otherwise; the run goes on, but is not bit-identical
    "learner.*",
    "cluster*",
    *(f"vllm.{key}*" for key in ("gpu", "kv", "max", "tensor", "enforce")),  # not its dtype
    "student.device",
    "student.threads",
    "optimizer.micro_tokens",
    "optimizer.recompute",
    "*rollout.max_live",
    "*rollout.processes",
    # when patience ends
    "*rollout.timeout",
    "*rollout.attempts",
    "*rollout.lost",
    # who teaches is the hash's and the self-test's to say
    "teachers.*.model*",  # a folder that was moved: the hash of its files is compared
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
    # what is told of it
    "journal.*",
    "checkpoint.*",
    "evaluation.*",
    "tasks.*.eval_args*",
)
"""Keys that do not touch what is learned."""

MISSING = object()


def refuse_changes(folder: Path, config: RunConfig, tasks: Mapping[str, TaskSettings]) -> None:
    """Compare a configuration with that of the run in the folder, which the run goes on from.

    Raises:
        ConfigError: every key that touches what is learned and is another now, and the cure; fewer
            steps than are done; the folder's own configuration is damaged.
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
            f" ({'; '.join(found)}): put that back, choose another run folder, or go on with"
            " accept_changes=true"
        )


def write_config(folder: Path, config: RunConfig, *, step: int) -> None:
    """RUN/config.yaml, without the permission to go on, which was for once; what it changes of the
    one that stood there goes to RUN/changes.jsonl, a line a change of configuration."""
    path, record = folder / run_folder.CONFIG, folder / run_folder.CHANGES
    try:
        changed = {key: [_plain(was), _plain(now)] for key, was, now in _changes(folder, config)}
    except ConfigError as error:  # whoever came here has accepted it
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
    """Its weights are in the checkpoint; what they are computed with lies where it began. saved:
    the digest of that, from the checkpoint."""
    if config.accept_changes or saved in (None, student_digest(config.student.model, tokenizer)):
        return
    where = config.student.model or config.student.tokenizer
    raise ConfigError(
        f"student: {where!r} has another config.json, vocabulary or template than when"
        f" {checkpoint} was saved: put the old ones back (the checkpoint has copies), choose"
        " another run folder, or go on with accept_changes=true"
    )


def refuse_other_teachers(
    config: RunConfig,
    references: dict[str, Fingerprint],
    checkpoint: Path,
    saved: Mapping[str, str],
) -> None:
    """From here on a teacher is compared with the run's first exam, not with this session's:
    `references` then hold that one. saved: the teachers' digests, from the checkpoint."""
    if config.accept_changes:
        return
    for name, fingerprint in references.items():
        if fingerprint.digest != saved.get(name):
            raise ConfigError(
                f"teachers.{name}: {config.teachers[name].model!r} holds other weights than when"
                f" {checkpoint} was saved: put the old ones back, choose another run folder, or go"
                " on with accept_changes=true"
            )
        first = Fingerprint.read(Path(config.run) / run_folder.TEACHERS / f"{name}.json")
        if first is not None:
            fingerprint.check_same(first)
            references[name] = first


def depending_on_steps(config: RunConfig, tasks: Mapping[str, TaskSettings]) -> str:
    """What a run of more steps would have done otherwise from its beginning, for a message: the
    schedule of the learning rate, and what goes by the share of a task's steps that is done. Empty:
    nothing; whose turn it is never depends on how many steps are to come."""
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
    """(key, what it was, what it is) of all that differs; MISSING on the side that has it not.
    Defaults that came after `old` was written are no difference."""
    try:
        filled = parse_config(dict(old), "").model_dump(mode="json")
    except ConfigError:  # an earlier version's, with keys that are no more
        filled = dict(old)
    was, now = dict(_leaves(filled)), dict(_leaves(config.model_dump(mode="json")))
    return [
        (key, was.get(key, MISSING), now.get(key, MISSING))
        for key in dict.fromkeys([*was, *now])
        if was.get(key, MISSING) != now.get(key, MISSING)
    ]


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping with keys of its own."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value != {}:
            yield f"{prefix}{key}", value


def _read(folder: Path) -> Mapping[str, Any]:
    """Raises ConfigError for what is no configuration of a run."""
    try:
        return run_folder.read_config(folder)
    except run_folder.Damaged as fault:
        raise ConfigError(
            f"{folder / run_folder.CONFIG} is damaged ({fault}), so that nobody can tell whether"
            " the run goes on as it was begun: put it back from a copy, or go on with"
            " accept_changes=true, which writes it anew"
        ) from None


def _plain(value: Any) -> Any:
    return None if value is MISSING else value


def _shown(value: Any) -> str:
    """A value in a message: as in YAML, not too long."""
    if value is MISSING:
        return "not there"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
