"""One run in a folder: a lock that names its owner.

The kernel holds the lock on RUN/.lock (flock) as long as the owner's process lives: after a crash,
or a SIGKILL, it is free. The file's text names the owner for whoever is refused. It also serves
where flock does not: on a disk without locks, or on a shared one that does not pass locks between
machines. There the owner touches the file every few seconds, and one that stops doing so is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tutelage.distill.config.credentials import hidden
from tutelage.distill.config.faults import ConfigError
from tutelage.evaluation.files import put

NAME = ".lock"
BEAT = 5.0
"""Seconds between two touches of the file by its owner."""
SILENCE = 4 * BEAT
"""Seconds without one after which an owner on another machine counts as gone. Several beats: a
busy machine, or a network's disk, may be late with one."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of flock on a disk without locks; which one differs from disk to disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process. boot: the id of its machine's current boot. born: when the process started, in
    ticks since that boot. Pids are used again; (boot, pid, born) is not."""

    pid: int
    host: str
    boot: str
    born: str
    since: str
    command: str

    @classmethod
    def me(cls) -> Owner:
        return cls(
            pid=os.getpid(),
            host=platform.node(),
            boot=_boot(),
            born=_born(os.getpid()) or "",
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            command=hidden(shlex.join(sys.argv)),  # who is refused reads it: no keys
        )

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """The owner that the file names; None: it is empty or cannot be read."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def same(self, other: Owner) -> bool:
        """Whether both are the same process."""
        # `since` is when the folder was taken, which one process may do twice.
        mine, theirs = (asdict(one) | {"since": "", "command": ""} for one in (self, other))
        return bool(mine == theirs)

    def lives_here(self) -> bool:
        """Whether this owner, a process of this machine, is still alive."""
        return self.boot == _boot() and _born(self.pid) == self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


class Lock:
    """Holds `folder` until `release`. The process that holds it may take it again, to no effect.

    Raises:
        ConfigError: another process holds it (names which); or it cannot be written, and why.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._descriptor = folder / NAME, -1
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take(Owner.me())
        except OSError as error:
            self.release()
            raise ConfigError(
                f"run: {folder} cannot be written to ({error.strerror}): make it a folder of yours"
                " with room in it, or choose another"
            ) from None
        except BaseException:
            self.release()
            raise

    def _take(self, me: Owner) -> None:
        descriptor, locked = self._open()
        owner = Owner.read(self._path)
        for _ in range(20):  # a second in all
            if owner is not None or locked is not False:
                break
            time.sleep(0.05)  # the owner has the lock, and is about to write who it is
            owner = Owner.read(self._path)
        if owner is not None and owner.same(me):  # taken before, by this process
            os.close(descriptor)
            return
        if locked is False or (owner is not None and self._lives(owner, locked=bool(locked))):
            os.close(descriptor)
            raise ConfigError(
                f"run: {self._path.parent} is another run's: {owner or 'who cannot be read'}: wait"
                " until it ends, stop it, or choose another folder"
            )
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        put(descriptor, json.dumps(asdict(me)).encode())
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def _open(self) -> tuple[int, bool | None]:
        """The file, and whether the kernel gave us its lock; None: the disk has no locks."""
        while True:
            # 0600: the owner's command line stands in it, and may hold a key. O_APPEND and no
            # O_TRUNC: until the lock is ours the text is another owner's.
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return descriptor, False
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    raise
                warnings.warn(
                    f"{self._path.parent} lies on a disk without locks: two runs that begin there"
                    " in the same second would not notice each other",
                    stacklevel=4,
                )
                return descriptor, None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    return descriptor, True
            # The last owner removed the file between our open and our flock: what we have locked
            # has no name any more, and the next run would lock a new file beside it.
            os.close(descriptor)

    def _lives(self, owner: Owner, *, locked: bool) -> bool:
        """Whether the named owner still holds the folder, although flock did not refuse us."""
        if owner.boot == _boot() and locked:
            return False  # the same kernel gave us the lock: the owner has ended
        if owner.host == platform.node():
            return owner.lives_here()
        # On another machine: watch for its next touch. The clocks of two machines differ, so that
        # only a change of the time counts, not its age.
        deadline, last = time.monotonic() + SILENCE, self._sign()
        while time.monotonic() < deadline:
            time.sleep(BEAT / 4)
            if self._sign() != last:
                return True
        return False

    def _sign(self) -> int:
        """When the file was last touched. Opened for it: NFS answers a bare stat from its cache."""
        with self._path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def release(self) -> None:
        """Leave the folder to others; may be called again. An empty folder is removed."""
        if self._descriptor >= 0:
            self._over.set()
            if self._thread is not None:
                self._thread.join()  # before the close: the number may become another file's
            owner = Owner.read(self._path)
            with contextlib.suppress(OSError):
                if owner is None or owner.same(Owner.me()):  # not what another one took since
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _boot() -> str:
    """The id of this machine's current boot; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process started, in ticks since boot; None: there is no such process."""
    try:
        # Field 22. Split after the last ")": the second field is the program's name, in brackets,
        # which may hold spaces and brackets. State Z is a zombie: ended, and not waited for.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else rest[18]
    except OSError:
        return None
