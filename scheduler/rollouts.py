"""Plays episodes: many at once, token-exact, each within its limits, each failure counted."""

from __future__ import annotations

import datetime
import math
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.envs.pool import Act, EnvironmentPool, Failed, Observed, Reset
from tutelage.envs.replay import ReplayingPool
from tutelage.scheduler.chat import Chat
from tutelage.scheduler.contexts import Context, ContextSettings, Reply
from tutelage.scheduler.engine import Completion, Engine, Request, Weights
from tutelage.scheduler.episodes import Dropped, Ending, Episode, Order, SamplingParams, Turn

GRACE, POLL = 0.25, 0.0005
"""Before each step, an engine that does not go in lockstep waits for environments for this share of
its last step's time (looking every POLL seconds): an episode whose answer comes just too late would
lose a whole step. Where an answer took longer than a step, it does not wait."""

MAX_VERDICT = 32  # characters of info["reason"]: a word to count, no sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRollout:
    """How one task is played. Times in seconds, lengths in tokens."""

    env: str
    env_args: Mapping[str, Any]
    context: ContextSettings
    sampling: SamplingParams
    max_turns: int
    max_new_tokens: int
    max_live: int
    """Episodes in flight at once: bounds the engine's cache."""
    processes: int
    timeout: float
    attempts: int
    max_observation: int
    """Characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Try:
    """An order to play."""

    order: Order
    attempt: int = 1


class _Live:
    """One episode in flight."""

    def __init__(self, order: Order, session: int, context: Context) -> None:
        self.order, self.session, self.context = order, session, context
        self.turns: list[Turn] = []
        self.prefix: list[int] = []  # a guide's (off-policy) tokens, with which this turn begins
        self.reward = 0.0
        self.observation = ""
        self.info: Mapping[str, Any] = {}


class EnvironmentPools:
    """Each task's environment processes: started at first use or by `open`, kept until `close`."""

    def __init__(self, tasks: Mapping[str, TaskRollout]) -> None:
        self._tasks, self._pools = dict(tasks), dict[str, EnvironmentPool]()

    def open(self, tasks: Iterable[str]) -> None:
        """Start these tasks' now, so that a bad id or option shows before anything costly loads.

        Raises:
            ValueError: the environment cannot be made; names it.
        """
        for task in tasks:
            self[task]

    def __getitem__(self, task: str) -> EnvironmentPool:
        if task not in self._pools:
            how = self._tasks[task]
            self._pools[task] = EnvironmentPool(
                how.env,
                how.env_args,
                processes=how.processes,
                timeout=how.timeout,
                max_observation=how.max_observation,
            )
        return self._pools[task]

    def close(self) -> None:
        """Stop the processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class RolloutWorker:
    """Plays orders with one engine. A plain class: the scheduler runs it in this process or as a
    Ray actor.

    Args:
        engine: the inference engine.
        tokenizer: the student's.
        tasks: how each task is played, by name.
        pools: the tasks' environments, if they are open already; closed with the worker.
        guides: by task, the engine of the teacher that plays the prefix of guided episodes; for
            other tasks the environment's expert does.
        stop_ids, date: see Chat.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        tasks: Mapping[str, TaskRollout],
        pools: EnvironmentPools | None = None,
        guides: Mapping[str, Engine] | None = None,
        *,
        stop_ids: Collection[int] = (),
        date: datetime.date | None = None,
    ) -> None:
        self.engine = engine
        self._guides = dict(guides or {})
        self._tokenizer, self._stop_ids, self._date = tokenizer, stop_ids, date
        self._tasks = dict(tasks)
        self._vocabulary = len(tokenizer)
        self._pools = pools or EnvironmentPools(tasks)
        self._sessions = 0
        self._loaded: int | None = None  # the version whose weights were loaded last

    def collect(
        self, orders: Sequence[Order], *, sampling: SamplingParams | None = None
    ) -> list[Episode | Dropped]:
        """Play every order (all of one task) and return the outcomes in the orders' order.

        sampling: replaces the task's own sampling parameters; given, it is an evaluation.
        """
        if not orders:
            return []
        (task,) = {order.task for order in orders}
        play = _Play(
            self, task, sampling or self._tasks[task].sampling, scores=sampling is not None
        )
        return play.run(orders)

    def play(
        self,
        orders: Sequence[Order],
        *,
        sampling: SamplingParams | None,
        weights: Weights | None,
        version: int | None,
    ) -> list[Episode | Dropped]:
        """`collect` with this version of the student; None: the one that is loaded."""
        if version is not None and version != self._loaded:
            self.load(weights, version)
        return self.collect(orders, sampling=sampling)

    def chat(self, task: str) -> Chat:
        """The chat of a task's conversations."""
        return Chat(
            self._tokenizer,
            system=self._tasks[task].context.system,
            stop_ids=self._stop_ids,
            date=self._date,
        )

    def num_episodes(self, task: str) -> int | None:
        """How many distinct games or problems the task's environment has; None: it does not say."""
        count = self._pools[task].probe["num_episodes"]
        return None if count is None else int(count)

    def load(self, weights: Weights | None, version: int) -> None:
        """Give the engine the learner's weights (None: it shares them)."""
        self.engine.load(weights, version)
        self._loaded = version

    def close(self) -> None:
        """Stop the environment processes."""
        self._pools.close()


class _Play:
    """One call of `collect`: the loop between an engine and an environment pool."""

    def __init__(
        self, worker: RolloutWorker, task: str, sampling: SamplingParams, *, scores: bool = False
    ) -> None:
        # an evaluation: a prompt that fits no context counts as not solved, and is not dropped
        self._scores = scores
        self._worker, self._engine, self._sampling = worker, worker.engine, sampling
        self._guide = worker._guides.get(task)
        self._how = worker._tasks[task]
        self._pool = ReplayingPool(worker._pools[task], attempts=self._how.attempts)
        self._chat = worker.chat(task)
        self._live: dict[int, _Live] = {}
        self._done: dict[int, Episode | Dropped] = {}
        self._waiting: deque[_Try] = deque()
        self._step_seconds = 0.0  # of the engine's last one
        self._late = 0  # answers that were not there when it began

    def run(self, orders: Sequence[Order]) -> list[Episode | Dropped]:
        self._waiting.extend(_Try(order=order) for order in orders)
        try:
            while self._waiting or self._live:
                self._admit()
                # In lockstep the engine steps only when no environment owes an answer: an expert's
                # act asks its environment again at once, hence the loop.
                while self._pool.outstanding:
                    self._take(self._answers())
                    if not self._engine.lockstep:
                        break
                if self._guide is not None and self._guide.pending:
                    self._open_with_prefixes(self._guide.step())
                begun = time.monotonic()
                completions = self._engine.step()
                self._step_seconds = time.monotonic() - begun
                self._act(completions)
        finally:
            # only after an error are there any; a copy, since `_leave` deletes from it
            for live in list(self._live.values()):
                self._leave(live)
        return [self._done[order.number] for order in orders]

    def _answers(self) -> list[Observed | Failed]:
        """The environments' answers: all that are outstanding if the engine goes in lockstep (their
        order of arrival then decides nothing), else those that are there."""
        answers: list[Observed | Failed] = []
        if not self._engine.lockstep:
            # with nothing to generate, wait for an answer; else the loop would spin
            busy = self._engine.pending or (self._guide is not None and self._guide.pending)
            answers += self._pool.receive(block=not busy)
            soon = len(answers) >= self._late  # else some are owed through a whole step
            until = time.monotonic() + (GRACE * self._step_seconds if soon else 0.0)
            while busy and self._pool.outstanding and time.monotonic() < until:
                time.sleep(POLL)
                answers += self._pool.receive(block=False)
            self._late = self._pool.outstanding
            return answers
        while self._pool.outstanding:
            answers += self._pool.receive()
        return answers

    def _admit(self) -> None:
        resets = []
        while self._waiting and len(self._live) < self._how.max_live:
            wanted = self._waiting.popleft()
            order = wanted.order
            self._worker._sessions += 1
            session = self._worker._sessions
            context = Context(self._chat, self._how.context)
            self._live[session] = _Live(order, session, context)
            resets.append(
                Reset(
                    episode=session,
                    seed=order.seed,
                    options={"index": order.index},
                    attempt=wanted.attempt,
                )
            )
        if resets:
            self._pool.send(resets)

    def _take(self, results: Iterable[Observed | Failed]) -> None:
        """Make a prompt, or the episode's end, of each environment's result."""
        acts: list[Act] = []
        # sorted: the order of arrival must not decide the order of requests in a batch
        for result in sorted(results, key=lambda r: r.episode):
            live = self._live.get(result.episode)
            if live is None:  # the episode was lost since it was asked
                continue
            if isinstance(result, Failed):
                self._lose(live, result)
                continue
            # the sum, not each reward: finite ones may overflow, or an infinity be made a NaN
            live.reward += result.reward
            if not math.isfinite(live.reward):
                detail = f"its rewards add up to {live.reward}: no number that can be compared"
                self._lose(live, Failed(episode=live.session, reason="garbage", detail=detail))
                continue
            live.observation, live.info = result.observation, result.info
            if result.terminated or result.truncated:
                self._finish(live, "terminated" if result.terminated else "truncated")
                continue
            live.context.observe(result.observation, result.info)
            if len(live.turns) >= self._how.max_turns:
                self._finish(live, "max_turns")
            elif self._room(live) >= 1:
                if act := self._open_turn(live):
                    acts.append(act)
            elif live.turns or self._scores:  # what it has played so far can be learned from
                self._finish(live, "context")
            else:
                self._lose(live, self._too_long(live))
        if acts:
            self._pool.send(acts)

    def _too_long(self, live: _Live) -> Failed:
        tokens, room = len(live.context.prompt_ids), self._engine.max_context
        return Failed(
            episode=live.session,
            reason="too long",
            detail=f"its first prompt has {tokens} tokens, and the student's context is {room}, the"
            " reply included: take a student with a longer one, shorten the prompt (env_args,"
            " rollout.context), or leave such problems out",
        )

    def _room(self, live: _Live) -> int:
        return min(
            self._how.max_new_tokens, self._engine.max_context - len(live.context.prompt_ids)
        ) - len(live.prefix)

    def _open_turn(self, live: _Live) -> Act | None:
        """Ask who speaks first in this turn, guide or student. Returns the act where the expert
        says all of it, and there is nobody to ask."""
        if live.order.actor == "expert":
            return self._expert_acts(live)
        guided = self._guided_tokens(live)
        if guided and self._guide is None:
            reply = self._as_reply(live, self._expert_action(live))
            if guided >= len(reply):
                return self._expert_acts(live)
            live.prefix = reply[:guided]
        elif guided:
            assert self._guide is not None
            self._ask(live, self._guide, at_most=guided)
            return None
        return self._continue(live)

    def _continue(self, live: _Live, *, closed: bool = False) -> Act | None:
        """Let the student continue the prefix; an act where the prefix is the whole reply."""
        if closed or self._room(live) < 1:
            return self._answer(live, closed=closed)
        self._ask(live, self._engine)
        return None

    def _guided_tokens(self, live: _Live) -> int:
        """How many tokens of this turn are the guide's: it plays whole turns, then part of one."""
        turns_left = live.order.guide * self._how.max_turns - len(live.turns)
        return max(0, min(self._room(live), int(turns_left * self._how.max_new_tokens)))

    def _ask(self, live: _Live, engine: Engine, *, at_most: int | None = None) -> None:
        turn = len(live.turns)
        # the guide has a seed of its own: with the student's, both would draw the same numbers
        entropy = [live.order.seed, turn] + ([1] if engine is self._guide else [])
        engine.submit(
            Request(
                session=live.session,
                ids=[*live.context.prompt_ids, *live.prefix],
                max_new_tokens=self._room(live) if at_most is None else at_most,
                stop_ids=self._chat.eos_ids,
                sampling=self._sampling,
                seed=int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]),
            )
        )

    def _open_with_prefixes(self, completions: Iterable[Completion]) -> None:
        """A guide's tokens open the turn; the student continues, unless the guide ended it."""
        acts = []
        for completion in sorted(completions, key=lambda c: c.session):
            live = self._live[completion.session]
            if not live.context.appends:
                assert self._guide is not None
                self._guide.release(live.session)
            live.prefix = list(completion.ids)
            if act := self._continue(live, closed=completion.stopped):
                acts.append(act)
        if acts:
            self._pool.send(acts)

    def _act(self, completions: Iterable[Completion]) -> None:
        """Make an action of each sampled reply."""
        acts = []
        for completion in sorted(completions, key=lambda c: c.session):
            live = self._live[completion.session]
            # a model may have more logits than the tokenizer has tokens, padded for speed
            if (highest := max(completion.ids, default=0)) >= self._worker._vocabulary:
                raise RuntimeError(
                    f"{live.order.name}: the engine sampled id {highest}, and the tokenizer has"
                    f" {self._worker._vocabulary}: cut its logits to the vocabulary"
                )
            if not live.context.appends:  # a window's prompt is never extended
                self._engine.release(live.session)
            acts.append(self._answer(live, completion, closed=completion.stopped))
        if acts:
            self._pool.send(acts)

    def _answer(self, live: _Live, sampled: Completion | None = None, *, closed: bool) -> Act:
        """Record the turn: the prefix, then what the student sampled."""
        unknown = [float("nan")] * len(live.prefix)  # the student did not sample the prefix
        ids, logprobs = (sampled.ids, sampled.logprobs) if sampled else ([], [])
        sampling = sampled.sampling_logprobs if sampled else None
        reply = Reply(
            ids=[*live.prefix, *ids],
            logprobs=[*unknown, *logprobs],
            closed=closed,
            sampling_logprobs=None if sampling is None else [*unknown, *sampling],
        )
        live.prefix = []
        text = self._chat.text(reply.ids)
        said = live.context.read(text)
        expert = self._expert_action(live) if live.order.labels else None
        live.context.reply(
            reply,
            action=said.remembered,
            expert_ids=None if expert is None else self._as_reply(live, expert),
        )
        live.turns.append(
            Turn(
                observation=live.observation,
                action=text,
                expert_action=expert,
                complete=closed,
                valid=said.valid,
            )
        )
        return Act(episode=live.session, action=said.command)

    def _expert_acts(self, live: _Live) -> Act:
        action = self._expert_action(live)
        ids = self._as_reply(live, action)
        live.context.reply(
            Reply(ids=ids, logprobs=[float("nan")] * len(ids), closed=True), action=action
        )
        live.turns.append(Turn(observation=live.observation, action=action, expert_action=action))
        return Act(episode=live.session, action=action)

    def _as_reply(self, live: _Live, action: str) -> list[int]:
        """An expert's action as the ids that the student would have sampled for it."""
        return self._chat.reply(live.context.say(action))

    def _expert_action(self, live: _Live) -> str:
        action = live.info.get("expert_action")
        if action is None:
            raise ValueError(
                f"task {live.order.task!r}: imitation and guidance need info['expert_action'] from"
                f" {self._how.env!r}: give the environment expert=True under env_args, or another"
                " objective"
            )
        return str(action)

    def _finish(self, live: _Live, ended: Ending) -> None:
        # In an environment whose info has no "success", a positive reward counts as one.
        self._done[live.order.number] = Episode(
            order=live.order,
            rows=live.context.rows(),
            turns=tuple(live.turns),
            success=bool(live.info.get("success", live.reward > 0)),
            reward=live.reward,
            task_type=str(live.info.get("task_type", "")),
            ended=ended,
            sampling=self._sampling,
            version=self._engine.version,
            attempts=self._pool.attempt(live.session),
            final_observation=live.observation,
            verdict=_verdict(live.info.get("reason")),
        )
        self._leave(live)

    def _lose(self, live: _Live, failure: Failed) -> None:
        # A replayed environment answered otherwise than before: only a new episode is consistent.
        if failure.reason == "differs":
            self._waiting.append(_Try(order=live.order, attempt=failure.attempts))
        else:
            self._done[live.order.number] = Dropped(
                order=live.order,
                reason=failure.reason,
                detail=failure.detail,
                attempts=failure.attempts,
            )
        self._leave(live)

    def _leave(self, live: _Live) -> None:
        del self._live[live.session]
        self._engine.release(live.session)
        if self._guide is not None:
            self._guide.release(live.session)
        self._pool.abandon([live.session])


def _verdict(reason: Any) -> str:
    """A word that can be counted; anything else that an environment puts there is left out."""
    return reason if isinstance(reason, str) and len(reason) <= MAX_VERDICT else ""
