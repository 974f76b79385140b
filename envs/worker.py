"""The process that holds environments: many instances, one per live episode, stepped in order.

`Host` is the part without a process, which a pool with `processes=0` uses directly. `main` serves
one over
a socket: a length-prefixed pickle of requests in, of replies out, one message for a whole batch. A
slow batch is answered in parts, so that silence always means one slow request, not many quick ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import math
import numbers
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym

# ("reset", episode, seed, options) | ("act", episode, action) | ("drop", episode)
Request = tuple[Any, ...]
# (episode, observation, reward, terminated, truncated, info) | (episode, reason, detail)
Reply = tuple[Any, ...]

HEADER = struct.Struct("!Q")  # the length of the pickle that follows, in bytes
GRACE = 2.0  # seconds that environments get to close when the pool or its process is gone
_DETAIL = 2000  # characters of a traceback that travel
_PLAIN = frozenset({str, int, float, bool, type(None), bytes})


class Garbage(Exception):
    """An environment answered with something that is not text in and text out."""


class Undecided(Exception):
    """Raised by an environment that cannot say how an action went, for reasons that are the
    machine's: the episode is played again, and lost at last, but never counted as a failure.
    """


class Host:
    """Instances of one environment, used again when their episode ends: they are costly to make."""

    def __init__(self, env_id: str, env_args: Mapping[str, Any]) -> None:
        self._make = lambda: gym.make(env_id, disable_env_checker=True, **env_args)
        self._live: dict[int, gym.Env[Any, Any]] = {}
        self._free = [self._make()]  # shows at once whether the id and the options are right

    def probe(self) -> dict[str, Any]:
        """What a caller must know before the first reset."""
        env = self._free[0].unwrapped
        count = getattr(env, "num_episodes", getattr(env, "num_games", None))
        return {"num_episodes": None if count is None else int(count)}

    def handle(self, request: Request) -> Reply | None:
        """Play one request. What an environment raises or makes up ends its own episode only."""
        episode = request[1]
        try:
            if request[0] == "reset":
                return self._reset(episode, request[2], request[3])
            if request[0] == "act":
                return self._act(episode, request[2])
            self._release(episode)
            return None
        except Garbage as error:
            self._discard(episode)
            return (episode, "garbage", str(error))
        except Undecided as error:
            self._discard(episode)
            return (episode, "undecided", str(error))
        except Exception:
            self._discard(episode)
            return (episode, "raised", traceback.format_exc()[-_DETAIL:])

    def close(self) -> None:
        for env in (*self._live.values(), *self._free):
            with contextlib.suppress(Exception):
                env.close()
        self._live.clear()
        self._free.clear()

    def _reset(self, episode: int, seed: int, options: dict[str, Any]) -> Reply:
        env = self._live.get(episode)
        if env is None:
            env = self._live[episode] = self._free.pop() if self._free else self._make()
        result = env.reset(seed=seed, options=options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Garbage(f"reset returned {_short(result)}, not (observation, info)")
        return (episode, *_checked(result[0], 0.0, False, False, result[1]))

    def _act(self, episode: int, action: str) -> Reply:
        result = self._live[episode].step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise Garbage(f"step returned {_short(result)}, not Gymnasium's five values")
        checked = _checked(*result)
        if checked[2] or checked[3]:
            self._release(episode)
        return (episode, *checked)

    def _release(self, episode: int) -> None:
        env = self._live.pop(episode, None)
        if env is not None:
            self._free.append(env)

    def _discard(self, episode: int) -> None:
        """An environment that failed may be in any state: it is not used again."""
        env = self._live.pop(episode, None)
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()


def _checked(
    observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any
) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """The five in plain types, with `info["success"]`; Garbage if they are not what they should be.

    An environment that does not say whether it succeeded is taken to have done so if it terminated
    with a positive reward.
    """
    if not isinstance(observation, str):
        raise Garbage(f"the observation is {_short(observation)}, not text")
    real = type(reward) is float or isinstance(reward, numbers.Real)
    amount = float(reward) if real else math.nan
    if not math.isfinite(amount):
        raise Garbage(f"the reward is {_short(reward)}, not a finite number")
    if type(info) is not dict and not isinstance(info, Mapping):
        raise Garbage(f"info is {_short(info)}, not a dict")
    ended = _flag("terminated", terminated)
    plain = _plain_dict(info)
    known = "success" in info
    plain["success"] = _flag("info['success']", info["success"]) if known else ended and amount > 0
    return str(observation), amount, ended, _flag("truncated", truncated), plain


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
        return value
    if isinstance(value, (list, tuple)):
        if _PLAIN.issuperset(map(type, value)):  # a list of commands, most often
            return value[:]  # a copy: in this process an environment might go on changing its own
        items = [_plain(item) for item in value]
        kept = [item for item in items if item is not _DROPPED]
        return tuple(kept) if isinstance(value, tuple) else kept
    if isinstance(value, Mapping):
        return _plain_dict(value)
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return _plain(value.tolist())
    return _DROPPED


def _plain_dict(info: Mapping[Any, Any]) -> dict[Any, Any]:
    plain = {}
    for key, value in info.items():
        sent = value if type(value) in _PLAIN else _plain(value)
        if sent is not _DROPPED and type(key) in _PLAIN:
            plain[key] = sent
    return plain


# --- the process --------------------------------------------------------------------------------


def main() -> None:
    """Serve one environment; the arguments are a socket and whether to die with the parent."""
    faulthandler.enable()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # an engine that prints disturbs no caller
    connection = socket.socket(fileno=int(sys.argv[1]))
    if sys.argv[2] == "1":
        die_with_parent()
    threading.Thread(target=_watch, args=(connection,), daemon=True).start()
    messages = _messages(connection)
    env_id, env_args, part_seconds = next(messages)
    try:
        host = Host(env_id, env_args)
        _send(connection, ("ready", host.probe()))
    except Exception as error:
        _send(connection, ("refused", " ".join(str(error).split()) or type(error).__name__))
        return
    for requests in messages:
        _serve(connection, host, requests, part_seconds)
    host.close()


def _serve(
    connection: socket.socket, host: Host, requests: Sequence[Request], part_seconds: float
) -> None:
    replies: list[Reply] = []
    flushed = time.monotonic()
    for request in requests:
        reply = host.handle(request)
        if reply is not None:
            replies.append(reply)
        if replies and time.monotonic() - flushed > part_seconds:
            _send(connection, ("replies", replies))
            replies, flushed = [], time.monotonic()
    if replies:
        _send(connection, ("replies", replies))


def _send(connection: socket.socket, message: Any) -> None:
    payload = pickle.dumps(message, protocol=5)
    connection.sendall(HEADER.pack(len(payload)) + payload)


def _messages(connection: socket.socket) -> Iterator[Any]:
    """The parent's messages until it hangs up."""
    stream = connection.makefile("rb")
    while len(header := stream.read(HEADER.size)) == HEADER.size:
        payload = stream.read(HEADER.unpack(header)[0])
        yield pickle.loads(payload)


def die_with_parent() -> None:
    """Linux kills us, stopped or not, when the thread that started us ends; so this is asked for in
    a main thread only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _watch(connection: socket.socket) -> None:
    """When the parent hangs up: a moment to close the environments, then the end of the whole
    session.
    """
    poll = select.poll()
    poll.register(connection, getattr(select, "POLLRDHUP", 0) | select.POLLHUP)
    while not poll.poll():
        pass
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
