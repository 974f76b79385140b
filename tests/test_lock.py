"""One run in a folder: who holds it, when it is free, and what whoever is refused is told."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.run import lock
from tutelage.distill.run.lock import Lock, Owner

HOLD = """
import sys
from pathlib import Path
from tutelage.distill.run.lock import Lock
try:
    held = Lock(Path(sys.argv[1]))
except ValueError as error:
    print(error, flush=True)
else:
    print("held", flush=True)
sys.stdin.read()
"""


def _hold(folder: Path) -> subprocess.Popen[str]:
    """A process that tries to take the folder, says what came of it, and lives until it is killed
    or its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without them, as some networks' are."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 1.0)


def _written(folder: Path, owner: Owner) -> None:
    folder.mkdir(parents=True)
    (folder / lock.NAME).write_text(json.dumps(asdict(owner)))


def _elsewhere() -> Owner:
    return replace(Owner.me(), host="far", boot="another", command="tutelage train far.yaml")


def test_a_second_process_is_told_who_the_first_is(folder: Path) -> None:
    first = _hold(folder)
    try:
        assert _said(first) == "held"
        with pytest.raises(ConfigError) as refused:
            Lock(folder)
        said = str(refused.value)
        for part in (str(folder), f"process {first.pid} on {os.uname().nodename}", "-c", "wait"):
            assert part in said
        assert "\n" not in said and (folder / lock.NAME).exists()
    finally:
        _end(first)


def test_one_that_was_killed_holds_nothing(folder: Path) -> None:
    first = _hold(folder)
    assert _said(first) == "held"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (folder / lock.NAME).exists()  # it could not tidy up
    Lock(folder).release()
    _end(first)


@pytest.mark.slow
def test_of_many_that_begin_at_once_one_has_it(folder: Path) -> None:
    for _ in range(3):
        all_ = [_hold(folder) for _ in range(5)]
        said = [_said(process) for process in all_]
        _end(*all_)
        assert said.count("held") == 1
        winner = all_[said.index("held")]
        assert all(f"process {winner.pid} " in one for one in said if one != "held")


def test_released_it_is_free_and_leaves_no_trace(folder: Path) -> None:
    with Lock(folder):
        assert [path.name for path in folder.iterdir()] == [lock.NAME]
        assert (folder / lock.NAME).stat().st_mode & 0o777 == 0o600
    assert not folder.exists()  # it was made for this, and nothing was written
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    with Lock(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_process_may_take_it_again(folder: Path) -> None:
    """A demo measures, trains and measures; a notebook's cell is run twice."""
    with Lock(folder):
        with Lock(folder):
            pass
        second = _hold(folder)
        assert "another run's" in _said(second)  # the inner one's end freed nothing
        _end(second)


@pytest.mark.parametrize("text", ["", "{}", "garbage", '{"pid": 1', "\x00\x00", "[1, 2]"])
def test_a_file_that_names_nobody_is_nobodys(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / lock.NAME).write_text(text)
    with Lock(folder):
        assert Owner.read(folder / lock.NAME) == replace(
            Owner.me(),
            since=Owner.read(folder / lock.NAME).since,  # type: ignore[union-attr]
        )


@pytest.mark.usefixtures("_no_locks")
class TestADiskWithoutLocks:
    @pytest.fixture(autouse=True)
    def _warned(self) -> Any:
        with pytest.warns(UserWarning, match="a disk without locks: two runs that begin"):
            yield

    def test_a_process_that_lives_holds_it(self, folder: Path) -> None:
        owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        born = lock._born(owner.pid)
        assert born is not None
        _written(folder, replace(Owner.me(), pid=owner.pid, born=born))
        with pytest.raises(ConfigError, match=f"process {owner.pid} on"):
            Lock(folder)
        owner.kill()
        owner.communicate()
        Lock(folder).release()

    def test_a_number_that_another_process_has_now_does_not(self, folder: Path) -> None:
        _written(folder, replace(Owner.me(), pid=os.getppid(), born="1"))
        Lock(folder).release()

    def test_nor_one_of_before_the_machine_was_started_again(self, folder: Path) -> None:
        _written(folder, replace(Owner.me(), boot="before"))
        Lock(folder).release()


@pytest.mark.usefixtures("_short")
class TestAnotherMachine:
    """Its kernel's locks may not be seen here: it is known by its signs of life."""

    def test_one_that_gives_none_is_gone(self, folder: Path) -> None:
        _written(folder, _elsewhere())
        with Lock(folder):
            assert Owner.read(folder / lock.NAME).host == os.uname().nodename  # type: ignore[union-attr]

    def test_one_that_does_holds_it(self, folder: Path) -> None:
        _written(folder, _elsewhere())
        over = threading.Event()

        def live() -> None:
            while not over.wait(0.05):
                os.utime(folder / lock.NAME)

        thread = threading.Thread(target=live)
        thread.start()
        try:
            with pytest.raises(ConfigError, match=r"on far, since .* \(tutelage train far\.yaml\)"):
                Lock(folder)
        finally:
            over.set()
            thread.join()

    def test_a_holder_gives_signs(self, folder: Path) -> None:
        with Lock(folder):
            path = folder / lock.NAME
            os.utime(path, (0, 0))
            waiting = threading.Event()
            while not path.stat().st_mtime:
                waiting.wait(0.05)


@pytest.mark.parametrize("place", ["a file", "below a file", "nowhere"])
def test_a_place_that_cannot_be_a_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    folder = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "nowhere": Path("/proc/nowhere/run"),
    }[place]
    with pytest.raises(ConfigError, match=rf"run: {folder} cannot be written to \(.+\): ") as no:
        Lock(folder)
    assert "\n" not in str(no.value)


def test_a_full_disk_is_told_before_a_model_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock, "put", full)
    with pytest.raises(ConfigError, match=r"cannot be written to \(No space left on device\)"):
        Lock(folder)
    monkeypatch.undo()
    Lock(folder).release()
