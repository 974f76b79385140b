"""The memory that a config would take, by device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tutelage.distill.config.resolved import TaskSettings
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.teachers import VllmConfig
from tutelage.distill.models.dtypes import BYTES
from tutelage.distill.models.loading import device_of
from tutelage.distill.models.student import DENSE_VOCABULARY
from tutelage.distill.objectives.scores import CHUNK
from tutelage.distill.plan.footprint import Footprint
from tutelage.distill.plan.tasks import TaskForecast

LIBRARIES = 400_000_000
"""Bytes of a process with Python, torch and transformers (measured: 375 MB with the demo's three
models)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that something takes on a device, at least and at most; None: unknown."""

    device: str
    what: str
    least: int | None
    most: int | None
    knob: str  # the key that changes it


def learner_needs(
    config: RunConfig,
    settings: Mapping[str, TaskSettings],
    student: Footprint,
    vocabulary: int | None,
    tasks: Sequence[TaskForecast],
) -> list[Need]:
    device, width = device_name(config.student.device), BYTES[config.student.dtype]
    weights = student.weights(config.student.dtype)
    gradients = student.gradients(config.student.dtype)
    found = [
        Need(device=device, what="student: weights", least=weights, most=weights, knob="dtype"),
        Need(device=device, what="gradients", least=gradients, most=gradients, knob="dtype"),
        _optimizer_need(config, student, device),
    ]
    micro = config.optimizer.micro_tokens_on(device)
    # a row is never split: one that is longer than a micro-batch makes one of its own
    longest = max(micro, student.shape.context) if student.shape else None
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
    full = any(task.objective.needs.full for task in settings.values())
    found += _head_needs(device, vocabulary, least, longest, full=full)
    return found if config.learner.processes == 1 else _over_ranks(config, found, weights)


CUT = 3
"""How many of a learner's needs, the first ones, are divided among its processes: weights,
gradients, optimizer."""


def _over_ranks(config: RunConfig, alone: Sequence[Need], weights: int | None) -> list[Need]:
    """A learner's needs over several processes. Each rank has its part of the first ones (`CUT`)
    and all of the others; rank 0 also has a whole copy of the weights. While starting, each loads
    all weights."""
    ranks, device = config.learner.processes, alone[0].device
    found = []
    # on the CPU all ranks share one memory: one line for all of them
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
    name = config.optimizer.name
    least, most = student.optimizer_state(name, config.student.dtype)
    what = "AdamW, two moments" if name == "adamw" else "Muon, one moment; AdamW"
    what = f"optimizer: {what}"
    return Need(device=device, what=what, least=least, most=most, knob="optimizer.name")


def _head_needs(
    device: str, vocabulary: int | None, least: int, longest: int | None, *, full: bool
) -> list[Need]:
    """Logits and log-probabilities of a micro-batch's tokens, or, for a large vocabulary, of one
    block of them after the other."""
    if vocabulary is None or vocabulary > DENSE_VOCABULARY:
        # CHUNK float32 numbers: at least the logits, at most log-probabilities and a gradient too
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
    if full:
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


def rollout_needs(
    config: RunConfig, settings: Mapping[str, TaskSettings], student: Footprint
) -> list[Need]:
    """The rollout engine's weights, where they are not the learner's own, and the keys and values
    of its sessions: at least of their replies, at most of whole contexts."""
    device, width = device_name(config.student.device), BYTES[config.student.dtype]
    workers = config.workers
    vllm = config.rollout.engine == "vllm"
    found = []
    if config.cluster is not None or vllm:
        weights = student.weights(config.rollout_dtype)
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
            # its workers map one shared copy in this machine's memory (engines/vllm/sync.py)
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
    sizes = [_sessions(config, task, workers) for task in settings.values()]
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


def _sessions(config: RunConfig, task: TaskSettings, workers: int) -> tuple[int, int]:
    """(episodes in flight in one engine, reply tokens of each that its cache holds)."""
    how, section = task.rollout, config.evaluation
    played = task.schedule.episodes
    if section.rounds(config.steps):
        # nobody has counted the games yet: taken as enough to fill every engine
        played = (
            how.max_live * workers if section.episodes == "all" else max(played, section.episodes)
        )
    turns = how.max_turns if how.context.kind == "full" else 1  # a window begins a new prompt
    return min(how.max_live, -(-played // workers)), turns * how.max_new_tokens


def teacher_needs(
    config: RunConfig,
    teachers: dict[str, Footprint],
    vocabulary: int | None,
    tasks: Sequence[TaskForecast],
) -> list[Need]:
    found = []
    # a server's memory is its own machine's
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
    # Teachers score one after the other, in blocks of tokens. A block is float32 three times: as
    # logits, log-probabilities and probabilities.
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


def guide_needs(
    config: RunConfig, settings: Mapping[str, TaskSettings], teachers: dict[str, Footprint]
) -> list[Need]:
    """The keys and values of a teacher that plays prefixes: at least of the guided share of the
    episodes in flight; at most of all guided episodes, if the others have ended before."""
    workers = config.workers
    found = []
    for name, task in settings.items():
        if task.guide is None:
            continue
        teacher, shape = config.teachers[task.guide], teachers[task.guide].shape
        live, reply = _sessions(config, task, workers)
        share, episodes = task.schedule.guided_share, task.schedule.episodes
        usual, all_at_once = round(share * live), min(live, round(share * episodes))
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
    """The memory that vLLM's engines reserve for keys and values: kv_cache_gib, or what is left of
    gpu_memory_utilization. Each of tensor_parallel_size workers reserves it: on a GPU of its own,
    or all in the CPU's memory."""
    size, room = options.cache_bytes(on_cpu=device == "cpu"), memory_here(device)
    kept = size
    if kept is None and room is not None and weights is not None:
        # vLLM's share of the memory includes its weights
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


def process_needs(config: RunConfig) -> Need:
    """The libraries of all processes with torch. Those of environments load none, and are not
    counted."""
    count = config.learner.processes
    if config.cluster is not None:
        count += config.cluster.workers + len(config.teachers)
    engines = [one.vllm for one in config.teachers.values() if one.engine == "vllm"]
    if config.rollout.engine == "vllm":
        engines += [config.vllm] * config.workers
    sizes = [one.tensor_parallel_size for one in engines if one is not None]
    # a vLLM of one worker runs inside the process that asks it (engines/vllm/environment.py)
    count += sum(size for size in sizes if size > 1)
    return Need(
        device="cpu",
        what=f"Python and libraries, {count} process{'es' * (count > 1)}",
        least=count * LIBRARIES,
        most=count * LIBRARIES,
        knob="cluster.workers" if config.cluster else "-",
    )


def device_name(name: str) -> str:
    """A device's name, with `auto` as what it is on this machine."""
    return str(device_of(name))


def memory_here(device: str) -> int | None:
    """The memory of a device of this machine, in bytes; None: there is no such device."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    index = torch.device(device).index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(index).total_memory)
