"""Sampling parameters: who tells the tokens' log-probabilities, and which objective they bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.distill.cli import main as cli
from tutelage.distill.config.loading import parse_config
from tutelage.distill.doctor.numbers import check_sampling
from tutelage.distill.engines.vllm.engine import _under_sampling
from tutelage.distill.objectives import build, weighted_sum
from tutelage.distill.plan.plan import make_plan, notes
from tutelage.distill.student.sampling_bias import bias, with_sampling_logprobs
from tutelage.scheduler.episodes import GREEDY, Episode, Order, Row, SamplingParams, revived, saved

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
WHOLE, TEMPERED = SamplingParams(), SamplingParams(temperature=0.7)
CUT, BOTH = SamplingParams(top_p=0.9), SamplingParams(temperature=0.7, top_p=0.8)
DRAWING: list[tuple[str, dict[str, Any]]] = [
    ("sampled_token", {}),
    ("trust_region", {}),
    ("entropy_aware", {}),
    ("reward_clipped", {}),
    ("advantage_gated", {}),
    ("local_support", {"renormalize": False, "tail": "sampled"}),
    ("local_support", {"support": "teacher+sampled"}),
    ("local_support", {"support": "student+sampled"}),
]
DIRECT: list[tuple[str, dict[str, Any]]] = [
    ("local_support", {}),
    ("local_support", {"support": "student", "renormalize": False}),
    ("full_vocabulary", {}),
    ("imitation", {}),
]


def _episode(*rows: Row, params: SamplingParams, version: int = 3) -> Episode:
    return Episode(
        order=Order(task="t", number=0, seed=5, index=2),
        rows=rows,
        turns=(),
        success=True,
        reward=1.0,
        task_type="",
        ended="terminated",
        sampling=params,
        version=version,
    )


class Sayer:
    """A learner that says -10 - i of the i-th action token of each row."""

    version = 3

    def __init__(self) -> None:
        self.asked: list[tuple[int, SamplingParams]] = []

    def sampling_logprobs(self, rows: list[Row], params: SamplingParams) -> list[torch.Tensor]:
        self.asked.append((len(rows), params))
        return [-10.0 - torch.arange(int(row.action_mask_T.sum())) for row in rows]


@pytest.fixture
def row(make_row: Callable[..., Row]) -> Row:
    """Two replies, the first token of the second off-policy; no sampling log-probabilities."""
    made = make_row([("prompt", [1, 2]), ("said", [5, 9]), ("prompt", [3]), ("said", [7, 4])])
    behavior_logprobs_T = made.behavior_logprobs_T.copy()
    behavior_logprobs_T[5] = np.nan
    return replace(made, behavior_logprobs_T=behavior_logprobs_T)


class TestRows:
    def test_a_row_of_an_older_version_knows_none(self, row: Row) -> None:
        """As a checkpoint holds it: without the field."""
        plain = saved(_episode(row, params=CUT))
        for each in plain["rows"]:
            del each["law_logprobs_T"]
        found = revived(plain)
        assert isinstance(found, Episode)
        assert np.isnan(found.rows[0].sampling_T).all() and len(found.rows[0].sampling_T) == len(
            row.ids_T
        )

    def test_what_was_said_comes_back(self, row: Row) -> None:
        said = replace(row, sampling_logprobs_T=row.behavior_logprobs_T * 0.5)
        found = revived(saved(_episode(said, params=CUT)))
        assert isinstance(found, Episode)
        np.testing.assert_array_equal(found.rows[0].sampling_T, row.behavior_logprobs_T * 0.5)

    def test_another_length_is_refused(self, row: Row) -> None:
        with pytest.raises(ValueError, match="differ in length"):
            replace(row, sampling_logprobs_T=row.behavior_logprobs_T[:-1])


class TestTold:
    def test_the_student_says_it_of_its_own_tokens_and_no_others(self, row: Row) -> None:
        learner, known = Sayer(), replace(row, sampling_logprobs_T=row.behavior_logprobs_T * 0.5)
        episodes = [_episode(row, known, params=BOTH), _episode(row, params=CUT)]
        first, second = with_sampling_logprobs(episodes, learner)  # type: ignore[arg-type]
        assert isinstance(first, Episode) and isinstance(second, Episode)
        assert learner.asked == [(1, BOTH), (1, CUT)] and first.rows[1] is known
        nan = math.nan
        for filled in (first.rows[0], second.rows[0]):
            wanted = [nan, nan, -10.0, -11.0, nan, nan, -13.0]
            np.testing.assert_array_equal(filled.sampling_T, np.float32(wanted))
            np.testing.assert_array_equal(filled.behavior_logprobs_T, row.behavior_logprobs_T)

    def test_the_whole_policys_are_the_recorded_ones(self, row: Row) -> None:
        learner = Sayer()
        (found,) = with_sampling_logprobs([_episode(row, params=WHOLE, version=1)], learner)  # type: ignore[arg-type]
        assert isinstance(found, Episode) and not learner.asked
        np.testing.assert_array_equal(found.rows[0].sampling_T, row.behavior_logprobs_T)

    def test_weights_that_are_gone_are_not_replaced_by_others(self, row: Row) -> None:
        with pytest.raises(
            RuntimeError, match=r"t\[2\] seed 5: .*version 2, now 3.*behavior: full"
        ):
            with_sampling_logprobs([_episode(row, params=CUT, version=2)], Sayer())  # type: ignore[arg-type]

    def test_what_vllm_tells(self) -> None:
        """The whole policy's log-probabilities; under other parameters it knows none."""
        logprobs = [-0.5, -2.0]
        assert _under_sampling(WHOLE, logprobs) == logprobs
        assert _under_sampling(GREEDY, logprobs) == [0.0, 0.0]
        assert (
            _under_sampling(CUT, logprobs) is None and _under_sampling(TEMPERED, logprobs) is None
        )


class TestBias:
    @pytest.mark.parametrize(("name", "options"), DRAWING)
    def test_the_parameters_are_named_with_the_cure(self, name: str, options: Any) -> None:
        full = build(name, **options)
        sampling = build(name, behavior="sampling", **options)
        takes = f"{name} treats its tokens as drawn from the whole policy at temperature 1;"
        part = "set behavior: sampling (tokens that are never drawn stay without their part), or"
        wanted = {
            CUT: (f"{takes} top_p 0.9 draws from a part of it", f"{part} top_p 1"),
            TEMPERED: (
                f"{takes} temperature 0.7 draws from another distribution",
                "set behavior: sampling (exact), or temperature 1",
            ),
            BOTH: (
                f"{takes} temperature 0.7 with top_p 0.8 draws from a part of it",
                f"{part} temperature 1 and top_p 1",
            ),
            GREEDY: (f"{takes} temperature 0 draws from a part of it", f"{part} temperature 1"),
        }
        for params, (text, cure) in wanted.items():
            found = bias(full, params)
            assert found is not None and (found.text, found.cure) == (text, cure)
        assert bias(full, WHOLE) is bias(sampling, WHOLE) is bias(sampling, TEMPERED) is None
        for params, cure in ((CUT, "top_p 1"), (BOTH, "top_p 1"), (GREEDY, "temperature 1")):
            left = bias(sampling, params)
            assert left is not None and left.cure == f"{cure} leaves nothing out"
            assert "never draws have no part in its gradient" in left.text

    @pytest.mark.parametrize(("name", "options"), DIRECT)
    def test_a_loss_that_takes_no_draw_has_none(self, name: str, options: Any) -> None:
        assert all(bias(build(name, **options), params) is None for params in (CUT, BOTH, GREEDY))

    def test_of_a_sum_the_loss_that_has_one_is_named(self) -> None:
        """One that weighs its tokens does not speak for one that does not."""
        weighs = build("sampled_token", behavior="sampling")
        found = bias(weighted_sum([(1.0, weighs), (0.1, build("trust_region"))]), TEMPERED)
        assert found is not None and found.text.startswith("trust_region treats its tokens")
        assert bias(weighted_sum([(1.0, weighs), (0.1, build("local_support"))]), TEMPERED) is None

    def test_the_doctor_says_so(self) -> None:
        objective = build("sampled_token")
        assert check_sampling("tasks.t", objective, WHOLE).level == "ok"
        note = check_sampling("tasks.t", objective, CUT)
        assert note.level == "note" and "top_p 0.9" in note.text and "top_p 1" in note.cure
        weighed = check_sampling("tasks.t", build("sampled_token", behavior="sampling"), TEMPERED)
        assert weighed.level == "ok" and "weighs its tokens" in weighed.text


def _config(**sections: Any) -> Any:
    task = {"env": "tutelage/Math-v0", "env_args": {"problems": "arithmetic"}, "teacher": "a"}
    data = {
        "run": "runs/x",
        "steps": 2,
        "student": {"model": "builtin:start"},
        "teachers": {"a": {"model": "builtin:arithmetic"}},
        "tasks": {"math": task},
        "objective": {"name": "sampled_token"},
    }
    return parse_config(data | sections, "test")


class TestConfigs:
    def test_the_plan_says_so_in_a_line(self) -> None:
        config = _config(rollout={"top_p": 0.9})
        (line,) = [note for note in notes(make_plan(config)) if "behavior" in note]
        assert line == (
            "tasks.math: sampled_token treats its tokens as drawn from the whole policy at"
            " temperature 1; top_p 0.9 draws from a part of it: set behavior: sampling (tokens that"
            " are never drawn stay without their part), or top_p 1"
        )
        sampling = {"name": "sampled_token", "behavior": "sampling"}
        for sections in (
            {"rollout": {"top_p": 1.0}},
            {"rollout": {"top_p": 1.0, "temperature": 0.7}, "objective": sampling},
            {"rollout": {"top_p": 0.9}, "objective": {"name": "local_support", "k": 8}},
        ):
            found = notes(make_plan(_config(**sections)))
            assert not [note for note in found if "drawn" in note or "draws" in note]

    def test_where_they_cannot_be_known_it_is_refused_before_anything_loads(self) -> None:
        """vLLM does not know, and stale weights are gone by the time the learner could say."""
        sampling = {"name": "sampled_token", "behavior": "sampling"}
        rollout, stale = {"engine": "vllm", "top_p": 0.9}, {"max_staleness": 1}
        with pytest.raises(ValueError, match=r"tasks\.math: objective\.behavior: sampling needs"):
            _config(objective=sampling, rollout=rollout, schedule=stale)
        _config(objective=sampling, rollout=rollout)
        _config(objective=sampling, rollout=rollout | {"top_p": 1.0}, schedule=stale)
        _config(objective=sampling, rollout={"top_p": 0.9}, schedule=stale)

    def test_a_behavior_that_is_none_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", str(DEMO), "objective={name: sampled_token, behavior: mu}"])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert "sampled_token behavior 'mu'" in error and error.count("\n") == 1
