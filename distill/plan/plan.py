"""Makes the plan of a config: its steps, tokens and memory. Loads no weights, asks no network.

Lengths of replies are upper bounds, since a student may stop earlier. Prompts and observations are
not counted: they are the environment's. A model that is not on this machine is sized by its
published architecture or by the size in its name; what that does not tell stays unknown.

Bytes are decimal: 1 GB = 10^9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tutelage.distill.config.resolved import TaskSettings, check_supports
from tutelage.distill.config.run import RunConfig
from tutelage.distill.models.loading import check_vocabularies, student_tokenizer
from tutelage.distill.plan.footprint import Footprint, at_hand, footprint, student_footprint
from tutelage.distill.plan.gpus import suggestion
from tutelage.distill.plan.memory import (
    Need,
    guide_needs,
    learner_needs,
    memory_here,
    process_needs,
    rollout_needs,
    teacher_needs,
)
from tutelage.distill.plan.tasks import TaskForecast, forecast, steps_of
from tutelage.distill.student.sampling_bias import biases


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a config would run. settings: of its tasks. vocabulary: the ids that get probability;
    None: unknown."""

    config: RunConfig
    settings: Mapping[str, TaskSettings]
    vocabulary: int | None
    student: Footprint
    teachers: dict[str, Footprint]
    tasks: tuple[TaskForecast, ...]
    needs: tuple[Need, ...]

    def total(self, device: str) -> tuple[int, int, bool]:
        """(at least, at most, whether something unknown comes on top)."""
        own = [need for need in self.needs if need.device == device]
        unknown = any(need.least is None or need.most is None for need in own)
        return sum(n.least or 0 for n in own), sum(n.most or n.least or 0 for n in own), unknown


def make_plan(config: RunConfig) -> Plan:
    """The plan of a checked config.

    Raises:
        ConfigError: what is on this machine does not fit together (vocabularies, k, config.json).
    """
    student = student_footprint(config.student)
    teachers = {
        name: footprint(teacher.files or teacher.model) for name, teacher in config.teachers.items()
    }
    vocabulary = _vocabulary(config, student)
    settings = config.resolve()
    steps = steps_of(config, settings)
    if vocabulary is not None:
        check_supports(settings, vocabulary)
    tasks = tuple(
        forecast(config, name, task, steps[name], vocabulary) for name, task in settings.items()
    )
    return Plan(
        config=config,
        settings=settings,
        vocabulary=vocabulary,
        student=student,
        teachers=teachers,
        tasks=tasks,
        needs=(
            *learner_needs(config, settings, student, vocabulary, tasks),
            *rollout_needs(config, settings, student),
            *teacher_needs(config, teachers, vocabulary, tasks),
            *guide_needs(config, settings, teachers),
            process_needs(config),
        ),
    )


def _vocabulary(config: RunConfig, student: Footprint) -> int | None:
    """How many ids student and teachers share. Only tokenizers on this machine are compared."""
    own = _tokenizer_here(config)
    if own is None:
        return None if student.shape is None else student.shape.rows
    folders = {
        name: at_hand(teacher.tokenizer)
        for name, teacher in config.teachers.items()
        if teacher.tokenizer is not None
    }
    # `check_vocabularies` loads what a config names: it gets folders, so that it asks no network.
    here = {
        name: config.teachers[name].model_copy(
            update={"model": str(folder), "weights": str(folder)}
        )
        for name, folder in folders.items()
        if folder is not None and (folder / "tokenizer_config.json").is_file()
    }
    key = "tokenizer" if config.student.tokenizer else "model"
    read = config.student.model_copy(update={key: str(own)})
    return check_vocabularies(config.model_copy(update={"student": read, "teachers": here}))


def _tokenizer_here(config: RunConfig) -> Path | None:
    """The folder of the student's tokenizer, if it is on this machine."""
    own = at_hand(student_tokenizer(config.student))
    return own if own is not None and (own / "tokenizer_config.json").is_file() else None


def notes(plan: Plan) -> list[str]:
    """Sentences that the reader of a plan needs beside its numbers."""
    config, found = plan.config, []
    asked = (name for name, teacher in config.teachers.items() if teacher.files is not None)
    models = (plan.student, *(plan.teachers[name] for name in asked))
    away = {
        "sized by their published config.json": [m.reference for m in models if m.published],
        "known by name alone": [m.reference for m in models if m.shape is None],
    }
    for how, references in away.items():
        if references:
            found.append(f"not on this machine, {how}: {', '.join(dict.fromkeys(references))}")
    if _tokenizer_here(config) is None:
        found.append("the student's tokenizer is not on this machine: vocabularies go unchecked")
    for name, own in biases(plan.settings).items():
        found.append(f"tasks.{name}: {own.text}: {own.cure}")
    if len(config.tasks) > 1 and config.schedule.policy in ("token_budget", "gap"):
        found.append(
            f"schedule {config.schedule.policy} decides in the run: the steps here are those of"
            " replies of the greatest length and of gaps that do not change"
        )
    devices = list(dict.fromkeys(need.device for need in plan.needs))
    if missing := [device for device in devices if memory_here(device) is None]:
        found.append(f"this machine has no {', no '.join(missing)}")
    for device in devices:
        least, most, unknown = plan.total(device)
        room = memory_here(device)
        if device != "cpu":
            more = ", and what is unknown" if unknown else ""
            found.append(f"{device}: at least {suggestion(least)}{more}")
        if room is not None and least > room:
            found.append(f"{device}: does not fit; {_largest(plan, device)}")
        elif room is not None and most > room:
            found.append(f"{device}: full contexts would not fit; {_largest(plan, device)}")
    if config.cluster is not None and config.cluster.address != "local":
        found.append(f"Ray at {config.cluster.address}: actors may run on other machines")
    return found


def _largest(plan: Plan, device: str) -> str:
    own = [need for need in plan.needs if need.device == device]
    need = max(own, key=lambda need: need.most or 0)
    return f"the largest part is {need.what} (see {need.knob})"
