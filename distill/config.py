"""The run's configuration: plain data, read once, checked whole, before anything heavy loads.

Unknown keys are refused with the nearest known one. A value is of its key's type or refused: no
text becomes a number, no number a switch. Every default has its reason beside it; what has no
sensible default is required. What hangs on this machine is preflight.py's.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tutelage.distill import reading
from tutelage.distill.faults import Like, printable, said, settled
from tutelage.distill.objectives import Objective, build
from tutelage.distill.teacher_engines import check_keys, check_sleep, lacking
from tutelage.envs.names import nearest, unknown
from tutelage.envs.plugins import look_beside
from tutelage.scheduler.contexts import ContextSettings
from tutelage.scheduler.episodes import SamplingLaw
from tutelage.scheduler.policies import Policy, make_policy
from tutelage.scheduler.rollouts import TaskRollout


class ConfigError(ValueError):
    """The user's mistake: its text names the file, the key and the cure."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """1e3 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", text):
        raise ValueError(
            "a name has 1 to 64 letters of a to z, digits, _ and -, and begins with no -: it names"
            f" files and metrics (got {text!r:.80})"
        )
    return text


def _place(text: str) -> str:
    """A path, or what may be one: ~ and $NAME stand for what they do in a shell."""
    if not text.strip() or "\0" in text:
        raise ValueError(f"it must not be empty (got {text!r})")
    text = os.path.expanduser(os.path.expandvars(text))
    left = re.search(r"^~[^/]*|\$\{?\w+\}?", text)
    if left is not None:
        raise ValueError(f"{left[0]} stands for nothing here: there is no such user or variable")
    return text


def _day(value: Any) -> Any:
    """A number would be taken for seconds."""
    if not isinstance(value, str | datetime.date) or str(value).isdigit():
        raise ValueError("it must be a day, such as 2026-01-31")
    return value


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?", text):
        near = nearest(text.partition(":")[0], ["cuda", "cpu", "auto"])
        hint = f": did you mean {near!r}?" if near else ""
        raise ValueError(f"a device is auto, cpu, cuda or cuda:N (got {text!r:.80}){hint}")
    return text


def _address(text: str) -> str:
    """Of Ray."""
    host, _, port = text.removeprefix("ray://").rpartition(":")
    known = re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host) and re.fullmatch(r"[0-9]{1,5}", port)
    if text not in ("local", "auto") and not (known and 0 < int(port) < 65_536):
        raise ValueError(
            "it is local, auto, HOST:PORT or ray://HOST:PORT, such as ray://head:10001 (got"
            f" {text!r:.80})"
        )
    return text


MOST, MOST_STEPS, MOST_SEED = 10**9, 10**7, 2**32 - 1
"""Whole numbers beyond these are a slip; seeds are NumPy's."""

Whole = Annotated[int, BeforeValidator(_whole), Field(le=MOST)]
Count = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[str, AfterValidator(_place)]
Device = Annotated[str, AfterValidator(_device)]
Name = Annotated[str, AfterValidator(_name)]
LISTED = Field(strict=False)  # a list is a tuple
Section = TypeVar("Section", bound=BaseModel)


class StudentConfig(_Section):
    """`model` (a folder or hub id), or `init` (architecture from scratch) with `tokenizer`."""

    model: Place | None = None
    init: dict[str, Any] | None = None
    tokenizer: Place | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # bf16 weights lose AdamW's small updates
    device: Device = "auto"  # cuda where there is one
    threads: Positive | None = None  # of torch in this process; none: every core that it may use
    # (OMP_NUM_THREADS, taskset). Forwards too small to gain from a second one take one

    @model_validator(mode="after")
    def _one_source(self) -> StudentConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("give exactly one of student.model and student.init")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("student.init needs student.tokenizer")
        return self


class VllmConfig(_Section):
    """How a vLLM engine is started; its own names for what it has names for."""

    dtype: Literal["float32", "bfloat16"] | None = None  # none: the model's own in this run
    gpu_memory_utilization: Part = 0.45  # of the GPU, weights and
    # cache together: the learner, or a teacher, has the other half
    # of each process that computes; none: what the line above leaves, and on the CPU 1, which
    # holds 260,000 tokens of the tiny models
    kv_cache_gib: Above0 | None = None
    max_model_len: Positive | None = None  # none: the model's context
    max_num_batched_tokens: Positive | None = None  # of one forward; none: as vLLM finds best
    tensor_parallel_size: Positive = 1  # GPUs, each with its process, that share the model
    # none: CUDA graphs on a GPU; none on the CPU, where compiling takes longer than it gains
    enforce_eager: bool | None = None


class TeacherConfig(_Section):
    """Every engine has some of the keys below; what belongs to another one is refused."""

    model: Place  # a folder or hub id; of a server: the name under which it serves
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    # of a server, which has its own: how far the exam may be off (bfloat16 unless said)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Device = "auto"
    cache: Place | None = None  # a folder for scores; none: a student's own rows hardly ever repeat
    sleeps: bool = False  # between answers it leaves the device to others: slower, less memory
    vllm: VllmConfig | None = None  # engine: vllm; none: its defaults
    # engine: server, such as `vllm serve`
    url: str | None = None
    weights: Place | None = None  # a folder or hub id of the same model here, to compare it with
    api_key_env: str | None = None  # the environment variable that holds the key
    timeout: Above0 = 300.0  # seconds of one answer
    attempts: Positive = 8  # at one answer; the pauses between 8 of them last 91 s: a restart
    concurrency: Positive = 8  # rows in flight
    # of one answer; a longer one is refused. 32,000 tokens with K = 64 take some 180
    max_answer_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 256.0

    @model_validator(mode="before")
    @classmethod
    def _server_dtype(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("engine") == "server":
            return {"dtype": "bfloat16"} | data
        return data

    @model_validator(mode="after")
    def _own_keys(self) -> TeacherConfig:
        check_keys(self)
        return self

    @property
    def files(self) -> str | None:
        """Where its weights and its tokenizer are to be had; None: the server alone has them."""
        return self.weights if self.engine == "server" else self.model


def _objective(name: str) -> str:
    build(name)  # with its defaults: whether there is one
    return name


class ObjectiveConfig(_Section):
    """`name` and its options: each further key goes to the objective, which knows its own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, AfterValidator(_objective)] = "local_support"
    # texts whose ids take no loss where they first occur in a turn
    mask_tokens: Annotated[tuple[Text, ...], LISTED] = ()

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        build(self.name, **self.options)
        return self


class ContextConfig(_Section):
    kind: Literal["full", "window"] = "full"
    repeat_task: bool = False
    turns: Count = 4
    admissible: bool = False
    format: str | None = None  # of prompts and replies, where the teacher has its own: gigpo
    system: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> ContextConfig:
        ContextSettings(**self.model_dump())
        return self


class RolloutConfig(_Section):
    # vllm: faster; a run repeats up to the last bits of log-probabilities, not byte for byte
    engine: Literal["transformers", "vllm"] = "transformers"
    temperature: Annotated[float, Field(ge=0)] = 1.0  # the policy itself
    top_p: Part = 1.0
    max_turns: Positive = 30
    max_new_tokens: Positive = 32
    context: ContextConfig = ContextConfig()
    max_live: Positive = 128
    # environment processes a task and worker; 0: in the worker itself, where none of its faults but
    # an exception or sys.exit can be survived
    processes: Count = 1
    timeout: Above0 = 60.0  # seconds an environment may take for one batch of steps
    attempts: Positive = 3  # of an episode whose environment died or hung
    # characters of one observation: a million fill the longest contexts there are. A longer one is
    # a fault of the environment: its episode is dropped and counted
    max_observation: Positive = 1_000_000
    lost: Share = 0.5  # a step that loses a greater share of its episodes stops the run, saved


class GuidanceConfig(_Section):
    """TrOPD's prefixes (objective trust_region): part of the episodes begin with somebody else's
    turns and tokens, at first all of them, by a cosine ever fewer, and the student goes on."""

    by: Literal["expert", "teacher"] = "expert"  # the environment's, or the task's own teacher
    share: Share = 0.2  # of the episodes (the official code: 128 beside 512)
    until: Part = 1.0  # share of the task's steps; then none is left


class TaskConfig(_Section):
    env: Text
    env_args: dict[str, Any] = {}
    eval_args: dict[str, Any] = {}  # replace env_args' keys in evaluation, such as the split
    # its name, or {name: weight}: each episode has one of them, as often as the weights say
    teacher: str | dict[str, Above0] | None = None
    episodes: Positive = 16
    group: Positive = 1  # episodes of one game or problem
    # imitation: the share of episodes that the expert plays itself, or [at first, at last]
    expert_share: Share | Annotated[tuple[Share, Share], LISTED] = 1.0
    guidance: GuidanceConfig | None = None
    start: Count = 0  # the first of the run's steps that the task may have
    end: Positive | None = None  # the first that it may have no more
    steps: Positive | None = None  # how many it gets at most
    weight: Above0 = 1.0  # of this task's loss
    # replaces the run's objective
    objective: Annotated[dict[str, Any] | None, Like(ObjectiveConfig)] = None
    # replaces keys of the run's rollout section
    rollout: Annotated[dict[str, Any], Like(RolloutConfig)] = {}

    @property
    def teachers(self) -> dict[str, float]:
        """Its teachers' weights."""
        if isinstance(self.teacher, dict):
            return self.teacher
        return {} if self.teacher is None else {self.teacher: 1.0}


class ScheduleConfig(_Section):
    """alternate: in turn, a task a step. weighted: a task a step, as often as its weight says.
    mixed: every task in every step. token_budget: a task a step, so that trained tokens stand in
    proportion to the weights. gap: a task a step, more often the one that closes on its teacher
    fastest."""

    policy: Literal["alternate", "weighted", "mixed", "token_budget", "gap"] = "alternate"
    weights: dict[str, Above0] = {}  # by task, of weighted and token_budget; 1 where none is given
    least: Part = 0.4  # gap: the part that all share equally
    # how many updates old the weights may be that play an episode; 0: strictly on-policy. With 1, a
    # Ray run plays the next step's episodes while the student learns
    max_staleness: Count = 0


class OptimizerConfig(_Section):
    """name: `adamw`, or `muon` for the hidden matrices with AdamW for the rest: half the steps for
    the tiny models from scratch. lr means the same for both."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Above0 = 1e-4
    betas: Annotated[tuple[Beta, Beta], LISTED] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Above0 = 1.0  # of the gradient's norm
    warmup: Count = 0  # steps
    decay: Literal["constant", "cosine"] = "constant"
    floor: Share = 0.1  # cosine: share of lr left at the end
    micro_tokens: Positive | None = None  # tokens, padding included, of one forward and backward;
    # none: 2,048 on the CPU, where what does not fit the cache costs twice, else 16,384
    # keep the inputs of layers alone and compute the rest again in the backward: a third more work,
    # for memory that long rows would not fit without
    recompute: bool = False
    minibatch: Positive | None = None  # rows of one optimizer step (the paper: 64); none: all
    # a task's mean loss: over all its tokens (the papers' formula), or over rows of their means
    aggregate: Literal["token", "sequence"] = "token"
    # several tasks in one update: `task` gives each its own mean, so that short answers are not
    # drowned by long chains; `all` is one mean over everything
    normalize: Literal["task", "all"] = "task"


class LearnerConfig(_Section):
    """The student's weights, gradients and optimizer state over several processes of this machine
    (FSDP2), each with its share of every update: one a GPU, or on the CPU."""

    processes: Positive = 1
    # seconds that one exchange of these may take, by the slowest of them; then the run stops
    timeout: Above0 = 1800.0


def _each_once(modes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(modes)) < len(modes):
        raise ValueError(f"each mode once (got {', '.join(modes)})")
    return modes


Modes = Annotated[
    tuple[Literal["greedy", "sampled"], ...],
    LISTED,
    Field(min_length=1),
    AfterValidator(_each_once),
]


class EvaluationConfig(_Section):
    every: Count = 0  # steps; 0: only when asked
    episodes: Positive | Literal["all"] = 100
    final: bool = False  # also after the last step
    modes: Modes = ("greedy", "sampled")
    live_modes: Modes = ("greedy",)  # while training: half the time


class CheckpointConfig(_Section):
    every: Positive = 50
    keep: Positive = 2  # the newest so many
    best: bool = True  # and the one with the best evaluation: the mean of the tasks' scores


class JournalConfig(_Section):
    # seconds after which a step that does not end leaves its stack in RUN/stalled/learner.txt
    stall: Above0 = 1800.0
    tensorboard: bool = True
    episodes_every: Positive = 1  # steps between episode files
    # a task's steps between diagnostics that need the student's distribution over all ids
    diagnostics_every: Positive = 10


class ClusterConfig(_Section):
    """address: `local` starts Ray here; `auto` or `ray://...` joins a running cluster, whose nodes
    see models and the files of environments under the same paths, or models by hub id."""

    address: Annotated[str, AfterValidator(_address)] = "local"
    workers: Positive = 1
    threads: Positive = 1  # of torch in each actor
    # what Ray keeps for each of them, such as {GPU: 1} or a name that nodes were started with
    worker_resources: dict[Text, Above0] = {}
    teacher_resources: dict[Text, Above0] = {}
    # of one placement group for all of these; none: each goes where there is room
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None
    wheel: Place | None = None  # a file: this package, for nodes that do not have it
    # seconds that an actor may take for one step's rollouts or one scoring; then it is replaced
    timeout: Above0 = 1800.0
    attempts: Positive = 3  # of a piece of work, each on a fresh actor

    @model_validator(mode="after")
    def _bundles(self) -> ClusterConfig:
        if self.strategy and not (self.worker_resources and self.teacher_resources):
            raise ValueError(
                f"cluster.strategy: {self.strategy} places resources: give worker_resources and"
                " teacher_resources, such as {CPU: 1}"
            )
        return self


class RunConfig(_Section):
    """A whole run."""

    run: Place
    accept_changes: bool = False  # go on in a run folder that was made with another configuration
    seed: Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST_SEED)] = 0
    steps: Annotated[Positive, Field(le=MOST_STEPS)]
    # what a chat template that shows the date takes for today; none: the day of the run's first
    # start, from its folder's config.yaml when it goes on or is evaluated
    date: Annotated[datetime.date, Field(strict=False), BeforeValidator(_day)] | None = None
    student: StudentConfig
    teachers: dict[Name, TeacherConfig] = {}
    tasks: dict[Name, TaskConfig]
    objective: ObjectiveConfig = ObjectiveConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()  # of rollout.engine=vllm
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    journal: JournalConfig = JournalConfig()
    cluster: ClusterConfig | None = None

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
            taught = objective.needs_teacher and objective.takes_given
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
            if objective.needs_teacher and not task.teachers:
                raise ValueError(
                    f"tasks.{name} has no teacher, and objective {objective.name!r} needs one: set"
                    f" tasks.{name}.teacher"
                )
            if task.guidance is not None and task.guidance.by == "teacher":
                self._check_guide(name, task)
            if objective.needs_law:
                self._check_law(name)
        if self.learner.processes > 1 and ":" in self.student.device:
            raise ValueError(
                f"learner.processes: {self.learner.processes} of them take a GPU each, from 0 on:"
                f" student.device {self.student.device!r} names one; say auto, cuda or cpu"
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
        if lack := lacking(teacher, objective, here=self.cluster is None):
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
        return _validated(ObjectiveConfig, own, f"tasks.{task}.objective")

    def support_of(self, teacher: str) -> int:
        """How many of its own ids a token a teacher's tasks want at most; at least 1."""
        tasks = [name for name, section in self.tasks.items() if teacher in section.teachers]
        return max([1, *(build_objective(self.objective_of(task)).k for task in tasks)])

    def rollout_of(self, task: str) -> RolloutConfig:
        """The run's rollout section with the task's keys in place."""
        merged = _merged(self.rollout.model_dump(), self.tasks[task].rollout)
        return _validated(RolloutConfig, merged, f"tasks.{task}.rollout")

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


def load_config(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `key.path=value` overrides (the last one of a key holds), check
    everything.

    Raises:
        ConfigError: with the file, the key and the cure in one line.
    """
    path = Path(path)
    look_beside(path.parent)  # for environments of the user's own
    try:
        data = reading.read_file(path)
        if not isinstance(data, dict):
            raise ValueError(f"must be a mapping of keys, not {_kind(data)}")
        for override in overrides or []:
            _override(data, override)
    except ValueError as error:
        raise ConfigError(printable(f"{path}: {error}")) from None
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """Check plain data, or what reading.py makes of a text; `source` is named in messages."""
    try:
        data = settled(RunConfig, data)
        return RunConfig.model_validate(data)
    except ValidationError as error:
        fault = said(error, data).lstrip(".: ")
    except ValueError as error:
        fault = str(error)
    raise ConfigError(printable(f"{source}: {fault}"))


def _validated(kind: type[Section], data: Any, where: str) -> Section:
    """A section that stands inside a task; its faults name the place."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(where + said(error, data)) from None


def _kind(data: Any) -> str:
    if data is None:
        return "an empty file"
    return "a list" if isinstance(data, list) else "a single value"


def _override(data: dict[str, Any], override: str) -> None:
    (*parents, last), value = reading.parse_pair(override, "key.path=value")
    place = data
    for at, parent in enumerate(parents):
        child = place.setdefault(parent, {})
        if isinstance(child, reading.Scalar) and child.value is None and not child.doubt:
            child = place[parent] = {}
        if not isinstance(child, dict):
            key = ".".join(parents[: at + 1])
            raise ValueError(f"{override!r}: {key} holds no keys in the file: give {key}={{...}}")
        place = child
    place[last] = value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged
