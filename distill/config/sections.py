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
    Amount,
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
    """The model to train: a folder, a hub id, or builtin:NAME of a tiny model that comes with this
    package."""
    init: dict[str, Any] | None = None
    """In place of model: the keys of a config.json, for a model with random weights."""
    tokenizer: Place | None = None
    """A folder or hub id; required with init. None: the model's own tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the student's weights and arithmetic. In bfloat16 weights AdamW's small updates
    are lost to rounding."""
    device: Device = "auto"
    """Where the student is trained: auto (cuda where there is one), cpu, cuda or cuda:N."""
    threads: Positive | None = None
    """CPU threads of torch in this process; none: one for each core that it may use
    (OMP_NUM_THREADS, taskset). Forwards too small to gain from a second thread use one."""

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

    # extra: the options of the loss that `name` names; `_known` checks them. Not strict: `build`
    # converts them as each loss wants.
    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, AfterValidator(_named_objective)] = "local_support"
    """The loss; the section's further keys are its options."""
    mask_tokens: Annotated[tuple[Text, ...], LISTED] = ()
    """Texts whose tokens are left out of the loss where a turn has them for the first time."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        known = {*options_of(self.name), *type(self).model_fields}
        for option, value in self.options.items():
            if option not in known:
                said = unknown(f"option of objective {self.name!r}:", option, known)
                if option == "weight":
                    said = "weights are for losses in a list; a task's weight is tasks.NAME.weight"
                # a ValueError would blame the whole section: this names the option's place. The
                # text goes in as a value, since pydantic would read braces in it as fields.
                fault = PydanticCustomError("value_error", "{said}", {"said": said})
                place = InitErrorDetails(type=fault, loc=(option,), input=value)
                raise ValidationError.from_exception_data(self.name, [place])
        build(self.name, **self.options)
        return self


class TermConfig(ObjectiveConfig):
    """By which loss a task is taught; or, in a list, one of the losses whose weighted sum it is."""

    weight: Above0 = 1.0
    """The factor of this loss in the sum; only for losses in a list."""


def build_objective(section: ObjectiveConfig | tuple[TermConfig, ...]) -> Objective:
    """The loss that a section names, or the sum that a list names."""
    if isinstance(section, ObjectiveConfig):
        return build(section.name, **section.options)
    return weighted_sum([(term.weight, build(term.name, **term.options)) for term in section])


def masked(section: ObjectiveConfig | tuple[TermConfig, ...]) -> tuple[str, ...]:
    """An objective's `mask_tokens`. The learner masks a task's tokens once, for all of its losses:
    where several of them name texts, these must be alike."""
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


# With tags pydantic tells the faults of the branch that was meant, not of both.
Objectives = Annotated[
    Annotated[ObjectiveConfig, Tag("one")]
    | Annotated[tuple[TermConfig, ...], LISTED, AfterValidator(_summed), Tag("sum")],
    Discriminator(lambda data: "sum" if isinstance(data, list | tuple) else "one"),
]
"""A loss, or the weighted sum of several."""


class OwnObjective(Section):
    """Reads a task's own objective, whose faults then have the path `tasks.NAME.objective`."""

    objective: Objectives


class ContextConfig(Section):
    """What the student sees each turn."""

    kind: Literal["full", "window"] = "full"
    """full: the whole episode, which makes one row for training. window: a new prompt each turn
    with the latest turns; each turn makes a row."""
    repeat_task: bool = False
    """Repeat the task's description with each observation."""
    turns: Count = 4
    """With kind=window: how many earlier turns the prompt shows."""
    admissible: bool = False
    """List the actions that the environment would accept with each observation."""
    format: str | None = None
    """The layout of prompts and replies that the teacher was trained on, by name: gigpo. None: the
    observations as they are."""
    system: str | None = None
    """The system message; none: the chat template's own, if it has one."""

    def settings(self) -> ContextSettings:
        """Raises ValueError for what does not go with each other."""
        return ContextSettings(**self.model_dump())

    @model_validator(mode="after")
    def _possible(self) -> ContextConfig:
        # ContextSettings checks itself when it is made: a config is to fail here, not in the run
        self.settings()
        return self


class RolloutConfig(Section):
    """How the student plays."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates the student's replies. vllm is faster, but a repeated run is then equal only
    up to the last bits of log-probabilities."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """The sampling temperature. 1: the policy itself; 0: greedy decoding."""
    top_p: Part = 1.0
    """Sample only from the most probable tokens whose probabilities sum to this much; 1: from
    all."""
    max_turns: Positive = 30
    """The most turns of an episode; after them it is truncated."""
    max_new_tokens: Positive = 32
    """The most tokens of one reply."""
    context: ContextConfig = ContextConfig()
    """What the student sees each turn."""
    max_live: Positive = 128
    """The most episodes that one engine plays at the same time."""
    processes: Count = 1
    """Environment processes for each task and rollout worker. 0: environments run in the worker
    itself, which then survives their exceptions and sys.exit, but no crash and no hang."""
    timeout: Above0 = 60.0
    """Seconds that an environment may take for one batch of steps."""
    attempts: Positive = 3
    """How often an episode is played whose environment dies or hangs, before it is dropped."""
    max_observation: Positive = MAX_OBSERVATION
    """The most characters of one observation: a million fill the longest contexts there are. A
    longer one is the environment's fault: the episode is dropped and counted."""
    lost: Share = 0.5
    """The share of a step's episodes that may be dropped; if more are, the run stops, saved."""


class GuidanceConfig(Section):
    """TrOPD's off-policy prefixes, for objective trust_region: an expert or the teacher begins some
    of the episodes, and the student continues them. At first the prefix is the whole episode; from
    step to step it shrinks, by a cosine, to nothing."""

    by: Literal["expert", "teacher"] = "expert"
    """Who plays the prefixes: the environment's expert, or the task's own teacher."""
    share: Share = 0.2
    """The share of a step's episodes that begin with a prefix (TrOPD's code: 128 beside 512)."""
    until: Part = 1.0
    """The share of the task's steps after which no episode begins with a prefix."""


class TaskConfig(Section):
    """What the student learns to do, and from whom."""

    env: Text
    """The environment's Gymnasium id, such as tutelage/Math-v0, or my_package:MyEnv-v0."""
    env_args: dict[str, Any] = Field(default_factory=dict)
    """The environment's arguments (of gymnasium.make); `tutelage envs` lists those of ours."""
    eval_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments that replace those of env_args in evaluation, such as the split."""
    teacher: str | dict[str, Above0] | None = None
    """The name of the task's teacher. Or {name: weight} of several: each episode is taught by one
    of them, in proportion to the weights."""
    episodes: Positive = 16
    """Episodes that the student plays for one step of this task."""
    group: Positive = 1
    """How many of a step's episodes play the same game or problem; episodes is a multiple of it."""
    expert_share: Share | Annotated[tuple[Share, Share], LISTED] = 1.0
    """With objective imitation: the share of a step's episodes in which the expert plays rather
    than the student; or [share in the first step, share in the last]."""
    guidance: GuidanceConfig | None = None
    """Episodes that an expert or the teacher begins; none: the student plays every token."""
    start: Count = 0
    """The first of the run's steps, counted from 0, in which the task may be trained."""
    end: Positive | None = None
    """The first step in which the task is no longer trained; none: it is to the run's end."""
    steps: Positive | None = None
    """The most steps that the task gets; none: no limit of its own."""
    weight: Above0 = 1.0
    """The factor by which this task's loss counts."""
    objective: Annotated[
        dict[str, Any] | list[Annotated[dict[str, Any], Like(TermConfig)]] | None,
        Like(ObjectiveConfig),
    ] = None
    """The task's own objective, which replaces the run's as a whole; none: the run's."""
    rollout: Annotated[dict[str, Any], Like(RolloutConfig)] = Field(default_factory=dict)
    """The task's own keys of rollout; those not given are the run's."""

    @property
    def teachers(self) -> dict[str, float]:
        """The weights of its teachers, by name."""
        if isinstance(self.teacher, dict):
            return self.teacher
        return {} if self.teacher is None else {self.teacher: 1.0}


class ScheduleConfig(Section):
    """Which tasks a step trains."""

    policy: Literal["alternate", "weighted", "mixed", "token_budget", "gap"] = "alternate"
    """Which tasks a step trains. mixed: all of them. The others: one. alternate: the tasks in turn.
    weighted: each as often as its weight says. token_budget: so that the tasks' trained tokens are
    in proportion to their weights. gap: more often the task whose distance to its teacher shrinks
    fastest."""
    weights: dict[str, Above0] = Field(default_factory=dict)
    """With policy weighted or token_budget: a weight for each task, by name; 1 where none is
    given."""
    least: Part = 0.4
    """With policy gap: the share of the steps that is divided equally among all tasks."""
    max_staleness: Count = 0
    """How many updates old the weights that play an episode may be. 0: strictly on-policy. 1: a Ray
    run plays the next step's episodes while the student learns (asynchronous rollouts)."""


class OptimizerConfig(Section):
    """How the student's weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimizer. muon: Muon for the hidden matrices, AdamW for the rest; it took half the steps
    for the tiny models that were trained from scratch."""
    lr: Above0 = 1e-4
    """The learning rate; a good value for adamw is one for muon too."""
    betas: Annotated[tuple[Beta, Beta], LISTED] = (0.9, 0.95)
    """The decay rates of AdamW's two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay, decoupled from the gradient as in AdamW."""
    clip: Above0 = 1.0
    """The largest norm of the gradient; a greater one is scaled down to it."""
    warmup: Count = 0
    """The steps in which the learning rate rises linearly to lr."""
    decay: Literal["constant", "cosine"] = "constant"
    """The course of the learning rate after warmup."""
    floor: Share = 0.1
    """With decay=cosine: the share of lr that is left at the end of the run."""
    micro_tokens: Positive | None = None
    """Tokens, padding included, of one forward and backward; gradients of several are summed. None:
    2,048 on the CPU, where more does not fit its cache and costs twice, else 16,384."""
    recompute: bool = False
    """Gradient checkpointing: keep only the layers' inputs, and compute the rest again in the
    backward. It costs a third more work, and makes room for longer rows."""
    minibatch: Positive | None = None
    """Rows for one move of the optimizer (the paper: 64); none: all rows of a step."""
    aggregate: Literal["token", "sequence"] = "token"
    """How a task's loss is averaged: over all its tokens (the papers' formula), or first within
    each row and then over the rows."""
    normalize: Literal["task", "all"] = "task"
    """How the losses of several tasks in one step are averaged. task: each task by itself, so that
    short answers are not drowned by long chains. all: one mean over everything."""

    def micro_tokens_on(self, device: str) -> int:
        """`micro_tokens`, or what it is where none is given. device: `cpu`, `cuda:1`."""
        return self.micro_tokens or (2048 if device == "cpu" else 16_384)


class LearnerConfig(Section):
    """Several processes of this machine that train the student together (FSDP2): each holds a part
    of weights, gradients and optimizer state, and computes a part of every update."""

    processes: Positive = 1
    """How many processes train the student: one for each GPU, or several on the CPU."""
    timeout: Above0 = 1800.0
    """Seconds that the slowest process may take for one exchange with the others; then the run
    stops."""


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
    """When the student is evaluated, and on how much."""

    every: Count = 0
    """Steps between evaluations while training; 0: none."""
    episodes: Positive | Literal["all"] = 100
    """Episodes that an evaluation plays for each task and mode; all: every game once."""
    final: bool = False
    """Evaluate after the last step too, and write the scores to RUN/eval.json."""
    modes: Modes = ("greedy", "sampled")
    """How the student plays in the final evaluation and in `tutelage eval`: by greedy decoding,
    and by sampling with the parameters of rollout."""
    live_modes: Modes = ("greedy",)
    """How it plays in evaluations while training: one mode takes half the time."""

    def due(self, done: int) -> bool:
        """Whether the student is evaluated after so many steps."""
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
    """How many of the newest checkpoints are kept."""
    best: bool = True
    """Also keep the checkpoint with the best evaluation (the mean of the tasks' scores)."""


CONSOLE = "console"
"""The observer that shows progress; the command line passes it to the run."""

# as text: run is a room above this one, which may not import it
OBSERVERS = {"tensorboard": "tutelage.distill.run.curves:TensorBoard"}
"""The other observers of this package: `module:Class` by name."""


def _observer(name: str) -> str:
    known = (CONSOLE, *OBSERVERS)
    if name not in known and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(unknown("observer", name, known) + "; or one of your own, module:Class")
    return name


class JournalConfig(Section):
    """What is recorded and shown of a run."""

    observers: Annotated[
        tuple[Annotated[str, AfterValidator(_observer)], ...], LISTED, AfterValidator(_each_once)
    ] = (CONSOLE, "tensorboard")
    """Who gets the metrics of each step, beside metrics.jsonl: console (progress), tensorboard
    (RUN/tensorboard), and classes of your own, as module:Class. One that fails is left out, and the
    run continues."""

    stall: Above0 = 1800.0
    """Seconds after which a step that has not ended writes its stack to
    RUN/stalled/learner.txt."""
    tensorboard: bool = True
    """false: observers without tensorboard; for configs that do not list observers."""
    episodes_every: Positive = 1
    """Steps between files with the episodes that were played."""
    diagnostics_every: Positive = 10
    """Steps of a task between the costly diagnostics, which need the student's distribution over
    the whole vocabulary."""

    @model_validator(mode="before")
    @classmethod
    def _either(cls, data: Any) -> Any:
        """Fills in whichever of `observers` and `tensorboard` is not given, from the other."""
        if not isinstance(data, Mapping):  # pydantic itself refuses it next, in its words
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
    """The Ray cluster. local: start Ray on this machine. auto, HOST:PORT or ray://HOST:PORT: join a
    running cluster, whose nodes must find models and the files of environments under the same
    paths, or models by hub id."""
    workers: Positive = 1
    """How many rollout workers play episodes, each with an engine of its own."""
    threads: Positive = 1
    """CPU threads of torch in each actor."""
    worker_resources: dict[Text, Amount] = Field(default_factory=dict)
    """What Ray reserves for each rollout worker, such as {GPU: 1}, or a resource that nodes were
    started with."""
    teacher_resources: dict[Text, Amount] = Field(default_factory=dict)
    """What Ray reserves for each teacher, such as {GPU: 1}."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None
    """Place all actors as one placement group, by this strategy of Ray's; none: each where there is
    room."""
    wheel: Place | None = None
    """A wheel file of this package, for nodes that do not have it; what it depends on must be
    installed there."""
    timeout: Above0 = 1800.0
    """Seconds that an actor may take for one step's rollouts or one scoring; then a new actor
    replaces it."""
    attempts: Positive = 3
    """How often a piece of work is tried, each time on a new actor, before the run stops."""

    @model_validator(mode="after")
    def _bundles(self) -> ClusterConfig:
        # Ray refuses a placement group in which an actor has no resources
        if self.strategy and not (self.worker_resources and self.teacher_resources):
            raise ValueError(
                f"cluster.strategy: {self.strategy} places resources: give worker_resources and"
                " teacher_resources, such as {CPU: 1}"
            )
        return self
