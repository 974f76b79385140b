"""The run's configuration: plain data, read once, checked whole, before anything heavy loads.

Unknown keys are refused with the nearest known one. A value of another type than its key's is
refused: no text becomes a number, no number a switch. What has no sensible default is required.
What depends on this machine is checked by run/preflight.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.resolved import TaskSettings, resolved
from tutelage.distill.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    JournalConfig,
    LearnerConfig,
    ObjectiveConfig,
    Objectives,
    OptimizerConfig,
    RolloutConfig,
    ScheduleConfig,
    StudentConfig,
    TaskConfig,
)
from tutelage.distill.config.teachers import (
    TeacherConfig,
    VllmConfig,
    check_sleep,
    lacking,
)
from tutelage.distill.config.values import (
    MOST_SEED,
    MOST_STEPS,
    Name,
    Place,
    Positive,
    Section,
    day,
    whole_number,
)
from tutelage.distill.objectives import Objective
from tutelage.envs.names import unknown
from tutelage.scheduler.episodes import SamplingParams
from tutelage.scheduler.policies import Policy, make_policy
from tutelage.scheduler.timetable import Timetable


class RunConfig(Section):
    """A whole run."""

    run: Place
    """The run folder, where the run keeps everything. A run that was stopped resumes from it."""
    accept_changes: bool = False
    """Resume although the run folder was made with another configuration. It is not written to the
    folder's config.yaml: a later change must be accepted anew."""
    seed: Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=MOST_SEED)] = 0
    """The seed: every random draw is a function of it and of the step."""
    steps: Annotated[Positive, Field(le=MOST_STEPS)]
    """The steps of the run, over all tasks together."""
    # not strict: in strict mode pydantic takes no text for a day, and a file has only text
    date: Annotated[datetime.date, Field(strict=False), BeforeValidator(day)] | None = None
    """The day that chat templates which show the date take for today. None: the day of the run's
    first start, which its config.yaml keeps for when it resumes or is evaluated."""
    student: StudentConfig
    """The model that learns."""
    teachers: dict[Name, TeacherConfig] = Field(default_factory=dict)
    """The models that score the student's tokens, by a name of your choice."""
    tasks: dict[Name, TaskConfig]
    """What the student learns, by a name of your choice."""
    # one default for all configs is safe, here and below: sections are frozen
    objective: Objectives = ObjectiveConfig()
    """The loss of all tasks that have none of their own; a list of losses is their weighted sum."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Which tasks a step trains."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student plays episodes, unless a task says otherwise."""
    vllm: VllmConfig = VllmConfig()
    """How vLLM is started for rollouts, where rollout.engine is vllm."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How an update moves the student's weights."""
    learner: LearnerConfig = LearnerConfig()
    """How many processes train the student together."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the student is evaluated, and on how much."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the student is saved, and what is kept."""
    journal: JournalConfig = JournalConfig()
    """What is recorded and shown of the run."""
    cluster: ClusterConfig | None = None
    """Ray, with rollout workers and teachers as its actors; none: all in this process."""

    @model_validator(mode="after")
    def _routes(self) -> RunConfig:
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one")
        for name, task in self.resolve().items():  # raises for tasks that cannot be resolved
            self._check_teachers(name, task)
            if task.objective.needs.sampling:
                self._check_sampling(name, task.rollout.sampling)
        if self.learner.processes > 1 and ":" in self.student.device:
            raise ValueError(
                f"learner.processes: {self.learner.processes} of them take a GPU each, from 0 on:"
                f" student.device {self.student.device!r} names one; say auto, cuda or cpu"
            )
        self.policy()  # raises for weights of unknown tasks
        # An idle teacher would load, and take its memory, for nothing.
        used = {teacher for task in self.tasks.values() for teacher in task.teachers}
        if idle := sorted(set(self.teachers) - used):
            raise ValueError(f"teachers.{idle[0]} teaches no task: remove it, or name it in a task")
        return self

    def resolve(self) -> dict[str, TaskSettings]:
        """Every task's settings: its own keys, and the run's where it has none.

        Raises:
            ValueError: keys that do not go with each other (in a checked config there are none).
        """
        return {
            name: resolved(name, task, self.objective, self.rollout, self.steps)
            for name, task in self.tasks.items()
        }

    def _check_teachers(self, name: str, settings: TaskSettings) -> None:
        """Raises ValueError for a task that lacks a teacher, or has one that cannot do its part."""
        task, objective = self.tasks[name], settings.objective
        # imitation learns from off-policy tokens too, but of an expert that plays whole episodes
        learns_prefixes = objective.needs.teacher and objective.needs.given
        if task.guidance is not None and not learns_prefixes:
            raise ValueError(
                f"tasks.{name}.guidance: only objective 'trust_region' learns from a guide's"
                f" tokens, and this task's is {objective.name!r}: change one of them"
            )
        for teacher in task.teachers:
            if teacher not in self.teachers:
                raise ValueError(
                    f"tasks.{name}.teacher: " + unknown("teacher", teacher, self.teachers)
                    if self.teachers
                    else f"tasks.{name}.teacher is {teacher!r}, but teachers is empty"
                )
            self._check_engine(name, teacher, objective)
        if objective.needs.teacher and not task.teachers:
            raise ValueError(
                f"tasks.{name} has no teacher, and objective {objective.name!r} needs one: set"
                f" tasks.{name}.teacher"
            )
        if task.guidance is not None and task.guidance.by == "teacher":
            self._check_guide(name, task)

    def _check_engine(self, task: str, name: str, objective: Objective) -> None:
        """Raises ValueError for what the task's teacher `name` cannot do in its engine."""
        teacher, key = self.teachers[name], f"teachers.{name}.engine"
        # in a cluster the teacher may run on another machine than this
        if teacher.sleeps and teacher.engine == "vllm" and self.cluster is None:
            check_sleep(f"teachers.{name}.sleeps")
        if lack := lacking(teacher, objective.needs, here=self.cluster is None):
            raise ValueError(
                f"tasks.{task}: objective {objective.name!r} needs {lack}: set {key} to"
                " transformers, or choose local_support on the teacher's support"
            )

    def _check_guide(self, task: str, section: TaskConfig) -> None:
        """Raises ValueError where the task's teacher cannot play its prefixes."""
        if len(section.teachers) != 1:
            raise ValueError(
                f"tasks.{task}.guidance.by: with several teachers it is not said which one guides:"
                " give the task one teacher, or set guidance.by=expert"
            )
        (name,) = section.teachers
        teacher = self.teachers[name]
        if teacher.engine != "transformers":
            raise ValueError(
                f"tasks.{task}.guidance: the teacher would play its prefixes, and in engine:"
                f" {teacher.engine} it only scores: set teachers.{name}.engine to transformers, or"
                " guidance.by to expert"
            )
        if teacher.sleeps:
            raise ValueError(
                f"teachers.{name}.sleeps: it also plays for tasks.{task}.guidance, and would do so"
                " asleep: set one of sleeps=false and guidance.by=expert"
            )

    def _check_sampling(self, task: str, sampling: SamplingParams) -> None:
        """Raises ValueError where the tokens' log-probabilities under the sampling parameters
        cannot be known: vLLM records those at temperature 1, and the learner can compute the others
        only while it has the weights that played."""
        stale = self.schedule.max_staleness
        if self.rollout.engine == "vllm" and stale and not sampling.whole:
            raise ValueError(
                f"tasks.{task}: objective.behavior: sampling needs what temperature"
                f" {sampling.temperature:g} with top_p {sampling.top_p:g} gave each token: vLLM"
                f" does not say, and with schedule.max_staleness {stale} the learner's weights are"
                " no longer those that played: set max_staleness 0, or rollout.engine transformers"
            )

    @property
    def workers(self) -> int:
        """How many rollout engines there are."""
        return self.cluster.workers if self.cluster else 1

    @property
    def rollout_dtype(self) -> Literal["float32", "bfloat16"]:
        """The type of the weights that play."""
        own = self.vllm.dtype if self.rollout.engine == "vllm" else None
        return own or self.student.dtype

    def policy(self) -> Policy:
        """A new policy, with nothing recorded."""
        schedule = self.schedule
        return make_policy(
            schedule.policy, [*self.tasks], weights=schedule.weights, least=schedule.least
        )

    def timetable(self, tasks: Mapping[str, TaskSettings]) -> Timetable:
        """The run's steps.

        Raises:
            ConfigError: the tasks' start, end and steps leave a step without any.
        """
        plans = {name: task.schedule for name, task in tasks.items()}
        try:
            return Timetable(plans, steps=self.steps, seed=self.seed, make_policy=self.policy)
        except ValueError as error:
            raise ConfigError(str(error)) from None
