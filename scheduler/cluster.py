"""Runs rollout workers and teachers as Ray actors.

They are the same classes as in one process (placement.py); one line of the configuration decides.
Only this file and ray_start.py import Ray.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic

from tutelage.envs.errors import first_line
from tutelage.scheduler.columns import Column, columns, restored
from tutelage.scheduler.engine import Weights
from tutelage.scheduler.episodes import Dropped, Episode, Order, SamplingParams
from tutelage.scheduler.placement import LOAD_SECONDS, AnswerT, AskT, Service, Started
from tutelage.scheduler.ray_start import connected
from tutelage.scheduler.rollouts import RolloutWorker
from tutelage.scheduler.watchdog import Watchdog, sweep

LOOK = 10.0
"""Seconds of waiting between two looks whether any node is left, which ray.get does not notice."""

SLOW = 60.0
"""Seconds of waiting for a start after which a line on stderr says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Where actors run, how many, and how long one may take.

    address: see ray_start.connected. workers: how many rollout workers; each plays a fixed share of
    every step's episodes, so that one worker plays exactly what a run in one process does. threads:
    of torch in each actor. worker_resources, teacher_resources: what Ray reserves for each of them:
    CPU, GPU, or a name that nodes were started with. strategy: of the one placement group of all
    actors: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD; None: no group, each goes where there is
    room. wheel: this package, for nodes that lack it; what it depends on must be installed there.
    timeout: seconds that one step's rollouts or one scoring may take. attempts: how often a job is
    tried, each time on a fresh actor, before the run stops.
    """

    address: str
    workers: int
    threads: int
    worker_resources: Mapping[str, float]
    teacher_resources: Mapping[str, float]
    strategy: str | None
    wheel: str | None
    timeout: float
    attempts: int


class RayCluster(Generic[AskT, AnswerT]):
    """Rollout workers and teachers as Ray actors; the learner stays here.

    An actor that dies or overruns its deadline is killed and replaced, and its work is done again:
    what a worker plays follows from its orders and the weights, so the run is bit-identical to one
    without the fault.

    Args:
        make_worker: called in the actor, returns its RolloutWorker. make_teachers: by name, called
            in the actor.
        weights: the student's, as they are now.
        stalled: a folder for the stacks of actors that overran, or None.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        make_worker: Callable[[], RolloutWorker],
        make_teachers: Mapping[str, Callable[[], Service[AskT, AnswerT]]],
        weights: Callable[[], Weights],
        stalled: Path | None = None,
    ) -> None:
        import ray

        self._ray, self._weights, self._stalled = ray, weights, stalled
        self._timeout, self._attempts = settings.timeout, settings.attempts
        workers = settings.workers
        # (the student's weights in Ray's store, their version)
        self._loaded: tuple[Any, int | None] = None, None
        self._group: Any = None
        self._workers: list[_Member] = []
        self._teachers: dict[str, _Member] = {}
        self.restarts = 0
        self._connection = contextlib.ExitStack()
        if not ray.is_initialized():  # a program of the user's may have joined Ray itself
            with _unpacked(settings.wheel) as modules:
                self._connection.enter_context(
                    connected(settings.address, attempts=settings.attempts, modules=modules)
                )
        needs = [settings.worker_resources] * workers
        needs += [settings.teacher_resources] * len(make_teachers)
        makers: dict[str, Callable[[], object]] = {
            f"worker-{i}": make_worker for i in range(workers)
        }
        makers |= {f"teacher-{name}": make for name, make in make_teachers.items()}

        # A function: a lambda made in the loop below would see the loop's last name and maker.
        def member(name: str, make: Callable[[], object], options: dict[str, Any]) -> _Member:
            actor = ray.remote(_Actor).options(**options)
            deadline = 0.9 * settings.timeout  # its stack is written before it is killed
            dump = None if stalled is None else (str(stalled / f"{name}.txt"), deadline)
            return _Member(name, lambda: actor.remote(name, make, settings.threads, dump))

        try:
            places = self._places(needs, settings.strategy)
            members = [
                member(name, make, options)
                for (name, make), options in zip(makers.items(), places, strict=True)
            ]
            self._workers = members[:workers]
            self._teachers = dict(zip(make_teachers, members[workers:], strict=True))
            for one in members:  # all are started by now, and load at the same time
                self._await_start(one)
        except BaseException:
            self._end()
            raise

    def sync(self, version: int) -> None:
        if self._loaded[1] == version:
            return  # an evaluation right after a step: Ray's store has this version already
        # put once, for all workers
        self._loaded = self._ray.put(dict(self._weights())), version

    def start(self, orders: Sequence[Order], *, sampling: SamplingParams | None = None) -> Started:
        weights, version = self._loaded
        how = {"sampling": sampling, "version": version}
        shares = [orders[i :: len(self._workers)] for i in range(len(self._workers))]
        jobs = [
            _Job(worker, "play", (share,), how, {"weights": weights})
            for worker, share in zip(self._workers, shares, strict=True)
            if share
        ]
        return Started(partial(self._played, orders, [job.start() for job in jobs]))

    def _played(
        self, orders: Sequence[Order], running: Sequence[_Running]
    ) -> list[Episode | Dropped]:
        parts = self._finish(running)
        by_number = {outcome.order.number: outcome for part in parts for outcome in part}
        return [by_number[order.number] for order in orders]

    def num_episodes(self, task: str) -> int | None:
        (count,) = self._run([_Job(self._workers[0], "num_episodes", (task,))])
        return None if count is None else int(count)

    def score(self, asks: Sequence[AskT]) -> Sequence[AnswerT]:
        return self._run([_Job(self._teachers[ask.teacher], "answer", (ask,)) for ask in asks])

    def close(self) -> None:
        for worker in self._workers:
            # its environments' processes end in order; a dead or hung one is killed below
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._get(_Job(worker, "close").start().reference, 10.0)
        self._end()

    def _end(self) -> None:
        """Kill all actors and leave Ray, whatever they are doing."""
        with contextlib.suppress(self._ray.exceptions.RayError):  # there may be no Ray any more
            for one in (*self._workers, *self._teachers.values()):
                self._ray.kill(one.actor)
            if self._group is not None:
                self._ray.util.remove_placement_group(self._group)
        self._connection.close()
        if self._stalled is not None:
            # Killed actors did not sweep their own; files of other runs there are left alone.
            members = (*self._workers, *self._teachers.values())
            sweep([self._stalled / f"{one.name}.txt" for one in members])

    def _places(
        self, needs: Sequence[Mapping[str, float]], strategy: str | None
    ) -> list[dict[str, Any]]:
        """Ray's options for an actor with each of these needs.

        Raises:
            ValueError: no node of the cluster has as much of a resource.
        """
        # Ray itself would wait for ever for such a node: it might still join.
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for need in needs:
            if not any(all(node.get(k, 0) >= v for k, v in need.items()) for node in nodes):
                # Ray's own, such as node:10.0.0.1, have a colon
                have = [{k: v for k, v in node.items() if ":" not in k} for node in nodes]
                raise ValueError(
                    f"cluster: no node has {dict(need)}: the nodes have {have}; start Ray there"
                    " with --resources, or ask for less"
                )
        # Ray's num_cpus reserves and does not limit: `_Actor` limits torch's threads.
        options: list[dict[str, Any]] = [
            {
                # options of their own: under `resources` Ray refuses these two
                "num_cpus": need.get("CPU", 0),
                "num_gpus": need.get("GPU", 0),
                "resources": {k: v for k, v in need.items() if k not in ("CPU", "GPU")},
            }
            for need in needs
        ]
        if strategy is not None:
            from ray.util.placement_group import placement_group
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            self._group = placement_group([dict(need) for need in needs], strategy=strategy)
            self._await_group(needs, strategy)
            for i, option in enumerate(options):
                option["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=i
                )
        return options

    def _await_group(self, needs: Sequence[Mapping[str, float]], strategy: str) -> None:
        """Raises RuntimeError where the cluster has no room for the placement group."""
        what = f"a {strategy} placement of {[dict(need) for need in needs]}"
        try:
            self._get(self._group.ready(), LOAD_SECONDS, what=what)
        except self._ray.exceptions.GetTimeoutError:
            raise RuntimeError(
                f"cluster: {what} found no room in {LOAD_SECONDS:g} s: {self._room()}; ask for"
                " less, or set cluster.strategy to PACK"
            ) from None

    def _room(self) -> str:
        """What the cluster has left, for a message."""
        free = {k: v for k, v in self._ray.available_resources().items() if ":" not in k}
        return f"free now: {free}"

    def _run(self, jobs: Sequence[_Job]) -> list[Any]:
        return self._finish([job.start() for job in jobs])

    def _finish(self, running: Sequence[_Running]) -> list[Any]:
        """Every job's result, in order; jobs whose actor was lost are done again on a fresh one.

        Raises:
            RuntimeError: a job lost its actor at every attempt.
        """
        results: dict[int, Any] = {}
        waiting = dict(enumerate(running))
        for attempt in range(1, self._attempts + 1):
            # one deadline for all: they run at the same time
            deadline, lost = time.monotonic() + self._timeout, dict[int, Exception]()
            for i, one in waiting.items():
                try:
                    # At 0 Ray still returns what is there: a slow job does not fail those after it.
                    left = max(0.0, deadline - time.monotonic())
                    (results[i],) = restored(self._get(one.reference, left))
                except self._ray.exceptions.RayTaskError:
                    raise  # the actor's own code raised: on a fresh actor it would again
                except self._ray.exceptions.RayError as error:
                    lost[i] = error
            for i, fault in lost.items():
                job = waiting[i].job
                if attempt == self._attempts:
                    raise RuntimeError(
                        f"{job.member.name}: {job.method!r} failed on {attempt} actors, the last"
                        f" with {type(fault).__name__}: {first_line(fault)};"
                        " see cluster.timeout and the folder `stalled` in the run's"
                    ) from fault
                self._replace(waiting[i])
            if not lost:
                break
            waiting = {i: waiting[i].job.start() for i in lost}
        return [results[i] for i in range(len(running))]

    def _replace(self, lost: _Running) -> None:
        """Put a fresh actor in the lost one's place, unless another job has done so already."""
        member = lost.job.member
        if member.actor is not lost.actor:
            return  # several jobs were queued with the actor that died
        self._refill(member)
        self._await_start(member)

    def _refill(self, member: _Member) -> None:
        """Kill what may be left of a member's actor; another one begins to load."""
        self.restarts += 1
        self._ray.kill(member.actor)
        member.fill()

    def _await_start(self, member: _Member) -> None:
        """Wait until its actor is ready; one that is lost as it starts is replaced, too.

        Raises:
            RuntimeError: every attempt lost its actor.
        """
        for attempt in range(1, self._attempts + 1):
            try:
                self._get(member.ready, LOAD_SECONDS, what=member.name)
                return
            except self._ray.exceptions.RayTaskError:
                raise  # what it could not load, another actor could not either
            except self._ray.exceptions.RayError as error:
                if attempt == self._attempts:
                    raise RuntimeError(
                        f"{member.name}: {attempt} actors were lost as they started, the last with"
                        f" {type(error).__name__}: {first_line(error)}"
                    ) from error
            self._refill(member)

    def _get(self, reference: Any, timeout: float, *, what: str = "") -> Any:
        """Wait for a result. An error that the actor's own code raised is raised as itself. what:
        that is being started; a line on stderr says so when it takes long.

        Raises:
            RuntimeError: no node is left to wait for.
        """
        deadline, told = time.monotonic() + timeout, not what
        try:
            while (left := deadline - time.monotonic()) > LOOK:
                with contextlib.suppress(self._ray.exceptions.GetTimeoutError):
                    return self._ray.get(reference, timeout=LOOK)
                if not any(node["Alive"] for node in self._ray.nodes()):
                    raise RuntimeError(
                        "cluster: Ray has no node left (its raylet died): run the same command"
                        " again"
                    )
                if not told and left < timeout - SLOW:
                    told = True
                    said = f"{what} has not started in {SLOW:g} s, and is waited for"
                    print(f"tutelage: cluster: {said} ({self._room()})", file=sys.stderr)
            return self._ray.get(reference, timeout=max(0.0, left))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise cause.with_traceback(None) from None


@contextlib.contextmanager
def _unpacked(wheel: str | None) -> Iterator[list[str]]:
    """A wheel's packages, as folders for Ray's py_modules. Given the wheel itself, Ray would have
    pip install it on every node with all that it depends on, torch included.
    """
    if wheel is None:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        found = [p for p in Path(folder).iterdir() if p.is_dir() and p.suffix != ".dist-info"]
        yield [str(path) for path in found]


class _Member:
    """A worker or teacher by name, whose actor may have to be replaced."""

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self.name, self._start = name, start
        self.fill()

    def fill(self) -> None:
        """Start a new actor; it begins to load."""
        self.actor = self._start()
        self.ready = self.actor.ready.remote()


@dataclass(frozen=True, slots=True)
class _Job:
    """A call that can be repeated on another actor. stored: arguments that lie in Ray's store."""

    member: _Member
    method: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict)

    def start(self) -> _Running:
        actor, args = self.member.actor, columns(self.args)
        call = actor.call.remote(self.method, args, self.kwargs, **self.stored)
        return _Running(self, actor, call)


@dataclass(frozen=True, slots=True)
class _Running:
    """A job in progress. actor: that has it, which may not be the member's any more."""

    job: _Job
    actor: Any
    reference: Any


class _Actor:
    """Holds one worker or teacher inside an actor process.

    dump: (a file, seconds): where its stack is written when a call takes longer.
    """

    def __init__(
        self, name: str, make: Callable[[], object], threads: int, dump: tuple[str, float] | None
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self._name, self._make = name, make
        self._held: object = None
        self._watchdog = None
        with contextlib.suppress(OSError):  # the run folder may be on the learner's node alone
            self._watchdog = None if dump is None else Watchdog(Path(dump[0]), dump[1])

    def ready(self) -> int:
        """Load the model; returns the process id. Not in `__init__`, whose error would reach the
        learner as an actor's death, which is tried again.

        Raises:
            ValueError: the node lacks something; names the node.
        """
        if self._held is None:
            try:
                self._held = self._make()
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self._name} on node {platform.node()}: {error}; on Ray every node must find"
                    " models, and files of environments, under the paths that the config says:"
                    " put them on a shared disk or on each node, or name models by hub id"
                ) from error
        return os.getpid()

    def node(self) -> str:
        """Where it runs, as Ray names it."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def call(
        self, method: str, args: Column, kwargs: Mapping[str, Any], /, **stored: Any
    ) -> Column:
        """Call a method; its arguments and its result travel by columns."""
        if self._watchdog is not None:
            self._watchdog.watch()
        try:
            found = getattr(self._held, method)(*restored(args), **kwargs, **stored)
            return columns([found])
        finally:
            if self._watchdog is not None:
                self._watchdog.rest()
