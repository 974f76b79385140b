"""Whatever ends a run, and wherever: nothing is lost that could be saved, and the same command
resumes, bit-identical."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.journal import Journal
from tutelage.distill.run.observers import Observer, Observers
from tutelage.distill.run.routing import Routing
from tutelage.distill.run.training import Run, evaluate_model
from tutelage.distill.student.learner import Learner
from tutelage.evaluation import evaluate, files, run_folder
from tutelage.scheduler.placement import InProcess

pytestmark = pytest.mark.runs

STEPS = 4


def _config(folder: Path, models: dict[str, str], **sections: Any) -> RunConfig:
    """Four steps of two short replies; an evaluation after the second and the last."""
    given = {
        "steps": STEPS,
        "objective": {"k": 4},
        "evaluation": {"every": 2, "episodes": 2, "final": True, "modes": ["greedy"]},
        "checkpoint": {"every": 3, "best": False},
    }
    return runs.config(folder, models, **given | sections)


def _content(folder: Path) -> dict[str, Any]:
    """All that may not differ."""
    weights = runs.weights(folder, STEPS)
    return {
        "metrics": runs.metrics_bytes(folder),
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "scores": json.loads((folder / "eval.json").read_text()),
        **runs.episodes(folder),
    }


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]
) -> Callable[..., dict[str, Any]]:
    """What a run of these sections comes to that nothing disturbs."""
    found: dict[str, dict[str, Any]] = {}

    def undisturbed(**sections: Any) -> dict[str, Any]:
        key = str(sections)
        if key not in found:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            found[key] = _content(runs.train(_config(folder, models, **sections)))
        return found[key]

    return undisturbed


class Failing:
    """Raises at the n-th call."""

    def __init__(self, function: Any, number: int, error: BaseException) -> None:
        self._function, self._left, self._error = function, number, error

    def __get__(self, owner: Any, kind: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == -1:
                raise self._error
            return self._function(owner, *args, **options)

        return call


PLACES: dict[str, tuple[Any, str, int, int]] = {
    # (where, which call, steps that are learned then)
    "sync": (InProcess, "sync", 1, 1),
    "rollout": (InProcess, "start", 1, 1),
    "scoring": (Routing, "batch", 2, 2),
    "episodes": (Journal, "write_episodes", 2, 2),
    "update": (Learner, "update", 2, 2),
    "observers": (Observers, "step", 1, 2),
    "evaluation": (Run, "evaluate", 0, 2),
    "last evaluation": (Run, "evaluate", 2, 4),
    "line": (Journal, "write", 1, 2),
    "line after a checkpoint": (Journal, "write", 3, 4),
}


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(
    "error",
    [OSError, KeyboardInterrupt],
)
@pytest.mark.parametrize("place", PLACES)
def test_no_learned_step_is_lost(
    place: str,
    error: type[BaseException],
    staleness: int,
    tmp_path: Path,
    models: dict[str, str],
    undisturbed: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No checkpoint was due: the next one comes after three steps."""
    kind, name, number, learned = PLACES[place]
    sections = {"schedule": {"max_staleness": staleness}}
    config = _config(tmp_path / "run", models, **sections)
    expected = undisturbed(**sections)
    if staleness and place == "rollout":
        learned = 0  # it is asked for a step before
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, Failing(getattr(kind, name), number, error()))
        with pytest.raises(error) as raised:
            runs.train(config)
    newest = run_folder.newest(tmp_path / "run" / "checkpoints")
    assert (newest.name if newest else "000000") == f"{learned:06d}"
    (note,) = raised.value.__notes__
    said = f"saved as {newest};" if newest else "nothing was learned yet;"
    assert said in note and "is lost" not in note
    calls: list[int] = []
    update = Learner.update
    monkeypatch.setattr(
        Learner, "update", lambda self, *a, **k: calls.append(1) or update(self, *a, **k)
    )
    assert _content(runs.train(config)) == expected
    assert len(calls) == STEPS - learned


def test_in_the_midst_of_an_update_what_is_lost_is_told(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    config = _config(tmp_path / "run", models)
    step = Failing(Learner.learning_rate, 4, KeyboardInterrupt())  # two calls an update
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learning_rate", step)
        with pytest.raises(KeyboardInterrupt) as raised:
            runs.train(config)
    (note,) = raised.value.__notes__
    assert note.endswith("no checkpoint yet: 2 steps lost; the same command begins anew")
    assert _content(runs.train(config)) == undisturbed()


class Asking(Observer):
    """Asks the run to stop, at the n-th step or while its n-th evaluation is played."""

    run: Run

    def __init__(self, *, step: int = -1, evaluation: int = -1) -> None:
        self._step, self._evaluation = step, evaluation

    def step(self, step: int, task: str, metrics: Any) -> None:
        if step == self._step:
            self.run.stop()

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        if 0 < done < total:
            self._evaluation -= 1
            if self._evaluation == -1:
                self.run.stop()


@pytest.mark.parametrize(
    ("asking", "learned", "lines"),
    [({"step": 0}, 1, 1), ({"evaluation": 0}, 2, 1), ({"evaluation": 1}, 4, 3)],
    ids=str,
)
def test_who_asks_to_stop_need_not_wait_for_an_evaluation(
    asking: dict[str, int],
    learned: int,
    lines: int,
    tmp_path: Path,
    models: dict[str, str],
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is played in parts, and made anew when the run resumes."""
    plain = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: plain(*a, **k, part=1))
    config, watch = _config(tmp_path / "run", models), Asking(**asking)
    with Run(config, watch=watch) as run:
        watch.run = run
        run.train()
        assert run.stopped
        assert f"saved as {run.folder}/checkpoints/{learned:06d}" in run.record.standing()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == lines
    again = Run(config)
    with again:
        again.stop()
        again.train()  # before anything else is done
        assert again.stopped and len(again.timetable.history) == learned
    monkeypatch.undo()
    assert _content(runs.train(config)) == undisturbed()


# --- a full disk ---------------------------------------------------------------------------------


def _disk(folder: Path, full_at: int) -> Iterator[Any]:
    """A stand-in for os.write: from call number `full_at` on, for files below the folder, half of
    the bytes find room and no more."""
    write, calls, half = os.write, 0, True

    def limited(descriptor: int, data: Any) -> int:
        nonlocal calls, half
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(str(folder)):
            return write(descriptor, data)
        calls += 1
        if calls <= full_at:
            return write(descriptor, data)
        if half:
            half = False
            return write(descriptor, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    yield limited
    yield calls


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> int:
    """How many a whole run makes."""
    folder = tmp_path_factory.mktemp("counted") / "run"
    disk = _disk(folder, 10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "write", next(disk))
        runs.train(_config(folder, models, journal={"tensorboard": True}))
    return int(next(disk))


@pytest.mark.parametrize("at", range(20))
def test_a_disk_that_is_full_at_any_write_costs_nothing(
    at: int,
    writes: int,
    tmp_path: Path,
    models: dict[str, str],
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line names the file; what stands there is whole; with room again all is as it would
    have been."""
    assert writes == 20  # every one is tried
    journal = {"journal": {"tensorboard": True}}
    config, expected = _config(tmp_path / "run", models, **journal), undisturbed(**journal)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", next(_disk(tmp_path / "run", at)))
        with pytest.raises((OSError, ValueError), match="No space left on device") as raised:
            runs.train(config)
    assert str(tmp_path / "run") in str(raised.value) and "\n" not in str(raised.value)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.name.endswith(".partial")
        if path.name == "metrics.jsonl":
            assert path.read_text()[-1:] in ("", "\n")
        if path.suffix == ".json" and path.is_file():
            json.loads(path.read_text())
    assert _content(runs.train(config)) == expected


@pytest.mark.parametrize("fault", ["torn", "cut", "joined"])
def test_lines_that_are_not_whole_are_not_built_upon(
    fault: str, tmp_path: Path, models: dict[str, str], undisturbed: Any
) -> None:
    config = _config(tmp_path / "run", models, steps=2, evaluation={})
    path = runs.train(config) / "metrics.jsonl"
    lines = path.read_bytes()
    longer = config.model_copy(update={"steps": 3})
    path.write_bytes(
        {"torn": lines + b'{"step": 2, "ta', "cut": lines[:-9], "joined": b"#" + lines}[fault]
    )
    if fault == "torn":  # killed while it wrote: what follows the checkpoint is cut off
        runs.train(longer)
    else:
        with pytest.warns(UserWarning, match=r"lines of steps that were done are lost or changed"):
            runs.train(longer)
    kept = path.read_text().splitlines()
    assert [json.loads(x)["step"] for x in kept if not x.startswith("#")][-1] == 2
    assert path.read_bytes().endswith(b"\n")


# --- others in the folder ------------------------------------------------------------------------


def test_a_model_is_evaluated_while_the_run_goes_on(tmp_path: Path, models: dict[str, str]) -> None:
    """It only reads; the run may even delete the checkpoint meanwhile."""

    class Looking(Observer):
        found: Any = None

        def step(self, step: int, task: str, metrics: Any) -> None:
            if step == 2:
                at = tmp_path / "run" / "checkpoints" / "000002"
                self.found = evaluate_model(config, str(at))

    config = _config(tmp_path / "run", models, checkpoint={"every": 1, "keep": 1})
    watch = Looking()
    runs.train(config, watch)
    assert watch.found["scores"]["math"]["greedy"]["n"] == 2 and len(watch.found["weights"]) == 64


def test_no_room_for_a_checkpoint_is_told_before_a_model_loads(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.distill.run import preflight
    from tutelage.distill.student import build as student_building

    monkeypatch.setattr(
        student_building, "load_student", lambda *_, **__: pytest.fail("it was loaded")
    )

    class Small:
        free = 2**18

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Small)
    with pytest.raises(
        ValueError, match=r"^run: .* has 0 MiB free, and one checkpoint takes 1 MiB"
    ):
        Run(_config(tmp_path / "run", models))
    assert not (tmp_path / "run").exists()
