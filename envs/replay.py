"""A pool whose episodes survive the loss of their process: each is replayed up to where it was.

When a process dies or hangs, this pool resets its episodes in other processes and repeats their
actions. The caller sees nothing of the fault: answers keep their order and batches their size, on
which the last bits of what an engine computes depend. When a process dies, nobody knows which of
its episodes is to blame; so the last attempt at an episode runs while no other request is under
way, and only its own fault can end it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from tutelage.envs.pool import Act, EnvironmentPool, Failed, Observed, Reset

SHARED = ("died", "timeout")
"""Failures that cost a process all its episodes, whichever of them is to blame."""


class _Life:
    """One episode: its requests, and how many of them its present instance has answered."""

    def __init__(self, reset: Reset) -> None:
        self.requests: list[Reset | Act] = [reset]
        self.seen: list[str] = []  # the observations that were passed on
        self.attempt, self.answered = reset.attempt, 0
        self.alone = False  # the last attempt: no other request may be under way
        self.lost = False  # its instance is gone, and no request has needed it since

    @property
    def awaited(self) -> bool:
        """Whether the caller waits for an answer."""
        return len(self.seen) < len(self.requests)

    def repeats(self, result: Observed) -> bool:
        """Whether a replayed answer is the one that was passed on before."""
        ended = result.terminated or result.truncated
        return not ended and result.observation == self.seen[self.answered]


class ReplayingPool:
    """An environment pool with the same calls, in which `Failed` is final: no attempt is left, or
    (reason `differs`) the replay gave another observation, and the episode must begin anew.

    Args:
        pool: the environments; not closed here.
        attempts: how often an episode is tried at most.
    """

    def __init__(self, pool: EnvironmentPool, *, attempts: int) -> None:
        self._pool, self._most = pool, attempts
        self._lives: dict[int, _Life] = {}
        self._alone: deque[int] = deque()  # episodes whose next request waits for its turn

    @property
    def outstanding(self) -> int:
        """Answers still to be received."""
        return sum(life.awaited for life in self._lives.values())

    def attempt(self, episode: int) -> int:
        """Which attempt at a live episode this is."""
        return self._lives[episode].attempt

    def send(self, requests: Sequence[Reset | Act]) -> None:
        """See EnvironmentPool.send."""
        for request in requests:
            if isinstance(request, Reset):
                self._lives[request.episode] = _Life(request)
            else:
                self._lives[request.episode].requests.append(request)
        self._send([request.episode for request in requests])

    def abandon(self, episodes: Iterable[int]) -> None:
        """See EnvironmentPool.abandon."""
        for episode in episodes:
            self._lives.pop(episode, None)
            if episode in self._alone:
                self._alone.remove(episode)
            self._pool.abandon([episode])

    def receive(self, *, block: bool = True) -> list[Observed | Failed]:
        """See EnvironmentPool.receive."""
        answers: list[Observed | Failed] = []
        while self.outstanding and not answers:
            if self._alone and not self._pool.outstanding:
                self._pool.send([self._next(self._alone.popleft())])
            answers = self._settle(self._pool.receive(block=block))
            if not block:
                break
        return answers

    def _send(self, episodes: Iterable[int]) -> None:
        """Send the next request of each; a last attempt waits until nothing else is under way."""
        now = []
        for episode in episodes:
            if not self._lives[episode].alone:
                now.append(self._next(episode))
            elif episode not in self._alone:
                self._alone.append(episode)
        if now:
            self._pool.send(now)

    def _next(self, episode: int) -> Reset | Act:
        life = self._lives[episode]
        if life.lost:  # a new instance begins with the reset
            life.lost, life.answered = False, 0
        return life.requests[life.answered]

    def _differs(self, episode: int) -> Failed:
        life = self._lives.pop(episode)
        self._pool.abandon([episode])
        detail = "its process was lost, and the replay of its actions gave another observation"
        return Failed(episode=episode, reason="differs", detail=detail, attempts=life.attempt)

    def _settle(self, results: Sequence[Observed | Failed]) -> list[Observed | Failed]:
        """The answers that the caller waits for; replays in between get their next request."""
        failures = [result for result in results if isinstance(result, Failed)]
        gone = {failure.episode for failure in failures}
        answers: list[Observed | Failed] = []
        further: list[int] = []
        for result in results:
            life = self._lives.get(result.episode)
            if life is None or isinstance(result, Failed):
                continue
            if life.answered == len(life.seen):  # new; else it is a replay's, which nobody awaits
                life.seen.append(result.observation)
                answers.append(result)
            elif not life.repeats(result):
                answers.append(self._differs(result.episode))
                continue
            life.answered += 1
            if life.awaited and result.episode not in gone:
                further.append(result.episode)
        # Episodes that the process owed an answer are blamed: theirs counts as an attempt. If it
        # owed none, every episode that is still needed is.
        known = any(not failure.idle for failure in failures if failure.reason in SHARED)
        for failure in failures:
            answers += self._fail(failure, further, spare=failure.idle and known)
        self._send(further)
        return answers

    def _fail(self, failure: Failed, further: list[int], *, spare: bool) -> list[Failed]:
        """Nothing, and another attempt in `further`; or the failure, if that was the last attempt.
        spare: another episode is to blame, so this one loses no attempt.
        """
        life = self._lives.get(failure.episode)
        if life is None:
            return []
        life.lost = True
        if not life.awaited:
            return []  # perhaps it is abandoned next: replay it only once it is needed
        if not spare and life.attempt == self._most:
            del self._lives[failure.episode]
            return [replace(failure, attempts=life.attempt)]
        if not spare:
            life.attempt += 1
            life.alone = failure.reason in SHARED and life.attempt == self._most
        further.append(failure.episode)
        return []
