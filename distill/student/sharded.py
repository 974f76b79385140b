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
import copy
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
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
from tutelage.distill.student.diagnostics import Meter
from tutelage.distill.student.learner import DENSE_VOCABULARY, Learner
from tutelage.distill.student.lessons import Course, Drawn
from tutelage.distill.student.muon import precision
from tutelage.envs.child import Child, Connection, Disconnected
from tutelage.scheduler.episodes import NOT_CHOSEN, Row, SamplingLaw

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every rank is made of. make_model: by rank, the same weights on the rank's device.
    timeout: seconds for one collective, and for a rank's start and answers. threads: of a rank."""

    make_model: Callable[[int], Any]
    processes: int
    timeout: float
    threads: int
    vocabulary: int
    config: OptimizerConfig
    steps: int
    dense_vocabulary: int = DENSE_VOCABULARY


class ShardedLearner(Learner):
    """One rank's part. Its public methods are called on all ranks at once.

    Args:
        model: whole; it is cut here.
    """

    def __init__(self, model: Any, setup: Setup) -> None:
        self._ranks = setup.processes
        self._mesh: DeviceMesh = init_device_mesh(model.device.type, (setup.processes,))
        self._root: Any = _sharded(model, self._mesh)
        super().__init__(
            model,
            vocabulary=setup.vocabulary,
            config=setup.config,
            steps=setup.steps,
            dense_vocabulary=setup.dense_vocabulary,
        )

    def learn(
        self,
        version: int,
        parts: Sequence[Sequence[Drawn]],
        courses: Mapping[str, Course],
        progress: Mapping[str, float],
        diagnose: bool,
    ) -> tuple[dict[str, Meter], float]:
        """This rank's share of an update."""
        self.version = version
        found = super()._learn(parts, courses, progress, diagnose)
        for own, whole in zip(self.model.parameters(), self._whole(), strict=True):
            full = own.detach().full_tensor()
            if whole is not None:
                whole.copy_(full)
        return found

    def optimizer_state(self) -> dict[str, Any]:
        """As of one process, on rank 0; elsewhere its tensors are None."""
        rank = dist.get_rank()

        def gathered(part: DTensor) -> torch.Tensor | None:
            full = part.full_tensor()
            return full.cpu() if rank == 0 else None

        return tree_map_only(DTensor, gathered, super().optimizer_state())

    def restore(self, optimizer_state: dict[str, Any], *, version: int) -> None:
        """Take the parts of rank 0's weights and of its optimizer's state; elsewhere that has the
        shapes alone."""
        with torch.no_grad():
            for own, whole in zip(self.model.parameters(), self._whole(), strict=True):
                source = torch.empty(own.shape, device="meta") if whole is None else whole
                own.to_local().copy_(self._part(source.to(own.dtype)).to_local())
        state = tree_map_only(
            torch.Tensor, lambda x: self._part(x) if x.ndim else x, optimizer_state
        )
        super().restore(state, version=version)

    def _part(self, whole: torch.Tensor, owner: int = 0) -> DTensor:
        """This rank's part of the owner's tensor (elsewhere: of the meta device)."""
        device = self.model.device
        if whole.is_meta:
            whole = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        return distribute_tensor(
            whole.detach().to(device), self._mesh, [Shard(0)], src_data_rank=owner
        )

    def _whole(self) -> Sequence[torch.Tensor | None]:
        """Where whole weights go to and come from."""
        return [None for _ in self.model.parameters()]

    def _sums(self, values: Sequence[float]) -> Sequence[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def _gathered(self, values: Sequence[float]) -> Sequence[float]:
        counts = [0.0] * self._ranks
        counts[dist.get_rank()] = float(len(values))
        counts = self._reduced(counts, dist.ReduceOp.SUM)
        before = int(sum(counts[: dist.get_rank()]))
        room = [0.0] * int(sum(counts))
        room[before : before + len(values)] = values
        return self._reduced(room, dist.ReduceOp.SUM)

    def _each(self, items: Sequence[T], work: Callable[[T], None]) -> None:
        (most,) = self._reduced([len(items)], dist.ReduceOp.MAX)
        super()._each(items, work)
        for _ in range(int(most) - len(items)):
            nothing = self._inside(self._nothing)
            if torch.is_grad_enabled():
                nothing.backward()
        self._root.reshard()  # the weights outside the layers stay gathered between passes

    def _nothing(self) -> torch.Tensor:
        """A pass that adds zero to every gradient."""
        (batch,) = pack([EMPTY], max_tokens=2, device=self.model.device)
        student = self.student(batch.hidden(self.model))
        return 0.0 * student.logprobs_at(batch.targets_N[:, None]).sum()

    def _inside(self, function: Callable[[], T]) -> T:
        found: T = self._root(function)
        return found

    def _clip(self) -> float:
        norm: Any = torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, self._config.clip)
        return float(norm.full_tensor())

    def _orthogonalized(self, matrices: Sequence[Any]) -> list[Any]:
        """Each on one rank, whole: they share the work, and make of a matrix what one process makes
        of it."""
        shares = split([x.numel() * min(x.shape) for x in matrices], self._ranks)
        owners = {i: rank for rank, share in enumerate(shares) for i in share}
        own: dict[int, torch.Tensor] = {}
        for i, matrix in enumerate(matrices):
            whole = matrix.full_tensor()
            if owners[i] == dist.get_rank():
                own[i] = whole
        done = dict(zip(own, super()._orthogonalized(list(own.values())), strict=True))
        return [
            self._part(done.get(i, _shape_of(matrix)), owners[i])
            for i, matrix in enumerate(matrices)
        ]

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=self.model.device)
        dist.all_reduce(totals, how)
        return list(totals.tolist())


def _shape_of(matrix: DTensor) -> torch.Tensor:
    """Of what comes of a matrix elsewhere."""
    return torch.empty(matrix.shape, dtype=precision(matrix.device), device="meta")


class DataParallelLearner(ShardedLearner):
    """Rank 0: what the run sees. It starts the others, and stops them in `close`.

    Where a rank died, failed or did not answer in time, a RuntimeError names it. From then on
    nothing can be saved: `whole` is False.
    """

    def __init__(self, setup: Setup) -> None:
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise ConfigError(
                f"learner.processes: {setup.processes} need a torch whose FSDP2 can sum gradients,"
                f" and {torch.__version__} only averages them: use a newer one (2.13 is tested)"
            )
        self._timeout, self._begun = setup.timeout, time.monotonic()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._others = [
            Child("tutelage.distill.student.sharded:serve") for _ in range(1, setup.processes)
        ]
        try:
            for number, rank in enumerate(self._others, start=1):
                rank.connection.send((number, store.port, setup), timeout=setup.timeout)
            model = setup.make_model(0)
            self._copy = copy.deepcopy(model).requires_grad_(False)
            self._answers(START_SECONDS)  # they have loaded theirs
            self._begun = time.monotonic()
            _join(0, store, model, setup)
            super().__init__(model, setup)
            self._answers()
        except BaseException as error:
            self._explain("as they started", error)
            raise

    @property
    def copy(self) -> Any:
        return self._copy

    def own_support(self, rows: Sequence[Row], k: int) -> list[npt.NDArray[np.int32]]:
        return self._asked("own_support", rows, k)

    def law_logprobs(self, rows: Sequence[Row], law: SamplingLaw) -> list[torch.Tensor]:
        return self._asked("law_logprobs", rows, law)

    def _asked(self, method: str, rows: Sequence[Row], wanted: Any) -> list[Any]:
        """What the ranks say of each row, in the rows' order."""
        shares = split([len(row.ids_T) for row in rows], self._ranks)
        parts = self._together(method, [([rows[i] for i in share], wanted) for share in shares])
        found = {
            i: said
            for share, part in zip(shares, parts, strict=True)
            for i, said in zip(share, part, strict=True)
        }
        return [found[i] for i in range(len(rows))]

    def optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._together("optimizer_state", [()] * self._ranks)[0]
        return state

    def restore(self, optimizer_state: dict[str, Any], *, version: int) -> None:
        shapes = tree_map_only(
            torch.Tensor, lambda x: x.to("meta") if x.ndim else x, optimizer_state
        )
        states = [optimizer_state, *[shapes] * len(self._others)]
        self._together("restore", [(state,) for state in states], version=version)

    def close(self) -> None:
        for rank in self._others:
            rank.kill()
        self._others = []
        if dist.is_initialized():
            dist.destroy_process_group()

    def _learn(
        self,
        parts: Sequence[Sequence[Drawn]],
        courses: Mapping[str, Course],
        progress: Mapping[str, float],
        diagnose: bool,
    ) -> tuple[dict[str, Meter], float]:
        shares: list[list[list[Drawn]]] = [[] for _ in range(self._ranks)]
        for part in parts:
            own = split([len(lesson.row.ids_T) for lesson, _ in part], self._ranks)
            for share, indices in zip(shares, own, strict=True):
                share.append([part[i] for i in indices])
        (meters, norm), *others = self._together(
            "learn", [(self.version, share, courses, progress, diagnose) for share in shares]
        )
        for theirs, _ in others:
            for task, meter in theirs.items():
                meters[task].merge(meter)
        return meters, norm

    def _whole(self) -> Sequence[torch.Tensor | None]:
        return list(self._copy.parameters())

    def _together(self, method: str, shares: Sequence[tuple[Any, ...]], **common: Any) -> list[Any]:
        """Call a method of ShardedLearner on every rank with its own share of the arguments."""
        if not self._others:
            raise RuntimeError("the learner's processes have ended: run the same command again")
        self._begun = time.monotonic()
        try:
            for rank, share in zip(self._others, shares[1:], strict=True):
                rank.connection.send((method, share, common), timeout=self._timeout)
            alike: FloatingPointError | None = None
            try:
                mine = getattr(ShardedLearner, method)(self, *shares[0], **common)
            except FloatingPointError as error:  # all ranks raise it, and stand ready again
                alike = error
            answers = self._answers()
        except BaseException as error:
            self.whole = False
            self._explain(f"in {method}", error)
            raise
        if alike is not None:
            raise alike
        return [mine, *answers]

    def _answers(self, timeout: float | None = None) -> list[Any]:
        return [_opened(rank, timeout or self._timeout) for rank in self._others]

    def _explain(self, where: str, error: BaseException) -> None:
        """Stop the others, and raise what is at the bottom of an error that may be theirs."""
        try:
            if not isinstance(error, (RuntimeError, OSError)):
                return
            found = [(*_reason(rank, error), rank) for rank in self._others]
            _, reason, rank = min(found, key=lambda one: one[0])
            number = 1 + self._others.index(rank)
            if not reason and time.monotonic() - self._begun >= self._timeout:
                reason = f"did not answer within learner.timeout = {self._timeout:g} s"
            if reason:
                raise RuntimeError(
                    f"learner rank {number} (process {rank.pid}) {reason}, {where}: run the"
                    " same command again"
                ) from error
        finally:
            self.close()


class _Failed(RuntimeError):
    """(rank, its own error as it told it)"""


def _opened(rank: Child, timeout: float) -> Any:
    fault, value = rank.connection.receive(timeout=timeout)
    if fault:
        raise _Failed(rank, fault)
    return value


def _reason(rank: Child, error: Exception) -> tuple[int, str]:
    """(how far from the bottom, what happened to a rank): a death in silence explains the others'
    errors, and so does an error of its own those of collectives. Of a rank that lives: nothing."""
    death = rank.ending(PATIENCE)
    fault = error.args[1] if isinstance(error, _Failed) and error.args[0] is rank else None
    with contextlib.suppress(Disconnected, TimeoutError):
        fault = fault or rank.connection.receive(timeout=0.1)[0]
    if fault:
        return (2 if fault.startswith("RuntimeError") else 1), f"failed ({fault})"
    return (3, "") if death is None else (0, f"ended ({death})")


PATIENCE = 5.0
"""Seconds in which a rank that failed has ended, or has said why."""

START_SECONDS = 3600.0
"""A rank may take this long to load its model."""

EMPTY = Row(
    ids_T=np.zeros(2, dtype=np.int32),
    turns_T=np.array([NOT_CHOSEN, 0], dtype=np.int32),
    logprobs_T=np.zeros(2, dtype=np.float32),
    branches_T=np.zeros(2, dtype=np.int32),
)


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


def _join(rank: int, store: Any, model: Any, setup: Setup) -> None:
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    dist.init_process_group(
        "nccl" if model.device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=setup.processes,
        timeout=timedelta(seconds=setup.timeout),
    )


def serve(connection: Connection) -> None:
    """The life of a rank other than 0."""
    number, port, setup = connection.receive()
    try:
        prepare_process(setup.threads)
        model = setup.make_model(number)
        connection.send((None, None))
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        _join(number, store, model, setup)
        learner = ShardedLearner(model, setup)
        connection.send((None, None))
        for method, share, common in connection:
            try:
                connection.send((None, _answer(learner, method, share, common)))
            except FloatingPointError:
                connection.send((None, None))
    except Disconnected:
        raise
    except Exception as error:  # the others wait in a collective: they learn of it by our end
        if os.environ.get("TUTELAGE_TRACEBACK"):
            traceback.print_exc()
        connection.send((f"{type(error).__name__}: {' '.join(str(error).split())}", None))
        sys.exit(1)


def _answer(learner: ShardedLearner, method: str, share: Any, common: Any) -> Any:
    found = getattr(learner, method)(*share, **common)
    return None if method == "optimizer_state" else found


def split(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of these each rank gets: the largest first, to the rank that has least; in order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += sizes[i]
    return [sorted(share) for share in shares]
