"""What Ctrl-C, SIGTERM and a closed terminal do, and what is said of it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs
from tutelage.distill.cli import demo
from tutelage.distill.cli import main as cli
from tutelage.distill.cli.signals import Ended, Signals
from tutelage.distill.run import training
from tutelage.distill.run.progress import ConsoleObserver
from tutelage.distill.run.training import Run

pytestmark = pytest.mark.runs


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Whoever runs these tests may ignore SIGINT: a shell's background job does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_with_nothing_to_save_the_first_ends(self, number: int) -> None:
        before = signal.getsignal(number)
        with Signals() as signals, pytest.raises(Ended) as ended:
            _send(number)
        assert signals.code == 128 + number == 128 + ended.value.number
        assert ended.value.__notes__ == [
            "there was nothing to save; the same command begins this again"
        ]
        assert signal.getsignal(number) == before

    def test_else_the_first_stops_and_the_second_ends(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        stops: list[int] = []
        with Signals() as signals:
            signals.stop = lambda: stops.append(1)
            _send(signal.SIGTERM)
            assert capfd.readouterr().err == "\ntutelage: saving after this step\n"
            with pytest.raises(Ended):
                _send(signal.SIGINT)
        assert stops == [1] and signals.code == 143

    def test_ctrl_c_says_at_once_what_it_does(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Signals() as signals:
            signals.stop = lambda: None
            _send()
        said = "\ntutelage: saving after this step; Ctrl-C again ends at once\n"
        assert capfd.readouterr().err == said

    def test_what_was_ignored_stays_so(self) -> None:
        """nohup, and a background job of a shell without job control."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as signals:
            _send(signal.SIGHUP)
        assert not signals.number

    def test_a_terminal_that_is_gone_is_not_written_to(self) -> None:
        """In a process of its own, whose output is one end of a terminal and whose errors go to a
        file: that stays."""
        code = (
            "import os, signal\n"
            "from tutelage.distill.cli.signals import Signals\n"
            "with Signals() as signals:\n"
            "    signals.stop = lambda: None\n"
            "    input()\n"
            "    os.kill(os.getpid(), signal.SIGHUP)\n"
            "    print('to nobody', flush=True)\n"
            "    os.write(2, b'to a file')\n"
            "raise SystemExit(signals.code)\n"
        )
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=subprocess.PIPE,
        )
        os.close(theirs)
        os.close(ours)  # it hangs up
        _, errors = process.communicate(b"\n")
        assert process.returncode == 128 + signal.SIGHUP
        assert errors.endswith(b"to a file")


@pytest.fixture
def path(tmp_path: Path, models: dict[str, str]) -> Path:
    """A configuration of three steps."""
    given = {"objective": {"k": 4}, "evaluation": {"episodes": 2, "modes": ["greedy"]}}
    config = runs.data(tmp_path / "run", models, **given)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """The user presses Ctrl-C so often when a step is told of."""
    tell = ConsoleObserver.step

    def told(self: Any, number: int, task: str, metrics: Any) -> None:
        tell(self, number, task, metrics)
        for _ in range(times if number == step else 0):
            _send()

    monkeypatch.setattr(ConsoleObserver, "step", told)


class TestTrain:
    def test_the_first_saves_and_says_where(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with monkeypatch.context() as patch:
            _at_step(patch, 0)
            assert _main("train", str(path)) == 130
        saved = path.parent / "run" / "checkpoints" / "000001"
        assert saved.is_dir()
        said = capfd.readouterr()
        assert f"stopped; saved as {saved}; the same command resumes" in _words(said.out)
        assert _main("train", str(path)) == 0
        assert "resuming at step 1 of 3" in _words(capfd.readouterr().out)

    def test_the_second_says_what_is_lost(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        _at_step(monkeypatch, 1, times=2)
        assert _main("train", str(path)) == 130
        assert not (path.parent / "run" / "checkpoints").exists()
        said = _words(capfd.readouterr().err)
        assert "tutelage: stopped tutelage: " in said
        assert said.endswith("no checkpoint yet: 2 steps lost; the same command begins anew")

    def test_while_models_load_nothing_is_lost(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(training, "make_learner", lambda *_: _send())
        assert _main("train", str(path)) == 130
        assert _words(capfd.readouterr().err).endswith(
            "tutelage: stopped tutelage: there was nothing to save; the same command begins this"
            " again"
        )
        assert not (path.parent / "run").exists()

    def test_a_run_folder_that_is_in_use(
        self, path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        hold = (
            "import sys, pathlib, tutelage.distill.run.lock as l; l.Lock(pathlib.Path(sys.argv[1]))"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", f"{hold}; print(flush=True); input()", path.parent / "run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        for command in ("train", "eval"):  # whoever only evaluates takes nothing away
            code = _main(command, str(path))
            said = capfd.readouterr().err
            if command == "eval":
                assert code == 0 and (path.parent / "run" / "eval.json").is_file()
            else:
                (line,) = said.splitlines()
                assert code == 2 and f"is another run's: process {other.pid} on" in line
        other.kill()
        other.communicate()


@pytest.mark.parametrize("out", ["folder", "config.yaml/eval.json", "/proc/nowhere/eval.json"])
def test_an_evaluation_that_could_not_be_written_is_not_made(
    path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (path.parent / "folder").mkdir()
    monkeypatch.setattr(training, "evaluate_model", lambda *_, **__: pytest.fail("it was made"))
    assert _main("eval", str(path), "--out", str(path.parent / out)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"tutelage: {path.parent / out} cannot be written (")
    assert not (path.parent / "run").exists()


def _words(text: str) -> str:
    return " ".join(text.split())


class TestDemo:
    def test_it_goes_on_wherever_it_was_stopped(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        kept = path.parent / "run" / "demo.json"

        class Pressed(Exception):
            pass

        with monkeypatch.context() as patch:  # while the teachers are measured
            patch.setattr(demo, "_teachers", lambda *_: _send())
            with pytest.raises(KeyboardInterrupt):
                demo.run_demo(path, [])
        assert json.loads(kept.read_text()).keys() == {"before"}
        with monkeypatch.context() as patch:  # in training
            _at_step(patch, 1)
            assert demo.run_demo(path, []) == 130
        measured = json.loads(kept.read_text())
        assert measured.keys() == {"before", "teacher"}
        with monkeypatch.context() as patch:  # while what came of it is measured
            patch.setattr(Run, "evaluate", _leaving)
            assert demo.run_demo(path, []) == 130
        assert json.loads(kept.read_text()) == measured
        with monkeypatch.context() as patch:
            patch.setattr(demo, "evaluate_model", lambda *_, **__: pytest.fail("it was kept"))
            assert demo.run_demo(path, []) == 0
        assert json.loads(kept.read_text()).keys() == {"before", "teacher", "after"}
        assert "saved as" in _words(capfd.readouterr().out)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", '{"before": 3}', '{"before": {"math": {}}, "teacher": {}}', "\x00"],
    )
    def test_a_damaged_file_is_measured_again(
        self, path: Path, text: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        kept = path.parent / "run" / "demo.json"
        kept.parent.mkdir()
        kept.write_text(text)
        assert demo.run_demo(path, ["steps=1"]) == 0
        assert f"{kept} is damaged (" in _words(capfd.readouterr().out)
        assert json.loads(kept.read_text())["before"]["math"]["greedy"]["n"] == 2


def _leaving(run: Run, modes: Any) -> dict[str, Any]:
    _send()
    raise training.Stopped
