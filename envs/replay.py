"""Episodes that outlive their process: led to where they were, they go on as if nothing had
happened.

What led an episode there is known: its seed and its actions. So its player sees nothing of a fault,
neither an order that changed nor a batch that was smaller, which would show in the last bits of
what an engine says. Nobody knows whose fault it was when a process dies; an episode's last attempt
is made while nothing else is on the way, so that only its own fault can cost it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from tutelage.envs.pool import Act, EnvironmentPool, Failed, Observed, Reset

SHARED = ("died", "timeout")
"""Reasons for which all episodes of a process are lost, whoever is to blame."""


class _Life:
    """One episode: what was asked of it, and how far its present instance has come."""

    def __init__(self, reset: Reset) -> None:
        self.asked: list[Reset | Act] = [reset]
        self.seen: list[str] = []  # the observations that were passed on
        self.attempt, self.at = reset.attempt, 0  # at: how many requests its instance has answered
        self.alone = False
        self.lost = False  # its instance is gone, and nobody needed it since

    @property
    def awaited(self) -> bool:
        return len(self.seen) < len(self.asked)

    def repeats(self, result: Observed) -> bool:
        """Whether an answer that was passed on before is the same again."""
        ended = result.terminated or result.truncated
        return not ended and result.observation == self.seen[self.at]


class ReplayingPool:
    """An environment pool with the same calls, in which `Failed` is final: no attempt is left, or
    (reason `differs`) the environment does not repeat itself, and the episode must begin anew.

    Args:
        pool: the environments; not closed here.
        attempts: at an episode.
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
                self._lives[request.episode].asked.append(request)
        self._ask([request.episode for request in requests])

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

    def _ask(self, episodes: Iterable[int]) -> None:
        """Send the next request of each, or let it wait until nothing else is on the way."""
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
        if life.lost:
            life.lost, life.at = False, 0
        return life.asked[life.at]

    def _differs(self, episode: int) -> Failed:
        life = self._lives.pop(episode)
        self._pool.abandon([episode])
        detail = "its process was lost, and led there again it answered otherwise"
        return Failed(episode=episode, reason="differs", detail=detail, attempts=life.attempt)

    def _settle(self, results: Sequence[Observed | Failed]) -> list[Observed | Failed]:
        """The answers that somebody waits for; what leads other episodes there is asked for."""
        failures = [result for result in results if isinstance(result, Failed)]
        gone = {failure.episode for failure in failures}
        answers: list[Observed | Failed] = []
        further: list[int] = []
        for result in results:
            life = self._lives.get(result.episode)
            if life is None or isinstance(result, Failed):
                continue
            if life.at == len(life.seen):
                life.seen.append(result.observation)
                answers.append(result)
            elif not life.repeats(result):
                answers.append(self._differs(result.episode))
                continue
            life.at += 1
            if life.awaited and result.episode not in gone:
                further.append(result.episode)
        # To blame are those that owed the process an answer; where none did, all that are needed.
        known = any(not failure.idle for failure in failures if failure.reason in SHARED)
        for failure in failures:
            answers += self._fail(failure, further, spare=failure.idle and known)
        self._ask(further)
        return answers

    def _fail(self, failure: Failed, further: list[int], *, spare: bool) -> list[Failed]:
        """Another attempt, which joins `further`; or the failure, if that was the last."""
        life = self._lives.get(failure.episode)
        if life is None:
            return []
        life.lost = True
        if not life.awaited:
            return []  # nobody may ever need it again
        if not spare and life.attempt == self._most:
            del self._lives[failure.episode]
            return [replace(failure, attempts=life.attempt)]
        if not spare:
            life.attempt += 1
            life.alone = failure.reason in SHARED and life.attempt == self._most
        further.append(failure.episode)
        return []
