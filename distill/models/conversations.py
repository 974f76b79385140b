"""How a run talks with its student: what ends a reply, and the day that a template may show.

Both are looked up once, before weights load, and given to every process that makes prompts.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.resolved import TaskSettings
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.sections import StudentConfig
from tutelage.distill.models.loading import load_generation, load_settings, load_tokenizer
from tutelage.evaluation.run_folder import Damaged, read_config
from tutelage.scheduler.chat import Chat
from tutelage.scheduler.templates import reads_clock


def stop_ids(reference: str | None) -> frozenset[int]:
    """What a model's own settings say ends a reply: eos_token_id of generation_config.json, else of
    config.json. reference: where the model is; None: from scratch, which has none."""
    if reference is None:
        return frozenset()
    settings = load_generation(reference) or load_settings(reference)
    told = getattr(settings, "eos_token_id", None)
    several = told if isinstance(told, list | tuple) else [told]
    return frozenset(int(one) for one in several if isinstance(one, int))


def spoken(config: RunConfig) -> dict[str, Any]:
    """What a rollout worker is told of the conversations, beside the tokenizer."""
    return {"stop_ids": stop_ids(config.student.model), "date": config.date}


def chat_of(config: RunConfig, tokenizer: Any, system: str | None) -> Chat:
    """A task's conversation. system: what it begins with.

    Raises:
        ConfigError: tokenizer or template do not do.
    """
    try:
        return Chat(tokenizer, system=system, **spoken(config))
    except ValueError as error:
        raise ConfigError(f"{tokenizer_key(config.student)}: {error}") from None


def tokenizer_key(student: StudentConfig) -> str:
    """The key that names the student's tokenizer."""
    return "student.tokenizer" if student.tokenizer else "student.model"


def check_conversations(
    config: RunConfig, tasks: Mapping[str, TaskSettings], tokenizer: Any
) -> None:
    """Whether every task's conversation can be held, and ends as its teachers know it.

    Raises:
        ConfigError: where not; names the key.
    """
    chats = {
        name: chat_of(config, tokenizer, task.rollout.context.system)
        for name, task in tasks.items()
    }
    known = {
        name: teacher_chat(name, load_tokenizer(teacher.files), teacher.files).eos_ids
        for name, teacher in config.teachers.items()
        if teacher.files is not None
    }
    for task, settings in tasks.items():
        end = chats[task].end_id
        for name in settings.schedule.teachers:
            if name in known and end not in known[name]:
                ends = ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in known[name])
                raise ConfigError(
                    f"teachers.{name}: in tasks.{task} a reply ends with"
                    f" {tokenizer.convert_ids_to_tokens(end)!r}, and this teacher's with {ends}: on"
                    " that token it misleads; choose a teacher that was taught in the student's"
                    " chat template, or put the token into eos_token_id of its"
                    " generation_config.json"
                )


def teacher_chat(name: str, tokenizer: Any, reference: str | None) -> Chat:
    """How a teacher's own conversations end; its template writes none here.

    Raises:
        ConfigError: its tokenizer does not do.
    """
    told = stop_ids(reference)
    try:
        return Chat(tokenizer, stop_ids=told)
    except ValueError:
        bare = copy.copy(tokenizer)
        bare.chat_template = None
    try:
        return Chat(bare, stop_ids=told)
    except ValueError as error:
        raise ConfigError(f"teachers.{name}: {error}") from None


def as_begun(config: RunConfig) -> RunConfig:
    """The config with the day on which the run in its folder began, if its prompts show it: a run
    that goes on tomorrow, and an evaluation of what it made, see the same prompts."""
    try:
        found = datetime.date.fromisoformat(str(read_config(Path(config.run))["date"]))
    except (Damaged, ValueError, LookupError):
        return config  # none yet; what else is wrong with it is said where the run goes on
    return config if config.date else config.model_copy(update={"date": found})


def dated(config: RunConfig, tokenizer: Any) -> RunConfig:
    """The config with a day for its prompts: where the template asks for one and none is given,
    today."""
    if config.date is not None or not reads_clock(tokenizer):
        return config
    return config.model_copy(update={"date": datetime.date.today()})
