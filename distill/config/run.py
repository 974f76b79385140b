"""The run's configuration: plain data, read once, checked whole, before anything heavy loads.

Unknown keys are refused with the nearest known one. A value is of its key's type or refused: no
text becomes a number, no number a switch. Every default has its reason beside it; what has no
sensible default is required. What hangs on this machine is preflight.py's.
"""

from __future__ import annotations

import datetime
import warnings
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from tutelage.distill.config.faults import validated
from tutelage.distill.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    JournalConfig,
    LearnerConfig,
    ObjectiveConfig,
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
from tutelage.distill.objectives import Objective, build
from tutelage.envs.names import unknown
from tutelage.scheduler.contexts import ContextSettings
from tutelage.scheduler.episodes import SamplingLaw
from tutelage.scheduler.policies import Policy, make_policy
from tutelage.scheduler.rollouts import TaskRollout


class RunConfig(Section):
    """A whole run."""

    run: Place
    """The run folder."""
    accept_changes: bool = False
    """Resume in a run folder that was made with another configuration; it holds for that once."""
    seed: Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=MOST_SEED)] = 0
    """Every random draw is a function of it and of the step."""
    steps: Annotated[Positive, Field(le=MOST_STEPS)]
    """Optimizer steps over all tasks."""
    date: Annotated[datetime.date, Field(strict=False), BeforeValidator(day)] | None = None
    """What a chat template that shows the date takes for today; none: the day of the run's first
    start, from its folder's config.yaml when it resumes or is evaluated."""
    student: StudentConfig
    """Who learns."""
    teachers: dict[Name, TeacherConfig] = Field(default_factory=dict)
    """Who scores, by name."""
    tasks: dict[Name, TaskConfig]
    """What is learned, by name."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """By which loss, unless a task has its own."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Which tasks a step trains."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student plays, unless a task says otherwise."""
    vllm: VllmConfig = VllmConfig()
    """How the engine of rollout.engine=vllm is started."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the student's weights move."""
    learner: LearnerConfig = LearnerConfig()
    """Over how many processes."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the student is examined."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept of it."""
    journal: JournalConfig = JournalConfig()
    """What is told of a run."""
    cluster: ClusterConfig | None = None
    """Ray; none: all in this process."""

    @model_validator(mode="after")
    def _routes(self) -> RunConfig:
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one")
        used = set()
        for name, task in self.tasks.items():
            self._check_turns(name, task)
            objective = build_objective(self.objective_of(name))
            if self.rollout_of(name).engine != self.rollout.engine:
                raise ValueError(
                    f"tasks.{name}.rollout.engine: all tasks are played by one engine: set the"
                    " run's rollout.engine"
                )
            taught = objective.needs.teacher and objective.needs.given
            if task.guidance is not None and not taught:
                raise ValueError(
                    f"tasks.{name}.guidance: only objective 'trust_region' learns from a guide's"
                    f" tokens, and this task's is {objective.name!r}: change one of them"
                )
            for teacher in task.teachers:
                used.add(teacher)
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
            if objective.needs.law:
                self._check_law(name)
        if self.learner.processes > 1 and ":" in self.student.device:
            raise ValueError(
                f"learner.processes: {self.learner.processes} of them take a GPU each, from 0 on:"
                f" student.device {self.student.device!r} names one; say auto, cuda or cpu"
            )
        if self.optimizer.warmup > self.steps:
            warnings.warn(
                f"optimizer.warmup: {self.optimizer.warmup} steps, and the run has {self.steps}: it"
                f" ends before the learning rate is {self.optimizer.lr:g}",
                stacklevel=1,
            )
        self.policy()
        if idle := sorted(set(self.teachers) - used):
            raise ValueError(f"teachers.{idle[0]} teaches no task: remove it, or name it in a task")
        return self

    def _check_turns(self, name: str, task: TaskConfig) -> None:
        """Raises ValueError for a task that can never be played, or not in whole groups."""
        end = self.steps if task.end is None else min(task.end, self.steps)
        if task.start >= end:
            last = f"end, {task.end}" if end == task.end else f"the run's {self.steps} steps"
            raise ValueError(
                f"tasks.{name}.start: {task.start} is not before {last}: the task would never be"
                " played: lower it, or leave the task out"
            )
        if task.episodes % task.group:
            raise ValueError(
                f"tasks.{name}.group: {task.episodes} episodes are no whole number of groups of"
                f" {task.group}: set episodes to a multiple of it"
            )

    def _check_engine(self, task: str, name: str, objective: Objective) -> None:
        """Raises ValueError for what the task's teacher `name` cannot do in its engine."""
        teacher, key = self.teachers[name], f"teachers.{name}.engine"
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

    def _check_law(self, task: str) -> None:
        """Raises ValueError where nobody can say what the sampling law gave the task's tokens."""
        how = self.rollout_of(task)
        stale, plain = self.schedule.max_staleness, how.temperature == how.top_p == 1
        if how.engine == "vllm" and stale and not plain:
            raise ValueError(
                f"tasks.{task}: objective.behavior: sampling needs what temperature"
                f" {how.temperature:g} with top_p {how.top_p:g} gave each token: vLLM does not say,"
                f" and with schedule.max_staleness {stale} the learner's weights are no longer"
                " those that played: set max_staleness 0, or rollout.engine transformers"
            )

    def policy(self) -> Policy:
        """A new policy, with nothing recorded."""
        schedule = self.schedule
        return make_policy(
            schedule.policy, [*self.tasks], weights=schedule.weights, least=schedule.least
        )

    def objective_of(self, task: str) -> ObjectiveConfig:
        """The task's own objective, or the run's."""
        own = self.tasks[task].objective
        if own is None:
            return self.objective
        return validated(ObjectiveConfig, own, f"tasks.{task}.objective")

    def support_of(self, teacher: str) -> int:
        """How many of its own ids a token a teacher's tasks want at most; at least 1."""
        tasks = [name for name, section in self.tasks.items() if teacher in section.teachers]
        return max([1, *(build_objective(self.objective_of(task)).needs.k for task in tasks)])

    def rollout_of(self, task: str) -> RolloutConfig:
        """The run's rollout section with the task's keys in place."""
        merged = _merged(self.rollout.model_dump(), self.tasks[task].rollout)
        return validated(RolloutConfig, merged, f"tasks.{task}.rollout")

    def task_rollout(self, task: str, *, evaluation: bool = False) -> TaskRollout:
        """How the task is played, as the scheduler takes it."""
        how, config = self.rollout_of(task), self.tasks[task]
        args = config.env_args
        if evaluation:
            args = {key: value for key, value in args.items() if key != "expert"} | config.eval_args
        return TaskRollout(
            env=config.env,
            env_args=args,
            context=ContextSettings(**how.context.model_dump()),
            law=SamplingLaw(temperature=how.temperature, top_p=how.top_p),
            max_turns=how.max_turns,
            max_new_tokens=how.max_new_tokens,
            max_live=how.max_live,
            processes=how.processes,
            timeout=how.timeout,
            attempts=how.attempts,
            max_observation=how.max_observation,
        )


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a section names."""
    return build(config.name, **config.options)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged
