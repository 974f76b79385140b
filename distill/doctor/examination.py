"""Runs all checks on a config: loads its models one by one, and each task's environment."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.resolved import TaskSettings, rollouts_of, support_of
from tutelage.distill.config.run import RunConfig
from tutelage.distill.doctor import numbers, texts
from tutelage.distill.doctor.engines import Known, examine_engine
from tutelage.distill.doctor.environments import check_environment, check_grader
from tutelage.distill.doctor.findings import Check, Finding
from tutelage.distill.engines.build import make_engine
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models.conversations import (
    as_begun,
    chat_of,
    dated,
    spoken,
    stop_ids,
    teacher_chat,
)
from tutelage.distill.models.loading import (
    BUILTIN,
    load_model,
    load_student,
    load_tokenizer,
    prepare_process,
    student_tokenizer,
)
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import Needs
from tutelage.distill.run.preflight import check_devices
from tutelage.distill.teachers.fingerprint import self_test_rows
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.envs.errors import one_line
from tutelage.scheduler.engine import Engine
from tutelage.scheduler.episodes import Dropped, Episode, Order, Row
from tutelage.scheduler.rollouts import RolloutWorker, TaskRollout

EPISODES, TURNS, TOKENS = 2, 4, 64
"""How much of each task the student plays, so that there are rows to score."""

AS_TOLD = "do as it says, or choose another model"
"""The cure where the message itself says what to do."""

Say = Callable[[str], None]
Settings = Mapping[str, TaskSettings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The student's rows in a task. opening: the ids of the first prompt."""

    rows: tuple[Row, ...]
    opening: tuple[int, ...]


def examine(config: RunConfig, *, say: Say = lambda _: None) -> Iterator[Finding]:
    """Every finding on a checked config, as soon as it is made. say: is told what comes next."""
    check_devices(config)
    prepare_process(config.student.threads)
    settings = config.resolve()
    say("environments")
    yield from _environments(config, settings)
    say("tokenizers")
    tokenizer, findings = _tokenizer("student", student_tokenizer(config.student))
    yield from findings
    if tokenizer is None:  # nothing can be compared; tell at once which others are missing too
        for name, teacher in config.teachers.items():
            if teacher.tokenizer is not None:
                yield from _tokenizer(f"teachers.{name}", teacher.tokenizer)[1]
        return
    config = dated(as_begun(config), tokenizer)  # templates show the run's date, not today's
    yield from _texts(config, settings, tokenizer)
    say("student")
    played: dict[str, Played] = {}
    yield from _student(config, settings, tokenizer, played)
    for name in config.teachers:
        say(f"teacher {name}")
        yield from _teacher(config, settings, name, tokenizer, played)


def _environments(config: RunConfig, settings: Settings) -> Iterator[Finding]:
    for name, task in settings.items():
        subject, guidance = f"tasks.{name}", config.tasks[name].guidance
        training, evaluation = task.rollout, task.evaluation
        guided = guidance is not None and guidance.by == "expert"
        yield from check_environment(
            subject,
            training.env,
            training.env_args,
            expert=task.schedule.labels or guided,
            admissible=training.context.lists_actions,
        )
        if evaluation.env_args != training.env_args:
            yield from check_environment(
                subject,
                evaluation.env,
                evaluation.env_args,  # no expert plays in an evaluation
                admissible=evaluation.context.lists_actions,
                check="environment, eval_args",
            )[:1]  # whether it can be made; all else was said of the same environment above
    # an id may name the module that registers it first: module:tutelage/Math-v0
    if any(task.env.endswith("tutelage/Math-v0") for task in config.tasks.values()):
        yield from check_grader()


def _tokenizer(subject: str, reference: str) -> tuple[Any, list[Finding]]:
    try:
        return load_tokenizer(reference), []
    except ConfigError as error:
        return None, [_absent(subject, "tokenizer", reference, error)]


def _absent(subject: str, what: str, reference: str | None, error: Exception) -> Finding:
    """A finding on what did not load. reference: its folder or id; None: made from student.init."""
    there = reference is None or reference.startswith(BUILTIN) or Path(reference).is_dir()
    cure = AS_TOLD if there else "name a folder that is there, or a hub id that can be reached"
    return Check(subject, what).fault(one_line(error), cure)


def _texts(config: RunConfig, settings: Settings, tokenizer: Any) -> Iterator[Finding]:
    systems = [task.rollout.context.system for task in settings.values()]
    for system in dict.fromkeys(systems):
        yield texts.check_template("student", tokenizer, system, config.date)
    for name, task in settings.items():
        yield texts.check_mask(f"tasks.{name}", tokenizer, task.mask_tokens)
        if task.objective.needs.draws:
            yield numbers.check_sampling(f"tasks.{name}", task.objective, task.rollout.sampling)


def _student(
    config: RunConfig, settings: Settings, tokenizer: Any, played: dict[str, Played]
) -> Iterator[Finding]:
    """Findings on the student; fills `played`."""
    size = len(tokenizer)
    try:
        student = load_student(config.student, seed=config.seed, vocabulary=size)
    except ConfigError as error:
        yield _absent("student", "weights", config.student.model, error)
        return
    yield texts.check_padding("student", student.rows, size)
    told = stop_ids(config.student.model)
    ends = texts.check_end_of_turn("student", tokenizer, told, config.date)
    yield ends
    if student.rows < size or ends.level == "fault":
        return  # it cannot play: a prompt may hold ids without a row, or no reply would end
    for name, task in settings.items():
        subject = f"tasks.{name}"
        engine = TransformersEngine(student)
        found = _play(config, name, task.rollout, engine, tokenizer)
        if isinstance(found, Finding):
            yield found
            continue
        played[name] = found
        yield numbers.check_engine(subject, student, found.rows)
        yield numbers.check_self_distillation(subject, student, found.rows, task.objective)
    if config.rollout.engine == "vllm":
        yield from _vllm(config, settings, student, tokenizer)
    del student
    _free()  # the teachers are next: no two models are loaded at once


def _vllm(
    config: RunConfig, settings: Settings, student: Student, tokenizer: Any
) -> Iterator[Finding]:
    """Whether vLLM takes the student's weights, and gives the tokens that it samples the
    log-probabilities that the student gives them (train-inference mismatch)."""
    check = Check("student", "vllm and learner")
    try:
        engine = make_engine(config, rollouts_of(settings), student)
        engine.load(None, 0)  # None: the student's own tensors, in this process
    except (ConfigError, RuntimeError) as error:
        cure = "see the vllm section; rollout.engine=transformers needs none of it"
        yield check.fault(one_line(error), cure)
        return
    within = numbers.tolerance(student, config.vllm.dtype)
    for name, task in settings.items():
        found = _play(config, name, task.rollout, engine, tokenizer)
        if isinstance(found, Finding):
            yield found
            continue
        yield numbers.check_engine(
            f"tasks.{name}",
            student,
            found.rows,
            within=within,
            check="vllm and learner",
        )
    engine.close()


def _play(
    config: RunConfig, name: str, how: TaskRollout, engine: Engine, tokenizer: Any
) -> Played | Finding:
    """A few short episodes of a task, exactly as training plays them."""
    how = replace(
        how,
        max_turns=min(how.max_turns, TURNS),
        max_new_tokens=min(how.max_new_tokens, TOKENS),
        attempts=1,  # an episode that is lost once is a finding already
    )
    check = Check(f"tasks.{name}", "rollout")
    worker = RolloutWorker(engine, tokenizer, {name: how}, **spoken(config))
    try:
        count = worker.num_episodes(name)
        orders = [
            # an environment may have fewer games than are played here
            Order(task=name, number=n, seed=n, index=n if count is None else n % count)
            for n in range(EPISODES)
        ]
        outcomes = worker.collect(orders)
    except (ValueError, RuntimeError, OSError) as error:
        return check.fault(one_line(error), "correct env, env_args and rollout")
    except ArithmeticError as error:  # the engine's, of NaN among the logits
        cure = "fetch the student's weights again, or set student.dtype to float32"
        return check.fault(one_line(error), cure)
    finally:
        worker.close()
    if lost := [outcome for outcome in outcomes if isinstance(outcome, Dropped)]:
        cure = "correct the environment; rollout.timeout says how many seconds it may take"
        if lost[0].reason == "too long":
            cure = "see the message"
        return check.fault(f"episode {lost[0].order.name}: {lost[0].why}", cure)
    rows = tuple(
        row for episode in outcomes if isinstance(episode, Episode) for row in episode.rows
    )
    if not rows:
        return check.fault(
            "the student had no room for a single token: the first prompt fills its context",
            "take a student with more max_position_embeddings, or shorten the prompt",
        )
    first = int(rows[0].action_mask_T.argmax())  # of booleans: where the first True is
    return Played(rows=rows, opening=tuple(rows[0].ids_T[:first].tolist()))


def _teacher(
    config: RunConfig, settings: Settings, name: str, tokenizer: Any, played: dict[str, Played]
) -> Iterator[Finding]:
    subject, section = f"teachers.{name}", config.teachers[name]
    tasks = {
        task: played[task]
        for task, own in settings.items()
        if name in own.schedule.teachers and task in played
    }
    known: Known | None = None
    if section.files is not None and section.tokenizer is not None:
        own, findings = _tokenizer(subject, section.tokenizer)
        yield from findings
        if own is None:
            return
        comparisons = [
            texts.check_vocabulary(subject, tokenizer, own),
            _ends(config, settings, tokenizer, subject, own),
            texts.check_same_template(subject, tokenizer, own),
        ]
        yield from comparisons
        try:
            model = load_model(section.files, dtype=section.dtype, device=section.device)
        except ConfigError as error:
            yield _absent(subject, "weights", section.files, error)
            return
        rows = model.get_output_embeddings().weight.shape[0]
        yield texts.check_padding(subject, rows, len(tokenizer))
        if rows < len(tokenizer) or comparisons[0].level == "fault":
            return  # its scores would be of other texts
        teacher = TransformersTeacher(model.requires_grad_(False), vocabulary=len(tokenizer))
        opening = next((p.opening for p in tasks.values()), None)
        prompt = opening or tokenizer.encode("What is two and two?", add_special_tokens=False)
        yield from examine_teacher(subject, teacher, model, prompt, tasks, size=len(tokenizer))
        if section.engine != "transformers":
            own_rows = [row for found in tasks.values() for row in found.rows]
            # fixed rows where the student could not play
            own_rows = own_rows or self_test_rows(len(tokenizer))
            scores = teacher.score(own_rows, Needs(k=support_of(name, settings)))
            known = Known(reference=section.files, rows=tuple(own_rows), scores=tuple(scores))
        del model, teacher
        _free()
    if section.engine != "transformers":
        said = {task: found.rows for task, found in tasks.items()}
        yield from examine_engine(config, settings, name, tokenizer, known, said)
        _free()


def _ends(config: RunConfig, settings: Settings, tokenizer: Any, subject: str, own: Any) -> Finding:
    """Whether teacher and student end alike. own: the teacher's tokenizer."""
    name = subject.removeprefix("teachers.")
    # there is one: RunConfig refuses a teacher without a task
    taught = next(task for task in settings.values() if name in task.schedule.teachers)
    try:
        student = chat_of(config, tokenizer, taught.rollout.context.system)
        teacher = teacher_chat(name, own, config.teachers[name].tokenizer)
    except ConfigError as error:
        return Check(subject, "EOS").fault(str(error), "see the message")
    return texts.check_ends(subject, student, teacher)


def examine_teacher(
    subject: str,
    teacher: Any,
    model: Any,
    prompt: Sequence[int],
    tasks: dict[str, Played],
    *,
    size: int,
) -> Iterator[Finding]:
    """Findings on a teacher's scores. teacher: has `score`; model: its weights; prompt: ids that it
    continues greedily, to score its own text; size: the tokenizer's."""
    within = numbers.tolerance(model)
    try:
        probes = numbers.greedy_probes(Student(model, vocabulary=size), prompt)
        rows = [probe.row for probe in probes]
        scores = teacher.score(rows, Needs(k=1))
    except ConfigError as error:  # such as a context that is too short
        yield Check(subject, "scores").fault(one_line(error), AS_TOLD)
        return
    except (ValueError, ArithmeticError) as error:  # NaN among the weights
        yield Check(subject, "scores").fault(
            one_line(error),
            "its weights hold NaN or infinity: load them again, or another dtype",
        )
        return
    yield numbers.check_support(subject, scores, size)
    yield numbers.check_weights(subject, scores)
    yield numbers.check_alignment(subject, teacher.score, probes, within=within)
    yield numbers.check_determinism(subject, teacher.score, rows, within=within)
    for task, found in tasks.items():
        theirs = teacher.score(found.rows, Needs(k=1))
        yield numbers.check_teacher_on_student(subject, task, theirs, found.rows)


def _free() -> None:
    gc.collect()  # models hold reference cycles: without this the next one might not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
