"""`tutelage plan`: what a config would run, and what that takes. Loads no weights, asks no network.

Lengths of replies are upper bounds, since a student may stop earlier; prompts and observations are
the environment's, so nothing here counts them. Models that are not on this machine are taken by
their published architecture, or by the size in their name; what that does not tell stays unknown.

Bytes are decimal: 1 GB = 10^9.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tutelage.distill.config import ConfigError, RunConfig, VllmConfig, build_objective
from tutelage.distill.footprint import (
    BYTES,
    Footprint,
    at_hand,
    footprint,
    student_footprint,
)
from tutelage.distill.gpus import suggestion
from tutelage.distill.laws import biases
from tutelage.distill.learner import DENSE_VOCABULARY
from tutelage.distill.models import check_vocabularies, device_of, student_tokenizer
from tutelage.distill.objectives.scores import CHUNK
from tutelage.scheduler.policies import Step
from tutelage.scheduler.timetable import TaskPlan, Timetable

LIBRARIES = 400_000_000
"""Bytes of a process that holds Python, torch and transformers (measured: 375 MB with the demo's
three models)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """One task's share of the run. Tokens: the student's replies, at most."""

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
        """Of the teacher's scores of a step."""
        return None if self.score_bytes is None else self.score_bytes * self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Memory that something takes on a device, in bytes; None: unknown."""

    device: str
    what: str
    least: int | None
    most: int | None
    knob: str  # the key that changes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a config would run. vocabulary: the ids that take probability; None: unknown."""

    config: RunConfig
    vocabulary: int | None
    student: Footprint
    teachers: dict[str, Footprint]
    tasks: tuple[TaskForecast, ...]
    needs: tuple[Need, ...]

    def total(self, device: str) -> tuple[int, int, bool]:
        """(at least, at most, whether something unknown comes on top)."""
        own = [need for need in self.needs if need.device == device]
        unknown = any(need.least is None or need.most is None for need in own)
        return sum(n.least or 0 for n in own), sum(n.most or n.least or 0 for n in own), unknown


def make_plan(config: RunConfig) -> Plan:
    """The plan of a checked config.

    Raises:
        ConfigError: what is on this machine does not fit together (vocabularies, k, config.json).
    """
    student = student_footprint(config.student)
    teachers = {
        name: footprint(teacher.files or teacher.model) for name, teacher in config.teachers.items()
    }
    vocabulary = _vocabulary(config, student)
    steps = _steps(config)
    tasks = tuple(_forecast(config, name, steps[name], vocabulary) for name in config.tasks)
    return Plan(
        config=config,
        vocabulary=vocabulary,
        student=student,
        teachers=teachers,
        tasks=tasks,
        needs=(
            *_learner_needs(config, student, vocabulary, tasks),
            *_rollout_needs(config, student),
            *_teacher_needs(config, teachers, vocabulary, tasks),
            *_guide_needs(config, teachers),
            _process_needs(config),
        ),
    )


def _vocabulary(config: RunConfig, student: Footprint) -> int | None:
    """How many ids student and teachers share, as far as their tokenizers are here."""
    own = _tokenizer_here(config)
    if own is None:
        return None if student.shape is None else student.shape.rows
    folders = {
        name: at_hand(teacher.files)
        for name, teacher in config.teachers.items()
        if teacher.files is not None
    }
    here = {
        name: config.teachers[name].model_copy(
            update={"model": str(folder), "weights": str(folder)}
        )
        for name, folder in folders.items()
        if folder is not None and (folder / "tokenizer_config.json").is_file()
    }
    key = "tokenizer" if config.student.tokenizer else "model"
    read = config.student.model_copy(update={key: str(own)})
    return check_vocabularies(config.model_copy(update={"student": read, "teachers": here}))


def _tokenizer_here(config: RunConfig) -> Path | None:
    """The folder of the student's tokenizer, if it is on this machine."""
    own = at_hand(student_tokenizer(config.student))
    return own if own is not None and (own / "tokenizer_config.json").is_file() else None


def _forecast(config: RunConfig, name: str, steps: int, vocabulary: int | None) -> TaskForecast:
    task, objective = config.tasks[name], build_objective(config.objective_of(name))
    k = max(objective.k, objective.student_k)
    if vocabulary is not None and k > vocabulary:
        raise ConfigError(
            f"tasks.{name}: objective {objective.name!r} has k={k}, the tokenizer {vocabulary} ids:"
            " lower objective.k"
        )
    return TaskForecast(
        name=name,
        env=task.env,
        teacher=_described_teachers(task.teachers) if objective.needs_teacher else None,
        objective=_described(config, name, objective),
        steps=steps,
        episodes=task.episodes,
        group=task.group,
        tokens=_reply_tokens(config, name),
        evaluated=_evaluated(config),
        score_bytes=score_bytes(objective, vocabulary),
    )


def _described_teachers(weights: Mapping[str, float]) -> str:
    """`one`, or `one 75%, two 25%`: the shares of the episodes."""
    if len(weights) == 1:
        return next(iter(weights))
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.0%}" for name, weight in weights.items())


def _described(config: RunConfig, name: str, objective: Any) -> str:
    """The objective with its k and with what differs from its defaults."""
    options = config.objective_of(name).options
    defaults = inspect.signature(type(objective.rule)).parameters
    shown = {
        key: value
        for key, value in options.items()
        if key != "k" and value != defaults[key].default
    }
    k = max(objective.k, objective.student_k)
    text = [objective.name, *([f"k={k}"] if "k" in defaults else [])]
    text += [f"{key}={value}" for key, value in shown.items()]
    task = config.tasks[name]
    if task.weight != 1:
        text.append(f"(weight {task.weight:g})")
    if task.guidance is not None:
        text.append(f"(the {task.guidance.by} begins {task.guidance.share:.0%} of the episodes)")
    return " ".join(text)


def _steps(config: RunConfig) -> dict[str, int]:
    """Every task's steps. Where they hang on what happens in the run (token_budget, gap): as if
    every reply were as long as it may be, and all gaps stayed."""
    plans = {
        name: TaskPlan(episodes=task.episodes, start=task.start, end=task.end, most=task.steps)
        for name, task in config.tasks.items()
    }
    timetable = Timetable(plans, steps=config.steps, seed=config.seed, make_policy=config.policy)
    tokens = {name: float(_reply_tokens(config, name)) for name in plans}
    gaps = dict.fromkeys(plans, 1.0)
    for _, tasks in timetable.walk():
        active = timetable.active()
        timetable.record(Step(active=active, trained=tasks, tokens=tokens, gaps=gaps))
    return {name: timetable.turn(name) for name in plans}


def _reply_tokens(config: RunConfig, name: str) -> int:
    """Of a step, at most."""
    how = config.rollout_of(name)
    return config.tasks[name].episodes * how.max_turns * how.max_new_tokens


def _evaluated(config: RunConfig) -> int | None:
    """Episodes that one task plays for evaluation."""
    section = config.evaluation
    times = config.steps // section.every * len(section.live_modes) if section.every else 0
    times += len(section.modes) if section.final else 0
    if section.episodes == "all":
        return None if times else 0
    return times * section.episodes


def score_bytes(objective: Any, vocabulary: int | None) -> int | None:
    """Bytes of a teacher's scores of one token, as distill/transport.py sends them: its K ids as
    int32 and float16, 6 bytes for the sampled token and the entropy, and where the objective needs
    them float16 at the J ids that the student asks for (which travel too, as int32) or at all V.
    None: it takes V, which is unknown."""
    if not objective.needs_teacher:
        return 0
    count = 6 * max(objective.k, objective.student_k) + 6 + 6 * int(objective.student_k)
    if not objective.needs_full:
        return count
    return None if vocabulary is None else count + 2 * vocabulary


def _learner_needs(
    config: RunConfig,
    student: Footprint,
    vocabulary: int | None,
    tasks: Sequence[TaskForecast],
) -> list[Need]:
    device, width = device_name(config.student.device), BYTES[config.student.dtype]
    weights = student.weights(config.student.dtype)
    found = [
        Need(device=device, what="student: weights", least=weights, most=weights, knob="dtype"),
        Need(device=device, what="gradients", least=weights, most=weights, knob="dtype"),
        _optimizer_need(config, student, device),
    ]
    micro = config.optimizer.micro_tokens or (2048 if device.startswith("cpu") else 16_384)
    longest = max(micro, student.shape.context) if student.shape else None  # a row goes whole
    least = min(micro, max(task.tokens for task in tasks))
    shape, again = student.shape, config.optimizer.recompute
    kept = None if shape is None else shape.activations(recompute=again) * width
    found.append(
        Need(
            device=device,
            what="activations of a micro-batch",
            least=None if kept is None else kept * least,
            most=None if kept is None or longest is None else kept * longest,
            knob="micro_tokens",
        )
    )
    found += _head_needs(config, device, vocabulary, least, longest)
    return found if config.learner.processes == 1 else _over_ranks(config, found, weights)


CUT = 3
"""The first needs of a learner: weights, gradients, optimizer."""


def _over_ranks(config: RunConfig, alone: Sequence[Need], weights: int | None) -> list[Need]:
    """A learner's needs over several processes: each has its part of the first ones, and all of the
    others; rank 0 a whole copy too. While it starts, each loads the whole weights."""
    ranks, device = config.learner.processes, alone[0].device
    found = []
    for rank in [0] if device == "cpu" else range(ranks):
        for i, need in enumerate(alone):
            cut, times = (ranks, "parts") if i < CUT else (1, "times")
            many = ranks if device == "cpu" else 1
            where = f"{need.what}, {ranks} {times}" if many > 1 else f"rank {rank}: {need.what}"
            found.append(
                replace(
                    need,
                    device=device if rank == 0 else f"cuda:{rank}",
                    what=where,
                    least=None if need.least is None else many * need.least // cut,
                    most=None if need.most is None else many * need.most // cut,
                )
            )
    copy = "student: weights, a whole copy of rank 0"
    knob = "learner.processes"
    return [*found, Need(device=device, what=copy, least=weights, most=weights, knob=knob)]


def _optimizer_need(config: RunConfig, student: Footprint, device: str) -> Need:
    """AdamW keeps two moments of a parameter; Muon one, of the hidden matrices."""
    weights, width = student.weights(config.student.dtype), BYTES[config.student.dtype]
    most = None if weights is None else 2 * weights
    if config.optimizer.name == "adamw":
        what, least = "optimizer: AdamW, two moments", most
    else:
        what, least = "optimizer: Muon, one moment; AdamW", weights
        if student.shape is not None and most is not None:
            least = most = most - student.shape.hidden_matrices * width
    return Need(device=device, what=what, least=least, most=most, knob="optimizer.name")


def _head_needs(
    config: RunConfig, device: str, vocabulary: int | None, least: int, longest: int | None
) -> list[Need]:
    """Logits and log-probabilities of a micro-batch's tokens, or the blocks that stand for them."""
    if vocabulary is None or vocabulary > DENSE_VOCABULARY:
        what, sizes = "output head, block by block", (4 * CHUNK, 3 * 4 * CHUNK)
        found = [Need(device=device, what=what, least=sizes[0], most=sizes[1], knob="-")]
    else:
        block = 3 * 4 * vocabulary  # logits, log-probabilities, a gradient
        found = [
            Need(
                device=device,
                what=f"logits [tokens, {vocabulary}], three times",
                least=block * least,
                most=None if longest is None else block * longest,
                knob="micro_tokens",
            )
        ]
    if any(build_objective(config.objective_of(name)).needs_full for name in config.tasks):
        row = None if vocabulary is None else 4 * vocabulary
        found.append(
            Need(
                device=device,
                what="teacher's full distributions",
                least=None if row is None else row * least,
                most=None if row is None or longest is None else row * longest,
                knob="objective",
            )
        )
    return found


def _rollout_needs(config: RunConfig, student: Footprint) -> list[Need]:
    """The engine's weights, where they are not the learner's own, and its sessions' keys and
    values: of their replies alone, or of whole contexts."""
    device, width = device_name(config.student.device), BYTES[config.student.dtype]
    workers = config.cluster.workers if config.cluster else 1
    vllm = config.rollout.engine == "vllm"
    dtype = (config.vllm.dtype if vllm else None) or config.student.dtype
    found = []
    if config.cluster is not None or vllm:
        weights = student.weights(dtype)
        copies = None if weights is None else weights * workers
        found.append(
            Need(
                device=device,
                what=f"rollout workers: {workers} x weights" if config.cluster else "vLLM: weights",
                least=copies,
                most=copies,
                knob="cluster.workers" if config.cluster else "vllm.dtype",
            )
        )
        if vllm and config.vllm.tensor_parallel_size > 1:
            sent = student.weights(config.student.dtype)
            sent = None if sent is None else sent * workers
            found.append(
                Need(
                    device="cpu",
                    what="vLLM: weights on their way to its processes",
                    least=sent,
                    most=sent,
                    knob="vllm.tensor_parallel_size",
                )
            )
        if vllm:
            return [*found, _vllm_need("rollouts", config.vllm, device, weights, workers)]
    sizes = [_sessions(config, name, workers) for name in config.tasks]
    each = None if student.shape is None else student.shape.cache * width
    context = student.shape.context if student.shape else 0
    found.append(
        Need(
            device=device,
            what=f"keys and values, {max(live for live, _ in sizes)} sessions"
            + (" a worker" if workers > 1 else ""),
            least=None
            if each is None
            else workers * each * max(live * min(reply, context) for live, reply in sizes),
            most=None
            if each is None
            else workers * each * max(live for live, _ in sizes) * context,
            knob="max_live",
        )
    )
    return found


def _sessions(config: RunConfig, name: str, workers: int) -> tuple[int, int]:
    """(episodes in flight in one engine, tokens of the replies that its cache holds of each)."""
    how, section = config.rollout_of(name), config.evaluation
    played = config.tasks[name].episodes
    if section.every or section.final:
        played = (
            how.max_live * workers if section.episodes == "all" else max(played, section.episodes)
        )
    turns = how.max_turns if how.context.kind == "full" else 1
    return min(how.max_live, -(-played // workers)), turns * how.max_new_tokens


def _teacher_needs(
    config: RunConfig,
    teachers: dict[str, Footprint],
    vocabulary: int | None,
    tasks: Sequence[TaskForecast],
) -> list[Need]:
    found = []
    here = {name: one for name, one in config.teachers.items() if one.engine != "server"}
    for name, teacher in here.items():
        weights = teachers[name].weights(teacher.dtype)
        device = device_name(teacher.device)
        found.append(
            Need(
                device=device,
                what=f"teacher {name}: weights",
                least=weights,
                most=weights,
                knob="dtype",
            )
        )
        if teacher.engine == "vllm":
            options = teacher.vllm or VllmConfig()
            found.append(_vllm_need(f"teacher {name}", options, device, weights))
    # A block of tokens' logits, float32: as they are, as log-probabilities, as probabilities.
    tokens = max((task.tokens for task in tasks if task.teacher), default=0)
    block = CHUNK if vocabulary is None else min(CHUNK, vocabulary * tokens)
    for device in dict.fromkeys(device_name(teacher.device) for teacher in here.values()):
        found.append(
            Need(
                device=device,
                what="a teacher's logits, three times",
                least=12 * block if vocabulary and block < CHUNK else 4 * CHUNK,
                most=12 * block,
                knob="-",
            )
        )
    return found


def _guide_needs(config: RunConfig, teachers: dict[str, Footprint]) -> list[Need]:
    """A teacher that plays prefixes keeps keys and values as an engine does: of its share of what
    is in flight, or, if others end before, of all guided episodes at once."""
    workers = config.cluster.workers if config.cluster else 1
    found = []
    for name, task in config.tasks.items():
        if task.guidance is None or task.guidance.by != "teacher":
            continue
        (name_of,) = task.teachers
        teacher, shape = config.teachers[name_of], teachers[name_of].shape
        live, reply = _sessions(config, name, workers)
        share = task.guidance.share
        usual, all_at_once = round(share * live), min(live, round(share * task.episodes))
        each = None if shape is None else workers * shape.cache * BYTES[teacher.dtype]
        context = shape.context if shape else 0
        found.append(
            Need(
                device=device_name(teacher.device),
                what=f"prefixes of {name}: keys and values, {usual} to {all_at_once} sessions",
                least=None if each is None else each * usual * min(reply, context),
                most=None if each is None else each * all_at_once * context,
                knob="max_live",
            )
        )
    return found


def _vllm_need(
    name: str, options: VllmConfig, device: str, weights: int | None, engines: int = 1
) -> Need:
    """What vLLM's engines set aside for keys and values: a size, or the rest of their share. Each
    of tensor_parallel_size workers does: on a GPU of its own, or all in the CPU's memory."""
    size, room = options.kv_cache_gib, memory_here(device)
    if size is None and device == "cpu":
        size = 1.0
    kept = None if size is None else int(size * (1 << 30))
    if kept is None and room is not None and weights is not None:
        kept = max(0, int(room * options.gpu_memory_utilization) - weights // engines)
    if kept is not None:
        kept *= engines * (options.tensor_parallel_size if device == "cpu" else 1)
    return Need(
        device=device,
        what=f"{name}: vLLM's cache",
        least=kept,
        most=kept,
        knob="vllm.kv_cache_gib" if size is not None else "vllm.gpu_memory_utilization",
    )


def _process_needs(config: RunConfig) -> Need:
    """Environments' own processes, which load no torch, come on top."""
    count = config.learner.processes
    if config.cluster is not None:
        count += config.cluster.workers + len(config.teachers)
    engines = [one.vllm for one in config.teachers.values() if one.engine == "vllm"]
    if config.rollout.engine == "vllm":
        engines += [config.vllm] * (config.cluster.workers if config.cluster else 1)
    sizes = [one.tensor_parallel_size for one in engines if one is not None]
    count += sum(size for size in sizes if size > 1)
    return Need(
        device="cpu",
        what=f"Python and libraries, {count} process{'es' * (count > 1)}",
        least=count * LIBRARIES,
        most=count * LIBRARIES,
        knob="cluster.workers" if config.cluster else "-",
    )


def device_name(name: str) -> str:
    """`auto` as what it is on this machine."""
    return str(device_of(name))


def notes(plan: Plan) -> list[str]:
    """What a reader must know beside the numbers."""
    config, found = plan.config, []
    asked = (name for name, teacher in config.teachers.items() if teacher.files is not None)
    models = (plan.student, *(plan.teachers[name] for name in asked))
    away = {
        "sized by their published config.json": [m.reference for m in models if m.published],
        "known by name alone": [m.reference for m in models if m.shape is None],
    }
    for how, references in away.items():
        if references:
            found.append(f"not on this machine, {how}: {', '.join(dict.fromkeys(references))}")
    if _tokenizer_here(config) is None:
        found.append("the student's tokenizer is not on this machine: vocabularies go unchecked")
    for name, own in biases(config).items():
        found.append(f"tasks.{name}: {own.text}: {own.cure}")
    if len(config.tasks) > 1 and config.schedule.policy in ("token_budget", "gap"):
        found.append(
            f"schedule {config.schedule.policy} decides in the run: steps are those of replies as"
            " long as may be and of gaps that stay"
        )
    devices = list(dict.fromkeys(need.device for need in plan.needs))
    if missing := [device for device in devices if memory_here(device) is None]:
        found.append(f"this machine has no {', no '.join(missing)}")
    for device in devices:
        least, most, unknown = plan.total(device)
        room = memory_here(device)
        if device != "cpu":
            more = ", and what is unknown" if unknown else ""
            found.append(f"{device}: at least {suggestion(least)}{more}")
        if room is not None and least > room:
            found.append(f"{device}: does not fit; {_largest(plan, device)}")
        elif room is not None and most > room:
            found.append(f"{device}: full contexts would not fit; {_largest(plan, device)}")
    if config.cluster is not None and config.cluster.address != "local":
        found.append(f"Ray at {config.cluster.address}: actors may run on other machines")
    return found


def _largest(plan: Plan, device: str) -> str:
    own = [need for need in plan.needs if need.device == device]
    need = max(own, key=lambda need: need.most or 0)
    return f"the largest part is {need.what} (see {need.knob})"


def memory_here(device: str) -> int | None:
    """The bytes of a device of this machine; None: there is no such device."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    index = torch.device(device).index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(index).total_memory)
