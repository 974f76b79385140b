"""One learner over several processes of one machine: each has a part of every weight, of its
gradient and of the optimizer's state (FSDP2), and learns from a share of the lessons.

Rank 0 is the run's own process. It cuts each part of an update into shares of like size, and keeps
a whole copy of the weights for rollouts and checkpoints. Every rank runs the same `Learner`:
denominators, random draws, norms and the parts themselves are those of one process, so that the
loss is too, up to rounding. Collectives must meet: a rank with fewer micro-batches than another
does empty ones.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.sections import OptimizerConfig
from tutelage.distill.models.batches import pack
from tutelage.distill.models.loading import prepare_process
from tutelage.distill.models.student import Student
from tutelage.distill.student.learner import Learner
from tutelage.distill.student.muon import orthogonalized, precision
from tutelage.distill.student.ranks import split
from tutelage.envs.child import Child, Connection, Disconnected
from tutelage.scheduler.episodes import NO_ACTION, Row
from tutelage.scheduler.placement import LOAD_SECONDS

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds in which a rank that failed has ended, or has said why."""

EMPTY = Row(
    ids_T=np.zeros(2, dtype=np.int32),
    turns_T=np.array([NO_ACTION, 0], dtype=np.int32),
    behavior_logprobs_T=np.zeros(2, dtype=np.float32),
    branches_T=np.zeros(2, dtype=np.int32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every rank is made of. make_student: by rank, the same weights on the rank's device.
    timeout: seconds for one collective, and for a rank's start and answers. threads: of a rank."""

    make_student: Callable[[int], Student]
    processes: int
    timeout: float
    threads: int
    config: OptimizerConfig
    steps: int


def start(setup: Setup) -> Learner:
    """Rank 0's learner, and the processes of the others. Where one of them died, failed or did not
    answer in time, a RuntimeError names it, and from then on the learner is not `intact`.

    Raises:
        ConfigError: this torch cannot.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(
            f"learner.processes: {setup.processes} need a torch whose FSDP2 can sum gradients,"
            f" and {torch.__version__} only averages them: use a newer one (2.13 is tested)"
        )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    others = Others(setup)
    with others.watched("as they started"):
        others.send([(number, store.port, setup) for number in range(1, setup.processes)])
        student = setup.make_student(0)
        whole = student.replica()
        others.answers(LOAD_SECONDS)  # they have loaded theirs
    with others.watched("as they started"):
        _join(0, store, student, setup)
        learner = _learner(student, setup, whole=whole, others=others)
        others.answers()
    return learner


class Others:
    """The processes of the ranks from 1 on: started, called, explained and ended by rank 0."""

    def __init__(self, setup: Setup) -> None:
        self._timeout, self._begun = setup.timeout, time.monotonic()
        self._ranks = [
            Child("tutelage.distill.student.sharded:serve") for _ in range(1, setup.processes)
        ]

    @property
    def alive(self) -> bool:
        return bool(self._ranks)

    def send(self, messages: Sequence[Any]) -> None:
        """A message to each."""
        for rank, message in zip(self._ranks, messages, strict=True):
            rank.connection.send(message, timeout=self._timeout)

    def answers(self, timeout: float | None = None) -> list[Any]:
        """One of each."""
        return [_opened(rank, timeout or self._timeout) for rank in self._ranks]

    @contextlib.contextmanager
    def watched(self, where: str) -> Iterator[None]:
        """Whatever goes wrong inside ends them all; if that began with one of them, the error names
        it."""
        self._begun = time.monotonic()
        try:
            yield
        except BaseException as error:
            try:
                if isinstance(error, (RuntimeError, OSError)):
                    self._explain(where, error)
            finally:
                self.close()
            raise

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        if dist.is_initialized():
            dist.destroy_process_group()

    def _explain(self, where: str, error: Exception) -> None:
        """Raise what is at the bottom of an error that may be another rank's."""
        found = [(*_reason(rank, error), rank) for rank in self._ranks]
        _, reason, rank = min(found, key=lambda one: one[0])
        number = 1 + self._ranks.index(rank)
        if not reason and time.monotonic() - self._begun >= self._timeout:
            reason = f"did not answer within learner.timeout = {self._timeout:g} s"
        if reason:
            raise RuntimeError(
                f"learner rank {number} (process {rank.pid}) {reason}, {where}: run the"
                " same command again"
            ) from error


class Sharded:
    """A rank among several (see `Ranks`).

    Args:
        student: whole; its model is cut here.
        count: of the ranks.
        whole: on rank 0, a copy of the student that stays in one piece. others: the other ranks.
    """

    def __init__(
        self,
        student: Student,
        count: int,
        *,
        whole: Student | None = None,
        others: Others | None = None,
    ) -> None:
        self.count, self._student, self._whole, self._others = count, student, whole, others
        self._mesh: DeviceMesh = init_device_mesh(student.device.type, (count,))
        self._root: Any = _sharded(student.model, self._mesh)

    @property
    def whole(self) -> Student:
        if self._whole is None:
            raise RuntimeError("rank 0 alone has the student in one piece")
        return self._whole

    @property
    def alive(self) -> bool:
        return self._others is None or self._others.alive

    def call(self, learner: Learner, method: str, shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._others is None or not self._others.alive:
            raise RuntimeError("the learner's processes have ended: run the same command again")
        with self._others.watched(f"in {method}"):
            self._others.send([(method, share) for share in shares[1:]])
            alike: FloatingPointError | None = None
            try:
                mine = getattr(learner, method)(*shares[0])
            except FloatingPointError as error:  # all ranks raise it, and stand ready again
                alike = error
            answers = self._others.answers()
        if alike is not None:
            raise alike
        return [mine, *answers]

    def sums(self, values: Sequence[float]) -> Sequence[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def gathered(self, values: Sequence[float]) -> Sequence[float]:
        counts = [0.0] * self.count
        counts[dist.get_rank()] = float(len(values))
        counts = self._reduced(counts, dist.ReduceOp.SUM)
        before = int(sum(counts[: dist.get_rank()]))
        room = [0.0] * int(sum(counts))
        room[before : before + len(values)] = values
        return self._reduced(room, dist.ReduceOp.SUM)

    def each(self, items: Sequence[T], work: Callable[[T], None]) -> None:
        (most,) = self._reduced([len(items)], dist.ReduceOp.MAX)
        for item in items:
            work(item)
        for _ in range(int(most) - len(items)):
            nothing = self.inside(self._nothing)
            if torch.is_grad_enabled():
                nothing.backward()
        self._root.reshard()  # the weights outside the layers stay gathered between passes

    def inside(self, function: Callable[[], T]) -> T:
        found: T = self._root(function)
        return found

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor())

    def orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        """Each on one rank, whole: they share the work, and make of a matrix what one process makes
        of it."""
        shares = split([x.numel() * min(x.shape) for x in matrices], self.count)
        owners = {i: rank for rank, share in enumerate(shares) for i in share}
        own: dict[int, torch.Tensor] = {}
        for i, matrix in enumerate(matrices):
            whole = matrix.full_tensor()
            if owners[i] == dist.get_rank():
                own[i] = whole
        done = dict(zip(own, orthogonalized(list(own.values())), strict=True))
        return [
            self._part(done.get(i, _shape_of(matrix)), owners[i])
            for i, matrix in enumerate(matrices)
        ]

    def publish(self) -> None:
        for own, whole in self._weights():
            full = own.detach().full_tensor()
            if whole is not None:
                whole.detach().copy_(full)

    def joined(self, state: dict[str, Any]) -> dict[str, Any]:
        rank = dist.get_rank()

        def gathered(part: DTensor) -> torch.Tensor | None:
            full = part.full_tensor()
            return full.cpu() if rank == 0 else None

        found: dict[str, Any] = tree_map_only(DTensor, gathered, state)
        return found if rank == 0 else {}

    @torch.no_grad()
    def adopted(self, state: dict[str, Any]) -> dict[str, Any]:
        for own, whole in self._weights():
            source = torch.empty(own.shape, device="meta") if whole is None else whole
            own.to_local().copy_(self._part(source.to(own.dtype)).to_local())
        found: dict[str, Any] = tree_map_only(
            torch.Tensor, lambda x: self._part(x) if x.ndim else x, state
        )
        return found

    def close(self) -> None:
        if self._others is not None:
            self._others.close()

    def _weights(self) -> Iterator[tuple[Any, torch.Tensor | None]]:
        """What trains: this rank's part of it, and where it is whole on rank 0."""
        own = self._student.trainable()
        whole = [None] * len(own) if self._whole is None else self._whole.trainable()
        yield from zip(own, whole, strict=True)

    def _part(self, whole: torch.Tensor, owner: int = 0) -> DTensor:
        """This rank's part of the owner's tensor (elsewhere: of the meta device)."""
        device = self._student.device
        if whole.is_meta:
            whole = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        return distribute_tensor(
            whole.detach().to(device), self._mesh, [Shard(0)], src_data_rank=owner
        )

    def _nothing(self) -> torch.Tensor:
        """A pass that adds zero to every gradient."""
        (batch,) = pack([EMPTY], max_tokens=2, device=self._student.device)
        student = self._student.view(batch)
        return 0.0 * student.logprobs_at(batch.targets_N[:, None]).sum()

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=self._student.device)
        dist.all_reduce(totals, how)
        return list(totals.tolist())


def _shape_of(matrix: DTensor) -> torch.Tensor:
    """Of what comes of a matrix elsewhere."""
    return torch.empty(matrix.shape, dtype=precision(matrix.device), device="meta")


class _Failed(RuntimeError):
    """A rank told of an error that ended it: (the rank, the error in words)."""


def _opened(rank: Child, timeout: float) -> Any:
    fault, value = rank.connection.receive(timeout=timeout)
    if fault:
        raise _Failed(rank, fault)
    return value


def _reason(rank: Child, error: Exception) -> tuple[int, str]:
    """(its order among the suspects, what happened to a rank) behind an error here.

    First comes a rank that died in silence: the others' collectives fail because it is gone. Then
    one that told an error of its own, and after it RuntimeErrors, which may be such collectives'.
    Last, and with nothing to say: a rank that lives.
    """
    death = rank.ending(PATIENCE)
    fault = error.args[1] if isinstance(error, _Failed) and error.args[0] is rank else None
    with contextlib.suppress(Disconnected, TimeoutError):
        fault = fault or rank.connection.receive(timeout=0.1)[0]
    if fault:
        return (2 if fault.startswith("RuntimeError") else 1), f"failed ({fault})"
    return (3, "") if death is None else (0, f"ended ({death})")


class _Root(nn.Module):
    """All that an update does with a model is one forward to FSDP, which then has the weights
    ready: the layers' one after the other, embedding, last norm and head throughout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def _sharded(model: Any, mesh: DeviceMesh) -> Any:
    kinds = set(model._no_split_modules or ())
    for module in [module for module in model.modules() if type(module).__name__ in kinds]:
        fully_shard(module, mesh=mesh)
    root: Any = fully_shard(_Root(model), mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):  # a sum, by name: some torch's gloo takes AVG for one
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    root.set_reshard_after_backward(False, recurse=False)  # diagnostics ask the head afterwards
    return root


def _join(rank: int, store: Any, student: Student, setup: Setup) -> None:
    if student.device.type == "cuda":
        torch.cuda.set_device(student.device)
    dist.init_process_group(
        "nccl" if student.device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=setup.processes,
        timeout=timedelta(seconds=setup.timeout),
    )


def _learner(student: Student, setup: Setup, **on_rank_0: Any) -> Learner:
    ranks = Sharded(student, setup.processes, **on_rank_0)
    return Learner(student, config=setup.config, steps=setup.steps, ranks=ranks)


def serve(connection: Connection) -> None:
    """The life of a rank other than 0."""
    number, port, setup = connection.receive()
    try:
        prepare_process(setup.threads)
        student = setup.make_student(number)
        connection.send((None, None))
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        _join(number, store, student, setup)
        learner = _learner(student, setup)
        connection.send((None, None))
        for method, share in connection:
            try:
                connection.send((None, getattr(learner, method)(*share)))
            except FloatingPointError:
                connection.send((None, None))
    except Disconnected:
        raise
    except Exception as error:  # the others wait in a collective: they learn of it by our end
        if os.environ.get("TUTELAGE_TRACEBACK"):
            traceback.print_exc()
        connection.send((f"{type(error).__name__}: {' '.join(str(error).split())}", None))
        sys.exit(1)
