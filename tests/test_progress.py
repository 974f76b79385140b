"""What a person sees of a run: what is done, how long a step takes, how long it will go on."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tutelage.distill.config.loading import load_config, parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.progress import ConsoleObserver, Pace
from tutelage.distill.run.training import Run

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
METRICS = {"reward/success": 0.5, "loss/mean": 1.25}
SCORE = {"value": 0.5, "interval": (0.25, 0.75), "n": 8}


class Screen:
    """A console, and a clock that stands still."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.now = 100.0
        self._file = io.StringIO()
        self.console = Console(file=self._file, force_terminal=terminal, width=150)

    @property
    def text(self) -> str:
        return self._file.getvalue()

    def lines(self) -> list[str]:
        """What came since the last call."""
        found = self.text.splitlines()
        self._file.seek(0)
        self._file.truncate()
        return found


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    found = Screen()
    monkeypatch.setattr("time.monotonic", lambda: found.now)
    return found


@pytest.fixture
def config() -> RunConfig:
    return load_config(DEMO, ["steps=100", "evaluation.every=50"])


def _step(watcher: Observer, screen: Screen, step: int, task: str, seconds: float) -> None:
    screen.now += seconds
    watcher.step(step, task, METRICS)


def test_a_step_is_the_mean_of_a_turn_and_the_first_of_a_task_warms_up() -> None:
    pace = Pace(["house", "math"])
    assert pace.seconds() == 0.0
    pace.add("house", 9.0)  # all that is known
    assert pace.seconds() == 9.0
    pace.add("math", 5.0)
    assert pace.seconds() == 7.0
    for seconds in (3.0, 3.0, 3.0):
        pace.add("house", seconds)
        pace.add("math", seconds / 3)
    assert pace.seconds() == pytest.approx(2.0)
    for _ in range(1000):  # of late
        pace.add("house", 30.0)
        pace.add("math", 10.0)
    assert pace.seconds() == pytest.approx(20.0)


def test_a_rare_task_weighs_what_it_comes() -> None:
    pace = Pace(["often", "rare"])
    for i in range(100):
        pace.add("rare" if i % 10 == 0 else "often", 11.0 if i % 10 == 0 else 1.0)
    assert pace.seconds() == pytest.approx(2.0, rel=0.1)


def test_without_a_terminal_lines_say_what_is_done_and_what_is_left(
    screen: Screen, config: RunConfig
) -> None:
    watcher = ConsoleObserver(screen.console)
    watcher.doing("loading builtin:start")
    assert screen.lines() == ["loading builtin:start"]
    watcher.start(config, 0)
    watcher.doing("step 1 of 100: the student plays")
    assert screen.lines() == ["step 1 of 100: the student plays"]
    _step(watcher, screen, 0, "household", 3.0)
    (line,) = screen.lines()
    brief = "household: success 50%, loss 1.250"
    assert line == f"step 1 of 100, 3 s a step, 5 min left  {brief}"
    for step in range(1, 20):
        watcher.doing("not told: a step is short")
        _step(watcher, screen, step, ("household", "math")[step % 2], (2.0, 1.0)[step % 2])
    found = screen.lines()  # one in ten seconds
    assert [line.split("  ")[0] for line in found] == [
        "step 9 of 100, 1.5 s a step, 2 min left",
        "step 17 of 100, 1.5 s a step, 2 min left",
    ]


def test_what_an_evaluation_takes_is_left_and_no_step_s_time(
    screen: Screen, config: RunConfig
) -> None:
    """One every 50 steps, greedy alone, and one of both modes in the end."""
    watcher = ConsoleObserver(screen.console, evaluates_after=True)
    for task in config.tasks:
        for mode, seconds in (("greedy", 60.0), ("sampled", 300.0)):
            watcher.evaluating(task, mode, 0, 8)
            screen.now += seconds
            watcher.evaluating(task, mode, 8, 8)
            watcher.score(task, mode, SCORE)
    screen.lines()
    watcher.start(config, 0)
    _step(watcher, screen, 0, "household", 1.0)
    minutes = round((99 * 1 + 2 * 2 * 60 + 2 * 360) / 60)
    assert f"1 s a step, {minutes} min left" in screen.lines()[0]
    for step in range(1, 50):
        _step(watcher, screen, step, ("household", "math")[step % 2], 1.0)
    for task in config.tasks:
        watcher.evaluating(task, "greedy", 0, 8)
        screen.now += 100.0
        watcher.score(task, "greedy", SCORE)
    screen.lines()
    for step in range(50, 62):
        _step(watcher, screen, step, ("household", "math")[step % 2], 1.0)
    minutes = round((38 * 1 + 200 + 200 + 600) / 60)
    assert screen.lines()[-1].startswith(f"step 61 of 100, 1 s a step, {minutes} min left")


def test_an_evaluation_says_how_long_it_will_go_on(screen: Screen) -> None:
    watcher = ConsoleObserver(screen.console)
    for done in range(0, 201, 50):
        watcher.evaluating("math", "greedy", done, 200)
        screen.now += 20.0
    assert screen.lines() == [
        "evaluating math, greedy 0/200",
        "evaluating math, greedy 50/200, 60 s left",
        "evaluating math, greedy 100/200, 40 s left",
        "evaluating math, greedy 150/200, 20 s left",
        "evaluating math, greedy 200/200",
    ]


def test_where_steps_are_slow_their_parts_are_told(screen: Screen, config: RunConfig) -> None:
    watcher = ConsoleObserver(screen.console)
    watcher.start(config, 0)
    _step(watcher, screen, 0, "household", 200.0)
    screen.lines()
    watcher.doing("step 2 of 100: teachers score them")
    assert screen.lines() == ["step 2 of 100: teachers score them"]


def test_a_step_of_several_tasks_counts_once(screen: Screen, config: RunConfig) -> None:
    watcher = ConsoleObserver(screen.console)
    watcher.start(config, 0)
    for step in range(4):
        _step(watcher, screen, step, "household", 20.0)
        watcher.step(step, "math", METRICS)
    assert [line.split("  ")[0] for line in screen.lines()][-1] == (
        "step 4 of 100, 20 s a step, 32 min left"
    )


def test_a_run_that_goes_on_counts_its_own_steps(screen: Screen, config: RunConfig) -> None:
    watcher = ConsoleObserver(screen.console)
    watcher.start(config, 90)
    assert screen.lines() == [f"resuming at step 90 of 100 in {config.run}"]
    _step(watcher, screen, 90, "household", 4.0)
    assert screen.lines()[0].startswith("step 91 of 100, 4 s a step, 36 s left")


def test_a_terminal_has_one_bar_for_the_training(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(terminal=True)
    monkeypatch.setattr("time.monotonic", lambda: screen.now)
    with ConsoleObserver(screen.console) as watcher:
        watcher.doing("loading builtin:start")
        watcher.start(config, 0)
        _step(watcher, screen, 0, "household", 3.0)
        watcher.doing("step 2 of 100: teachers score them")
        _step(watcher, screen, 1, "math", 3.0)
        watcher.evaluating("math", "greedy", 0, 8)
        watcher.score("math", "greedy", SCORE)
    for said in ("loading builtin:start", "training", "2/100, 3 s a step, 5 min left"):
        assert said in screen.text


class _Told(Observer):
    """What is said to be done, and when steps are."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def doing(self, what: str) -> None:
        self.lines.append(what)

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        self.lines.append(f"done {step}")

    def evaluating(self, task: str, mode: str, done: int, total: int) -> None:
        self.lines.append(f"{task} {done}/{total}")


@pytest.mark.runs
def test_a_run_tells_what_it_does_before_it_does_it(
    tmp_path: Path, tokenizer: Any, save_model: Callable[..., str]
) -> None:
    student, teacher = (save_model(tmp_path / x, tokenizer, seed=i) for i, x in enumerate("st"))
    told = _Told()
    data = {
        "run": str(tmp_path / "run"),
        "steps": 1,
        "student": {"model": student, "device": "cpu"},
        "teachers": {"one": {"model": teacher, "device": "cpu"}},
        "tasks": {
            "sums": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": "arithmetic"},
                "teacher": "one",
                "episodes": 2,
                "rollout": {"max_turns": 1, "max_new_tokens": 4},
            }
        },
        "objective": {"name": "sampled_token"},
        "rollout": {"processes": 0},
        "evaluation": {"every": 1, "episodes": 2},
        "journal": {"tensorboard": False},
    }
    with Run(parse_config(data, "test"), watch=told) as run:
        run.train()
    assert told.lines == [
        f"loading {student}",
        "loading teachers: one",
        "step 1 of 1: the student plays episodes, 2 of sums",
        "step 1 of 1: teachers score them",
        "step 1 of 1: the student learns from them",
        "done 0",
        "sums 0/2",
        "sums 2/2",
    ]
