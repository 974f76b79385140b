"""The sections of a config, key by key: each default with its reason."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tutelage.distill.config.faults import Like
from tutelage.distill.config.values import (
    LISTED,
    Above0,
    Beta,
    Count,
    Device,
    Part,
    Place,
    Positive,
    Section,
    Share,
    Text,
    _address,
)
from tutelage.distill.objectives import build
from tutelage.scheduler.contexts import ContextSettings


class StudentConfig(Section):
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


def _named_objective(name: str) -> str:
    build(name)  # with its defaults: whether there is one
    return name


class ObjectiveConfig(Section):
    """`name` and its options: each further key goes to the objective, which knows its own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, AfterValidator(_named_objective)] = "local_support"
    # texts whose ids take no loss where they first occur in a turn
    mask_tokens: Annotated[tuple[Text, ...], LISTED] = ()

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        build(self.name, **self.options)
        return self


class ContextConfig(Section):
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


class RolloutConfig(Section):
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


class GuidanceConfig(Section):
    """TrOPD's prefixes (objective trust_region): part of the episodes begin with somebody else's
    turns and tokens, at first all of them, by a cosine ever fewer, and the student goes on."""

    by: Literal["expert", "teacher"] = "expert"  # the environment's, or the task's own teacher
    share: Share = 0.2  # of the episodes (the official code: 128 beside 512)
    until: Part = 1.0  # share of the task's steps; then none is left


class TaskConfig(Section):
    env: Text
    env_args: dict[str, Any] = Field(default_factory=dict)
    eval_args: dict[str, Any] = Field(
        default_factory=dict
    )  # replace env_args' keys in evaluation, such as the split
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
    rollout: Annotated[dict[str, Any], Like(RolloutConfig)] = Field(default_factory=dict)

    @property
    def teachers(self) -> dict[str, float]:
        """Its teachers' weights."""
        if isinstance(self.teacher, dict):
            return self.teacher
        return {} if self.teacher is None else {self.teacher: 1.0}


class ScheduleConfig(Section):
    """alternate: in turn, a task a step. weighted: a task a step, as often as its weight says.
    mixed: every task in every step. token_budget: a task a step, so that trained tokens stand in
    proportion to the weights. gap: a task a step, more often the one that closes on its teacher
    fastest."""

    policy: Literal["alternate", "weighted", "mixed", "token_budget", "gap"] = "alternate"
    weights: dict[str, Above0] = Field(
        default_factory=dict
    )  # by task, of weighted and token_budget; 1 where none is given
    least: Part = 0.4  # gap: the part that all share equally
    # how many updates old the weights may be that play an episode; 0: strictly on-policy. With 1, a
    # Ray run plays the next step's episodes while the student learns
    max_staleness: Count = 0


class OptimizerConfig(Section):
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


class LearnerConfig(Section):
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


class EvaluationConfig(Section):
    every: Count = 0  # steps; 0: only when asked
    episodes: Positive | Literal["all"] = 100
    final: bool = False  # also after the last step
    modes: Modes = ("greedy", "sampled")
    live_modes: Modes = ("greedy",)  # while training: half the time


class CheckpointConfig(Section):
    every: Positive = 50
    keep: Positive = 2  # the newest so many
    best: bool = True  # and the one with the best evaluation: the mean of the tasks' scores


class JournalConfig(Section):
    # seconds after which a step that does not end leaves its stack in RUN/stalled/learner.txt
    stall: Above0 = 1800.0
    tensorboard: bool = True
    episodes_every: Positive = 1  # steps between episode files
    # a task's steps between diagnostics that need the student's distribution over all ids
    diagnostics_every: Positive = 10


class ClusterConfig(Section):
    """address: `local` starts Ray here; `auto` or `ray://...` joins a running cluster, whose nodes
    see models and the files of environments under the same paths, or models by hub id."""

    address: Annotated[str, AfterValidator(_address)] = "local"
    workers: Positive = 1
    threads: Positive = 1  # of torch in each actor
    # what Ray keeps for each of them, such as {GPU: 1} or a name that nodes were started with
    worker_resources: dict[Text, Above0] = Field(default_factory=dict)
    teacher_resources: dict[Text, Above0] = Field(default_factory=dict)
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
