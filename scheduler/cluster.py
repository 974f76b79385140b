"""Where workers and teachers run: in this process, or as Ray actors.

The same classes either way, chosen by one line of configuration. The only module that imports Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tutelage.scheduler.episodes import Dropped, Episode, Order, Row, SamplingLaw
from tutelage.scheduler.rollouts import RolloutWorker


class Placement(Protocol):
    """The learner's view of everything that is not the learner."""

    def sync(self, version: int) -> None:
        """From here on, rollouts use this version of the student."""

    def collect(
        self, orders: Sequence[Order], *, law: SamplingLaw | None = None
    ) -> list[Episode | Dropped]:
        """Play the orders; outcomes in the orders' order."""

    def num_episodes(self, task: str) -> int | None:
        """How many distinct games the task has; None: its environment does not say."""

    def score(self, teacher: str, rows: Sequence[Row], **wanted: Any) -> list[Any]:
        """A teacher's scores of rows; `wanted` is what its `score` takes."""

    def close(self) -> None:
        """Stop every process that was started."""


class InProcess:
    """Everything here: rollouts share the learner's weights, teachers answer by call."""

    def __init__(self, worker: RolloutWorker, teachers: Mapping[str, Any]) -> None:
        self._worker, self._teachers = worker, dict(teachers)

    def sync(self, version: int) -> None:
        self._worker.load(None, version)

    def collect(
        self, orders: Sequence[Order], *, law: SamplingLaw | None = None
    ) -> list[Episode | Dropped]:
        return self._worker.collect(orders, law=law)

    def num_episodes(self, task: str) -> int | None:
        return self._worker.num_episodes(task)

    def score(self, teacher: str, rows: Sequence[Row], **wanted: Any) -> list[Any]:
        scores: list[Any] = self._teachers[teacher].score(rows, **wanted)
        return scores

    def close(self) -> None:
        self._worker.close()


class RayCluster:
    """Rollout workers and teachers as Ray actors; the learner stays here.

    Args:
        address: `local` starts Ray on this machine; `auto` or `ray://...` joins a running cluster.
        workers: rollout workers. Each plays a fixed share of every step's episodes, so one worker
            plays exactly what an in-process run does.
        threads: of torch in each actor.
        make_worker: called in the actor, returns its RolloutWorker. make_teachers: by name, called
            in the actor.
        weights: the student's current weights by name, as arrays.
        timeout: seconds that one step's rollouts or one scoring may take.
    """

    def __init__(
        self,
        *,
        address: str,
        workers: int,
        threads: int,
        make_worker: Callable[[], RolloutWorker],
        make_teachers: Mapping[str, Callable[[], Any]],
        weights: Callable[[], Mapping[str, Any]],
        timeout: float = 3600.0,
    ) -> None:
        import ray

        self._ray, self._weights, self._timeout = ray, weights, timeout
        self._version: int | None = None
        self._owned = not ray.is_initialized()
        if self._owned:
            ray.init(
                address=None if address == "local" else address,
                include_dashboard=False,
                log_to_driver=True,
                configure_logging=False,
            )
        actor = ray.remote(num_cpus=0)(
            _Actor
        )  # threads are limited by hand: Ray's CPU counts are no limit
        self._workers = [actor.remote(make_worker, threads) for _ in range(workers)]
        self._teachers = {name: actor.remote(make, threads) for name, make in make_teachers.items()}
        self._get([a.ready.remote() for a in (*self._workers, *self._teachers.values())])

    def sync(self, version: int) -> None:
        if version == self._version:  # an evaluation after a step: they have it
            return
        self._version = version
        weights = self._ray.put(dict(self._weights()))
        self._get([worker.call.remote("load", weights, version) for worker in self._workers])

    def collect(
        self, orders: Sequence[Order], *, law: SamplingLaw | None = None
    ) -> list[Episode | Dropped]:
        shares = [orders[i :: len(self._workers)] for i in range(len(self._workers))]
        parts = self._get(
            [
                worker.call.remote("collect", share, law=law)
                for worker, share in zip(self._workers, shares, strict=True)
            ]
        )
        by_number = {outcome.order.number: outcome for part in parts for outcome in part}
        return [by_number[order.number] for order in orders]

    def num_episodes(self, task: str) -> int | None:
        (count,) = self._get([self._workers[0].call.remote("num_episodes", task)])
        return None if count is None else int(count)

    def score(self, teacher: str, rows: Sequence[Row], **wanted: Any) -> list[Any]:
        (scores,) = self._get([self._teachers[teacher].call.remote("score", rows, **wanted)])
        return list(scores)

    def close(self) -> None:
        for worker in self._workers:
            self._get([worker.call.remote("close")])
        for actor in (*self._workers, *self._teachers.values()):
            self._ray.kill(actor)
        if self._owned:
            self._ray.shutdown()

    def _get(self, references: Sequence[Any]) -> list[Any]:
        """Results, within the deadline; an actor's error is raised as itself."""
        try:
            return list(self._ray.get(list(references), timeout=self._timeout))
        except self._ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None


class _Actor:
    """Holds one worker or teacher inside an actor process."""

    def __init__(self, make: Callable[[], Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._held = make()

    def ready(self) -> bool:
        return True

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._held, method)(*args, **kwargs)
