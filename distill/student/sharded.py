"""One learner over several processes of one machine: each has a part of every weight, of its
gradient and of the optimizer's state (FSDP2), and learns from a share of the training examples.

Rank 0 is the run's own process. It cuts each part of an update into shares of about the same size,
and keeps a whole copy of the weights for rollouts and checkpoints. Every rank runs the same
`Learner`. Denominators, random draws, norms and the parts themselves are those of one process, so
that the loss is the same up to rounding. Every rank must take part in every collective: one with
fewer micro-batches than another does empty ones.
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
from tutelage.distill.models.decoders import TransformersDecoder
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
"""Seconds that a failed rank has to end or to send its error."""

# Two tokens, the second an action: a pass over it uses every weight, as a real one does.
EMPTY = Row(
    ids_T=np.zeros(2, dtype=np.int32),
    turns_T=np.array([NO_ACTION, 0], dtype=np.int32),
    behavior_logprobs_T=np.zeros(2, dtype=np.float32),
    branches_T=np.zeros(2, dtype=np.int32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every rank is built from. make_student: from a rank's number, the same weights on that
    rank's device. timeout: seconds for one collective, and for a rank's start and answers. threads:
    of torch in a rank."""

    make_student: Callable[[int], Student]
    processes: int
    timeout: float
    threads: int
    config: OptimizerConfig
    steps: int


def start(setup: Setup) -> Learner:
    """Start the other ranks' processes; return rank 0's learner. When another rank dies, fails or
    does not answer in time, a RuntimeError names it, and the learner is no longer `intact`.

    Raises:
        ConfigError: this torch cannot sum gradients.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(
            f"learner.processes: {setup.processes} need a torch whose FSDP2 can sum gradients,"
            f" and {torch.__version__} only averages them: use a newer one (2.13 is tested)"
        )
    # Port 0: the system picks a free one, which the ranks are told.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    others = Others(setup)
    with others.watched("as they started"):
        others.send([(number, store.port, setup) for number in range(1, setup.processes)])
        student = setup.make_student(0)  # while the others load theirs
        whole = student.replica()  # before FSDP2 cuts the model in place
        # Loading may take longer than learner.timeout, which is that of a collective.
        others.answers(LOAD_SECONDS)
    with others.watched("as they started"):
        _join(0, store, student, setup)
        learner = _learner(student, setup, whole=whole, others=others)
        others.answers()
    return learner


class Others:
    """The processes of the ranks from 1 on. Rank 0 starts them, calls them, ends them, and says
    which of them an error came from."""

    def __init__(self, setup: Setup) -> None:
        self._timeout, self._begun = setup.timeout, time.monotonic()
        self._ranks = [
            Child("tutelage.distill.student.sharded:serve") for _ in range(1, setup.processes)
        ]

    @property
    def alive(self) -> bool:
        return bool(self._ranks)

    def send(self, messages: Sequence[Any]) -> None:
        """Send each its message."""
        for rank, message in zip(self._ranks, messages, strict=True):
            rank.connection.send(message, timeout=self._timeout)

    def answers(self, timeout: float | None = None) -> list[Any]:
        """Receive an answer from each."""
        return [_opened(rank, timeout or self._timeout) for rank in self._ranks]

    @contextlib.contextmanager
    def watched(self, where: str) -> Iterator[None]:
        """End them all on any error inside. If one of them caused it, the error names that one."""
        self._begun = time.monotonic()
        try:
            yield
        except BaseException as error:
            try:
                # Only these can be another rank's fault: a collective's, a closed connection's.
                if isinstance(error, (RuntimeError, OSError)):
                    self._explain(where, error)
            finally:
                self.close()
            raise

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()  # at once: one that waits in a collective would not hear a message
        self._ranks = []
        if dist.is_initialized():
            dist.destroy_process_group()

    def _explain(self, where: str, error: Exception) -> None:
        """Raise an error that names the rank that caused this one, if it was another rank."""
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
    """One rank of several (see `Ranks`).

    Args:
        student: in one piece; its model is cut here.
        count: how many ranks there are.
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
        # FSDP2 gathers a layer's weights in hooks of its forward
        student.decoder = TransformersDecoder(student.model)

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
            shared: FloatingPointError | None = None
            try:
                mine = getattr(learner, method)(*shares[0])
            except FloatingPointError as error:
                # All ranks raise it at the same point and are ready for the next call. So it leaves
                # `watched`, which would end them, only after their answers are read.
                shared = error
            answers = self._others.answers()
        if shared is not None:
            raise shared
        return [mine, *answers]

    def sums(self, values: Sequence[float]) -> Sequence[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def gathered(self, values: Sequence[float]) -> Sequence[float]:
        # A sum of vectors in which each rank fills its own stretch: gloo's all_gather takes only
        # tensors of one size.
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
        # FSDP2 gathers weights and reduces gradients in every pass: all ranks need as many.
        for _ in range(int(most) - len(items)):
            nothing = self.inside(self._nothing)
            # `Learner.answer` runs without gradients: there is nothing to reduce.
            if torch.is_grad_enabled():
                nothing.backward()
        self._root.reshard()  # the weights outside the layers stay gathered between passes

    def inside(self, function: Callable[[], T]) -> T:
        found: T = self._root(function)
        return found

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, most)
        # A DTensor: until it is gathered, each rank has the norm of its own part.
        return float(norm.full_tensor())

    def orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        """Each matrix is gathered whole on one rank, which computes it as a single process would;
        the ranks share the matrices among them."""
        # by the multiplications of XX', which take most of the time
        shares = split([x.numel() * min(x.shape) for x in matrices], self.count)
        owners = {i: rank for rank, share in enumerate(shares) for i in share}
        own: dict[int, torch.Tensor] = {}
        for i, matrix in enumerate(matrices):
            whole = matrix.full_tensor()  # a collective: every rank, whoever owns the matrix
            if owners[i] == dist.get_rank():
                own[i] = whole
        done = dict(zip(own, orthogonalized(list(own.values())), strict=True))
        return [
            self._part(done.get(i, _shape_of(matrix)), owners[i])
            for i, matrix in enumerate(matrices)
        ]

    def publish(self) -> None:
        for own, whole in self._weights():
            full = own.detach().full_tensor()  # a collective, also where `whole` is None
            if whole is not None:
                whole.detach().copy_(full)

    def joined(self, state: dict[str, Any]) -> dict[str, Any]:
        rank = dist.get_rank()

        def gathered(part: DTensor) -> torch.Tensor | None:
            full = part.full_tensor()
            return full.cpu() if rank == 0 else None  # a GPU may have no room for the whole state

        found: dict[str, Any] = tree_map_only(DTensor, gathered, state)
        return found if rank == 0 else {}

    @torch.no_grad()
    def adopted(self, state: dict[str, Any]) -> dict[str, Any]:
        for own, whole in self._weights():
            source = torch.empty(own.shape, device="meta") if whole is None else whole
            own.to_local().copy_(self._part(source.to(own.dtype)).to_local())
        # AdamW's step counts have no dimension to cut along
        found: dict[str, Any] = tree_map_only(
            torch.Tensor, lambda x: self._part(x) if x.ndim else x, state
        )
        return found

    def close(self) -> None:
        if self._others is not None:
            self._others.close()

    def _weights(self) -> Iterator[tuple[Any, torch.Tensor | None]]:
        """This rank's part of each weight that trains and, on rank 0, the whole weight."""
        own = self._student.trainable()
        whole = [None] * len(own) if self._whole is None else self._whole.trainable()
        yield from zip(own, whole, strict=True)

    def _part(self, whole: torch.Tensor, owner: int = 0) -> DTensor:
        """This rank's part of the owner's tensor. Other ranks pass one of the meta device."""
        device = self._student.device
        if whole.is_meta:
            whole = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        # Shard(0): by rows, as FSDP2 cuts the weights themselves.
        return distribute_tensor(
            whole.detach().to(device), self._mesh, [Shard(0)], src_data_rank=owner
        )

    def _nothing(self) -> torch.Tensor:
        """The loss of an empty pass: it adds zero to every gradient."""
        (batch,) = pack([EMPTY], max_tokens=2, device=self._student.device)
        student = self._student.view(batch)
        return 0.0 * student.logprobs_at(batch.targets_N[:, None]).sum()

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        # float64: counts of tokens stay exact
        totals = torch.tensor(values, dtype=torch.float64, device=self._student.device)
        dist.all_reduce(totals, how)
        return list(totals.tolist())


def _shape_of(matrix: DTensor) -> torch.Tensor:
    """A tensor without memory, with the shape and dtype of another rank's result for a matrix."""
    return torch.empty(matrix.shape, dtype=precision(matrix.device), device="meta")


class _Failed(RuntimeError):
    """A rank sent the error that ended it. Arguments: the rank, the error's text."""


def _opened(rank: Child, timeout: float) -> Any:
    fault, value = rank.connection.receive(timeout=timeout)
    if fault:
        raise _Failed(rank, fault)
    return value


def _reason(rank: Child, error: Exception) -> tuple[int, str]:
    """(how likely this rank caused the error, 0 most; what happened to it, empty if it lives).

    0: it died without a message, and the others' collectives fail because it is gone. 1: it sent an
    error of its own. 2: it sent a RuntimeError, which may be a collective that failed for another
    rank's sake. 3: it lives.
    """
    death = rank.ending(PATIENCE)
    fault = error.args[1] if isinstance(error, _Failed) and error.args[0] is rank else None
    with contextlib.suppress(Disconnected, TimeoutError):
        fault = fault or rank.connection.receive(timeout=0.1)[0]
    if fault:
        return (2 if fault.startswith("RuntimeError") else 1), f"failed ({fault})"
    return (3, "") if death is None else (0, f"ended ({death})")


class _Root(nn.Module):
    """Runs any function as this module's forward. FSDP2 gathers weights in hooks of `forward`, and
    a learner calls parts of the model (hidden states, head) that have no forward of their own.
    Layers are gathered one after the other; embedding, last norm and head stay gathered
    throughout."""

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
        # Learners divide by denominators of all ranks themselves, so gradients are to be summed.
        # By name, because some releases' gloo takes an average for a sum.
        if isinstance(module, FSDPModule):
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
    """The main function of a rank other than 0: loads, joins, then answers calls until rank 0 ends
    or closes the connection."""
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
            # Rank 0 raises the same, and reads this answer only to keep in step (`Sharded.call`).
            except FloatingPointError:
                connection.send((None, None))
    except Disconnected:
        raise
    # The others may wait for this rank in a collective: when it ends, theirs fails.
    except Exception as error:
        if os.environ.get("TUTELAGE_TRACEBACK"):
            traceback.print_exc()
        connection.send((f"{type(error).__name__}: {' '.join(str(error).split())}", None))
        sys.exit(1)
