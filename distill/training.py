"""The training loop, and what it is put together from.

for step, tasks in timetable:                      # a function of (seed, step, history)
    placement.sync(learner)                        # rollouts use this version of the student
    for task in tasks:
        episodes = placement.collect(orders)       # token-exact; failures are counted records
        lessons += placement.score(teacher, episodes)
    metrics  = learner.update(lessons, objectives)
    timetable.record(step); journal.write(step, task, metrics)
    checkpoint / evaluate where due
"""

from __future__ import annotations

import hashlib
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tutelage.distill import checkpoints
from tutelage.distill.config import ConfigError, RunConfig, TeacherConfig, build_objective
from tutelage.distill.engine import TransformersEngine
from tutelage.distill.journal import Journal
from tutelage.distill.learner import Course, Learner, Lesson
from tutelage.distill.masks import loss_mask, special_ids
from tutelage.distill.models import (
    check_vocabularies,
    load_model,
    load_student,
    load_tokenizer,
    prepare_process,
    resolve,
    student_tokenizer,
)
from tutelage.distill.objectives import TeacherScores
from tutelage.distill.teachers import TransformersTeacher
from tutelage.distill.transport import CompactScores, CompactTeacher
from tutelage.evaluation.evaluate import evaluate, law_of
from tutelage.scheduler.cluster import InProcess, Placement, RayCluster
from tutelage.scheduler.engine import Engine
from tutelage.scheduler.episodes import Dropped, Episode
from tutelage.scheduler.policies import Step
from tutelage.scheduler.rollouts import EnvironmentPools, RolloutWorker, TaskRollout
from tutelage.scheduler.timetable import TaskPlan, Timetable
from tutelage.scheduler.watchdog import Watchdog

EVALUATION = "evaluation:"
"""Prefix of a task's name when it is played for evaluation, with its eval_args."""


class Run:
    """Everything a run holds. Use as a context manager: what it starts, it stops.

    Args:
        config: the checked configuration.
        watch: told of progress (see Watcher); None: silent.
    """

    def __init__(self, config: RunConfig, *, watch: Watcher | None = None) -> None:
        self.config, self.watch = config, watch or Watcher()
        self.folder = Path(config.run)
        self.vocabulary = check_vocabularies(config)
        prepare_process(config.student.threads)
        self.tokenizer = load_tokenizer(student_tokenizer(config.student))
        self._courses = {
            name: Course(objective=build_objective(config.objective_of(name)), weight=task.weight)
            for name, task in config.tasks.items()
        }
        _check_supports(self._courses, self.vocabulary)
        self._special = {
            name: special_ids(self.tokenizer, config.objective_of(name).mask_tokens)
            for name in config.tasks
        }
        self.timetable = _timetable(config, self._courses)
        rollouts = _rollouts(config)
        pools = EnvironmentPools(rollouts)
        try:
            if config.cluster is None:
                pools.open(rollouts)  # a bad id or option shows before a model loads
            model = load_student(config.student, seed=config.seed)
            self.learner = Learner(
                model, vocabulary=self.vocabulary, config=config.optimizer, steps=config.steps
            )
            self.placement = _placement(
                config, self.learner, self.tokenizer, self.vocabulary, pools
            )
        except BaseException:
            pools.close()
            raise
        self._games: dict[str, int | None] = {}
        self._best: tuple[float, int] | None = None  # (score, after how many steps)
        self._stop = self.stopped = False

    def stop(self) -> None:
        """Save after the current step and end `train` (from a signal handler, say)."""
        self._stop = True

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.placement.close()

    def train(self) -> None:
        """Train to the last step, from where the run folder left off."""
        config = self.config
        start, position = self._resume()
        _write_config(self.folder, config)
        journal = Journal(
            self.folder, start=start, position=position, tensorboard=config.journal.tensorboard
        )
        watchdog = Watchdog(self.folder / "stalled" / "learner.txt", config.journal.stall)
        try:
            self.watch.start(config, start)
            for step, tasks in self.timetable.walk():
                watchdog.watch()
                metrics = self._step_or_save(step, tasks, journal)
                done = step + 1
                due = self._stop or done % config.checkpoint.every == 0 or done == config.steps
                if config.evaluation.every and done % config.evaluation.every == 0:
                    scores = _score_metrics(self.evaluate(config.evaluation.live_modes))
                    metrics |= scores
                    due |= self._is_best(done, scores)
                journal.write(step, "+".join(tasks), metrics)
                if due:
                    self._save(done, journal)
                if self._stop and done < config.steps:
                    self.stopped = True
                    return
            if config.evaluation.final:
                scores = self.evaluate(config.evaluation.modes)
                checkpoints.write_json(self.folder / "eval.json", scores)
        finally:
            watchdog.close()
            journal.close()

    def evaluate(self, modes: Sequence[str]) -> dict[str, Any]:
        """Scores of the student as it is, by task and mode."""
        self.placement.sync(self.learner.version)
        scores: dict[str, Any] = {}
        for task in self.config.tasks:
            name = EVALUATION + task
            sampled = self.config.task_rollout(task, evaluation=True).law
            for mode in modes:
                found = evaluate(
                    name,
                    lambda orders, law: self.placement.collect(orders, law=law),
                    law=law_of(mode, sampled),
                    episodes=self.config.evaluation.episodes,
                    num_games=self._num_games(name),
                    progress=partial(self.watch.evaluating, task, mode),
                )
                scores.setdefault(task, {"metric": self._metric(task)})[mode] = found
                self.watch.score(task, mode, found)
        return scores

    def _metric(self, task: str) -> str:
        return "pass@1" if self.config.rollout_of(task).max_turns == 1 else "success rate"

    def _step_or_save(self, step: int, tasks: Sequence[str], journal: Journal) -> dict[str, Any]:
        """A step; when it fails, what was learned before it is saved before the error rises."""
        try:
            return self._step(step, tasks, journal)
        except Exception:
            if step and self.learner.version == len(self.timetable.history) == step:
                self._save(step, journal)
            raise

    def _step(self, step: int, tasks: Sequence[str], journal: Journal) -> dict[str, Any]:
        """One update on one or several tasks; its line of metrics."""
        clock, timetable = _Clock(), self.timetable
        outcomes: dict[str, list[Episode | Dropped]] = {}
        lessons: list[Lesson] = []
        ledger: dict[str, dict[str, float]] = {}
        self.placement.sync(self.learner.version)
        clock.lap("sync")
        for task in tasks:
            orders = timetable.orders(task, self._num_games(task))
            outcomes[task] = self.placement.collect(orders)
            clock.lap("rollout")
            own, ledger[task] = self._lessons(task, outcomes[task])
            lessons += own
            clock.lap("score")
        turn = timetable.turn(tasks[0])
        update = self.learner.update(
            lessons,
            self._courses,
            seed=self.config.seed * 1_000_003 + turn,
            progress=timetable.progress(tasks[0]),
            diagnose=turn % self.config.journal.diagnostics_every == 0,
        )
        clock.lap("update")
        everything = [outcome for own in outcomes.values() for outcome in own]
        if step % self.config.journal.episodes_every == 0:
            journal.write_episodes(step, everything, lessons)
        clock.lap("journal")
        found = {task: _outcome_metrics(outcomes[task]) | update[task] for task in tasks}
        for task in tasks:
            found[task] |= ledger[task]
        timetable.record(
            Step(
                active=timetable.active(),
                trained=tuple(tasks),
                tokens={task: found[task]["tokens/trained"] for task in tasks},
                gaps={task: _gap(found[task]) for task in tasks},
            )
        )
        for task in tasks:
            self.watch.step(step, task, found[task])
        timings = clock.metrics(everything, lessons)
        timings["perf/actors_replaced"] = float(self.placement.restarts)
        if len(tasks) == 1:
            return found[tasks[0]] | timings
        named = {f"{task}/{name}": v for task in tasks for name, v in found[task].items()}
        return named | timings

    def _lessons(
        self, task: str, outcomes: Sequence[Episode | Dropped]
    ) -> tuple[list[Lesson], dict[str, float]]:
        """The task's episodes with what its teacher says of them, and the ledger of who taught how
        much: the sum of `teacher/NAME/tokens` over a run is what it trained."""
        episodes = [outcome for outcome in outcomes if isinstance(outcome, Episode)]
        lost = [outcome for outcome in outcomes if isinstance(outcome, Dropped)]
        most = self.config.rollout_of(task).lost
        if lost and (not episodes or len(lost) > most * len(outcomes)):
            raise RuntimeError(
                f"task {task!r}: {len(lost)} of {len(outcomes)} episodes were lost (rollout.lost"
                f" allows a share of {most}), the first ({lost[0].order.name}) because its"
                f" environment {lost[0].reason}: {lost[0].detail}"
            )
        rows = [row for episode in episodes for row in episode.rows]
        objective, teacher = self._courses[task].objective, self.config.tasks[task].teacher
        scores: list[TeacherScores | None] = [None] * len(rows)
        sent: list[CompactScores] = []
        if objective.needs_teacher:
            assert teacher is not None
            k = max(objective.k, objective.student_k)
            wanted: dict[str, Any] = {"k": k, "full": objective.needs_full}
            if objective.student_k:
                wanted["asked"] = self.learner.own_support(rows, objective.student_k)
            sent = self.placement.score(teacher, rows, **wanted)
            if objective.student_k:
                asked = [ids_NK.numpy().astype(np.int32) for ids_NK in wanted["asked"]]
                sent = [one.answering(ids) for one, ids in zip(sent, asked, strict=True)]
            scores = [one.unpack() for one in sent]
        special = self._special[task]
        lessons = [
            Lesson(task=task, row=row, scores=score, mask_T=loss_mask(row, special))
            for row, score in zip(rows, scores, strict=True)
        ]
        if not sent:
            return lessons, {}
        return lessons, {
            f"teacher/{teacher}/tokens": float(sum(x.mask_T.sum() for x in lessons)),
            f"teacher/{teacher}/positions": float(sum(len(one) for one in sent)),
            f"teacher/{teacher}/bytes": float(sum(one.nbytes for one in sent)),
        }

    def _num_games(self, name: str) -> int | None:
        if name not in self._games:
            self._games[name] = self.placement.num_episodes(name)
        return self._games[name]

    def _is_best(self, done: int, scores: Mapping[str, float]) -> bool:
        """Whether these scores' mean is the run's highest so far; then it is remembered."""
        mean = sum(scores.values()) / len(scores)
        if not self.config.checkpoint.best or (self._best and mean <= self._best[0]):
            return False
        self._best = mean, done
        return True

    def _save(self, done: int, journal: Journal) -> None:
        checkpoints.save(
            self.folder / "checkpoints",
            step=done,
            model=self.learner.model,
            tokenizer=self.tokenizer,
            state={
                "step": done,
                "version": self.learner.version,
                "position": journal.position,
                "optimizer": self.learner.optimizer.state_dict(),
                "best": self._best,
                "history": [asdict(step) for step in self.timetable.history],
            },
            keep=self.config.checkpoint.keep,
            best=self._best[1] if self._best else None,
        )

    def _resume(self) -> tuple[int, int]:
        """(the first step to do, the bytes of metrics.jsonl that stand)."""
        _refuse_other_config(self.folder, self.config)
        checkpoint = checkpoints.newest(self.folder / "checkpoints")
        if checkpoint is None:
            return 0, 0
        state = checkpoints.load_state(checkpoint)
        checkpoints.load_weights(checkpoint, self.learner.model)
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.version = state["version"]
        self._best = state["best"]
        self.timetable.restore([Step(**step) for step in state["history"]])
        return state["step"], state["position"]


def evaluate_model(
    config: RunConfig, model: str | None, *, watch: Watcher | None = None
) -> dict[str, Any]:
    """Scores of a model (None: the configured student) on every task; loads no teacher."""
    if model is not None:
        student = config.student.model_copy(
            update={"model": model, "init": None, "tokenizer": None}
        )
        config = config.model_copy(update={"student": student})
    with Run(config.model_copy(update={"teachers": {}}), watch=watch) as run:
        scores = run.evaluate(config.evaluation.modes)
    return {
        "model": model or config.student.model or "student.init",
        "weights": _digest(model or config.student.model),
        "scores": scores,
        "versions": _versions(),
    }


def _digest(model: str | None) -> str | None:
    """SHA-256 of the weights' file, where they are one file on this machine."""
    if model is None:
        return None
    path = Path(resolve(model)) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _versions() -> dict[str, str]:
    names = ("tutelage", "torch", "transformers", "gymnasium", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


class Watcher:
    """Told what a run does, as it does it. This one keeps silent; the command line's draws it."""

    def start(self, config: RunConfig, step: int) -> None:
        """Training begins at `step`."""

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        """A step is done."""

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        """Evaluation has played `done` of `total` episodes."""

    def score(self, task: str, mode: str, found: Mapping[str, Any]) -> None:
        """A task has been evaluated."""


class _Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self._last = self._begun = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(
        self, outcomes: Sequence[Episode | Dropped], lessons: Sequence[Lesson]
    ) -> dict[str, float]:
        tokens = sum(len(lesson.row.ids_T) for lesson in lessons)
        chosen = sum(o.num_chosen for o in outcomes if isinstance(o, Episode))
        return {
            **{f"time/{name}": round(seconds, 4) for name, seconds in self._laps.items()},
            "time/step": round(time.perf_counter() - self._begun, 4),
            "perf/rollout_tokens_per_s": round(chosen / max(self._laps["rollout"], 1e-9), 1),
            "perf/score_tokens_per_s": round(tokens / max(self._laps["score"], 1e-9), 1),
            "perf/update_tokens_per_s": round(tokens / max(self._laps["update"], 1e-9), 1),
            "memory/peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }


def _outcome_metrics(outcomes: Sequence[Episode | Dropped]) -> dict[str, float]:
    episodes = [outcome for outcome in outcomes if isinstance(outcome, Episode)]
    count = len(episodes)
    replies = [turn for episode in episodes for turn in episode.turns]
    alone = [episode for episode in episodes if not episode.order.guide] or episodes
    return {
        "reward/success": sum(episode.success for episode in alone) / len(alone),
        "episodes/guided": sum(episode.order.guide > 0 for episode in episodes) / count,
        "episodes/played": count,
        "episodes/dropped": len(outcomes) - count,
        # under perf/, since faults of the machine are no part of what is learned
        "perf/episodes_retried": sum(episode.attempts > 1 for episode in episodes),
        "episodes/turns": sum(len(episode.turns) for episode in episodes) / count,
        "episodes/unfinished": sum(episode.ended != "terminated" for episode in episodes) / count,
        "episodes/cut_off": sum(not turn.complete for turn in replies) / max(1, len(replies)),
        "tokens/chosen": sum(episode.num_chosen for episode in episodes),
        "tokens/seen": sum(len(row.ids_T) for episode in episodes for row in episode.rows),
    }


def _score_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """`eval/TASK/MODE` for a step's line of metrics."""
    return {
        f"eval/{task}/{mode}": found["value"]
        for task, modes in scores.items()
        for mode, found in modes.items()
        if mode != "metric"
    }


def _timetable(config: RunConfig, courses: Mapping[str, Course]) -> Timetable:
    """The run's steps.

    Raises:
        ConfigError: the tasks' start, end and steps leave a step without any.
    """
    plans = {}
    for name, task in config.tasks.items():
        share, guidance = task.expert_share, task.guidance
        plans[name] = TaskPlan(
            episodes=task.episodes,
            group=task.group,
            labels=not courses[name].objective.needs_teacher,
            expert_share=share if isinstance(share, tuple) else (share, share),
            guided_share=guidance.share if guidance else 0.0,
            guided_until=guidance.until if guidance else 1.0,
            start=task.start,
            end=task.end,
            most=task.steps,
        )
    try:
        return Timetable(plans, steps=config.steps, seed=config.seed, make_policy=config.policy)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _gap(metrics: Mapping[str, float]) -> float:
    """How far the student is from its teacher, for the schedule."""
    return -metrics["gap/mean"] if "gap/mean" in metrics else metrics["loss/mean"]


def _check_supports(courses: Mapping[str, Course], vocabulary: int) -> None:
    """Raises ConfigError for a support larger than the vocabulary."""
    for task, course in courses.items():
        if (k := max(course.objective.k, course.objective.student_k)) > vocabulary:
            raise ConfigError(
                f"tasks.{task}: objective {course.objective.name!r} has k={k}, the tokenizer"
                f" {vocabulary} ids: lower objective.k"
            )


def _rollouts(config: RunConfig) -> dict[str, TaskRollout]:
    tasks = {}
    for name in config.tasks:
        tasks[name] = config.task_rollout(name)
        tasks[EVALUATION + name] = config.task_rollout(name, evaluation=True)
    return tasks


def _placement(
    config: RunConfig, learner: Learner, tokenizer: Any, vocabulary: int, pools: EnvironmentPools
) -> Placement:
    if config.cluster is None:
        engine = TransformersEngine(learner.model, vocabulary=vocabulary)
        teachers = {
            name: _make_teacher(name, teacher, vocabulary)
            for name, teacher in config.teachers.items()
        }
        guides = _guides(config, teachers, vocabulary)
        worker = RolloutWorker(engine, tokenizer, _rollouts(config), pools, guides)
        return InProcess(worker, teachers)
    return RayCluster(
        address=config.cluster.address,
        workers=config.cluster.workers,
        threads=config.cluster.threads,
        worker_resources=config.cluster.worker_resources,
        teacher_resources=config.cluster.teacher_resources,
        strategy=config.cluster.strategy,
        wheel=config.cluster.wheel,
        timeout=config.cluster.timeout,
        attempts=config.cluster.attempts,
        stalled=(Path(config.run) / "stalled").absolute(),
        make_worker=partial(_make_worker, config, vocabulary),
        make_teachers={
            name: partial(_make_teacher, name, teacher, vocabulary)
            for name, teacher in config.teachers.items()
        },
        weights=lambda: {
            name: tensor.detach().cpu().numpy()
            for name, tensor in learner.model.state_dict().items()
        },
    )


def _make_worker(config: RunConfig, vocabulary: int) -> RolloutWorker:
    """A rollout worker with its own copy of the student (in a Ray actor)."""
    model = load_student(config.student, seed=config.seed)
    tokenizer = load_tokenizer(student_tokenizer(config.student))
    engine = TransformersEngine(model, vocabulary=vocabulary)
    teachers = {
        name: _make_teacher(name, config.teachers[name], vocabulary)
        for name in _guiding(config).values()
    }
    guides = _guides(config, teachers, vocabulary)
    return RolloutWorker(engine, tokenizer, _rollouts(config), guides=guides)


def _guiding(config: RunConfig) -> dict[str, str]:
    """The teachers that play prefixes, by task."""
    return {
        name: str(task.teacher)
        for name, task in config.tasks.items()
        if task.guidance is not None and task.guidance.by == "teacher"
    }


def _guides(
    config: RunConfig, teachers: Mapping[str, CompactTeacher], vocabulary: int
) -> dict[str, Engine]:
    """An engine over the teacher's own weights for each task that it guides."""
    return {
        task: TransformersEngine(teachers[name].model, vocabulary=vocabulary)
        for task, name in _guiding(config).items()
        if name in teachers  # evaluation loads no teacher
    }


def _make_teacher(name: str, config: TeacherConfig, vocabulary: int) -> CompactTeacher:
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    teacher = TransformersTeacher(model.requires_grad_(False), vocabulary=vocabulary)
    return CompactTeacher(teacher, name=name)


def _write_config(folder: Path, config: RunConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


FREE_TO_CHANGE = ("run", "accept_changes", "cluster", "journal", "checkpoint", "evaluation")
"""Sections that may differ when a run goes on: they do not touch what is learned."""


def _refuse_other_config(folder: Path, config: RunConfig) -> None:
    path = folder / "config.yaml"
    made = path.is_file() and checkpoints.newest(folder / "checkpoints") is not None
    if not made or config.accept_changes:
        return
    old, new = yaml.safe_load(path.read_text(encoding="utf-8")), config.model_dump(mode="json")
    for key in new:
        if key not in FREE_TO_CHANGE and old.get(key) != new[key]:
            raise ConfigError(
                f"{path}: the run there was made with another {key!r} ({old.get(key)!r}, now"
                f" {new[key]!r}): choose another run folder, delete that one, or go on with"
                " accept_changes=true"
            )
