"""The process that holds environments: many instances, one per live episode, stepped in order.

`Host` is the part without a process, which a pool with `processes=0` uses directly. `main` serves
one in a child process (child.py): requests in, replies out, one message for a whole batch. A slow
or large batch is answered in parts, so that silence always means one slow request, not many quick
ones, and no message is ever longer than MAX_MESSAGE.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym

from tutelage.envs.child import MAX_MESSAGE, Connection, Disconnected, packed
from tutelage.envs.plugins import refusal

# ("reset", episode, seed, options) | ("act", episode, action) | ("drop", episode)
Request = tuple[Any, ...]
# (episode, observation, reward, terminated, truncated, info) | (episode, reason, detail)
Reply = tuple[Any, ...]

MAX_OBSERVATION = 1_000_000  # characters, by default: they fill the longest contexts there are
_DETAIL = 2000  # characters of a traceback that travel
_PLAIN = frozenset({str, int, float, bool, type(None), bytes})


class Garbage(Exception):
    """An environment answered with something that is not text in and text out."""


class Undecided(RuntimeError):
    """Raised by an environment that cannot say how an action went because the machine is too busy:
    the episode is repeated, and at last dropped, but never counted as unsolved.
    """


class Host:
    """Instances of one environment. One whose episode has ended is used again: they are costly to
    make.

    max_observation: characters of one observation; a longer one is garbage.
    """

    def __init__(self, env_id: str, env_args: Mapping[str, Any], *, max_observation: int) -> None:
        self._make = lambda: gym.make(env_id, disable_env_checker=True, **env_args)
        self._most, self._process = max_observation, os.getpid()
        self._live: dict[int, gym.Env[Any, Any]] = {}
        self._free = [self._make()]  # shows at once whether the id and the options are right
        self._count = num_episodes(self._free[0])

    def probe(self) -> dict[str, Any]:
        """What the pool must know before the first reset."""
        return {"num_episodes": self._count}

    def handle(self, request: Request) -> Reply | None:
        """Play one request. An exception, an invalid answer or a sys.exit of the environment ends
        that episode only.
        """
        episode = request[1]
        try:
            if request[0] == "reset":
                return self._reset(episode, request[2], request[3])
            if request[0] == "act":
                return self._act(episode, request[2])
            self._release(episode)
            return None
        except KeyboardInterrupt:  # the user's
            raise
        except Garbage as error:
            return self._failed(episode, "garbage", str(error))
        except Undecided as error:
            return self._failed(episode, "undecided", str(error))
        except BaseException:
            return self._failed(episode, "raised", traceback.format_exc())
        finally:
            if os.getpid() != self._process:  # it forked, and this is the child: two would answer
                os._exit(1)

    def close(self) -> None:
        for env in (*self._live.values(), *self._free):
            _close(env)
        self._live.clear()
        self._free.clear()

    def _reset(self, episode: int, seed: int, options: dict[str, Any]) -> Reply:
        env = self._live.get(episode)
        if env is None:
            env = self._live[episode] = self._free.pop() if self._free else self._make()
        result = env.reset(seed=seed, options=options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Garbage(f"reset returned {_short(result)}, not (observation, info)")
        return (episode, *self._checked(result[0], 0.0, False, False, result[1]))

    def _act(self, episode: int, action: str) -> Reply:
        result = self._live[episode].step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise Garbage(f"step returned {_short(result)}, not Gymnasium's five values")
        checked = self._checked(*result)
        if checked[2] or checked[3]:
            self._release(episode)
        return (episode, *checked)

    def _checked(
        self, observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any
    ) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """The five in plain types, with `info["success"]`; Garbage if they are not what they should
        be.

        An environment that does not say whether it succeeded is taken to have done so if it
        terminated with a positive reward.
        """
        if not isinstance(observation, str):
            raise Garbage(f"the observation is {_short(observation)}, not text")
        if len(observation) > self._most:
            raise Garbage(
                f"the observation has {len(observation)} characters, and rollout.max_observation"
                f" allows {self._most}"
            )
        _check_text("the observation", observation)
        real = type(reward) is float or isinstance(reward, numbers.Real)
        amount = float(reward) if real else math.nan
        if not math.isfinite(amount):
            raise Garbage(f"the reward is {_short(reward)}, not a finite number")
        if type(info) is not dict and not isinstance(info, Mapping):
            raise Garbage(f"info is {_short(info)}, not a dict")
        ended = _flag("terminated", terminated)
        plain = _plain_dict(info)
        known = "success" in info
        success = _flag("info['success']", info["success"]) if known else ended and amount > 0
        plain["success"] = success
        return str(observation), amount, ended, _flag("truncated", truncated), plain

    def _release(self, episode: int) -> None:
        env = self._live.pop(episode, None)
        if env is not None:
            self._free.append(env)

    def _failed(self, episode: int, reason: str, detail: str) -> Reply:
        """An environment that failed may be in any state: it is not used again."""
        env = self._live.pop(episode, None)
        if env is not None:
            _close(env)
        # in characters that every file and terminal takes
        return (episode, reason, detail[-_DETAIL:].encode(errors="backslashreplace").decode())


def _close(env: gym.Env[Any, Any]) -> None:
    """Close an environment that is not used again: what it raises then matters to nobody."""
    try:
        env.close()
    except KeyboardInterrupt:  # the user's
        raise
    except BaseException:
        return


def num_episodes(env: gym.Env[Any, Any]) -> int | None:
    """How many games an environment says that it has; None: it does not say.

    Raises:
        ValueError: something else than a whole number above 0.
    """
    bare = env.unwrapped
    name = "num_episodes" if hasattr(bare, "num_episodes") else "num_games"
    value = getattr(bare, name, None)
    if value is None:
        return None
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{name} is {_short(value)}: say how many games reset(options={{'index': i}}) takes, a"
            " whole number above 0, or leave it out"
        )
    return int(value)


def _check_text(name: str, text: str) -> None:
    """Garbage if no tokenizer and no file could take it: half of a surrogate pair."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Garbage(
            f"{name} has half of a surrogate pair, {text[error.start]!r}, at character"
            f" {error.start}: decode with errors='replace'"
        ) from None


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_") or (type(value) is int and value in (0, 1)):
        return bool(value)  # NumPy's, or 0 and 1
    raise Garbage(f"{name} is {_short(value)}, not a bool")


def _short(value: Any) -> str:
    try:
        return repr(value)[:200]
    except Exception:
        return f"a {type(value).__name__}"


_DROPPED = object()


def _plain(value: Any) -> Any:
    """`value` in built-in types, or _DROPPED: objects do not travel."""
    if type(value) in _PLAIN:
        if type(value) is str:
            _check_text("info", value)
        return value
    if isinstance(value, (list, tuple)):
        if {str}.issuperset(map(type, value)):  # a list of commands, most often
            _check_text("info", "".join(value))
            return value[:]  # a copy: in this process an environment might go on changing its own
        items = [_plain(item) for item in value]
        kept = [item for item in items if item is not _DROPPED]
        return tuple(kept) if isinstance(value, tuple) else kept
    if isinstance(value, Mapping):
        return _plain_dict(value)
    if isinstance(value, str):
        return _plain(str(value))
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return _plain(value.tolist())
    return _DROPPED


def _plain_dict(info: Mapping[Any, Any]) -> dict[Any, Any]:
    plain = {}
    for key, value in info.items():
        sent = _plain(value)
        if sent is not _DROPPED and type(key) in _PLAIN:
            plain[key] = sent
    return plain


# --- the process --------------------------------------------------------------------------------


def main(connection: Connection) -> None:
    """Serve one environment, which the first message describes."""
    messages = iter(connection)
    env_id, env_args, max_observation, part_seconds = next(messages)
    try:
        host = Host(env_id, env_args, max_observation=max_observation)
        connection.send(("ready", host.probe()))
    except KeyboardInterrupt:  # the user's
        raise
    except BaseException as error:  # a sys.exit, too
        connection.send(("refused", refusal(env_id, error)))
        return
    try:
        for requests in messages:
            _serve(connection, host, requests, part_seconds)
    except Disconnected as error:
        sys.exit(f"tutelage: {env_id}: its process lost its connection: {error}")
    host.close()


def _serve(
    connection: Connection, host: Host, requests: Sequence[Request], part_seconds: float
) -> None:
    replies: list[Reply] = []
    flushed = time.monotonic()
    for request in requests:
        reply = host.handle(request)
        if reply is not None:
            replies.append(reply)
        if replies and time.monotonic() - flushed > part_seconds:
            _reply(connection, replies)
            replies, flushed = [], time.monotonic()
    if replies:
        _reply(connection, replies)


def _reply(connection: Connection, replies: list[Reply]) -> None:
    """Send replies in one message, or in several where one would be too long. A reply that alone is
    too long becomes garbage.
    """
    payload = packed(("replies", replies))
    if len(payload) <= MAX_MESSAGE:
        connection.send_packed(payload)
    elif len(replies) > 1:
        half = len(replies) // 2
        _reply(connection, replies[:half])
        _reply(connection, replies[half:])
    else:
        said = f"its observation and info take {len(payload)} bytes, more than {MAX_MESSAGE}"
        _reply(connection, [(replies[0][0], "garbage", said)])
