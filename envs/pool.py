"""Runs environments in processes of their own, where a fault is one counted record and never the
end of a run.

A caller sends requests for many episodes at once and takes answers as they come. A process that
dies or stays silent too long is killed and replaced; its live episodes come back as `Failed`, and
can be played again (same seed, same episode; replay.py does). An environment that raises loses its
own episode only.

    with EnvironmentPool("tutelage/Math-v0", {"split": "valid"}, processes=2) as pool:
        pool.send([Reset(episode=0, seed=0, options={"index": 3})])
        (first,) = pool.receive()
        pool.send([Act(episode=0, action="\\boxed{7}")])

Processes end with the pool or its process, and so does whatever they started (child.py). What comes
from them is bounded and plain data; anything else on their connection ends them.
"""

from __future__ import annotations

import itertools
import os
import select
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from tutelage.envs.child import Child, InvalidMessage
from tutelage.envs.keeper import GRACE
from tutelage.envs.plugins import Absent, refusal
from tutelage.envs.worker import Host, Reply, Request

START_SECONDS = 120.0  # for imports and the first environment, on a machine under load
MAX_FAILED_STARTS = 3  # in a row: so many show that no single episode is to blame
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

Reason = Literal["died", "timeout", "raised", "garbage", "undecided", "differs", "too long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """Begin `episode` (the caller's name for it). `options={"index": i}` picks the game. attempt:
    which attempt at the episode this is, for replay.py.
    """

    episode: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One step of `episode`."""

    episode: int
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What `reset` (reward 0.0) or `step` gave. `info["success"]` is always a bool.

    An environment without that key counts as successful if it terminated with a positive reward.
    Values of `info` that are not plain data stay behind in the process.
    """

    episode: int
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The episode is lost. The cause of `died` and `timeout` is its process, of `raised` and
    `garbage` its environment, of `undecided` the machine (worker.Undecided), of `differs` a replay
    (replay.py), of `too long` its first prompt. idle: no request of it was under way when its
    process was lost.
    """

    episode: int
    reason: Reason
    detail: str
    idle: bool = False
    attempts: int = 1


class EnvironmentPool:
    """Instances of one environment over `processes` processes (0: in this one, without a deadline).

    Args:
        env_id: a Gymnasium id, `module:Id-v0` to import what registers it.
        env_args: keyword arguments of the environment; plain data.
        processes: how many; each holds as many instances as it has live episodes.
        timeout: seconds of silence after which a process that owes an answer is killed and
            replaced.
        max_observation: characters of one observation; a longer one is garbage.

    Raises ValueError, naming the id, if the environment can't be made (Absent where this machine
    may lack something): at once, never as a failure later. Not safe for several threads at a time.

    Attributes:
        probe: `{"num_episodes": int | None}` of the environment.
        restarts: how many processes were replaced.
    """

    def __init__(
        self,
        env_id: str,
        env_args: Mapping[str, Any],
        *,
        processes: int,
        timeout: float,
        max_observation: int,
    ) -> None:
        if processes < 0 or timeout <= 0:
            raise ValueError(
                f"processes={processes}, timeout={timeout}: want processes >= 0, timeout > 0"
            )
        # The last: seconds after which a worker sends the replies that it has, well within timeout.
        self._setup = (env_id, dict(env_args), max_observation, min(0.5, timeout / 10))
        self._timeout = timeout
        self._ready: deque[Observed | Failed] = deque()
        self._seats: dict[int, _Seat] = {}  # by live episode
        self._episodes: dict[int, int] = {}  # by ticket
        self._tickets = itertools.count()
        self._owed: set[int] = set()  # those with a request on the way
        self._lost: set[int] = set()  # failed, and the caller can't know it yet
        self._failed_starts = 0
        self.restarts = 0
        self._host: Host | None = None
        self._processes: list[_Process] = []
        # Also when nobody calls `close`: at garbage collection or at exit.
        self._finalizer = weakref.finalize(self, _kill_all, self._processes)
        try:
            self.probe = self._start(processes)
        except BaseException:
            self.close()
            raise

    def _start(self, processes: int) -> dict[str, Any]:
        env_id, env_args, max_observation, _ = self._setup
        if processes == 0:
            try:
                self._host = Host(env_id, env_args, max_observation=max_observation)
            except KeyboardInterrupt:  # the user's
                raise
            except BaseException as error:  # a sys.exit, too
                raise _cannot(env_id, *refusal(env_id, error)) from error
            return self._host.probe()
        self._processes.extend(_Process(self._setup) for _ in range(processes))
        for at in range(processes):
            self._await_start(at)
        return self._processes[0].probe

    def _await_start(self, at: int) -> None:
        while not (process := self._processes[at]).started:
            left = process.deadline(self._timeout) - time.monotonic()
            poll = select.poll()
            poll.register(process.connection, process.connection.events)
            poll.poll(1000 * max(0.0, left))
            self._exchange(process)
            if process.refused:
                raise _cannot(self._setup[0], process.refused, process.absent)
            if process.connection.fault:
                self._replace(at, "died", process.death())
            elif left <= 0 and not process.started:
                self._replace(at, "timeout", f"not ready within {START_SECONDS:.0f} s")

    @property
    def outstanding(self) -> int:
        """Answers still to be received."""
        return len(self._owed) + len(self._ready)

    def send(self, requests: Sequence[Reset | Act]) -> None:
        """Hand out a batch, one message per process. At most one request of an episode is on the
        way.

        Raises ValueError for an action of an episode that is not live or still owes an answer.
        """
        batches: dict[_Process | None, list[Request]] = {}
        for request in requests:
            if request.episode in self._lost:
                continue  # its Failed waits to be received
            if request.episode in self._owed:
                raise ValueError(f"episode {request.episode} still owes an answer")
            seat = self._seat(request)
            if isinstance(request, Reset):
                line: Request = ("reset", seat.ticket, request.seed, request.options)
            else:
                line = ("act", seat.ticket, request.action)
            if seat.process is not None and not self._owes(seat.process):
                seat.process.wake()  # its silence counts from here: so far it owed nothing
            self._owed.add(request.episode)
            batches.setdefault(seat.process, []).append(line)
        for process, lines in batches.items():
            self._deliver(process, lines)

    def abandon(self, episodes: Iterable[int]) -> None:
        """Give up live episodes (a caller's own limit): their instances become free, answers are
        dropped.
        """
        batches: dict[_Process | None, list[Request]] = {}
        for episode in set(episodes):
            seat = self._forget(episode)
            if seat is not None:
                batches.setdefault(seat.process, []).append(("drop", seat.ticket))
        for process, lines in batches.items():
            self._deliver(process, lines)

    def receive(self, *, block: bool = True) -> list[Observed | Failed]:
        """Whatever is ready; with `block` at least one answer, unless nothing is outstanding."""
        self._pump(0.0)
        while block and not self._ready and self._owed:
            self._pump(self._wait())
        answers = list(self._ready)
        self._ready.clear()
        self._lost.clear()
        return answers

    def close(self) -> None:
        """End every process; what is outstanding is dropped."""
        self._finalizer()
        if self._host is not None:
            self._host.close()
        self._seats.clear()
        self._episodes.clear()
        self._owed.clear()

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def pids(self) -> list[int]:
        """Process ids, for people who look at the machine."""
        return [process.child.pid for process in self._processes]

    # --- inside ---------------------------------------------------------------------------------

    def _seat(self, request: Reset | Act) -> _Seat:
        """A live episode stays where its instance is; a new one goes where the fewest live."""
        seat = self._seats.get(request.episode)
        if seat is not None:
            return seat
        if isinstance(request, Act):
            raise ValueError(f"episode {request.episode} is not live: reset it first")
        if not self._processes and self._host is None:
            raise ValueError("the pool is closed")
        process = min(self._processes, key=lambda p: len(p.live), default=None)
        seat = _Seat(process=process, ticket=next(self._tickets))
        self._seats[request.episode] = seat
        self._episodes[seat.ticket] = request.episode
        if process is not None:
            process.live.add(request.episode)
        return seat

    def _deliver(self, process: _Process | None, lines: list[Request]) -> None:
        if process is not None:
            process.connection.post(lines)
            return
        assert self._host is not None
        for line in lines:
            reply = self._host.handle(line)
            if reply is not None:
                self._take(reply)

    def _forget(self, episode: int) -> _Seat | None:
        seat = self._seats.pop(episode, None)
        if seat is not None:
            del self._episodes[seat.ticket]
            if seat.process is not None:
                seat.process.live.discard(episode)
        self._owed.discard(episode)
        return seat

    def _take(self, reply: Reply) -> None:
        episode = self._episodes.get(reply[0])
        if episode is None:
            return  # abandoned while its answer was on the way
        self._owed.discard(episode)
        if len(reply) == 3:
            self._ready.append(Failed(episode=episode, reason=reply[1], detail=reply[2]))
            self._forget(episode)
            return
        _, observation, reward, terminated, truncated, info = reply
        self._ready.append(
            Observed(
                episode=episode,
                observation=observation,
                reward=reward,
                terminated=terminated,
                truncated=truncated,
                info=info,
            )
        )
        if terminated or truncated:
            self._forget(episode)

    def _wait(self) -> float:
        """Seconds until the next deadline."""
        now = time.monotonic()
        owing = filter(self._owes, self._processes)
        deadlines = [process.deadline(self._timeout) for process in owing]
        return max(0.0, min(deadlines, default=now + self._timeout) - now)

    def _pump(self, seconds: float) -> None:
        """Move bytes for up to `seconds`, then judge the dead and the silent."""
        if not self._processes:
            return
        poll = select.poll()
        by_descriptor = {process.connection.fileno(): process for process in self._processes}
        for descriptor, process in by_descriptor.items():
            poll.register(descriptor, process.connection.events)
        for descriptor, _ in poll.poll(1000 * seconds):
            self._exchange(by_descriptor[descriptor])
        now = time.monotonic()
        for at, process in enumerate(self._processes):
            if process.connection.fault or process.refused:
                self._replace(at, "died", process.refused or process.death())
            elif self._owes(process) and now >= process.deadline(self._timeout):
                self._replace(at, "timeout", f"no answer within {self._timeout:g} s")

    def _owes(self, process: _Process) -> bool:
        return not process.live.isdisjoint(self._owed)

    def _exchange(self, process: _Process) -> None:
        for replies in process.messages():
            self._failed_starts = 0
            for reply in replies:
                self._take(reply)

    def _replace(self, at: int, reason: Reason, detail: str) -> None:
        old = self._processes[at]
        old.child.kill()
        for episode in sorted(old.live):
            idle = episode not in self._owed
            self._forget(episode)
            self._lost.add(episode)
            self._ready.append(Failed(episode=episode, reason=reason, detail=detail, idle=idle))
        self.restarts += 1
        self._failed_starts += not old.started
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"{self._setup[0]}: {self._failed_starts} processes in a row ended while starting "
                f"({detail})"
            )
        self._processes[at] = _Process(self._setup)


def _cannot(env_id: str, why: str, absent: bool) -> ValueError:
    return (Absent if absent else ValueError)(f"{env_id}: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seat:
    """Where an episode lives (None: in this process), and its number there.

    The number is never used twice, so an answer that comes after its episode was abandoned can't be
    taken for that of a new episode with the same name.
    """

    process: _Process | None
    ticket: int


class _Process:
    """One worker process, and what it has said of itself."""

    def __init__(self, setup: tuple[str, dict[str, Any], int, float]) -> None:
        self.live: set[int] = set()
        self.probe: dict[str, Any] = {}
        self.started = False
        self.refused, self.absent = "", False
        self._active = time.monotonic()  # its last sign of life, or when it got work after a rest
        self.child = Child(
            "tutelage.envs.worker:main", environment={**os.environ, **ONE_THREAD}, plain=True
        )
        self.connection = self.child.connection
        self.connection.post(setup)

    def deadline(self, timeout: float) -> float:
        """When its silence becomes a fault (time.monotonic seconds)."""
        return self._active + (timeout if self.started else START_SECONDS)

    def wake(self) -> None:
        """It owes something from now on."""
        if self.started:
            self._active = time.monotonic()

    def messages(self) -> Iterator[list[Reply]]:
        """The replies in each message that is here."""
        for message in self.connection.arrived():
            self._active = time.monotonic()
            replies: list[Reply] = []
            match message:
                case ("ready", probe):
                    self.started, self.probe = True, probe
                case ("refused", (why, absent)):
                    self.refused, self.absent = why, absent
                case ("replies", list(content)):
                    replies = content
            yield replies

    def death(self) -> str:
        """How it ended, once its connection is closed."""
        if isinstance(self.connection.fault, InvalidMessage):
            return f"its environment {self.connection.fault}"
        return self.child.ending() or "it closed its connection"


def _kill_all(processes: list[_Process]) -> None:
    """Hang up on all first, so that they close at the same time."""
    for process in processes:
        process.connection.hang_up()
    for process in processes:
        process.child.kill(grace=GRACE)
    processes.clear()
