"""Answers that make no sense, of environments, engines, teachers and disks: bounded, counted or
named with the place and the cure, and never learned from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tests import runs
from tests.runs import metrics, train
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models.loading import load_model
from tutelage.distill.teachers.service import Answer, TeacherService
from tutelage.envs.grading import Verdict
from tutelage.envs.math import env as math_env
from tutelage.scheduler.engine import Completion

pytestmark = pytest.mark.runs

STEPS = 4


class Garbled(gym.Env[str, str]):
    """Six games; game 2 answers `garbage` where it should say what became of it."""

    observation_space = action_space = spaces.Text(1000)
    garbage: Any = None

    def __init__(self) -> None:
        self.num_episodes = 6

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._index = int((options or {"index": 0})["index"])
        return f"{self._index}+1=", {"success": False}

    def step(self, action: str) -> Any:
        if self._index == 2 and isinstance(Garbled.garbage, BaseException):
            raise Garbled.garbage
        if self._index == 2:
            return Garbled.garbage
        return "done", 1.0, True, False, {"success": True}


gym.register("Garbled-v0", entry_point=Garbled)  # type: ignore[arg-type]


@pytest.fixture
def configure(tmp_path: Path, models: dict[str, str]) -> Configure:
    def configure(run: str = "run", env: str = "tutelage/Math-v0", **sections: Any) -> RunConfig:
        given = {
            "steps": STEPS,
            "teachers": {"sage": {"model": models["one"], "device": "cpu"}},
            "tasks": {"sums": {"env": env, "teacher": "sage", "episodes": 6}},
            "checkpoint": {"every": 1},
        }
        return runs.config(tmp_path / run, models, **given | sections)

    return configure


Configure = Callable[..., RunConfig]


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class TestEnvironments:
    @pytest.mark.parametrize(
        ("garbage", "said"),
        [
            ((None, 1.0, True, False, {}), "the observation is None, not text"),
            (("x", math.nan, True, False, {}), "the reward is nan, not a finite number"),
            (("x", "1", True, False, {}), "the reward is '1', not a finite number"),
            (("x", 1.0, True, {}), "not Gymnasium's five values"),
            (("x", 1.0, True, False, {}, {}), "not Gymnasium's five values"),
            (None, "step returned None"),
            (("x", 1.0, "yes", False, {}), "terminated is 'yes', not a bool"),
            (("x", 1.0, True, False, ["success"]), "info is ['success'], not a dict"),
            (("x", 1.0, True, False, {"success": "yes"}), "info['success'] is 'yes', not a bool"),
            (("x", 1.0, True, False, {"success": None}), "info['success'] is None, not a bool"),
            (("x", -math.inf, True, False, {}), "the reward is -inf, not a finite number"),
            ((b"x", 1.0, True, False, {}), "the observation is b'x', not text"),
            (
                ("\ud83d", 1.0, True, False, {}),
                "half of a surrogate pair, '\\ud83d', at character 0",
            ),
            (
                ("x", 1.0, True, False, {"expert_action": "\udfff"}),
                "info has half of a surrogate pair",
            ),
            (
                ("x" * 2000, 1.0, True, False, {}),
                "2000 characters, and rollout.max_observation allows",
            ),
        ],
        ids=lambda value: None if isinstance(value, tuple) else value,
    )
    def test_their_episode_is_dropped_counted_and_named_in_the_metrics(
        self, configure: Configure, garbage: Any, said: str
    ) -> None:
        Garbled.garbage = garbage
        rollout = {"processes": 0, "max_turns": 1, "max_new_tokens": 4, "max_observation": 1000}
        folder = train(configure(env="Garbled-v0", steps=2, rollout=rollout))
        for step, line in enumerate(metrics(folder)):
            assert (line["episodes/played"], line["episodes/dropped"]) == (5, 1)
            (lost,) = line["episodes/lost"]
            assert lost.startswith("sums[2] seed ") and said in lost and ": garbage: " in lost
            text = (folder / "episodes" / f"{step:06d}.jsonl").read_text(encoding="utf-8")
            (dropped,) = [one for one in map(json.loads, text.splitlines()) if "dropped" in one]
            assert (dropped["dropped"], dropped["attempts"]) == ("garbage", 3)

    @pytest.mark.parametrize("end", [SystemExit(0), SystemExit("bye"), BaseException("no")])
    def test_an_exit_in_this_process_is_no_end_of_the_run_nor_of_its_evaluation(
        self, configure: Configure, end: BaseException
    ) -> None:
        """It ended both, silently, with the code that the environment chose."""
        Garbled.garbage = end
        evaluation = {"final": True, "modes": ["greedy"], "episodes": 6}
        folder = train(configure(env="Garbled-v0", steps=1, evaluation=evaluation))
        (line,) = metrics(folder)
        (lost,) = line["episodes/lost"]
        assert f"raised: {type(end).__name__}: {end}" in lost
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["sums"]["greedy"]
        assert (found["n"], found["dropped"], found["value"]) == (5, 1, 1.0)

    def test_answers_that_the_machine_could_not_grade_are_dropped_and_never_wrong(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every third grade comes late; each episode is tried three times."""
        calls = iter(range(99))

        def judge(*_: Any, **__: Any) -> Verdict:
            late = next(calls) % 3 == 2
            return Verdict(correct=not late, reason="late" if late else "exact")

        monkeypatch.setattr(math_env, "judge", judge)
        (line,) = metrics(train(configure(steps=1)))
        assert (line["episodes/dropped"], line["reward/success"]) == (0, 1.0)  # played again
        late = Verdict(correct=False, reason="late")
        slow = iter([late] * 3)  # all attempts at the first
        monkeypatch.setattr(
            math_env, "judge", lambda *_, **__: next(slow, Verdict(correct=True, reason="exact"))
        )
        rollout = {"processes": 0, "max_turns": 1, "max_new_tokens": 4, "max_live": 1}
        (line,) = metrics(train(configure("other", steps=1, rollout=rollout)))
        assert (line["grading/undecided"], line["episodes/dropped"]) == (1, 1)
        assert line["reward/success"] == 1.0
        assert "undecided: no grade within 45 s (late): this machine is" in line["episodes/lost"][0]

    def test_a_step_without_losses_names_none(self, configure: Configure) -> None:
        assert not any("episodes/lost" in line for line in metrics(train(configure(steps=1))))


def _nan(answer: Answer) -> Answer:
    first, *others = answer.scores
    logprobs_NK = first.logprobs_NK.copy()
    logprobs_NK[1, 2] = np.nan
    return replace(answer, scores=(replace(first, logprobs_NK=logprobs_NK), *others))


def _outside(answer: Answer) -> Answer:
    *others, last = answer.scores
    ids_NK = last.ids_NK.copy()
    ids_NK[0, 0] = last.vocabulary
    return replace(answer, scores=(*others, replace(last, ids_NK=ids_NK)))


def _short(answer: Answer) -> Answer:
    first, *others = answer.scores
    cut = {
        name: getattr(first, name)[:-1]
        for name in ("ids_NK", "logprobs_NK", "sampled_N", "entropy_N")
    }
    return replace(answer, scores=(replace(first, **cut), *others))


def _certain(answer: Answer) -> Answer:
    first, *others = answer.scores
    certain = replace(first, logprobs_NK=np.zeros_like(first.logprobs_NK))
    return replace(answer, scores=(certain, *others))


class TestTeachers:
    @pytest.mark.parametrize(
        ("garble", "said"),
        [
            (_nan, r"row 0 of 6: .*logprobs_NK at \[1, 2\] is nan"),
            (_outside, r"row 5 of 6: .*a support id lies outside the vocabulary of 825"),
            (_short, r"row 0 of 6: it scored 3 of 4 tokens"),
            (lambda a: replace(a, scores=a.scores[1:]), r"it answered 5 rows of 6"),
            (_certain, r"row 0 of 6: its probabilities sum to more than 1"),
            (
                lambda a: replace(a, scores=(replace(a.scores[0], vocabulary=9), *a.scores[1:])),
                r"row 0 of 6: it knows 9 ids, the student 825",
            ),
        ],
        ids=["nan", "outside", "short", "rows", "certain", "vocabulary"],
    )
    def test_the_run_stops_saved_names_the_teacher_and_goes_on_as_if_nothing_had_been(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch, garble: Any, said: str
    ) -> None:
        score, calls = TeacherService.score, iter(range(99))

        def garbled(self: TeacherService, *args: Any, **wanted: Any) -> Answer:
            answer = score(self, *args, **wanted)
            return garble(answer) if answer.scores and next(calls) == 2 else answer

        sections = {"checkpoint": {"every": 100}}
        monkeypatch.setattr(TeacherService, "score", garbled)
        config = configure(**sections)
        with pytest.raises(RuntimeError, match=rf"teachers\.sage: {said}.*is saved; load"):
            train(config)
        assert _saved(Path(config.run)) == ["000002"]
        monkeypatch.undo()
        train(config)
        whole = train(configure("whole", **sections))
        assert metrics(whole) == metrics(Path(config.run))


class TestEngines:
    @pytest.mark.parametrize(
        ("ids", "logprobs", "said"),
        [
            ([5, 7], [-0.5, math.nan], r"sampled id 7 with log-probability nan \(token 1 of 2\)"),
            ([5], [0.25], "sampled id 5 with log-probability 0.25"),
            ([5], [-math.inf], "sampled id 5 with log-probability -inf"),
            ([-1], [-0.5], "sampled id -1"),
            ([5, 7], [-0.5], "sampled 2 ids and 1 log-probabilities"),
        ],
    )
    def test_what_no_distribution_gives_is_refused_where_it_arises(
        self, ids: list[int], logprobs: list[float], said: str
    ) -> None:
        with pytest.raises(RuntimeError, match=said):
            Completion(session=1, ids=ids, logprobs=logprobs, stopped=False)

    def test_an_id_beyond_the_vocabulary_stops_the_run_saved(
        self, configure: Configure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step, calls = TransformersEngine.step, iter(range(99))

        def padded(self: TransformersEngine) -> list[Completion]:
            found = step(self)
            if found and next(calls) == 1:
                found[0] = replace(found[0], ids=[825] * len(found[0].ids))
            return found

        monkeypatch.setattr(TransformersEngine, "step", padded)
        config = configure(checkpoint={"every": 100})
        with pytest.raises(RuntimeError, match=r"sums\[\d+\] seed .* id 825.*tokenizer has 825"):
            train(config)
        assert _saved(Path(config.run)) == ["000001"]


def _half(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()  # somebody may have it mapped
    path.write_bytes(data[: len(data) // 2])


class TestDisks:
    @pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
    @pytest.mark.parametrize("damage", [_half, Path.unlink, lambda p: p.write_bytes(b"")])
    def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_leads_to_the_same(
        self, configure: Configure, file: str, damage: Callable[[Path], Any]
    ) -> None:
        folder = train(configure())
        before = metrics(folder)
        weights = (folder / "checkpoints" / "000004" / "model.safetensors").read_bytes()
        damage(folder / "checkpoints" / "000004" / file)
        if (folder / "checkpoints" / "000004" / "trainer.pt").exists():
            with pytest.warns(UserWarning, match=r"000004 is damaged .*set aside .*the one before"):
                train(configure())
        else:
            train(configure())  # without it, it never was one
        assert metrics(folder) == before
        again = (folder / "checkpoints" / "000004" / "model.safetensors").read_bytes()
        assert again == weights

    def test_where_every_checkpoint_is_damaged_nothing_begins_anew(
        self, configure: Configure
    ) -> None:
        folder = train(configure(checkpoint={"every": 2, "keep": 1}))
        before = metrics(folder)
        _half(folder / "checkpoints" / "000004" / "model.safetensors")
        for _ in range(2):  # the same command, again
            with pytest.raises(RuntimeError, match=r"000004 is damaged .*no other.*begin anew"):
                train(configure(checkpoint={"every": 2, "keep": 1}))
        assert metrics(folder) == before

    def test_half_a_line_of_metrics_is_not_built_upon(self, configure: Configure) -> None:
        """Beyond the checkpoint it is cut off, as ever; before it, what was lost is said."""
        config = configure(steps=2)
        folder = train(config)
        path = folder / "metrics.jsonl"
        before = metrics(folder)
        with path.open("a") as file:
            file.write('{"step": 2, "loss/me')
        train(config)
        assert metrics(folder) == before
        data = path.read_bytes()
        path.write_bytes(data[: data.find(b"\n") + 9])  # a line and a bit
        with pytest.warns(UserWarning, match=r"metrics.jsonl has \d+ bytes.* knows of \d+"):
            train(configure(steps=2, checkpoint={"every": 3}))
        assert metrics(folder) == before[:1]

    def test_a_damaged_teacher_is_refused_by_name(
        self, models: dict[str, str], tmp_path: Path
    ) -> None:
        import shutil

        shutil.copytree(models["one"], tmp_path / "teacher")
        _half(tmp_path / "teacher" / "model.safetensors")
        with pytest.raises(ConfigError, match=r"teacher': its weights does not load"):
            load_model(str(tmp_path / "teacher"), dtype="float32", device="cpu")
