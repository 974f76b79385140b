"""How a run talks with its student: what ends a reply, and the date that a template may show.

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
    """The ids that end a reply by a model's own settings: eos_token_id of generation_config.json,
    else of config.json. reference: where the model is; None: from scratch, without settings."""
    if reference is None:
        return frozenset()
    settings = load_generation(reference) or load_settings(reference)
    eos = getattr(settings, "eos_token_id", None)
    several = eos if isinstance(eos, list | tuple) else [eos]  # Llama 3 has a list
    return frozenset(int(one) for one in several if isinstance(one, int))


def spoken(config: RunConfig) -> dict[str, Any]:
    """The arguments of `Chat` that a rollout worker needs beside the tokenizer."""
    return {"stop_ids": stop_ids(config.student.model), "date": config.date}


def chat_of(config: RunConfig, tokenizer: Any, system: str | None) -> Chat:
    """A task's conversation. system: its system message.

    Raises:
        ConfigError: the tokenizer or its template cannot be used.
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
    """Check that every task's template can be used, and that its teachers know the token that ends
    a reply.

    Raises:
        ConfigError: names the key.
    """
    chats = {
        name: chat_of(config, tokenizer, task.rollout.context.system)
        for name, task in tasks.items()
    }
    known = {
        name: teacher_chat(name, load_tokenizer(teacher.tokenizer), teacher.tokenizer).eos_ids
        for name, teacher in config.teachers.items()
        if teacher.tokenizer is not None
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
    """A teacher's own chat, to see how its replies end; no prompt is made with it.

    Raises:
        ConfigError: its tokenizer cannot be used.
    """
    stops = stop_ids(reference)
    # A template that fails here does not matter for a teacher, which reads the student's ids: then
    # its tokenizer's and settings' ends alone count.
    try:
        return Chat(tokenizer, stop_ids=stops)
    except ValueError:
        bare = copy.copy(tokenizer)
        bare.chat_template = None
    try:
        return Chat(bare, stop_ids=stops)
    except ValueError as error:
        raise ConfigError(f"teachers.{name}: {error}") from None


def as_begun(config: RunConfig) -> RunConfig:
    """The config with the date on which the run in its folder began, if its prompts show it: a run
    resumed tomorrow, and an evaluation of its checkpoints, see the same prompts."""
    try:
        found = datetime.date.fromisoformat(str(read_config(Path(config.run))["date"]))
    except (Damaged, ValueError, LookupError):
        return config  # there is no run yet; whatever else is wrong with it, resuming says
    return config if config.date else config.model_copy(update={"date": found})


def dated(config: RunConfig, tokenizer: Any) -> RunConfig:
    """The config with a date for its prompts: today's, where the template shows one and the config
    gives none."""
    if config.date is not None or not reads_clock(tokenizer):
        return config
    return config.model_copy(update={"date": datetime.date.today()})
