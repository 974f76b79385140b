"""The training loop.

for step, tasks in timetable:                # a function of (seed, step, history)
    placement.sync(learner)                  # rollouts use this version of the student
    episodes = ahead.next()                  # token-exact; failures are counted records
    lessons  = routing.teach(episodes)       # every episode's own teacher scores it
    metrics  = learner.update(lessons, objectives)
    timetable.record(step); journal.write(step, task, metrics)
    checkpoint / evaluate where due
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tutelage.distill import checkpoints
from tutelage.distill.assembly import (
    EVALUATION,
    check_rollout_engine,
    check_supports,
    check_teachers,
    learner_threads,
    make_learner,
    make_placement,
    make_timetable,
    task_rollouts,
)
from tutelage.distill.config import ConfigError, LearnerConfig, RunConfig, build_objective
from tutelage.distill.identity import Identity, digest_of
from tutelage.distill.journal import Journal
from tutelage.distill.learner import Course
from tutelage.distill.masks import special_ids
from tutelage.distill.measures import Clock, outcome_metrics, score_metrics, teacher_gap
from tutelage.distill.models import (
    check_vocabularies,
    load_tokenizer,
    prepare_process,
    student_tokenizer,
)
from tutelage.distill.routing import Routing
from tutelage.distill.teacher_engines import as_it_teaches
from tutelage.evaluation.evaluate import evaluate, law_of
from tutelage.scheduler.ahead import Ahead
from tutelage.scheduler.episodes import Dropped, Episode, Order, SamplingLaw
from tutelage.scheduler.policies import Step
from tutelage.scheduler.rollouts import EnvironmentPools
from tutelage.scheduler.watchdog import Watchdog


class Run:
    """Everything a run holds. Use as a context manager: what it starts, it stops.

    Args:
        config: the checked configuration.
        watch: told of progress (see Watcher); None: silent.
    """

    def __init__(self, config: RunConfig, *, watch: Watcher | None = None) -> None:
        self.config, self.watch = config, watch or Watcher()
        self.folder = Path(config.run)
        check_rollout_engine(config)
        self.vocabulary = check_vocabularies(config)
        prepare_process(learner_threads(config))
        self.tokenizer = load_tokenizer(student_tokenizer(config.student))
        check_teachers(config, self.tokenizer)
        self._courses = {
            name: Course(objective=build_objective(config.objective_of(name)), weight=task.weight)
            for name, task in config.tasks.items()
        }
        check_supports(self._courses, self.vocabulary)
        special = {
            name: special_ids(self.tokenizer, config.objective_of(name).mask_tokens)
            for name in config.tasks
        }
        self.timetable = make_timetable(config, self._courses)
        rollouts = task_rollouts(config)
        pools = EnvironmentPools(rollouts)
        try:
            if config.cluster is None:
                pools.open(rollouts)  # a bad id or option shows before a model loads
            self.learner = make_learner(config, self.vocabulary)
            try:
                self.placement = make_placement(
                    config, self.learner, self.tokenizer, self.vocabulary, pools
                )
            except BaseException:
                self.learner.close()
                raise
        except BaseException:
            pools.close()
            raise
        self.routing = Routing(config, self._courses, special, self.learner, self.placement)
        self.ahead = Ahead(
            self.timetable,
            self.placement,
            self._num_games,
            staleness=config.schedule.max_staleness,
        )
        self._games: dict[str, int | None] = {}
        self._best: tuple[float, int] | None = None  # (score, after how many steps)
        self._stop = self.stopped = False

    def stop(self) -> None:
        """Save after the current step and end `train` (from a signal handler, say)."""
        self._stop = True

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.placement.close()
        finally:
            self.learner.close()

    def train(self) -> None:
        """Train to the last step, from where the run folder left off."""
        config = self.config
        start, position = self._resume()
        _write_config(self.folder, config)
        for name, identity in self.routing.references.items():
            identity.write(self.folder / "teachers" / f"{name}.json")
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
                due = done % config.checkpoint.every == 0 or done == config.steps
                if config.evaluation.every and done % config.evaluation.every == 0:
                    scores = score_metrics(self.evaluate(config.evaluation.live_modes))
                    metrics |= scores
                    due |= self._is_best(done, scores)
                journal.write(step, "+".join(tasks), metrics)
                stop = self._stop  # read once: a signal may come at any time
                if due or stop:
                    self._save(done, journal)
                if stop and done < config.steps:
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
                    self._play,
                    law=law_of(mode, sampled),
                    episodes=self.config.evaluation.episodes,
                    num_games=self._num_games(name),
                    progress=partial(self.watch.evaluating, task, mode),
                )
                scores.setdefault(task, {"metric": self._metric(task)})[mode] = found
                self.watch.score(task, mode, found)
        return scores

    def _play(self, orders: Sequence[Order], law: SamplingLaw) -> list[Episode | Dropped]:
        return self.placement.finish(self.placement.start(orders, law=law))

    def _metric(self, task: str) -> str:
        return "pass@1" if self.config.rollout_of(task).max_turns == 1 else "success rate"

    def _step_or_save(self, step: int, tasks: Sequence[str], journal: Journal) -> dict[str, Any]:
        """A step; when it fails, what was learned before it is saved before the error rises."""
        try:
            return self._step(step, tasks, journal)
        except Exception as error:
            moved = not self.learner.whole or self.learner.version != len(self.timetable.history)
            if step and not moved and not self._saved(step):
                try:
                    self._save(step, journal)
                except Exception as another:  # it may need what just failed
                    error.add_note(f"Nor could it be saved since the last checkpoint: {another}")
            raise

    def _step(self, step: int, tasks: Sequence[str], journal: Journal) -> dict[str, Any]:
        """One update on one or several tasks; its line of metrics."""
        clock, timetable, version = Clock(), self.timetable, self.learner.version
        with clock.part("sync"):
            self.placement.sync(version)
        with clock.part("rollout"):
            outcomes = self.ahead.next()
        with clock.part("score"):
            taught = self.routing.teach(outcomes)
        turn = timetable.turn(tasks[0])
        with clock.part("update"):
            update = self.learner.update(
                taught.lessons,
                self._courses,
                seed=self.config.seed * 1_000_003 + turn,
                progress={task: timetable.progress(task) for task in tasks},
                diagnose=turn % self.config.journal.diagnostics_every == 0,
            )
        everything = [outcome for own in outcomes.values() for outcome in own]
        with clock.part("journal"):
            if step % self.config.journal.episodes_every == 0:
                journal.write_episodes(step, everything, taught.lessons, version)
        found = {
            task: outcome_metrics(outcomes[task], version) | update[task] | taught.ledger[task]
            for task in tasks
        }
        timetable.record(
            Step(
                active=timetable.active(),
                trained=tuple(tasks),
                tokens={task: found[task]["tokens/trained"] for task in tasks},
                gaps={task: teacher_gap(found[task]) for task in tasks},
            )
        )
        for task in tasks:
            self.watch.step(step, task, found[task])
        timings = clock.metrics(everything, taught.lessons) | taught.costs
        timings["perf/actors_replaced"] = float(self.placement.restarts)
        if len(tasks) == 1:
            return found[tasks[0]] | timings
        named = {f"{task}/{name}": v for task in tasks for name, v in found[task].items()}
        return named | timings

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

    def _saved(self, done: int) -> bool:
        newest = checkpoints.newest(self.folder / "checkpoints")
        return newest is not None and int(newest.name) == done

    def _save(self, done: int, journal: Journal) -> None:
        checkpoints.save(
            self.folder / "checkpoints",
            step=done,
            model=self.learner.copy,
            tokenizer=self.tokenizer,
            state={
                "step": done,
                "version": self.learner.version,
                "position": journal.position,
                "optimizer": self.learner.optimizer_state(),
                "teachers": {name: one.digest for name, one in self.routing.references.items()},
                "best": self._best,
                "history": [asdict(step) for step in self.timetable.history],
                "ahead": self.ahead.state(),
            },
            keep=self.config.checkpoint.keep,
            best=self._best[1] if self._best else None,
        )

    def _resume(self) -> tuple[int, int]:
        """(the first step to do, the bytes of metrics.jsonl that stand)."""
        _refuse_other_config(self.folder, self.config)
        found = checkpoints.load_newest(self.folder / "checkpoints", self.learner.copy)
        if found is None:
            return 0, 0
        checkpoint, state = found
        self.learner.restore(state["optimizer"], version=state["version"])
        self._refuse_other_teachers(checkpoint, state["teachers"])
        self._best = state["best"]
        history = [Step(**step) for step in state["history"]]
        self.timetable.restore(history)
        if not self.config.accept_changes:  # else what was planned may not fit any more
            self.timetable.restore(history, self.ahead.restore(state["ahead"], self.routing.sound))
        return state["step"], state["position"]

    def _refuse_other_teachers(self, checkpoint: Path, saved: Mapping[str, str]) -> None:
        """From here on a teacher is compared with the run's first exam, not with this session's."""
        if self.config.accept_changes:
            return
        for name, identity in self.routing.references.items():
            if identity.digest != saved.get(name):
                raise ConfigError(
                    f"teachers.{name}: {self.config.teachers[name].model!r} holds other weights"
                    f" than when {checkpoint} was saved: put the old ones back, choose another run"
                    " folder, or go on with accept_changes=true"
                )
            first = Identity.read(self.folder / "teachers" / f"{name}.json")
            if first is not None:
                identity.check_same(first)
                self.routing.references[name] = first


def evaluate_model(
    config: RunConfig, model: str | None, *, watch: Watcher | None = None
) -> dict[str, Any]:
    """Scores of a model (None: the configured student) on every task; loads no teacher."""
    if model is not None:
        student = config.student.model_copy(
            update={"model": model, "init": None, "tokenizer": None}
        )
        config = config.model_copy(update={"student": student})
    alone = {"teachers": {}, "learner": LearnerConfig()}
    with Run(config.model_copy(update=alone), watch=watch) as run:
        scores = run.evaluate(config.evaluation.modes)
    name = config.student.model
    return {
        "model": name or "student.init",
        "weights": None if name is None else digest_of(name),
        "scores": scores,
        "versions": _versions(),
    }


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


def _write_config(folder: Path, config: RunConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


FREE_TO_CHANGE = (
    "run",
    "accept_changes",
    "learner",
    "cluster",
    "journal",
    "checkpoint",
    "evaluation",
)
"""Sections that may differ when a run goes on: they do not touch what is learned. Other numbers of
processes or workers round otherwise: the run goes on, but not to the byte."""


def _refuse_other_config(folder: Path, config: RunConfig) -> None:
    path = folder / "config.yaml"
    made = path.is_file() and checkpoints.newest(folder / "checkpoints") is not None
    if not made or config.accept_changes:
        return
    old = as_it_teaches(yaml.safe_load(path.read_text(encoding="utf-8")))
    new = as_it_teaches(config.model_dump(mode="json"))
    for key in new:
        if key not in FREE_TO_CHANGE and old.get(key) != new[key]:
            raise ConfigError(
                f"{path}: the run there was made with another {key!r} ({old.get(key)!r}, now"
                f" {new[key]!r}): choose another run folder, delete that one, or go on with"
                " accept_changes=true"
            )
