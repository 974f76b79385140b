"""The training loop.

for step, tasks in timetable:                # a function of (seed, step, history)
    placement.sync(version)                  # rollouts use this version of the student
    episodes = prefetch.next()               # token-exact; failures are counted records
    batch    = routing.batch(episodes)       # every episode is scored by its own teacher
    metrics  = learner.update(batch, objectives)
    timetable.record(step)                   # later steps may depend on what this one did
    evaluate where due; write the line of metrics; save a checkpoint where due
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

from tutelage.distill.config.resolved import check_supports, rollouts_of
from tutelage.distill.config.run import RunConfig
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
from tutelage.distill.run.assembly import make_placement
from tutelage.distill.run.lock import Lock
from tutelage.distill.run.measures import Clock, outcome_metrics, step_line, teacher_gap
from tutelage.distill.run.observers import Observer, make_observers
from tutelage.distill.run.preflight import (
    check_folder,
    check_machine,
    check_room,
    open_all,
)
from tutelage.distill.run.record import Record
from tutelage.distill.run.resume import refuse_changes
from tutelage.distill.run.routing import Routing
from tutelage.distill.student.build import learner_threads, make_learner
from tutelage.distill.student.examples import TaskObjective
from tutelage.distill.student.masks import special_ids
from tutelage.distill.teachers.build import check_teachers
from tutelage.distill.teachers.fingerprint import digest_of
from tutelage.evaluation import run_folder
from tutelage.evaluation.evaluate import evaluate_tasks, record, score_metrics
from tutelage.evaluation.files import write_json
from tutelage.scheduler.episodes import Dropped, Episode, Order, SamplingParams
from tutelage.scheduler.policies import Step
from tutelage.scheduler.prefetch import Prefetch
from tutelage.scheduler.rollouts import EnvironmentPools
from tutelage.scheduler.watchdog import Watchdog


class Stopped(Exception):
    """The user asked to stop, and what was being done can be done again."""


class Run:
    """Everything a run holds. Use as a context manager: what it starts, it stops.

    Args:
        config: the checked configuration.
        watch: the observer that `console` in journal.observers stands for; None: there is none.
        trains: the run locks its folder until it is closed. False: only `evaluate` is called, and
            another process may train there meanwhile.
    """

    def __init__(
        self, config: RunConfig, *, watch: Observer | None = None, trains: bool = True
    ) -> None:
        self.config = as_begun(config)  # resumed another day, prompts show the first day's date
        self.tasks, self.folder = config.resolve(), Path(config.run)
        self._stop = self.stopped = False
        with ExitStack() as stack:
            if trains:
                self._take_folder(stack)
            self.observers = make_observers(config, watch, trains=trains)
            stack.callback(self.observers.close)
            self._check()
            self._load(stack)
            self._stack = stack.pop_all()  # nothing failed: `__exit__` closes it, not this block

    def _take_folder(self, stack: ExitStack) -> None:
        """Lock the run folder; refuse one in which this configuration may not start or resume."""
        check_folder(self.config)  # before the lock, which writes a file there
        stack.callback(Lock(self.folder).release)
        checkpoints.tidy(self.folder / run_folder.CHECKPOINTS)
        refuse_changes(self.folder, self.config, self.tasks)
        check_room(self.config)

    def _check(self) -> None:
        """Find what is wrong with the configuration before a model loads."""
        config, tasks = self.config, self.tasks
        check_machine(config)
        check_rollout_engine(config)
        self.vocabulary = check_vocabularies(config)
        prepare_process(learner_threads(config))
        self.tokenizer = load_tokenizer(student_tokenizer(config.student))
        config = self.config = dated(config, self.tokenizer)
        check_conversations(config, tasks, self.tokenizer)
        check_teachers(config, tasks, self.tokenizer)
        self._task_objectives = {
            name: TaskObjective(objective=task.objective, weight=task.weight)
            for name, task in tasks.items()
        }
        check_supports(tasks, self.vocabulary)
        self._special = {
            name: special_ids(self.tokenizer, task.mask_tokens) for name, task in tasks.items()
        }
        self.timetable = config.timetable(tasks)

    def _load(self, stack: ExitStack) -> None:
        """Start and load, the cheapest first. The stack stops what was started, the last first."""
        config, tasks = self.config, self.tasks
        rollouts = rollouts_of(tasks)
        pools = EnvironmentPools(rollouts)
        stack.callback(pools.close)
        if config.cluster is None or config.cluster.address == "local":
            open_all(rollouts, pools)  # a bad id or option shows before a model loads
        if config.cluster is not None:
            pools.close()  # the workers have their own
        self.observers.doing(f"loading {config.student.model or 'student.init'}")
        self.learner = make_learner(config, self.vocabulary)
        stack.callback(self.learner.close)
        if config.cluster is not None:
            self.observers.doing("starting workers and teachers on Ray")
        elif config.teachers:
            self.observers.doing(f"loading teachers: {', '.join(config.teachers)}")
        self.placement = make_placement(
            config, tasks, self.learner, self.tokenizer, self.vocabulary, pools
        )
        stack.callback(self.placement.close)
        # on Ray every question is a message to a worker, which may be busy playing
        self.num_games = cache(self.placement.num_episodes)
        self.routing = Routing(
            tasks,
            self._special,
            self.learner,
            self.placement,
            config.teachers,
        )
        self.prefetch = Prefetch(
            self.timetable,
            self.placement.start,
            self.num_games,
            staleness=config.schedule.max_staleness,
        )
        self.record = Record(
            config,
            tokenizer=self.tokenizer,
            learner=self.learner,
            timetable=self.timetable,
            routing=self.routing,
            prefetch=self.prefetch,
            observers=self.observers,
        )

    def stop(self) -> None:
        """Save after the current step and end `train` (from a signal handler, say). An evaluation
        under way is given up: it starts anew when the run resumes."""
        self._stop = True  # no more than this: a signal handler may interrupt any line

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def train(self) -> None:
        """Train to the last step, from where the run folder left off.

        Whatever ends it, the steps since the last checkpoint are saved, unless an update was cut
        off in its middle; the error's note says what is saved, and where.
        """
        stall = self.folder / run_folder.STALLED / "learner.txt", self.config.journal.stall
        with (
            closing(Watchdog(*stall)) as watchdog,
            self.record.open(stopping=lambda: self._stop) as start,
        ):
            try:
                self.observers.start(self.config, start)
                self._conclude()  # the last session may have ended between a step and its line
                for step, tasks in self.timetable.walk():
                    self._stop_if_asked()
                    watchdog.watch()
                    self._step(step, tasks)
                    self._conclude()
                if self.config.evaluation.final:
                    self._stop_if_asked()
                    watchdog.watch()
                    scores = self.evaluate(self.config.evaluation.modes)
                    write_json(self.folder / run_folder.SCORES, scores)
            except Stopped:
                self.record.save_rest()
                self.stopped = True

    def _stop_if_asked(self) -> None:
        if self._stop:
            raise Stopped

    def _conclude(self) -> None:
        """Do what is due after an update: evaluate, write the step's line, save a checkpoint."""
        if self.record.pending is None:
            return
        done, scores = self.record.pending[0] + 1, dict[str, float]()
        if self.config.evaluation.due(done):
            scores = score_metrics(self.evaluate(self.config.evaluation.live_modes))
        self.record.write(scores)

    def evaluate(self, modes: Sequence[str]) -> dict[str, Any]:
        """Scores of the student as it is now, by task and mode."""
        self.placement.sync(self.learner.version)
        return evaluate_tasks(
            {name: task.evaluation for name, task in self.tasks.items()},
            self._play,
            modes=modes,
            episodes=self.config.evaluation.episodes,
            num_games=self.num_games,
            progress=self._evaluating,
            scored=self.observers.score,
        )

    def _evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        self.observers.evaluating(task, mode, done, total)
        if 0 < done < total:  # at the end the score is as good as there
            self._stop_if_asked()

    def _play(self, orders: Sequence[Order], sampling: SamplingParams) -> list[Episode | Dropped]:
        return self.placement.start(orders, sampling=sampling).outcomes()

    def _step(self, step: int, tasks: Sequence[str]) -> None:
        """One update on one or several tasks. All that is likely to fail comes before the update,
        so that the step can be repeated; the record holds its metrics as `pending` right after."""
        clock, timetable, version = Clock(), self.timetable, self.learner.version
        with clock.part("sync"):
            self.placement.sync(version)
        now = f"step {step + 1} of {self.config.steps}"
        orders = ", ".join(f"{self.config.tasks[task].episodes} of {task}" for task in tasks)
        self.observers.doing(f"{now}: the student plays episodes, {orders}")
        with clock.part("rollout"):
            played = self.prefetch.next()
        self.observers.doing(f"{now}: teachers score them")
        with clock.part("score"):
            outcomes = self.routing.complete(played)
            batch = self.routing.batch(outcomes)
        everything = [outcome for own in outcomes.values() for outcome in own]
        with clock.part("journal"):  # before the update: a full disk must not follow a learned step
            if step % self.config.journal.episodes_every == 0:
                self.record.journal.write_episodes(step, everything, batch.examples, version)
        # A task's own count of steps, not the run's: what else the run trains changes no draw.
        turn = timetable.turn(tasks[0])
        self.observers.doing(f"{now}: the student learns from them")
        with clock.part("update"):
            update = self.learner.update(
                batch.examples,
                self._task_objectives,
                seed=self.config.seed * 1_000_003 + turn,  # apart for every seed and turn
                progress={task: timetable.progress(task) for task in tasks},
                diagnose=turn % self.config.journal.diagnostics_every == 0,
            )
        found = {
            task: outcome_metrics(outcomes[task], version) | update[task] | batch.ledger[task]
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
        timings = clock.metrics(everything, batch.examples) | batch.costs
        timings["perf/actors_replaced"] = float(self.placement.restarts)
        if self.observers.failed:
            timings["perf/observers_failed"] = self.observers.failed
        self.record.pending = step, *step_line(found, timings)
        for task in tasks:
            self.observers.step(step, task, found[task])


def evaluate_model(
    config: RunConfig, model: str | None, *, watch: Observer | None = None
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
        # before the games: a run that is training may delete the checkpoint while they are played
        weights = None if name is None else digest_of(name)
        scores = run.evaluate(config.evaluation.modes)
        date = run.config.date
    return record(name or "student.init", weights, scores, date)
