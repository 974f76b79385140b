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

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig, build_objective
from tutelage.distill.config.sections import LearnerConfig
from tutelage.distill.engines.build import check_rollout_engine
from tutelage.distill.models.conversations import as_begun, check_conversations, dated
from tutelage.distill.models.loading import (
    check_vocabularies,
    load_tokenizer,
    prepare_process,
    student_tokenizer,
)
from tutelage.distill.run import checkpoints
from tutelage.distill.run.assembly import (
    EVALUATION,
    check_room,
    check_supports,
    make_placement,
    make_timetable,
    task_rollouts,
)
from tutelage.distill.run.curves import plain
from tutelage.distill.run.journal import Journal
from tutelage.distill.run.lock import Lock
from tutelage.distill.run.measures import Clock, outcome_metrics, teacher_gap
from tutelage.distill.run.preflight import check_folder, check_machine, open_all
from tutelage.distill.run.resume import refuse_changes, write_config
from tutelage.distill.run.routing import Routing
from tutelage.distill.run.watcher import Watcher
from tutelage.distill.student.build import learner_threads, make_learner
from tutelage.distill.student.lessons import Course
from tutelage.distill.student.masks import special_ids
from tutelage.distill.teachers.build import check_teachers
from tutelage.distill.teachers.identity import Identity, digest_of, student_digest
from tutelage.evaluation import run_folder
from tutelage.evaluation.evaluate import evaluate, law_of, score_metrics, versions
from tutelage.evaluation.files import write_json
from tutelage.scheduler.ahead import Ahead
from tutelage.scheduler.episodes import Dropped, Episode, Order, SamplingLaw
from tutelage.scheduler.policies import Step
from tutelage.scheduler.rollouts import EnvironmentPools
from tutelage.scheduler.watchdog import Watchdog

NEEDED = ("step", "version", "position", "optimizer", "teachers", "best", "history", "ahead")
"""Of a checkpoint's state."""


class Stopped(Exception):
    """Somebody asked to stop, and what was being done can be done again."""


class Run:
    """Everything a run holds. Use as a context manager: what it starts, it stops.

    Args:
        config: the checked configuration.
        watch: told of progress (see Watcher); None: silent.
        trains: the run folder is this run's until it is closed. False: only `evaluate` is called,
            and whoever trains there may go on.
    """

    def __init__(
        self, config: RunConfig, *, watch: Watcher | None = None, trains: bool = True
    ) -> None:
        config = as_begun(config)
        self.config, self.watch = config, watch or Watcher()
        self.folder = Path(config.run)
        if trains:
            check_folder(config)
        self._lock = Lock(self.folder) if trains else None
        try:
            if trains:
                checkpoints.tidy(self._checkpoints)
                refuse_changes(self.folder, config)
                check_room(config)
            self._open()
        except BaseException:
            self._release()
            raise
        self._games: dict[str, int | None] = {}
        self._best: tuple[float, int] | None = None  # (score, after how many steps)
        # (a step, its tasks, their metrics): learned, and neither evaluated nor written
        self._pending: tuple[int, str, dict[str, Any]] | None = None
        self._stop = self.stopped = False

    def _open(self) -> None:
        """Check, then load, the cheapest first."""
        config = self.config
        check_machine(config)
        check_rollout_engine(config)
        self.vocabulary = check_vocabularies(config)
        prepare_process(learner_threads(config))
        self.tokenizer = load_tokenizer(student_tokenizer(config.student))
        config = self.config = dated(config, self.tokenizer)
        check_conversations(config, self.tokenizer)
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
            if config.cluster is None or config.cluster.address == "local":
                open_all(config, pools)  # a bad id or option shows before a model loads
            if config.cluster is not None:
                pools.close()  # the workers have their own
            self.watch.doing(f"loading {config.student.model or 'student.init'}")
            self.learner = make_learner(config, self.vocabulary)
            try:
                if config.cluster is not None:
                    self.watch.doing("starting workers and teachers on Ray")
                elif config.teachers:
                    self.watch.doing(f"loading teachers: {', '.join(config.teachers)}")
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

    def stop(self) -> None:
        """Save after the current step and end `train` (from a signal handler, say). An evaluation
        is left: it is made anew when the run goes on."""
        self._stop = True

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.placement.close()
        finally:
            try:
                self.learner.close()
            finally:
                self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def train(self) -> None:
        """Train to the last step, from where the run folder left off.

        Whatever ends it, what was learned is saved where it is whole; the error says where.
        """
        config = self.config
        start, position = self._resume()
        write_config(self.folder, config, step=start)
        for name, identity in self.routing.references.items():
            identity.write(self.folder / "teachers" / f"{name}.json")
        journal = Journal(
            self.folder,
            start=start if self._pending is None else start - 1,
            position=position,
            tensorboard=config.journal.tensorboard,
        )
        watchdog = Watchdog(self.folder / "stalled" / "learner.txt", config.journal.stall)
        try:
            with self._saving(journal):
                self.watch.start(config, start)
                self._conclude(journal)
                for step, tasks in self.timetable.walk():
                    if self._stop:
                        raise Stopped
                    watchdog.watch()
                    self._step(step, tasks, journal)
                    self._conclude(journal)
                if config.evaluation.final:
                    if self._stop:
                        raise Stopped
                    watchdog.watch()
                    scores = self.evaluate(config.evaluation.modes)
                    write_json(self.folder / "eval.json", scores)
        finally:
            watchdog.close()
            journal.close()

    def _conclude(self, journal: Journal) -> None:
        """What is due after a step that is learned: evaluation, its line, a checkpoint."""
        if self._pending is None:
            return
        step, tasks, metrics = self._pending
        done, scores = step + 1, dict[str, float]()
        if self.config.evaluation.every and done % self.config.evaluation.every == 0:
            scores = score_metrics(self.evaluate(self.config.evaluation.live_modes))
        journal.write(step, tasks, metrics | scores)
        self._pending = None
        best = bool(scores) and self._is_best(done, scores)
        if best or done % self.config.checkpoint.every == 0 or done == self.config.steps:
            self._save(done, journal)

    @contextmanager
    def _saving(self, journal: Journal) -> Iterator[None]:
        """Whatever ends the run inside, the steps since the last checkpoint are saved if they can
        be: not in the middle of an update, nor when Ctrl-C came again."""
        try:
            try:
                yield
            except Stopped:
                self._save_rest(journal)
                self.stopped = True
        except (Exception, KeyboardInterrupt) as error:
            again = isinstance(error, KeyboardInterrupt) and self._stop
            if not again and not isinstance(error, checkpoints.SaveError):
                try:
                    self._save_rest(journal)
                except Exception as another:  # it may need what just failed
                    error.add_note(f"Nor could it be saved since the last checkpoint: {another}")
            error.add_note(self.standing())
            raise

    def _save_rest(self, journal: Journal) -> None:
        """Save what was learned since the last checkpoint, unless an update was cut off."""
        done = len(self.timetable.history)
        whole = self.learner.whole and self.learner.version == done
        newest = run_folder.newest(self._checkpoints)
        if done and whole and (newest is None or int(newest.name) != done):
            self._save(done, journal)

    def standing(self) -> str:
        """What of this run is on the disk, in one line."""
        newest, done = run_folder.newest(self._checkpoints), len(self.timetable.history)
        lost = max(0, done - (int(newest.name) if newest else 0))
        steps = f"{lost} step{'s' * (lost != 1)}"
        if newest is None:
            said = f"no checkpoint yet: {steps} lost" if lost else "nothing was learned yet"
            return f"{self.folder}: {said}; the same command begins anew"
        said = f"; what came after it is lost, {steps}" if lost else ""
        return f"saved as {newest}{said}; the same command goes on from there"

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
                    progress=partial(self._evaluating, task, mode),
                )
                scores.setdefault(task, {"metric": self._metric(task)})[mode] = found
                self.watch.score(task, mode, found)
        return scores

    def _evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        self.watch.evaluating(task, mode, done, total)
        if self._stop and 0 < done < total:
            raise Stopped

    def _play(self, orders: Sequence[Order], law: SamplingLaw) -> list[Episode | Dropped]:
        return self.placement.finish(self.placement.start(orders, law=law))

    def _metric(self, task: str) -> str:
        return "pass@1" if self.config.rollout_of(task).max_turns == 1 else "success rate"

    def _step(self, step: int, tasks: Sequence[str], journal: Journal) -> None:
        """One update on one or several tasks. What may fail comes before it, so that the step can
        be done again; what comes of it is `_pending` at once."""
        clock, timetable, version = Clock(), self.timetable, self.learner.version
        with clock.part("sync"):
            self.placement.sync(version)
        told = f"step {step + 1} of {self.config.steps}"
        orders = ", ".join(f"{self.config.tasks[task].episodes} of {task}" for task in tasks)
        self.watch.doing(f"{told}: the student plays episodes, {orders}")
        with clock.part("rollout"):
            played = self.ahead.next()
        self.watch.doing(f"{told}: teachers score them")
        with clock.part("score"):
            outcomes = self.routing.complete(played)
            taught = self.routing.teach(outcomes)
        everything = [outcome for own in outcomes.values() for outcome in own]
        with clock.part("journal"):
            if step % self.config.journal.episodes_every == 0:
                journal.write_episodes(step, everything, taught.lessons, version)
        turn = timetable.turn(tasks[0])
        self.watch.doing(f"{told}: the student learns from them")
        with clock.part("update"):
            update = self.learner.update(
                taught.lessons,
                self._courses,
                seed=self.config.seed * 1_000_003 + turn,
                progress={task: timetable.progress(task) for task in tasks},
                diagnose=turn % self.config.journal.diagnostics_every == 0,
            )
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
        timings = clock.metrics(everything, taught.lessons) | taught.costs
        timings["perf/actors_replaced"] = float(self.placement.restarts)
        named = {f"{task}/{name}": v for task in tasks for name, v in found[task].items()}
        line = found[tasks[0]] if len(tasks) == 1 else named
        self._pending = step, "+".join(tasks), line | timings
        for task in tasks:
            self.watch.step(step, task, found[task])

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
            self._checkpoints,
            step=done,
            model=self.learner.copy,
            tokenizer=self.tokenizer,
            state={
                "step": done,
                "version": self.learner.version,
                "position": journal.position,
                "optimizer": self.learner.optimizer_state(),
                "teachers": {name: one.digest for name, one in self.routing.references.items()},
                "student": student_digest(self.config.student.model, self.tokenizer),
                "best": self._best,
                "history": [asdict(step) for step in self.timetable.history],
                "ahead": self.ahead.state(),
                "pending": json.dumps(self._pending, default=plain),
            },
            keep=self.config.checkpoint.keep,
            best=self._best[1] if self._best else None,
        )

    def _resume(self) -> tuple[int, int]:
        """(the first step to do, the bytes of metrics.jsonl that stand)."""
        found = checkpoints.load_newest(self._checkpoints, self.learner.copy)
        if found is None:
            return 0, 0
        checkpoint, state = found
        if missing := [key for key in NEEDED if key not in state]:
            raise RuntimeError(
                f"{checkpoint}: its {run_folder.STATE} has no {missing[0]!r}: another version of"
                " tutelage saved it; go on with that one, or choose another run folder"
            )
        optimizer = state["optimizer"]
        if not self.learner.optimizer.fits(optimizer):  # a change that was accepted
            warnings.warn(
                f"optimizer: what {checkpoint} keeps is another one's: this one begins anew",
                stacklevel=2,
            )
            optimizer = self.learner.optimizer_state()
        self.learner.restore(optimizer, version=state["version"])
        self._refuse_other_student(checkpoint, state.get("student"))
        self._refuse_other_teachers(checkpoint, state["teachers"])
        self._best, self._pending = state["best"], json.loads(state.get("pending", "null"))
        history = [Step(**step) for step in state["history"]]
        self.timetable.restore(history)
        if not self.config.accept_changes:  # else what was planned may not fit any more
            self.timetable.restore(history, self.ahead.restore(state["ahead"], self.routing.sound))
        return state["step"], state["position"]

    def _refuse_other_student(self, checkpoint: Path, saved: str | None) -> None:
        """Its weights are in the checkpoint; what they are computed with lies where it began."""
        found = student_digest(self.config.student.model, self.tokenizer)
        if saved not in (None, found) and not self.config.accept_changes:
            where = self.config.student.model or self.config.student.tokenizer
            raise ConfigError(
                f"student: {where!r} has another config.json, vocabulary or template than when"
                f" {checkpoint} was saved: put the old ones back (the checkpoint has copies),"
                " choose another run folder, or go on with accept_changes=true"
            )

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
    name = config.student.model
    with Run(config.model_copy(update=alone), watch=watch, trains=False) as run:
        # now: a run that goes on may have deleted the checkpoint when all is played
        weights = None if name is None else digest_of(name)
        scores = run.evaluate(config.evaluation.modes)
        date = run.config.date
    return {
        "model": name or "student.init",
        "weights": weights,
        "scores": scores,
        **({} if date is None else {"date": date.isoformat()}),
        "versions": versions(),
    }
