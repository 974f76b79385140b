"""Starts Ray for one run, behind a token and on this machine alone; or joins a cluster.

A Ray that is started here listens on the loopback address, obeys only who shows the run's own
random token (which its processes inherit in their environment), has no dashboard, and keeps its
files in a folder that only the user can read, deleted when it ends. A cluster that is joined is its
owner's affair: the user's token is shown to it, and a warning says so if it asks for none.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TOKEN_SINCE = "2.52"
"""The first Ray with token authentication."""

PATIENCE = 15.0
"""Seconds of waiting for Ray after which a line on stderr says so."""

LONGEST_FOLDER = 40
"""Characters. Ray's sockets have paths some 60 longer, and Linux allows 107 for a socket's path."""


@contextlib.contextmanager
def connected(address: str, *, attempts: int, modules: Sequence[str] = ()) -> Iterator[None]:
    """Connect to Ray for the block. address: `local`, `auto` or `ray://...`. modules: folders of
    packages for nodes that lack them.

    Raises:
        RuntimeError: Ray does not start, does not answer, or refuses the token; with the cure.
    """
    import ray

    options: dict[str, Any] = {"log_to_driver": True, "configure_logging": False}
    if modules:
        options["runtime_env"] = {"py_modules": [*modules]}
    # Ray's default is 15: on a machine that does anything else, its actors starve and the learner
    # waits for them. Read by a Ray that starts here, not by one that is joined.
    os.environ.setdefault("RAY_worker_niceness", "0")
    mode = _token_mode()
    if address != "local":
        _join(address, options, attempts)
        if not mode():
            _say(
                f"cluster.address: {address}: this cluster asks for no token, so whoever reaches it"
                " runs code there: start it with RAY_AUTH_MODE=token"
            )
        try:
            yield
        finally:
            ray.shutdown()
        return
    folder, failed = _folder(), False
    try:
        with _on_its_own():
            if not mode():
                raise RuntimeError("cluster: Ray did not take RAY_AUTH_MODE=token from this run")
            # a folder inside ours: Ray makes its own one readable for everybody
            _start(folder / "r", options, attempts)
        yield
    except RuntimeError:
        failed = True
        raise
    finally:
        ray.shutdown()
        _read_settings()  # forget this token: the next Ray of this process has another, or none
        if not failed:  # its logs tell why it failed
            shutil.rmtree(folder, ignore_errors=True)


def _token_mode() -> Callable[[], bool]:
    """A function that tells whether this process shows a token to Ray.

    Raises:
        RuntimeError: this Ray has no tokens.
    """
    import ray

    raylet: Any = importlib.import_module("ray._raylet")
    if not hasattr(raylet, "get_authentication_mode"):
        raise RuntimeError(
            f"cluster: Ray {ray.__version__} has no token authentication: whoever reaches its port"
            f" runs code here: install ray>={TOKEN_SINCE}, or leave cluster out"
        )
    return lambda: raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN


@contextlib.contextmanager
def _on_its_own() -> Iterator[None]:
    """Set what a Ray that starts inside reads. Its processes inherit that; processes that start
    after the block, such as those of environments, do not."""
    from ray._private import ray_constants

    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Without clusters Ray listens on the loopback address. The variable is named after Windows
        # and macOS, where that is the default; read at the import, hence the constant below.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }
    before = {name: os.environ.get(name) for name in (*own, "RAY_AUTH_TOKEN_PATH")}
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ.update(own)
    spans, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        _read_settings()
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = spans
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _read_settings() -> None:
    """Have Ray read its environment again: by itself it does so only when it is imported."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _folder() -> Path:
    """A new folder that only the user can enter (0700).

    Raises:
        RuntimeError: it cannot be made.
    """
    where = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(where) > LONGEST_FOLDER and "RAY_TMPDIR" not in os.environ:
        where = "/tmp"
    try:
        return Path(tempfile.mkdtemp(prefix="ray-", dir=where))
    except OSError as error:
        raise RuntimeError(
            f"cluster: no folder for Ray's files can be made in {where} ({error.strerror}): set"
            " RAY_TMPDIR to one that has room, with a short name"
        ) from None


@contextlib.contextmanager
def _deaf_to_terminals() -> Iterator[None]:
    """Processes that start inside ignore that the terminal closes: the run itself hears it, saves
    with their help, and ends them. (From Ctrl-C Ray shields its processes itself.)"""
    # a blocked signal stays blocked in children; a handler would not be inherited over exec
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(folder: Path, options: dict[str, Any], attempts: int) -> None:
    """Raises RuntimeError where Ray does not start."""
    import ray

    # Ray's default of 30 is too short on a busy machine
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    begun = time.monotonic()
    for attempt in range(1, attempts + 1):
        try:
            with (
                _told("cluster: Ray is starting on this machine, which takes long"),
                _signals(),
                _deaf_to_terminals(),
            ):
                ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **options)
            return
        except Exception as error:  # Ray raises a bare Exception where it was too slow
            ray.shutdown()
            what = _brief(error)
            if attempt == attempts:
                seconds = time.monotonic() - begun
                raise RuntimeError(
                    f"cluster: Ray did not start on this machine in {attempt} tries and"
                    f" {seconds:.0f} s ({what}): see whether it has memory, processes (ulimit -u),"
                    f" open files (ulimit -n) and room in /dev/shm and {folder} left, and the logs"
                    " there; without `cluster` the run needs no Ray"
                ) from error
            _say(f"cluster: Ray did not start ({what}); trying again")


def _join(address: str, options: dict[str, Any], attempts: int) -> None:
    """Raises RuntimeError where Ray does not answer, or wants another token."""
    import ray

    for attempt in range(1, attempts + 1):
        try:
            with _told(f"cluster.address: {address} has not answered yet"), _signals():
                ray.init(address=address, **options)
            return
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            ray.shutdown()
            _forget_client()
            if _unauthorized(error):  # Ray has no one class of error for it
                raise RuntimeError(
                    f"cluster.address: {address} wants a token, and this process has none or"
                    " another: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the cluster's"
                    " own (ray get-auth-token prints it there)"
                ) from None
            # Ray gives up on a ray:// client after 30 s, which a busy machine exceeds
            again = isinstance(error, ConnectionError)
            if attempt == attempts or not again:
                raise RuntimeError(
                    f"cluster.address: {address} did not answer in {attempt} tries"
                    f" ({_brief(error)}): is Ray running there (ray status), and for ray:// its"
                    " client server? One that wants a token wants it here, too: RAY_AUTH_MODE=token"
                    " and RAY_AUTH_TOKEN_PATH"
                ) from error


def _unauthorized(error: BaseException | None) -> bool:
    """Whether the error, or one of its causes, is about the token."""
    while error is not None:
        if any(word in f"{type(error).__name__} {error}" for word in ("uthenticat", "AuthToken")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _forget_client() -> None:
    """Leave the client mode, which Ray keeps after a `ray://` address that failed: the next cluster
    would be taken for a client's, too."""
    from ray._private.client_mode_hook import _explicitly_disable_client_mode

    _explicitly_disable_client_mode()


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Say on stderr what a run waits for, if the block takes longer than PATIENCE."""
    timer = threading.Timer(PATIENCE, _say, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Put SIGTERM's handler back afterwards: Ray sets its own, which ends the process unsaved."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # other threads may not set handlers; None: C code set the one before, and Python cannot
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _say(what: str) -> None:
    print(f"tutelage: {what}", file=sys.stderr, flush=True)
