"""Whole runs of random tiny models on real environments: resuming, mixing, placing, refusing."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.runs import train
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.objectives import Needs
from tutelage.distill.run import assembly, checkpoints
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.training import Run, evaluate_model
from tutelage.distill.student import build as student_building
from tutelage.distill.student.learner import Learner
from tutelage.distill.teachers import build as teacher_building
from tutelage.envs.pool import EnvironmentPool
from tutelage.evaluation import files, run_folder
from tutelage.scheduler.episodes import Dropped, Row
from tutelage.scheduler.placement import InProcess, Started
from tutelage.scheduler.ray_start import connected

pytestmark = pytest.mark.runs

Configure = Callable[..., RunConfig]

HOUSEHOLD = {
    "env": "tutelage/Household-v0",
    "env_args": {"split": "train", "difficulty": "tiny"},
    "teacher": "one",
    "episodes": 3,
    "rollout": {"max_turns": 3, "max_new_tokens": 4, "context": {"repeat_task": True}},
}
MATH = {
    "env": "tutelage/Math-v0",
    "env_args": {"problems": "arithmetic"},
    "teacher": "two",
    "episodes": 6,
    "rollout": {"max_turns": 1, "max_new_tokens": 8},
}
EXPERT_MATH = MATH | {"env_args": {"problems": "arithmetic", "expert": True}, "teacher": None}


@pytest.fixture
def configure(tmp_path: Path, models: dict[str, str]) -> Configure:
    """A run of `tasks`, everything in this process on one thread."""

    def configure(tasks: Mapping[str, Any], run: str = "run", **sections: Any) -> RunConfig:
        data = {
            "run": str(tmp_path / run),
            "steps": 4,
            "student": {"model": models["student"], "threads": 1, "device": "cpu"},
            "teachers": {
                task["teacher"]: {"model": models[task["teacher"]], "device": "cpu"}
                for task in tasks.values()
                if task["teacher"]
            },
            "tasks": copy.deepcopy(dict(tasks)),
            "objective": {"name": "local_support", "k": 8},
            "rollout": {"processes": 0, "top_p": 0.9},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": 100},
            "journal": {"tensorboard": False},
        }
        return parse_config(data | sections, "test")

    return configure


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One on this machine for all runs that ask for it, as a program may have that joined Ray
    itself; how a run starts its own: tests/test_leaks.py."""
    with connected("local", attempts=3):
        yield


class Killed(BaseException):
    """Ends a run as a SIGKILL would: nobody gets to save."""


class _StopAfter(Observer):
    """Asks the run to stop as a SIGTERM would, or ends it as a kill would."""

    def __init__(self, step: int, *, kill: bool = False) -> None:
        self.run: Run | None = None
        self._step, self._kill = step, kill

    def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        if step == self._step:
            if self._kill:
                raise Killed
            assert self.run is not None
            self.run.stop()


class TestResuming:
    """A run that was cut off and run again is the run that was not."""

    STEPS = 6

    def _mixture(self, configure: Configure, run: str) -> RunConfig:
        """Both kinds of task, both objectives, a schedule, evaluations, the special-token mask."""
        math = MATH | {"objective": {"name": "sampled_token", "mask_tokens": ["<|end|>"]}}
        return configure(
            {"household": HOUSEHOLD, "math": math},
            run,
            steps=self.STEPS,
            optimizer={"lr": 3e-3, "warmup": 2, "decay": "cosine"},
            evaluation={"every": 3, "episodes": 2},
        )

    def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(self, configure: Configure) -> None:
        whole = train(self._mixture(configure, "whole"))
        assert [(line["step"], line["task"]) for line in runs.metrics(whole)] == [
            (step, ("household", "math")[step % 2]) for step in range(self.STEPS)
        ]
        config = self._mixture(configure, "stopped")
        watch = _StopAfter(2)
        with Run(config, watch=watch) as run:
            watch.run = run
            run.train()
            assert run.stopped
        assert len(runs.metrics(Path(config.run))) == 3
        runs.assert_same(train(config), whole, self.STEPS)
        before = runs.weights(whole, self.STEPS)
        assert train(config) == Path(config.run)  # done: run once more, nothing changes
        runs.assert_same(Path(config.run), whole, self.STEPS)
        start = load_file(Path(config.student.model or "") / "model.safetensors")
        assert any(not torch.equal(before[name], start[name]) for name in start)  # it did learn

    def test_a_killed_run_repeats_what_came_after_its_checkpoint(
        self, configure: Configure
    ) -> None:
        """Steps 2 and 3 were done, and step 2 written, after the last checkpoint. Muon's state
        comes back too."""

        def config(run: str) -> RunConfig:
            return configure(
                {"math": MATH},
                run,
                steps=5,
                checkpoint={"every": 2},
                optimizer={"name": "muon", "lr": 3e-3},
            )

        whole = train(config("whole"))
        with pytest.raises(Killed):
            train(config("killed"), _StopAfter(3, kill=True))
        killed = Path(config("killed").run)
        assert [line["step"] for line in runs.metrics(killed)] == [0, 1, 2]
        assert [path.name for path in (killed / "checkpoints").iterdir()] == ["000002"]
        runs.assert_same(train(config("killed")), whole, 5)

    @pytest.mark.parametrize(
        "schedule",
        [
            {"policy": "weighted", "weights": {"math": 2}},
            {"policy": "token_budget"},
            {"policy": "gap"},
            {"policy": "mixed"},
        ],
        ids=lambda schedule: schedule["policy"],
    )
    def test_every_policy_goes_on_where_it_was(
        self, configure: Configure, schedule: dict[str, Any]
    ) -> None:
        """What it had learned of the run so far comes back with the checkpoint."""

        def config(run: str) -> RunConfig:
            tasks = {"household": HOUSEHOLD, "math": MATH}
            return configure(tasks, run, steps=5, schedule=schedule, checkpoint={"every": 3})

        whole = train(config("whole"))
        with pytest.raises(Killed):
            train(config("killed"), _StopAfter(4, kill=True))
        runs.assert_same(train(config("killed")), whole, 5)
        names = [line["task"] for line in runs.metrics(whole)]
        if schedule["policy"] == "weighted":
            assert names == ["math", "household", "math", "math", "household"]
        if schedule["policy"] == "mixed":
            assert names == ["household+math"] * 5
            first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
            assert {"household/loss/mean", "math/loss/mean"} <= first.keys()
            assert not any("/perf/" in name or "/time/" in name for name in first)

    def test_another_configuration_does_not_go_on_in_the_same_folder(
        self, configure: Configure
    ) -> None:
        train(configure({"math": MATH}, steps=1))
        train(configure({"math": MATH}, steps=1, evaluation={"episodes": 3}))  # no harm
        with pytest.raises(
            ConfigError, match=r"\(optimizer\.lr: 0\.001, now 0\.005\).*choose another"
        ):
            train(configure({"math": MATH}, steps=1, optimizer={"lr": 5e-3}))
        more = {"steps": 2, "optimizer": {"lr": 5e-3}, "accept_changes": True}
        folder = train(configure({"math": MATH}, **more))
        assert [line["optimizer/lr"] for line in runs.metrics(folder)] == [1e-3, 5e-3]

    def test_a_teacher_whose_weights_changed_is_refused(
        self, configure: Configure, models: dict[str, str], tmp_path: Path
    ) -> None:
        """Under the same name, between two sessions of one run."""
        folder = tmp_path / "teacher"
        shutil.copytree(models["two"], folder)
        config = configure({"math": MATH}, steps=3, checkpoint={"every": 1})
        config = config.model_copy(
            update={
                "teachers": {
                    "two": config.teachers["two"].model_copy(update={"model": str(folder)})
                }
            }
        )
        watch = _StopAfter(0)
        with Run(config, watch=watch) as run:
            watch.run = run
            run.train()
        shutil.copy(Path(models["one"]) / "model.safetensors", folder)
        with pytest.raises(ConfigError, match=r"teachers.two: .* holds other weights than"):
            train(config)
        shutil.copy(Path(models["two"]) / "model.safetensors", folder)
        self_test = Path(config.run) / "teachers" / "two.json"
        first = json.loads(self_test.read_text(encoding="utf-8"))
        files.write_json(self_test, first | {"entropies": [x + 1 for x in first["entropies"]]})
        with pytest.raises(RuntimeError, match=r"teachers.two: its weights were lost or changed"):
            train(config)  # the same files, and another answer than at first
        files.write_json(self_test, first)
        assert len(runs.metrics(train(config))) == 3

    @pytest.mark.parametrize("changed", ["config.json", "chat_template.jinja"])
    def test_a_student_that_is_computed_otherwise_is_refused(
        self, configure: Configure, models: dict[str, str], tmp_path: Path, changed: str
    ) -> None:
        """Its weights are in the checkpoint, and say nothing of it."""
        folder = tmp_path / "student"
        shutil.copytree(models["student"], folder)
        student = {"model": str(folder), "threads": 1, "device": "cpu"}
        config = configure({"math": MATH}, student=student, steps=2)
        watch = _StopAfter(0)
        with Run(config, watch=watch) as run:
            watch.run = run
            run.train()
        before = (folder / changed).read_text(encoding="utf-8")
        after = before.replace("1e-06", "1e-05") if changed == "config.json" else before + "!"
        assert after != before
        (folder / changed).write_text(after, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"^student: .* has another config\.json, vocab"):
            train(config)
        (folder / changed).write_text(before, encoding="utf-8")
        assert len(runs.metrics(train(config))) == 2

    def test_an_accepted_change_of_the_optimizer_is_its_own(self, configure: Configure) -> None:
        """torch takes a state's betas and decay back with it, and not those that are asked for."""
        train(configure({"math": MATH}, steps=1))
        other = {"lr": 1e-3, "betas": [0.5, 0.6], "weight_decay": 0.25}
        config = configure({"math": MATH}, steps=2, optimizer=other, accept_changes=True)
        with Run(config) as run:
            run.train()
            groups = run.learner.optimizer._parts[0].param_groups
            assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
            assert all(tuple(group["betas"]) == (0.5, 0.6) for group in groups)
            (state, *_) = run.learner.optimizer._parts[0].state.values()
            assert state["step"] == 2  # it went on all the same

    @pytest.mark.parametrize(
        ("tasks", "sections"),
        [
            ({"math": MATH}, {"optimizer": {"name": "muon"}}),
            ({"math": MATH}, {}),
            ({"sums": MATH, "more": MATH}, {"schedule": {"policy": "gap"}}),
            ({"math": MATH, "more": MATH}, {"schedule": {"policy": "mixed"}}),
        ],
        ids=["optimizer", "a task less", "other tasks", "a task more"],
    )
    def test_a_run_goes_on_after_any_change_that_is_accepted(
        self, configure: Configure, tasks: dict[str, Any], sections: dict[str, Any]
    ) -> None:
        """What the old configuration left that means nothing in the new one begins anew."""
        train(configure({"household": HOUSEHOLD, "math": MATH}, steps=2))
        config = configure(tasks, steps=5, accept_changes=True, **sections)
        anew = pytest.warns(UserWarning, match="optimizer: .* begins anew")
        with anew if "optimizer" in sections else contextlib.nullcontext():
            folder = train(config)
        played = {task for line in runs.metrics(folder)[2:] for task in line["task"].split("+")}
        assert len(runs.metrics(folder)) == 5 and played == {*tasks}

    def test_a_state_of_another_version_is_named(self, configure: Configure) -> None:
        config = configure({"math": MATH}, steps=1)
        newest = run_folder.newest(train(config) / "checkpoints")
        state = checkpoints.load_state(newest)
        del state["position"]
        torch.save(state, newest / run_folder.STATE)
        (newest / run_folder.SUMS).unlink()
        with (
            pytest.warns(UserWarning, match="has no SHA256SUMS"),
            pytest.raises(RuntimeError, match=r"000001: its trainer\.pt has no 'position': anoth"),
        ):
            train(config)

    def test_a_teacher_that_loses_its_weights_in_mid_run_teaches_nothing(
        self, configure: Configure
    ) -> None:
        """As an actor does that was started again without them: its next answer tells."""

        class Thief(Observer):
            run: Run

            def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
                service: Any = self.run.placement
                teacher = service._teachers["two"]
                with torch.no_grad():
                    teacher.model.get_output_embeddings().weight.mul_(0.5)
                teacher.fingerprint = teacher._self_test()

        thief, config = Thief(), configure({"math": MATH})
        with (
            Run(config, watch=thief) as run,
            pytest.raises(RuntimeError, match=r"lost or changed: .*of this run's beginning"),
        ):
            thief.run = run
            run.train()
        assert len(runs.metrics(Path(config.run))) == 1  # and it was saved
        assert (Path(config.run) / "checkpoints" / "000001").is_dir()

    @pytest.mark.parametrize("option", [{"cache": True}, {"sleeps": True}])
    def test_a_cache_or_a_sleeping_teacher_changes_nothing(
        self, configure: Configure, tmp_path: Path, option: dict[str, Any]
    ) -> None:
        """With a cache, a run that is repeated from its beginning is scored from the disk."""
        if "cache" in option:
            option = {"cache": str(tmp_path / "cache")}
        plain = configure({"math": MATH}, "plain", steps=3)
        update = {"two": plain.teachers["two"].model_copy(update=option)}
        hits = []
        for name in ("first", "again"):
            run = {"run": str(tmp_path / name), "teachers": update}
            folder = train(plain.model_copy(update=run))
            text = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            hits.append(sum(json.loads(line)["perf/cache_hits"] for line in text))
            if name == "first":
                train(plain)
            runs.assert_same(folder, Path(plain.run), 3)
        assert hits == ([0, 18] if "cache" in option else [0, 0])

    def test_the_best_checkpoint_is_kept_beside_the_newest(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also when the run was stopped between, and though no checkpoint was due at that step."""
        values = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 10: 0.25}

        def evaluate(run: Run, modes: Any) -> dict[str, Any]:
            value = values[run.learner.version]
            return {"math": {"metric": "pass@1", "greedy": {"value": value}}}

        monkeypatch.setattr(Run, "evaluate", evaluate)
        config = configure(
            {"math": MATH},
            steps=10,
            evaluation={"every": 2},
            checkpoint={"every": 3, "keep": 1},
        )
        with pytest.raises(Killed):
            train(config, _StopAfter(6, kill=True))
        kept = Path(config.run) / "checkpoints"
        assert sorted(path.name for path in kept.iterdir()) == ["000004", "000006"]
        train(config)
        assert sorted(path.name for path in kept.iterdir()) == ["000004", "000010"]


class TestMixing:
    def test_a_task_in_a_mixture_is_played_and_scored_as_it_is_alone(
        self, configure: Configure
    ) -> None:
        """At a learning rate that moves no weight: the task's n-th step has the same episodes, the
        same loss and the same gradient, whatever stands between its steps."""
        still = {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}}
        alone = train(configure({"math": MATH}, "alone", steps=2, **still))
        tasks = {"household": HOUSEHOLD, "math": MATH}
        mixed = train(configure(tasks, "mixed", steps=4, **still))
        of_math = [line for line in runs.metrics(mixed) if line["task"] == "math"]
        assert [line.pop("step") for line in of_math] == [1, 3]
        lines = runs.metrics(alone)
        assert [line.pop("step") for line in lines] == [0, 1]
        assert of_math == lines
        played = [
            [json.loads(line) | {"version": None} for line in runs.episodes(run)[name].splitlines()]
            for run, name in ((mixed, "000003.jsonl"), (alone, "000001.jsonl"))
        ]
        assert played[0] == played[1]

    def test_one_tasks_own_settings_are_the_runs(self, configure: Configure) -> None:
        """A config with one task: what is said in the task or for the whole run is the same run."""
        task = MATH | {"rollout": {}}
        said = {"name": "sampled_token", "clip": 0.3}
        how = {"processes": 0, "top_p": 0.9, "max_turns": 1, "max_new_tokens": 8}
        inside = configure({"math": MATH | {"objective": said}}, "inside", steps=2)
        outside = configure({"math": task}, "outside", steps=2, objective=said, rollout=how)
        runs.assert_same(train(inside), train(outside), 2)

    def test_a_weight_of_two_doubles_a_tasks_gradient(self, configure: Configure) -> None:
        norms, losses = [], []
        for weight in (1.0, 2.0):
            folder = train(configure({"math": MATH | {"weight": weight}}, f"{weight}", steps=1))
            (line,) = runs.metrics(folder)
            norms.append(line["optimizer/grad_norm"])
            losses.append(line["loss/mean"])
        assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)
        assert losses[0] == losses[1]

    def test_each_task_is_scored_by_its_own_teacher(
        self, configure: Configure, models: dict[str, str]
    ) -> None:
        """Task `math` is taught by a copy of the student: its loss is 0, the other's is not."""
        config = configure({"household": HOUSEHOLD, "math": MATH}, steps=2)
        teachers = {
            name: teacher.model_copy(update={"model": models["student"]})
            if name == "two"
            else teacher
            for name, teacher in config.teachers.items()
        }
        still = config.optimizer.model_copy(update={"lr": 1e-30})
        folder = train(config.model_copy(update={"teachers": teachers, "optimizer": still}))
        household, math = runs.metrics(folder)
        assert household["loss/mean"] > 0.1
        assert math["loss/mean"] == pytest.approx(0, abs=1e-6)


def test_every_task_of_a_mixed_step_is_at_its_own_progress(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes late is at its beginning when the other is nearly done."""
    update, seen = Learner.update, list[Any]()

    def spy(self: Learner, *args: Any, progress: Any, **options: Any) -> Any:
        seen.append(progress)
        return update(self, *args, progress=progress, **options)

    monkeypatch.setattr(Learner, "update", spy)
    tasks = {"household": HOUSEHOLD, "math": MATH | {"start": 2}}
    train(configure(tasks, steps=5, schedule={"policy": "mixed"}))
    assert seen == [
        {"household": 0.0},
        {"household": 0.25},
        {"household": 0.5, "math": 0.0},
        {"household": 0.75, "math": 0.5},
        {"household": 1.0, "math": 1.0},
    ]


@pytest.mark.usefixtures("ray")
@pytest.mark.slow
def test_ray_actors_do_what_one_process_does(configure: Configure) -> None:
    """Rollouts and teachers as actors on this machine: the same metrics, episodes and weights."""
    tasks = {"household": HOUSEHOLD, "math": MATH}
    sections = {"steps": 3, "evaluation": {"every": 3, "episodes": 2}}
    here = train(configure(tasks, "here", **sections))
    cluster = {"address": "local", "workers": 1, "threads": 1}
    there = train(configure(tasks, "there", cluster=cluster, **sections))
    runs.assert_same(here, there, 3)


@pytest.mark.usefixtures("ray")
@pytest.mark.slow
def test_killed_ray_actors_cost_a_run_nothing(configure: Configure, models: dict[str, str]) -> None:
    """Worker and teacher are killed by SIGKILL after the first step: the same run, to the byte. The
    student is in bfloat16, which numpy does not know."""

    class Killer(Observer):
        run: Run

        def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
            if step == 0:
                import ray

                cluster: Any = self.run.placement
                for member in (*cluster._workers, *cluster._teachers.values()):
                    process = ray.get(member.actor.ready.remote())
                    assert os.getpriority(os.PRIO_PROCESS, process) == os.getpriority(
                        os.PRIO_PROCESS, 0
                    )  # Ray's default would let them starve beside any other work
                    os.kill(process, signal.SIGKILL)

    student = {"model": models["student"], "dtype": "bfloat16", "threads": 1, "device": "cpu"}
    sections = {"steps": 3, "student": student}
    here = train(configure({"math": MATH}, "here", **sections))
    cluster = {"address": "local", "workers": 1, "threads": 1}
    there = configure({"math": MATH}, "there", cluster=cluster, **sections)
    killer = Killer()
    with Run(there, watch=killer) as run:
        killer.run = run
        run.train()
        assert run.placement.restarts == 2
    runs.assert_same(here, Path(there.run), 3)


def test_killed_environments_cost_a_run_nothing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two processes is killed in the middle of the others' turns: played anew, its episodes
    would be in other batches, and differ in the last bits."""
    task = HOUSEHOLD | {"episodes": 7, "rollout": {"max_turns": 6, "max_new_tokens": 9}}

    def config(run: str) -> RunConfig:
        rollout = {"processes": 2, "top_p": 0.9}
        return configure({"household": task}, run, steps=4, rollout=rollout)

    here = train(config("here"))
    send, calls = EnvironmentPool.send, iter(range(999))

    def deadly(self: EnvironmentPool, requests: Any) -> None:
        if next(calls) in (3, 20, 40):
            os.kill(self.pids()[0], signal.SIGKILL)
        send(self, requests)

    monkeypatch.setattr(EnvironmentPool, "send", deadly)
    there = train(config("there"))
    assert runs.metrics_bytes(here) == runs.metrics_bytes(there)
    left, right = runs.weights(here, 4), runs.weights(there, 4)
    assert all(torch.equal(left[name], right[name]) for name in left)
    lines = map(json.loads, (there / "metrics.jsonl").read_text().splitlines())
    assert sum(line["perf/episodes_retried"] for line in lines) >= 7


def test_a_step_that_fails_between_two_minibatches_is_not_saved(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights have moved by half a step then: what resumes must begin before it."""
    descend, calls = Learner._descend, iter(range(9))

    def broken(self: Learner, *args: Any) -> float:
        if next(calls) == 3:
            raise FloatingPointError("the second minibatch of the second step")
        return descend(self, *args)

    def config(run: str) -> RunConfig:
        half = {"lr": 1e-3, "minibatch": 3}
        return configure({"math": MATH}, run, steps=3, optimizer=half)

    whole = train(config("whole"))
    monkeypatch.setattr(Learner, "_descend", broken)
    with pytest.raises(FloatingPointError):
        train(config("broken"))
    monkeypatch.undo()
    assert not (Path(config("broken").run) / "checkpoints").exists()
    runs.assert_same(train(config("broken")), whole, 3)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ((InProcess, "start"), r"the rollout ran out of memory: CUDA.*lower rollout.max_live"),
        ((InProcess, "score"), r"the score ran out of memory: CUDA.*give the teacher dtype"),
        ((Learner, "_descend"), r"the update ran out of memory: CUDA.*optimizer.recompute: true"),
    ],
    ids=["rollout", "score", "update"],
)
def test_memory_that_runs_out_names_the_cure_and_costs_no_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str], said: str
) -> None:
    # at the second step; teachers are first asked who they are
    plain, calls = getattr(*where), iter(range(9))
    second = 2 if where == (InProcess, "score") else 1

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == second:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(*args, **kwargs)

    config = configure({"math": MATH}, steps=3)
    monkeypatch.setattr(*where, full)
    with pytest.raises(RuntimeError, match=said):
        train(config)
    assert run_folder.newest(Path(config.run) / "checkpoints").name == "000001"


def test_the_stack_of_a_step_that_hangs_is_in_the_run_folder(configure: Configure) -> None:
    class Slow(Observer):
        def step(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
            if step == 1:
                time.sleep(3)

    stalled = {"journal": {"tensorboard": False, "stall": 2.0}}
    folder = train(configure({"math": MATH}, "slow", steps=2, **stalled), Slow())
    stack = (folder / "stalled" / "learner.txt").read_text(encoding="utf-8")
    assert "in _step" in stack and "test_training.py" in stack
    assert not (train(configure({"math": MATH}, "quick", steps=1)) / "stalled").exists()


def test_the_ledger_tells_who_taught_every_trained_token(configure: Configure) -> None:
    """8 ids at 6 bytes, and 6 more a token; masked tokens are scored and not taught."""
    masked = MATH | {"objective": {"name": "local_support", "k": 8, "mask_tokens": ["<|end|>"]}}
    config = configure({"household": HOUSEHOLD, "math": masked}, steps=4)
    lines = runs.metrics(train(config))
    for teacher, task in (("one", "household"), ("two", "math")):
        own = [line for line in lines if line["task"] == task]
        other = [line for line in lines if line["task"] != task]
        assert all(line[f"teacher/{teacher}/tokens"] == line["tokens/trained"] for line in own)
        assert all(line[f"teacher/{teacher}/positions"] == line["tokens/chosen"] for line in own)
        assert all(line[f"teacher/{teacher}/rows"] == line["episodes/played"] for line in own)
        for line in own:
            assert line[f"teacher/{teacher}/bytes"] == 54 * line[f"teacher/{teacher}/positions"]
        assert not any(f"teacher/{teacher}/tokens" in line for line in other)
    taught = sum(v for line in lines for k, v in line.items() if k.endswith("/tokens"))
    assert taught == sum(line["tokens/trained"] for line in lines)


class TestLosses:
    def test_a_step_that_loses_too_many_episodes_stops_the_run_saved(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half may be lost, two thirds may not; what was learned before is there to go on from."""
        start = InProcess.start
        losses = iter([0, 3, 4])

        def lossy(self: Any, orders: Any, **sampling: Any) -> Started:
            outcomes = start(self, orders, **sampling).outcomes()
            for i in range(next(losses)):
                outcomes[i] = Dropped(
                    order=orders[i], reason="timeout", detail="60 s passed", attempts=3
                )
            return Started(lambda: outcomes)

        monkeypatch.setattr(InProcess, "start", lossy)
        config = configure({"math": MATH}, steps=5)
        with pytest.raises(RuntimeError, match=r"4 of 6 episodes were lost .*timeout: 60 s passed"):
            train(config)
        assert [line["episodes/dropped"] for line in runs.metrics(Path(config.run))] == [0, 3]
        assert [path.name for path in (Path(config.run) / "checkpoints").iterdir()] == ["000002"]
        monkeypatch.undo()
        train(config)
        assert len(runs.metrics(Path(config.run))) == 5


class TestCollectingAhead:
    STEPS = 6
    wholes: ClassVar[dict[str, Path]] = {}  # of each schedule: the run that nothing cut off

    def _config(self, configure: Configure, run: str, **schedule: Any) -> RunConfig:
        return configure(
            {"household": HOUSEHOLD, "math": MATH},
            run,
            steps=self.STEPS,
            schedule={"policy": "alternate", "max_staleness": 1} | schedule,
        )

    def test_episodes_are_as_old_as_allowed_and_say_so(self, configure: Configure) -> None:
        for most in (0, 1, 2):
            folder = train(self._config(configure, f"s{most}", max_staleness=most))
            ages = [min(step, most) for step in range(self.STEPS)]
            assert [line["episodes/staleness"] for line in runs.metrics(folder)] == ages
            for step, age in enumerate(ages):
                text = (folder / "episodes" / f"{step:06d}.jsonl").read_text(encoding="utf-8")
                told = {
                    (one["version"], one["staleness"]) for one in map(json.loads, text.splitlines())
                }
                assert told == {(step - age, age)}

    def test_they_are_what_the_older_weights_play(self, configure: Configure) -> None:
        """The second step's are those of a run whose first update moved nothing."""

        def second(config: RunConfig) -> list[Any]:
            path = train(config) / "episodes" / "000001.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines()
            return [[row["ids"] for row in json.loads(line)["rows"]] for line in lines]

        prefetch = self._config(configure, "ahead")
        still = configure({"household": HOUSEHOLD, "math": MATH}, "still", steps=2)
        still = still.model_copy(
            update={"optimizer": still.optimizer.model_copy(update={"lr": 1e-30})}
        )
        on_policy = self._config(configure, "on_policy", max_staleness=0)
        assert second(prefetch) == second(still) != second(on_policy)

    @pytest.mark.parametrize("kill", [False, True])
    @pytest.mark.parametrize(
        "schedule",
        [
            {},
            {"max_staleness": 2},
            {"policy": "token_budget"},
            {"policy": "gap"},
            {"policy": "mixed"},
        ],
        ids=lambda schedule: "-".join(map(str, schedule.values())) or "alternate",
    )
    def test_a_run_that_was_cut_off_is_the_run_that_was_not(
        self, configure: Configure, schedule: dict[str, Any], kill: bool
    ) -> None:
        """What was collected ahead is in the checkpoint: the weights that played it are not."""
        key = str(schedule)
        if key not in self.wholes:
            self.wholes[key] = train(self._config(configure, "whole", **schedule))
        config = self._config(configure, "parts", **schedule)
        often = {"checkpoint": config.checkpoint.model_copy(update={"every": 2})}
        config = config.model_copy(update=often)
        for step in (2, 4):
            watch = _StopAfter(step, kill=kill)
            with Run(config, watch=watch) as run, contextlib.suppress(Killed):
                watch.run = run
                run.train()
        runs.assert_same(train(config), self.wholes[key], self.STEPS)

    @pytest.mark.usefixtures("ray")
    @pytest.mark.slow
    def test_on_ray_it_is_the_same_run(self, configure: Configure) -> None:
        """There the next episodes are played while the student learns."""
        tasks = {"household": HOUSEHOLD, "math": MATH | {"teacher": HOUSEHOLD["teacher"]}}
        ahead = {"steps": self.STEPS, "schedule": {"policy": "alternate", "max_staleness": 1}}
        cluster = {"address": "local", "workers": 1, "threads": 1}
        here = train(configure(tasks, "here", **ahead))
        there = train(configure(tasks, "there", cluster=cluster, **ahead))
        runs.assert_same(here, there, self.STEPS)

    def test_a_step_that_lost_too_much_is_played_anew(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Kept in the checkpoint it would stop the run again for ever."""
        start, calls = InProcess.start, iter(range(99))

        def lossy(self: Any, orders: Any, **sampling: Any) -> Started:
            if next(calls) == 3:
                return Started(
                    lambda: [
                        Dropped(order=o, reason="died", detail="-", attempts=3) for o in orders
                    ]
                )
            return start(self, orders, **sampling)

        monkeypatch.setattr(InProcess, "start", lossy)
        config = self._config(configure, "lossy")
        with pytest.raises(RuntimeError, match="6 of 6 episodes were lost"):
            train(config)
        assert [path.name for path in (Path(config.run) / "checkpoints").iterdir()] == ["000003"]
        assert len(runs.metrics(train(config))) == self.STEPS


class TestSeveralTeachers:
    def test_each_episode_has_one_and_that_one_scores_it(
        self, configure: Configure, tokenizer: Any
    ) -> None:
        task = MATH | {"teacher": "one"}
        config = configure({"math": task, "other": task | {"teacher": "two"}}, steps=4)
        both = config.tasks["math"].model_copy(update={"teacher": {"one": 2.0, "two": 1.0}})
        config = config.model_copy(update={"tasks": {"math": both}})
        folder = train(config)
        rows, by_teacher = 0, Counter[str]()
        services = {
            name: teacher_building.make_teacher(name, config, len(tokenizer))
            for name in ("one", "two")
        }
        for path in sorted((folder / "episodes").iterdir()):
            for episode in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                by_teacher[episode["teacher"]] += 1
                for row in episode["rows"]:
                    rows += 1
                    ids = np.asarray(row["ids"], dtype=np.int32)
                    one = Row(
                        ids_T=ids,
                        turns_T=np.asarray(row["turn"], dtype=np.int32),
                        behavior_logprobs_T=np.full(len(ids), np.nan, dtype=np.float32),
                        branches_T=np.zeros(len(ids), dtype=np.int32),
                    )
                    (exact,) = services[episode["teacher"]].score([one], Needs(k=8)).scores
                    told = [x for x in row["teacher_logprob"] if x is not None]
                    assert np.allclose(told, exact.sampled_N, atol=1e-4)
        assert rows == 24 and by_teacher == {"one": 16, "two": 8}
        lines = runs.metrics(folder)
        for name, count in by_teacher.items():
            assert sum(line[f"teacher/{name}/rows"] for line in lines) == count
        tokens = sum(v for line in lines for k, v in line.items() if k.endswith("/tokens"))
        assert tokens == sum(line["tokens/trained"] for line in lines)

    def test_one_of_two_is_one_alone(self, configure: Configure) -> None:
        """A mapping of one name is that name."""
        alone = train(configure({"math": MATH}, "alone"))
        config = configure({"math": MATH}, "mapped")
        mapped = config.tasks["math"].model_copy(update={"teacher": {"two": 3.0}})
        runs.assert_same(alone, train(config.model_copy(update={"tasks": {"math": mapped}})), 4)


class TestSelfDistillation:
    @pytest.mark.parametrize("task", [HOUSEHOLD, MATH], ids=["household", "math"])
    def test_a_student_has_nothing_to_learn_from_itself(
        self, configure: Configure, models: dict[str, str], task: dict[str, Any]
    ) -> None:
        """Engine, scoring and learner are three ways through the network; a shift by one token or
        a wrong position in any of them shows here. What is left is the rounding of the teacher's
        top K to float16."""
        config = configure(
            {"t": task | {"teacher": "student"}}, steps=1, rollout={"processes": 0, "top_p": 1.0}
        )
        (line,) = runs.metrics(train(config))
        assert line["tokens/trained"] > 20
        assert line["loss/mean"] == pytest.approx(0, abs=1e-6)
        assert line["optimizer/grad_norm"] < 2e-3
        assert line["gap/mean"] == pytest.approx(0, abs=1e-5)
        assert line["gap/engine"] < 1e-5
        assert line["student/entropy"] > 0.5  # not a student without choices

    def test_nor_by_policy_gradient(self, configure: Configure, models: dict[str, str]) -> None:
        config = configure(
            {"t": MATH | {"teacher": "student"}}, steps=1, objective={"name": "sampled_token"}
        )
        (line,) = runs.metrics(train(config))
        assert line["loss/mean"] == pytest.approx(0, abs=1e-5)
        assert line["optimizer/grad_norm"] < 1e-4

    def test_another_teacher_has_something_to_teach(self, configure: Configure) -> None:
        """The guard of the two above."""
        (line,) = runs.metrics(train(configure({"t": MATH}, steps=1)))
        assert line["loss/mean"] > 0.1 and line["optimizer/grad_norm"] > 0.01


class TestImitation:
    @pytest.mark.parametrize(("share", "success"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
    def test_the_expert_plays_its_share_and_labels_the_rest(
        self, configure: Configure, share: float, success: float
    ) -> None:
        """The random student solves nothing, the expert everything; whoever acts, the loss falls on
        the expert's tokens alone."""
        config = configure(
            {"math": EXPERT_MATH | {"expert_share": share}},
            steps=2,
            objective={"name": "imitation"},
            journal={"diagnostics_every": 1, "tensorboard": False},
        )
        folder = train(config)
        for line in runs.metrics(folder):
            assert line["reward/success"] == success
            assert line["loss/mean"] == pytest.approx(-line["student/logprob"], rel=1e-6)
        tokenizer = _tokenizer(config)
        for text in runs.episodes(folder)["000001.jsonl"].decode().splitlines():
            episode = json.loads(text)
            (turn,), (row,) = episode["turns"], episode["rows"]
            said = [i for i, mask in zip(row["ids"], row["mask"], strict=True) if mask]
            assert tokenizer.decode(said) == f"{turn['expert_action']}<|end|>"
            assert set(row["sampled_logprob"]) == {None}
            assert (episode["actor"] == "expert") == (turn["action"] == turn["expert_action"])

    def test_household_labels_stand_on_branches_of_the_students_own_path(
        self, configure: Configure
    ) -> None:
        task = HOUSEHOLD | {
            "env_args": {"split": "train", "difficulty": "tiny", "expert": True},
            "teacher": None,
            "expert_share": 0.0,
        }
        config = configure({"t": task}, steps=1, objective={"name": "imitation"})
        folder = train(config)
        tokenizer = _tokenizer(config)
        for text in runs.episodes(folder)["000000.jsonl"].decode().splitlines():
            episode = json.loads(text)
            (row,) = episode["rows"]
            for number, turn in enumerate(episode["turns"]):
                label = [i for i, t in zip(row["ids"], row["turn"], strict=True) if t == number]
                assert tokenizer.decode(label) == f"{turn['expert_action']}<|end|>"
            assert len(episode["turns"]) == 3
            trunk = [i for i, b in zip(row["ids"], row["branch"], strict=True) if not b]
            for turn in episode["turns"][:-1]:
                assert turn["action"] in tokenizer.decode(trunk)

    def test_it_learns(self, configure: Configure) -> None:
        config = configure(
            {"math": EXPERT_MATH | {"episodes": 16}},
            steps=12,
            objective={"name": "imitation"},
            optimizer={"lr": 1e-2},
        )
        losses = [line["loss/mean"] for line in runs.metrics(train(config))]
        assert losses[-1] < 0.7 * losses[0]


def _tokenizer(config: RunConfig) -> Any:
    from tutelage.distill.models.loading import load_tokenizer, student_tokenizer

    return load_tokenizer(student_tokenizer(config.student))


class TestEpisodeFiles:
    def test_what_was_sampled_is_what_is_written(self, configure: Configure) -> None:
        """Ids, turns, mask and both log-probabilities token by token, in line with the words."""
        config = configure(
            {"t": HOUSEHOLD},
            steps=1,
            objective={"name": "local_support", "k": 4, "mask_tokens": ["<|end|>"]},
        )
        tokenizer = _tokenizer(config)
        for text in runs.episodes(train(config))["000000.jsonl"].decode().splitlines():
            episode = json.loads(text)
            (row,) = episode["rows"]
            for number, turn in enumerate(episode["turns"]):
                own = [i for i, t in enumerate(row["turn"]) if t == number]
                ids = [row["ids"][i] for i in own]
                assert tokenizer.decode(ids, skip_special_tokens=True) == turn["action"]
                ends = [i for i in own if row["ids"][i] == tokenizer.eos_token_id]
                assert [i for i in own if not row["mask"][i]] == ends[:1]
            for i, turn in enumerate(row["turn"]):
                for key in ("sampled_logprob", "law_logprob", "teacher_logprob"):
                    assert (row[key][i] is None) == (turn == -1)
            # a part of the policy's mass is cut off: what is left has more of it
            pairs = zip(row["law_logprob"], row["sampled_logprob"], strict=True)
            gains = [sampling - own for sampling, own in pairs if own is not None]
            assert all(-1e-5 < gain <= -math.log(0.9) + 1e-5 for gain in gains) and any(gains)
            assert episode["top_p"] == 0.9 and episode["version"] == 0


class TestSamplingLaw:
    def _config(self, configure: Configure, run: str, **sections: Any) -> RunConfig:
        return configure(
            {"household": HOUSEHOLD, "math": MATH},
            run,
            objective={"name": "sampled_token", "behavior": "sampling"},
            rollout={"processes": 0, "top_p": 0.8, "temperature": 0.7},
            **sections,
        )

    def test_the_learner_says_it_where_the_engine_does_not(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """vLLM's case: the weights are still those that played, so the run is the same."""
        told = runs.metrics(train(self._config(configure, "told", steps=2)))
        step = TransformersEngine.step

        def silent(self: TransformersEngine) -> list[Any]:
            return [replace(one, sampling_logprobs=None) for one in step(self)]

        monkeypatch.setattr(TransformersEngine, "step", silent)
        folder = train(self._config(configure, "silent", steps=2))
        for one, other in zip(told, runs.metrics(folder), strict=True):
            numbers = {key: value for key, value in one.items() if isinstance(value, float)}
            assert numbers["behavior/weight"] != 1
            found = {key: other[key] for key in numbers}
            assert found == pytest.approx(numbers, rel=1e-3, abs=1e-4)
        for text in runs.episodes(folder)["000001.jsonl"].decode().splitlines():
            for row in json.loads(text)["rows"]:
                drawn = [own is not None for own in row["sampled_logprob"]]
                assert [sampling is not None for sampling in row["law_logprob"]] == drawn

    def test_it_is_kept_with_the_episodes_that_were_played_ahead(
        self, configure: Configure
    ) -> None:
        """Their weights are gone: a run that resumes finds it in the checkpoint, to the bit."""
        prefetch = {"steps": 3, "schedule": {"max_staleness": 1}}
        whole = train(self._config(configure, "whole", **prefetch))
        config = self._config(configure, "parts", **prefetch)
        watch = _StopAfter(0)
        with Run(config, watch=watch) as run:
            watch.run = run
            run.train()
        runs.assert_same(train(config), whole, 3)


class TestRefusals:
    """Before any weight is loaded."""

    @pytest.fixture(autouse=True)
    def _no_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def loaded(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(student_building, "load_student", loaded)
        monkeypatch.setattr(teacher_building, "load_model", loaded)

    def _with_teacher(self, configure: Configure, model: str) -> RunConfig:
        config = configure({"math": MATH})
        teacher = config.teachers["two"].model_copy(update={"model": model})
        return config.model_copy(update={"teachers": {"two": teacher}})

    def test_a_teacher_whose_vocabulary_differs_in_one_token(
        self, configure: Configure, tokenizer: Any, models: dict[str, str], tmp_path: Path
    ) -> None:
        """Two tokens changed places: the sizes agree, and every score would be wrong."""
        folder = tmp_path / "swapped"
        shutil.copytree(models["two"], folder)
        tokenizer.save_pretrained(folder)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"]
        one, other = "mug", "Ġmug"
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"teachers\.two: its vocabulary differs.*mug") as no:
            Run(self._with_teacher(configure, str(folder)))
        assert "\n" not in str(no.value)

    def test_a_teacher_that_ends_otherwise(
        self, configure: Configure, tokenizer: Any, models: dict[str, str], tmp_path: Path
    ) -> None:
        folder = tmp_path / "ends"
        shutil.copytree(models["two"], folder)
        odd = copy.deepcopy(tokenizer)
        odd.eos_token = "<|pad|>"
        odd.save_pretrained(folder)
        with pytest.raises(ConfigError, match=r"teachers\.two: it ends with '<\|pad\|>'"):
            Run(self._with_teacher(configure, str(folder)))

    def test_a_model_too_small_for_its_tokenizer(
        self, configure: Configure, tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        folder = tmp_path / "small"
        make_model(vocabulary=100).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with pytest.raises(ConfigError, match=r"teachers\.two\.model.*100 embedding rows"):
            Run(self._with_teacher(configure, str(folder)))

    def test_a_folder_that_is_not_there(self, configure: Configure) -> None:
        with pytest.raises(ConfigError, match=r"/nowhere/teacher.*no such folder"):
            Run(self._with_teacher(configure, "/nowhere/teacher"))

    def test_an_environment_that_does_not_exist(self, configure: Configure) -> None:
        with pytest.raises(ValueError, match="Maths-v0"):
            Run(configure({"math": MATH | {"env": "tutelage/Maths-v0"}}))

    def test_an_environments_unknown_option(self, configure: Configure) -> None:
        with pytest.raises(ValueError, match="splt"):
            Run(configure({"math": MATH | {"env_args": {"splt": "train"}}}))

    def test_a_mask_text_that_gives_no_token(self, configure: Configure) -> None:
        objective = {"name": "local_support", "k": 8, "mask_tokens": [""]}
        with pytest.raises(ValueError, match=r"objective\.mask_tokens\.0: it must not be empty"):
            Run(configure({"math": MATH}, objective=objective))


class TestEvaluation:
    def test_a_models_scores_need_no_teacher_and_repeat(
        self, configure: Configure, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(assembly, "make_teacher", lambda *_: pytest.fail("a teacher loaded"))
        config = configure(
            {"household": HOUSEHOLD, "math": MATH | {"eval_args": {"split": "test"}}},
            evaluation={"episodes": 5},
        )
        one, other = (evaluate_model(config, models["one"]) for _ in range(2))
        assert one == other
        assert one["model"] == models["one"] and len(one["weights"]) == 64
        for task, metric in (("household", "success rate"), ("math", "pass@1")):
            found = one["scores"][task]
            assert found["metric"] == metric
            for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                assert (found[mode]["n"], found[mode]["temperature"]) == (5, temperature)
                assert found[mode]["interval"][0] <= found[mode]["value"]

    def test_scores_during_training_stand_in_the_metrics_of_their_step(
        self, configure: Configure
    ) -> None:
        config = configure({"math": MATH}, steps=4, evaluation={"every": 2, "episodes": 3})
        lines = runs.metrics(train(config))
        scored = [any(key.startswith("eval/") for key in line) for line in lines]
        assert scored == [False, True, False, True]


@pytest.mark.parametrize("by", ["expert", "teacher"])
def test_guided_episodes_are_learned_from_by_trust_region(configure: Configure, by: str) -> None:
    """At the first step all of a guided episode is given, at the last nothing is left."""
    task = MATH | {"guidance": {"by": by, "share": 0.5}}
    if by == "expert":
        task["env_args"] = task.get("env_args", {}) | {"expert": True}
    config = configure(
        {"math": task},
        steps=3,
        objective={"name": "trust_region", "k": 8},
        journal={"tensorboard": False},
    )
    lines = runs.metrics(train(config))
    assert [line["episodes/guided"] for line in lines] == [0.5, 0.5, 0.0]
    assert lines[0]["trust/given"] > lines[1]["trust/given"] > lines[2]["trust/given"] == 0.0
    assert 0 < lines[2]["trust/share"] < 1
