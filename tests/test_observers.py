"""Who is told of a run: what, in which order, and that none of them can end it."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.runs import metrics, train
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.curves import TensorBoard
from tutelage.distill.run.observers import Observer, Observers, make_observers
from tutelage.distill.run.training import Run, evaluate_model
from tutelage.evaluation import files
from tutelage.evaluation.run_folder import read_metrics

EVENTS = ("start", "doing", "step", "evaluating", "score", "written", "close")


class Killed(BaseException):
    """Ends a run as a SIGKILL would: nobody gets to save."""


class Diary(Observer):
    """Keeps what it is told, and fails where it is to."""

    def __init__(self, failing: str = "", error: type[BaseException] = OSError) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._failing, self._error = failing, error

    def __getattribute__(self, name: str) -> Any:
        if name not in EVENTS:
            return super().__getattribute__(name)

        def told(*what: Any) -> None:
            self.events.append((name, *what))
            if name == self._failing:
                raise self._error("broken\nfor ever")

        return told


def _config(folder: Path, models: dict[str, str], **journal: Any) -> RunConfig:
    """Two steps; an evaluation after the second."""
    sections = {"evaluation": {"every": 2, "episodes": 2}, "checkpoint": {"every": 1}}
    return runs.config(folder, models, steps=2, journal=journal, **sections)


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(point.step, point.value) for point in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


@pytest.mark.runs
class TestRun:
    def test_each_event_comes_in_its_place(self, tmp_path: Path, models: dict[str, str]) -> None:
        diary = Diary()
        config = _config(tmp_path / "run", models, observers=["console"])
        folder = train(config, diary)
        told = [event for event in diary.events if event[0] != "doing"]
        assert [event[:2] if event[0] in ("step", "written") else event[0] for event in told] == [
            "start", ("step", 0), ("written", 0),
            ("step", 1), "evaluating", "evaluating", "score", ("written", 1), "close",
        ]  # fmt: skip
        assert told[0] == ("start", config, 0)
        for event, line in zip(
            [e for e in told if e[0] == "written"], read_metrics(folder), strict=True
        ):
            _, step, task, found = event
            assert {"step": step, "task": task, **found} == line
        assert told[-2][3]["eval/math/greedy"] == told[-3][3]["value"]

    @pytest.mark.parametrize("failing", EVENTS)
    def test_one_that_fails_is_left_out_and_the_run_goes_on(
        self, failing: str, tmp_path: Path, models: dict[str, str], whole: Path
    ) -> None:
        """It is told of once, in one line; who comes after it is told everything."""
        broken, other = Diary(failing), Diary()
        config = _config(tmp_path / "run", models)
        with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning) as warned:
            patch.setattr(
                "tutelage.distill.run.training.make_observers",
                lambda *_, **__: Observers({"broken": broken, "other": other}),
            )
            folder = train(config)
        (said,) = [str(one.message) for one in warned if "observers" in str(one.message)]
        assert said.startswith(f"journal.observers: broken failed ({failing}: broken): it is told")
        assert [event[0] for event in broken.events].count(failing) == 1
        assert broken.events[-1][0] == "close"
        assert {event[0] for event in other.events} == set(EVENTS)
        assert metrics(folder) == metrics(whole)
        counted = [line.get("perf/observers_failed", 0) for line in read_metrics(folder)]
        before = {"start": 0, "doing": 0, "step": 1, "written": 1}  # lines without
        assert counted == [0] * before.get(failing, 2) + [1] * (2 - before.get(failing, 2))

    def test_a_full_disk_under_tensorboard_alone(
        self, tmp_path: Path, models: dict[str, str], whole: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = os.write

        def limited(descriptor: int, data: Any) -> int:
            if "tensorboard" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(files.os, "write", limited)
        with pytest.warns(UserWarning, match=r"tensorboard failed \(written: .*No space left"):
            folder = train(_config(tmp_path / "run", models))
        assert metrics(folder) == metrics(whole)
        assert (folder / "checkpoints" / "000002").is_dir()

    @pytest.mark.parametrize(
        ("event", "error", "stand", "again"),
        [
            ("step", Killed, 0, [0, 1]),
            ("written", Killed, 0, [0, 1]),
            ("written", KeyboardInterrupt, 0, [0, 1]),  # saved as learned and not written
            ("evaluating", KeyboardInterrupt, 1, [1]),
            ("score", KeyboardInterrupt, 1, [1]),
        ],
    )
    def test_a_run_that_goes_on_tells_each_step_once(
        self,
        event: str,
        error: type[BaseException],
        stand: int,
        again: list[int],
        tmp_path: Path,
        models: dict[str, str],
        whole: Path,
    ) -> None:
        """TensorBoard, told before who ends the run, forgets the point whose line is not there."""
        config = _config(tmp_path / "run", models, observers=["tensorboard", "console"])
        with pytest.raises(error):
            train(config, Diary(event, error))
        assert len(read_metrics(Path(config.run))) == stand
        diary = Diary()
        folder = train(config, diary)
        assert [told[1] for told in diary.events if told[0] == "written"] == again
        assert metrics(folder) == metrics(whole)
        for tag in ("math/loss/mean", "math/eval/math/greedy"):
            assert _curves(folder)[tag] == _curves(whole)[tag]
        assert [step for step, _ in _curves(folder)["math/loss/mean"]] == [0, 1]

    def test_evaluation_alone_writes_no_curves(
        self, tmp_path: Path, models: dict[str, str]
    ) -> None:
        diary = Diary()
        evaluate_model(_config(tmp_path / "run", models), models["one"], watch=diary)
        assert {event[0] for event in diary.events} == {"doing", "evaluating", "score", "close"}
        assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Path:
    """A run that nothing disturbs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return train(_config(tmp_path_factory.mktemp("whole") / "run", models))


class TestConfig:
    @pytest.mark.parametrize(
        ("journal", "observers"),
        [
            ({}, ("console", "tensorboard")),
            ({"tensorboard": True}, ("console", "tensorboard")),
            ({"tensorboard": False}, ("console",)),
            ({"observers": ["console"]}, ("console",)),
            ({"observers": []}, ()),
            ({"observers": ["tensorboard"], "tensorboard": True}, ("tensorboard",)),
            ({"observers": ["my_pkg.seen:Board"]}, ("my_pkg.seen:Board",)),
        ],
    )
    def test_two_keys_say_one_thing(
        self, journal: dict[str, Any], observers: tuple[str, ...], models: dict[str, str]
    ) -> None:
        found = _config(Path("run"), models, **journal).journal
        assert found.observers == observers
        assert found.tensorboard == ("tensorboard" in observers)
        again = _config(Path("run"), models, **found.model_dump(mode="json"))
        assert again.journal == found  # as RUN/config.yaml has it

    @pytest.mark.parametrize(
        ("journal", "said"),
        [
            ({"observers": ["tensorbord"]}, r"unknown observer 'tensorbord': did you mean 'tensor"),
            ({"observers": ["TensorBoard"]}, r"did you mean 'tensorboard'\?"),
            ({"observers": ["console", "console"]}, r"journal\.observers: each once"),
            (
                {"observers": ["tensorboard"], "tensorboard": False},
                r"journal: tensorboard is false, and observers are tensorboard: leave one",
            ),
            (
                {"observers": ["console"], "tensorboard": True},
                r"journal: tensorboard is true, and observers are console: leave one",
            ),
        ],
    )
    def test_what_cannot_be_meant_is_refused(
        self, journal: dict[str, Any], said: str, models: dict[str, str]
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            _config(Path("run"), models, **journal)

    def test_a_class_of_ones_own_is_found_by_its_module(
        self, tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "my_board.py").write_text(
            "from tutelage.distill.run.observers import Observer\n"
            "class Board(Observer):\n"
            "    def start(self, config, step):\n"
            "        self.out = open(config.run + '/board.txt', 'w')\n"
            "    def written(self, step, task, metrics):\n"
            "        self.out.write(f'{step} {task} {metrics[\"loss/mean\"]}\\n')\n"
            "    def close(self):\n"
            "        self.out.close()\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        config = _config(tmp_path / "run", models, observers=["my_board:Board"])
        folder = train(config)
        assert (folder / "board.txt").read_text().splitlines() == [
            f"{line['step']} {line['task']} {line['loss/mean']}" for line in read_metrics(folder)
        ]
        assert not (folder / "tensorboard").exists()

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("my_bord:Board", "ModuleNotFoundError: No module named 'my_bord'"),
            ("json:Board", "AttributeError: .*'Board'"),
            ("collections:Counter", "is no subclass of tutelage.*Observer"),
        ],
    )
    def test_one_that_cannot_be_made_is_refused_before_a_model_loads(
        self, name: str, said: str, tmp_path: Path, models: dict[str, str]
    ) -> None:
        config = _config(tmp_path / "run", models | {"student": "nowhere"}, observers=[name])
        with pytest.raises(ConfigError, match=rf"^journal\.observers: '{name}' .*{said}"):
            Run(config)

    def test_console_is_who_starts_the_run(self, models: dict[str, str]) -> None:
        for names, told in ((["console"], [("doing", "this")]), (["tensorboard"], [])):
            diary, config = Diary(), _config(Path("run"), models, observers=names)
            make_observers(config, diary, trains=False).doing("this")
            assert diary.events == told


class TestTensorBoard:
    def _board(self, folder: Path, models: dict[str, str]) -> TensorBoard:
        board = TensorBoard()
        board.start(_config(folder, models), 0)
        return board

    def test_one_point_a_step_named_by_task_and_there_before_the_end(
        self, tmp_path: Path, models: dict[str, str]
    ) -> None:
        board = self._board(tmp_path, models)
        several: Mapping[str, Any] = {"u/loss/mean": 0.5, "time/step": 2.0}
        board.written(0, "t", {"loss/mean": 1.5, "reward/success": 0, "who": "nobody"})
        board.written(1, "t", {"loss/mean": 1.25})
        board.written(2, "t+u", several)
        assert _curves(tmp_path) == {
            "t/loss/mean": [(0, 1.5), (1, 1.25)],
            "t/reward/success": [(0, 0.0)],
            "u/loss/mean": [(2, 0.5)],
            "time/step": [(2, 2.0)],
        }
        board.close()

    def test_a_resumed_run_replaces_what_came_after_its_checkpoint(
        self, tmp_path: Path, models: dict[str, str]
    ) -> None:
        first = self._board(tmp_path, models)
        for step in range(4):
            first.written(step, "t", {"loss/mean": float(step)})
        first.close()
        resumed = self._board(tmp_path, models)
        resumed.written(2, "t", {"loss/mean": 7.0})
        resumed.close()
        assert _curves(tmp_path) == {"t/loss/mean": [(0, 0.0), (1, 1.0), (2, 7.0)]}

    def test_nothing_of_it_runs_beside_the_training(
        self, tmp_path: Path, models: dict[str, str]
    ) -> None:
        """Ctrl-C in the queue of TensorBoard's own writer left a lock taken: two runs in 55
        that were interrupted waited for that thread for ever."""
        before = threading.active_count()
        board = self._board(tmp_path, models)
        board.written(0, "t", {"loss/mean": 1.5})
        assert threading.active_count() == before
        board.close()
