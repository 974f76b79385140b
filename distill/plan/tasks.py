"""Forecasts what each task of a config would run: steps, episodes, tokens, bytes of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tutelage.distill.config.resolved import TaskSettings
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.sections import ObjectiveConfig, TaskConfig, TermConfig
from tutelage.distill.objectives import Needs, options_of
from tutelage.scheduler.policies import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """One task's part of the run. Tokens are those of the student's replies, at most."""

    name: str
    env: str
    teacher: str | None
    objective: str
    steps: int
    episodes: int  # a step
    group: int  # of one game
    tokens: int  # a step
    evaluated: int | None  # episodes of all evaluations; None: every game, however many
    score_bytes: int | None  # of the teacher's scores of one token; None: V is unknown

    @property
    def run_episodes(self) -> int:
        return self.steps * self.episodes

    @property
    def run_tokens(self) -> int:
        return self.steps * self.tokens

    @property
    def step_bytes(self) -> int | None:
        """Bytes of the teacher's scores in a step."""
        return None if self.score_bytes is None else self.score_bytes * self.tokens


def forecast(
    config: RunConfig, name: str, settings: TaskSettings, steps: int, vocabulary: int | None
) -> TaskForecast:
    task, objective = config.tasks[name], settings.objective
    return TaskForecast(
        name=name,
        env=task.env,
        teacher=_described_teachers(task.teachers) if objective.needs.teacher else None,
        objective=_described(task, settings),
        steps=steps,
        episodes=task.episodes,
        group=task.group,
        tokens=reply_tokens(settings),
        evaluated=evaluated(config),
        score_bytes=score_bytes(objective.needs, vocabulary),
    )


def _described_teachers(weights: Mapping[str, float]) -> str:
    """`one`, or `one 75%, two 25%`: who teaches which share of the episodes."""
    if len(weights) == 1:
        return next(iter(weights))
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.0%}" for name, weight in weights.items())


def _described(task: TaskConfig, settings: TaskSettings) -> str:
    """The task's losses, its weight if that is not 1, and its guidance."""
    text = [" + ".join(map(_loss, settings.losses))]
    if task.weight != 1:
        text.append(f"(weight {task.weight:g})")
    if task.guidance is not None:
        text.append(f"(the {task.guidance.by} begins {task.guidance.share:.0%} of the episodes)")
    return " ".join(text)


def _loss(section: ObjectiveConfig) -> str:
    """A loss: its weight in a sum, its name, its k, and the options that differ from defaults."""
    defaults = {key: one.default for key, one in options_of(section.name).items()}
    shown = {key: x for key, x in section.options.items() if x != defaults[key]}
    if "k" in defaults:
        shown = {"k": defaults["k"]} | shown
    weight = section.weight if isinstance(section, TermConfig) else 1.0
    text = [f"{weight:g}"] if weight != 1 else []
    text += [section.name, *(f"{key}={value}" for key, value in shown.items())]
    return " ".join(text)


def steps_of(config: RunConfig, settings: Mapping[str, TaskSettings]) -> dict[str, int]:
    """Every task's steps. Where they depend on what happens in the run (token_budget, gap), every
    reply is taken to have the greatest length, and all gaps to stay the same."""
    timetable = config.timetable(settings)
    tokens = {name: float(reply_tokens(task)) for name, task in settings.items()}
    gaps = dict.fromkeys(settings, 1.0)
    for _, tasks in timetable.walk():
        active = timetable.active()
        timetable.record(Step(active=active, trained=tasks, tokens=tokens, gaps=gaps))
    return {name: timetable.turn(name) for name in settings}


def reply_tokens(task: TaskSettings) -> int:
    """The most tokens of the student's replies in one step."""
    how = task.rollout
    return task.schedule.episodes * how.max_turns * how.max_new_tokens


def evaluated(config: RunConfig) -> int | None:
    """Episodes that one task plays in all evaluations; None: every game, however many."""
    section = config.evaluation
    times = section.rounds(config.steps)
    if section.episodes == "all":
        return None if times else 0
    return times * section.episodes


def score_bytes(needs: Needs, vocabulary: int | None) -> int | None:
    """Bytes of a teacher's scores of one token in compact form (teachers/transport.py): K ids as
    int32 with float16 log-probabilities, and 6 bytes for the sampled token and the entropy. Where
    needed, also J query ids as int32 with float16, and float16 for all V ids. None: V is unknown.
    """
    if not needs.teacher:
        return 0
    count = 6 * needs.width + 6 + 6 * needs.student_k
    if not needs.full:
        return count
    return None if vocabulary is None else count + 2 * vocabulary
