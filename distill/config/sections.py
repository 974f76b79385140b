"""The sections of a config, key by key: each default with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

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
from tutelage.distill.objectives import Objective, build, options_of, weighted_sum
from tutelage.envs.names import unknown
from tutelage.envs.worker import MAX_OBSERVATION
from tutelage.scheduler.contexts import ContextSettings


class StudentConfig(Section):
    """Who learns: `model`, or `init` (an architecture with random weights) with `tokenizer`."""

    model: Place | None = None
    """A folder, a hub id, or builtin:NAME of a tiny model that ships."""
    init: dict[str, Any] | None = None
    """Instead of model: the keys of a config.json, for random weights."""
    tokenizer: Place | None = None
    """With init, a folder or hub id; none: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and arithmetic; bfloat16 weights lose AdamW's small updates."""
    device: Device = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:N."""
    threads: Positive | None = None
    """Of torch in this process; none: every core that it may use (OMP_NUM_THREADS, taskset).
    Forwards too small to gain from a second one take one."""

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
    """By which loss a task is taught."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, AfterValidator(_named_objective)] = "local_support"
    """Which one; each further key is an option of it."""
    mask_tokens: Annotated[tuple[Text, ...], LISTED] = ()
    """Texts whose ids take no loss where they first occur in a turn."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        known = {*options_of(self.name), *type(self).model_fields}
        for option, value in self.options.items():
            if option not in known:
                said = unknown(f"option of objective {self.name!r}:", option, known)
                fault = PydanticCustomError("value_error", "{said}", {"said": said})
                place = InitErrorDetails(type=fault, loc=(option,), input=value)
                raise ValidationError.from_exception_data(self.name, [place])
        build(self.name, **self.options)
        return self


class TermConfig(ObjectiveConfig):
    """By which loss a task is taught; or, in a list, one of the losses whose weighted sum it is."""

    weight: Above0 = 1.0
    """In a list: of this loss in the sum."""


def build_objective(section: ObjectiveConfig | tuple[TermConfig, ...]) -> Objective:
    """The loss that a section names, or the sum that a list names."""
    if isinstance(section, ObjectiveConfig):
        return build(section.name, **section.options)
    return weighted_sum([(term.weight, build(term.name, **term.options)) for term in section])


def masked(section: ObjectiveConfig | tuple[TermConfig, ...]) -> tuple[str, ...]:
    """Its `mask_tokens`. They are the task's: where several losses give any, they must be alike."""
    if isinstance(section, ObjectiveConfig):
        return section.mask_tokens
    found = {term.name: term.mask_tokens for term in section if term.mask_tokens}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} {[*texts]}" for name, texts in found.items())
        raise ValueError(f"mask_tokens are the task's, one list for all its losses (got {said})")
    return next(iter(found.values()), ())


def _summed(terms: tuple[TermConfig, ...]) -> tuple[TermConfig, ...]:
    build_objective(terms)
    masked(terms)
    return terms


Objectives = Annotated[
    Annotated[ObjectiveConfig, Tag("one")]
    | Annotated[tuple[TermConfig, ...], LISTED, AfterValidator(_summed), Tag("sum")],
    Discriminator(lambda data: "sum" if isinstance(data, list | tuple) else "one"),
]
"""A loss, or the weighted sum of several."""


class OwnObjective(Section):
    """A task's, in the place of the run's."""

    objective: Objectives


class ContextConfig(Section):
    """What the student sees each turn."""

    kind: Literal["full", "window"] = "full"
    """full: the whole history in one row. window: the last turns, a row a turn."""
    repeat_task: bool = False
    """Say the task again with each observation."""
    turns: Count = 4
    """window: how many earlier turns it shows."""
    admissible: bool = False
    """List the admissible actions with each observation."""
    format: str | None = None
    """Of prompts and replies, where the teacher was trained on one of its own: gigpo."""
    system: str | None = None
    """The system message; none: the chat template's own, if it has one."""

    def settings(self) -> ContextSettings:
        """Raises ValueError for what does not go with each other."""
        return ContextSettings(**self.model_dump())

    @model_validator(mode="after")
    def _possible(self) -> ContextConfig:
        self.settings()
        return self


class RolloutConfig(Section):
    """How the student plays."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """vllm is faster; such a run repeats up to the last bits of log-probabilities."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of sampling; 1: the policy itself; 0: greedy."""
    top_p: Part = 1.0
    """Sample from the most probable tokens that together have this much; 1: from all."""
    max_turns: Positive = 30
    """Of an episode; then it is truncated."""
    max_new_tokens: Positive = 32
    """Of a reply."""
    context: ContextConfig = ContextConfig()
    """What the student sees each turn."""
    max_live: Positive = 128
    """Episodes in flight in an engine."""
    processes: Count = 1
    """Environment processes for each task and worker; 0: in the worker itself, where none of its
    faults but an exception or sys.exit can be survived."""
    timeout: Above0 = 60.0
    """Seconds that an environment may take for one batch of steps."""
    attempts: Positive = 3
    """At an episode whose environment died or hung."""
    max_observation: Positive = MAX_OBSERVATION
    """Characters of one observation: a million fill the longest contexts there are. A longer one is
    a fault of the environment: its episode is dropped and counted."""
    lost: Share = 0.5
    """A step that loses a greater share of its episodes stops the run, saved."""


class GuidanceConfig(Section):
    """TrOPD's prefixes (objective trust_region): part of the episodes begin with somebody else's
    turns and tokens, at first all of them, by a cosine ever fewer, and the student goes on."""

    by: Literal["expert", "teacher"] = "expert"
    """The environment's expert, or the task's own teacher."""
    share: Share = 0.2
    """Of the episodes (the official code: 128 beside 512)."""
    until: Part = 1.0
    """The share of the task's steps after which no episode is begun so."""


class TaskConfig(Section):
    """What the student learns to do, and from whom."""

    env: Text
    """The environment's id, such as tutelage/Math-v0, or my_package:MyEnv-v0."""
    env_args: dict[str, Any] = Field(default_factory=dict)
    """What gymnasium.make is given; `tutelage envs` lists each environment's."""
    eval_args: dict[str, Any] = Field(default_factory=dict)
    """What replaces keys of env_args in evaluation, such as the split."""
    teacher: str | dict[str, Above0] | None = None
    """Its name, or {name: weight}: each episode has one of them, as often as the weights say."""
    episodes: Positive = 16
    """Of a step."""
    group: Positive = 1
    """Episodes of one game or problem."""
    expert_share: Share | Annotated[tuple[Share, Share], LISTED] = 1.0
    """imitation: the share of episodes that the expert plays itself, or [at first, at last]."""
    guidance: GuidanceConfig | None = None
    """Episodes that somebody else begins; none: the student plays all from their first token."""
    start: Count = 0
    """The first of the run's steps that the task may have."""
    end: Positive | None = None
    """The first step that it may have no more; none: it has them to the end."""
    steps: Positive | None = None
    """How many it gets at most; none: no bound of its own."""
    weight: Above0 = 1.0
    """Of this task's loss."""
    objective: Annotated[
        dict[str, Any] | list[Annotated[dict[str, Any], Like(TermConfig)]] | None,
        Like(ObjectiveConfig),
    ] = None
    """Replaces the run's objective."""
    rollout: Annotated[dict[str, Any], Like(RolloutConfig)] = Field(default_factory=dict)
    """Replaces keys of the run's rollout."""

    @property
    def teachers(self) -> dict[str, float]:
        """Its teachers' weights."""
        if isinstance(self.teacher, dict):
            return self.teacher
        return {} if self.teacher is None else {self.teacher: 1.0}


class ScheduleConfig(Section):
    """Which tasks a step trains."""

    policy: Literal["alternate", "weighted", "mixed", "token_budget", "gap"] = "alternate"
    """alternate: in turn, a task a step. weighted: a task a step, as often as its weight says.
    mixed: every task in every step. token_budget: a task a step, so that trained tokens stand in
    proportion to the weights. gap: a task a step, more often the one that closes on its teacher
    fastest."""
    weights: dict[str, Above0] = Field(default_factory=dict)
    """By task, of weighted and token_budget; 1 where none is given."""
    least: Part = 0.4
    """gap: the part that all tasks share equally."""
    max_staleness: Count = 0
    """How many updates old the weights may be that play an episode; 0: strictly on-policy. With 1,
    a Ray run plays the next step's episodes while the student learns."""


class OptimizerConfig(Section):
    """How the student's weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: for the hidden matrices, with AdamW for the rest: half the steps for the tiny models
    from scratch."""
    lr: Above0 = 1e-4
    """The learning rate; it means the same for both."""
    betas: Annotated[tuple[Beta, Beta], LISTED] = (0.9, 0.95)
    """AdamW's decay of its two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled, as AdamW has it."""
    clip: Above0 = 1.0
    """Bound of the gradient's norm."""
    warmup: Count = 0
    """Steps in which lr rises to its value."""
    decay: Literal["constant", "cosine"] = "constant"
    """What lr does after that."""
    floor: Share = 0.1
    """cosine: the share of lr that is left at the end."""
    micro_tokens: Positive | None = None
    """Tokens, padding included, of one forward and backward; none: 2,048 on the CPU, where what
    does not fit the cache costs twice, else 16,384."""
    recompute: bool = False
    """Keep the inputs of layers alone and compute the rest again in the backward: a third more
    work, for memory that long rows would not fit without."""
    minibatch: Positive | None = None
    """Rows of one optimizer step (the paper: 64); none: all of a step's."""
    aggregate: Literal["token", "sequence"] = "token"
    """A task's mean loss: over its tokens (the papers' formula), or over its rows' means."""
    normalize: Literal["task", "all"] = "task"
    """Several tasks in one update: task gives each its own mean, so that short answers are not
    drowned by long chains; all is one mean over everything."""

    def micro_tokens_on(self, device: str) -> int:
        """`micro_tokens`, or what it is where none is given. device: `cpu`, `cuda:1`."""
        return self.micro_tokens or (2048 if device == "cpu" else 16_384)


class LearnerConfig(Section):
    """The student's weights, gradients and optimizer state over several processes of this machine
    (FSDP2), each with its share of every update: one a GPU, or on the CPU."""

    processes: Positive = 1
    """One a GPU, or on the CPU."""
    timeout: Above0 = 1800.0
    """Seconds that one exchange of these may take, by the slowest of them; then the run stops."""


def _each_once(modes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(modes)) < len(modes):
        raise ValueError(f"each once (got {', '.join(modes)})")
    return modes


Modes = Annotated[
    tuple[Literal["greedy", "sampled"], ...],
    LISTED,
    Field(min_length=1),
    AfterValidator(_each_once),
]


class EvaluationConfig(Section):
    """When the student is examined, and on how much."""

    every: Count = 0
    """Steps between evaluations; 0: only when asked."""
    episodes: Positive | Literal["all"] = 100
    """Of each task and mode; all: every game once."""
    final: bool = False
    """Also after the last step; writes eval.json."""
    modes: Modes = ("greedy", "sampled")
    """Greedy decoding, and sampling as rollout says."""
    live_modes: Modes = ("greedy",)
    """While training: one mode takes half the time."""

    def due(self, done: int) -> bool:
        """Whether the student is examined after so many steps."""
        return self.every > 0 and done % self.every == 0

    def rounds(self, steps: int) -> int:
        """How often a run of so many steps plays `episodes` of each task."""
        live = steps // self.every if self.every else 0
        return live * len(self.live_modes) + self.final * len(self.modes)


class CheckpointConfig(Section):
    """What is kept of the student."""

    every: Positive = 50
    """Steps between checkpoints."""
    keep: Positive = 2
    """The newest so many."""
    best: bool = True
    """And the one with the best evaluation: the mean of the tasks' scores."""


CONSOLE = "console"
"""The observer that whoever starts the run brings: the command line's progress."""

OBSERVERS = {"tensorboard": "tutelage.distill.run.curves:TensorBoard"}
"""The others that come with this package: their classes by name."""


def _observer(name: str) -> str:
    known = (CONSOLE, *OBSERVERS)
    if name not in known and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(unknown("observer", name, known) + "; or one of your own, module:Class")
    return name


class JournalConfig(Section):
    """What is told of a run."""

    observers: Annotated[
        tuple[Annotated[str, AfterValidator(_observer)], ...], LISTED, AfterValidator(_each_once)
    ] = (CONSOLE, *OBSERVERS)
    """Who is told of the run as it goes, beside metrics.jsonl: console (progress), tensorboard
    (RUN/tensorboard), and classes of your own, module:Class. One that fails is left out."""

    stall: Above0 = 1800.0
    """Seconds after which a step that does not end leaves its stack in RUN/stalled/learner.txt."""
    tensorboard: bool = True
    """Whether tensorboard is one of the observers, where they are not listed."""
    episodes_every: Positive = 1
    """Steps between episode files."""
    diagnostics_every: Positive = 10
    """A task's steps between diagnostics that need the student's distribution over all ids."""

    @model_validator(mode="before")
    @classmethod
    def _either(cls, data: Any) -> Any:
        """The key that is not given says what the other does."""
        if not isinstance(data, Mapping):
            return data
        named = data.get("observers")
        if named is None and data.get("tensorboard") is False:
            return {"observers": (CONSOLE,), **data}
        if isinstance(named, list | tuple):
            return {"tensorboard": "tensorboard" in named, **data}
        return data

    @model_validator(mode="after")
    def _agree(self) -> JournalConfig:
        if self.tensorboard != ("tensorboard" in self.observers):
            raise ValueError(
                f"tensorboard is {str(self.tensorboard).lower()}, and observers are"
                f" {', '.join(self.observers) or 'none'}: leave one of these two keys out"
            )
        return self


class ClusterConfig(Section):
    """Rollout workers and teachers as Ray actors; none: all in this process."""

    address: Annotated[str, AfterValidator(_address)] = "local"
    """local starts Ray here; auto or ray://... joins a running cluster, whose nodes see models and
    the files of environments under the same paths, or models by hub id."""
    workers: Positive = 1
    """Rollout workers."""
    threads: Positive = 1
    """Of torch in each actor."""
    worker_resources: dict[Text, Above0] = Field(default_factory=dict)
    """What Ray keeps for each worker, such as {GPU: 1} or a name that nodes were started with."""
    teacher_resources: dict[Text, Above0] = Field(default_factory=dict)
    """What Ray keeps for each teacher."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None
    """Of one placement group for all of these; none: each goes where there is room."""
    wheel: Place | None = None
    """A file: this package, for nodes that do not have it."""
    timeout: Above0 = 1800.0
    """Seconds that an actor may take for one step's rollouts or one scoring; then it is
    replaced."""
    attempts: Positive = 3
    """At a piece of work, each on a fresh actor."""

    @model_validator(mode="after")
    def _bundles(self) -> ClusterConfig:
        if self.strategy and not (self.worker_resources and self.teacher_resources):
            raise ValueError(
                f"cluster.strategy: {self.strategy} places resources: give worker_resources and"
                " teacher_resources, such as {CPU: 1}"
            )
        return self
