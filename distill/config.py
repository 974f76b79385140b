"""The run's configuration: plain data, read once, checked whole, before anything heavy loads.

Unknown keys are refused with the nearest known one. Every default has its reason beside it; what
has no sensible default is required.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutelage.distill.objectives import Objective, build
from tutelage.distill.teacher_engines import check_keys, check_sleep, lacking
from tutelage.envs.names import unknown
from tutelage.scheduler.contexts import ContextSettings
from tutelage.scheduler.episodes import SamplingLaw
from tutelage.scheduler.policies import Policy, make_policy
from tutelage.scheduler.rollouts import TaskRollout


class ConfigError(ValueError):
    """The user's mistake: its text names the file, the key and the cure."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Section = TypeVar("Section", bound=BaseModel)


class StudentConfig(_Section):
    """`model` (a folder or hub id), or `init` (architecture from scratch) with `tokenizer`."""

    model: str | None = None
    init: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # bf16 weights lose AdamW's small updates
    device: str = "auto"  # cuda where there is one
    threads: Positive | None = None  # of torch in this process; none: every core

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
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.45  # of the GPU, weights and
    # cache together: the learner, or a teacher, has the other half
    # of each process that computes; none: what the line above leaves, and on the CPU 1, which
    # holds 260,000 tokens of the tiny models
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    max_model_len: Positive | None = None  # none: the model's context
    max_num_batched_tokens: Positive | None = None  # of one forward; none: as vLLM finds best
    tensor_parallel_size: Positive = 1  # GPUs, each with its process, that share the model
    # none: CUDA graphs on a GPU; none on the CPU, where compiling takes longer than it gains
    enforce_eager: bool | None = None


class TeacherConfig(_Section):
    """Every engine has some of the keys below; what belongs to another one is refused."""

    model: str  # a folder or hub id; of a server: the name under which it serves
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    # of a server, which has its own: how far the exam may be off (bfloat16 unless said)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    cache: str | None = None  # a folder for scores; none: a student's own rows hardly ever repeat
    sleeps: bool = False  # between answers it leaves the device to others: slower, less memory
    vllm: VllmConfig | None = None  # engine: vllm; none: its defaults
    # engine: server, such as `vllm serve`
    url: str | None = None
    weights: str | None = None  # a folder or hub id of the same model here, to compare it with
    api_key_env: str | None = None  # the environment variable that holds the key
    timeout: Annotated[float, Field(gt=0)] = 300.0  # seconds of one answer
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


class ObjectiveConfig(_Section):
    """`name` and its options: each further key goes to the objective, which knows its own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "local_support"
    mask_tokens: tuple[
        str, ...
    ] = ()  # texts whose ids take no loss where they first occur in a turn

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
    turns: Annotated[int, Field(ge=0)] = 4
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
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_turns: Positive = 30
    max_new_tokens: Positive = 32
    context: ContextConfig = ContextConfig()
    max_live: Positive = 128
    processes: Annotated[int, Field(ge=0)] = (
        1  # environment processes a task and worker; 0: in the worker itself, where none of its
        # faults but an exception or sys.exit can be survived
    )
    timeout: Annotated[float, Field(gt=0)] = (
        60.0  # seconds an environment may take for one batch of steps
    )
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
    until: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the task's steps; then none is left


class TaskConfig(_Section):
    env: str
    env_args: dict[str, Any] = {}
    eval_args: dict[str, Any] = {}  # replace env_args' keys in evaluation, such as the split
    # its name, or {name: weight}: each episode has one of them, as often as the weights say
    teacher: str | dict[str, Annotated[float, Field(gt=0)]] | None = None
    episodes: Positive = 16
    group: Positive = 1  # episodes of one game or problem
    # imitation: the share of episodes that the expert plays itself, or [at first, at last]
    expert_share: Share | tuple[Share, Share] = 1.0
    guidance: GuidanceConfig | None = None
    start: Annotated[int, Field(ge=0)] = 0  # the first of the run's steps that the task may have
    end: Positive | None = None  # the first that it may have no more
    steps: Positive | None = None  # how many it gets at most
    weight: Annotated[float, Field(gt=0)] = 1.0  # of this task's loss
    objective: dict[str, Any] | None = None  # replaces the run's objective
    rollout: dict[str, Any] = {}  # replaces keys of the run's rollout section

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
    weights: dict[str, float] = {}  # by task, of weighted and token_budget; 1 where none is given
    least: Annotated[float, Field(gt=0, le=1)] = 0.4  # gap: the part that all share equally
    # how many updates old the weights may be that play an episode; 0: strictly on-policy. With 1, a
    # Ray run plays the next step's episodes while the student learns
    max_staleness: Annotated[int, Field(ge=0)] = 0


class OptimizerConfig(_Section):
    """name: `adamw`, or `muon` for the hidden matrices with AdamW for the rest: half the steps for
    the tiny models from scratch. lr means the same for both."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0  # of the gradient's norm
    warmup: Annotated[int, Field(ge=0)] = 0  # steps
    decay: Literal["constant", "cosine"] = "constant"
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1  # cosine: share of lr left at the end
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
    timeout: Annotated[float, Field(gt=0)] = 1800.0


class EvaluationConfig(_Section):
    every: Annotated[int, Field(ge=0)] = 0  # steps; 0: only when asked
    episodes: Positive | Literal["all"] = 100
    final: bool = False  # also after the last step
    modes: tuple[Literal["greedy", "sampled"], ...] = ("greedy", "sampled")
    live_modes: tuple[Literal["greedy", "sampled"], ...] = (
        "greedy",
    )  # while training: half the time


class CheckpointConfig(_Section):
    every: Positive = 50
    keep: Positive = 2  # the newest so many
    best: bool = True  # and the one with the best evaluation: the mean of the tasks' scores


class JournalConfig(_Section):
    # seconds after which a step that does not end leaves its stack in RUN/stalled/learner.txt
    stall: Annotated[float, Field(gt=0)] = 1800.0
    tensorboard: bool = True
    episodes_every: Positive = 1  # steps between episode files
    # a task's steps between diagnostics that need the student's distribution over all ids
    diagnostics_every: Positive = 10


class ClusterConfig(_Section):
    """address: `local` starts Ray here; `auto` or `ray://...` joins a running cluster, whose nodes
    see models and the files of environments under the same paths, or models by hub id."""

    address: str = "local"
    workers: Positive = 1
    threads: Positive = 1  # of torch in each actor
    # what Ray keeps for each of them, such as {GPU: 1} or a name that nodes were started with
    worker_resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    teacher_resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    # of one placement group for all of these; none: each goes where there is room
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None
    wheel: str | None = None  # a file: this package, for nodes that do not have it
    # seconds that an actor may take for one step's rollouts or one scoring; then it is replaced
    timeout: Annotated[float, Field(gt=0)] = 1800.0
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

    run: str
    accept_changes: bool = False  # go on in a run folder that was made with another configuration
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Positive
    student: StudentConfig
    teachers: dict[str, TeacherConfig] = {}
    tasks: dict[str, TaskConfig]
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
    """Read a YAML file, apply `key.path=value` overrides, check everything.

    Raises:
        ConfigError: with the file, the key and the cure in one line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text: a configuration is YAML in UTF-8") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, not {type(data).__name__}")
    for override in overrides or []:
        _override(data, override, path)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """Check plain data; `source` is named in messages."""
    data = _numbers(data)
    if found := _unknown_key(RunConfig, data, ""):
        raise ConfigError(f"{source}: {found}")
    tasks = data.get("tasks")
    for name, task in tasks.items() if isinstance(tasks, dict) else ():
        own = task.get("rollout") if isinstance(task, dict) else None
        if found := _unknown_key(RolloutConfig, own, f"tasks.{name}.rollout."):
            raise ConfigError(f"{source}: {found}")
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_fault(error).lstrip('.: ')}") from None


def _validated(kind: type[Section], data: Any, where: str) -> Section:
    """A section that stands inside a task; its faults name the place."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(where + _fault(error)) from None


def _fault(error: ValidationError) -> str:
    """The first fault in one line, `.key.path: what is wrong`; `: what is wrong` of the whole."""
    first = error.errors()[0]
    key = "".join(f".{part}" for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = "" if isinstance(value, dict) or first["type"] == "missing" else f" (got {value!r})"
    return f"{key}: {message}{shown}"


def _override(data: dict[str, Any], override: str, path: Path) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{path}: override {override!r}: write it as key.path=value")
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        child = place.get(parent)
        if not isinstance(child, dict):
            child = place[parent] = {}
        place = child
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{path}: override {override!r}: the value is not YAML") from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _unknown_key(section: type[BaseModel], data: Any, prefix: str) -> str | None:
    """The first key that no field bears, with the nearest one; None when all are known."""
    if not isinstance(data, dict):
        return None
    for key, value in data.items():
        field = section.model_fields.get(str(key))
        if field is None:
            if section.model_config.get("extra") == "allow":
                continue
            said = unknown("key", key, section.model_fields)
            if prefix and key in RunConfig.model_fields:
                said = f"{key!r} is a key of the run's, at the top of the file; here: {said}"
            return f"{prefix}{key}: {said}"
        inner, many = _sections_of(field.annotation)
        if inner is None or not isinstance(value, dict):
            continue
        children = value.items() if many else [(None, value)]
        for name, child in children:
            where = f"{prefix}{key}." + (f"{name}." if many else "")
            if found := _unknown_key(inner, child, where):
                return found
    return None


def _sections_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """(the section class inside an annotation, whether it is a mapping of them)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    many = get_origin(annotation) is dict
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument, many
    return None, False
