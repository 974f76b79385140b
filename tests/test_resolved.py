"""A resolved config: every key arrives once, and no record below has a default of its own."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch

from tests import settings
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.resolved import TaskSettings, rollouts_of
from tutelage.distill.config.sections import (
    ClusterConfig,
    ContextConfig,
    EvaluationConfig,
    OptimizerConfig,
    RolloutConfig,
)
from tutelage.distill.models.loading import load_student
from tutelage.distill.plan.footprint import student_footprint
from tutelage.distill.student.optimizers import Optimizer
from tutelage.scheduler.cluster import ClusterSettings
from tutelage.scheduler.contexts import ContextSettings
from tutelage.scheduler.rollouts import TaskRollout
from tutelage.scheduler.timetable import TaskPlan

DATA: dict[str, Any] = {
    "run": "runs/x",
    "steps": 6,
    "student": {"model": "builtin:arithmetic"},
    "teachers": {"t": {"model": "builtin:arithmetic"}},
    "tasks": {
        "own": {
            "env": "tutelage/Math-v0",
            "env_args": {"split": "train", "expert": True},
            "eval_args": {"split": "valid"},
            "teacher": "t",
            "episodes": 6,
            "group": 3,
            "start": 1,
            "end": 5,
            "steps": 2,
            "weight": 2.0,
            "objective": {"name": "trust_region", "k": 5, "mask_tokens": ["x"]},
            "guidance": {"by": "teacher", "share": 0.5, "until": 0.7},
            "rollout": {
                "temperature": 0.7,
                "top_p": 0.8,
                "max_turns": 3,
                "max_new_tokens": 4,
                "max_live": 5,
                "processes": 6,
                "timeout": 7.0,
                "attempts": 8,
                "max_observation": 9,
                "lost": 0.1,
                "context": {"kind": "window", "turns": 2},
            },
        },
        "plain": {"env": "tutelage/Math-v0", "teacher": "t"},
    },
}


@pytest.mark.parametrize(
    "record", [TaskRollout, TaskPlan, ContextSettings, ClusterSettings, TaskSettings]
)
def test_a_record_below_the_config_has_no_defaults(record: Any) -> None:
    of = {f.name for f in fields(record)}
    having = {
        f.name
        for f in fields(record)
        if f.default is not MISSING or f.default_factory is not MISSING
    }
    assert of and having == set()


def test_records_that_are_sections_have_their_keys() -> None:
    for record, section in ((ClusterSettings, ClusterConfig), (ContextSettings, ContextConfig)):
        assert {field.name for field in fields(record)} == section.model_fields.keys()  # type: ignore[arg-type]


def test_every_key_of_a_task_arrives() -> None:
    task = parse_config(DATA, "test").resolve()["own"]
    how = settings.rollout(
        "tutelage/Math-v0",
        {"split": "train", "expert": True},
        **{k: v for k, v in DATA["tasks"]["own"]["rollout"].items() if k != "lost"},
    )
    assert task.rollout == how
    assert (how.sampling.temperature, how.sampling.top_p, how.max_turns, how.max_new_tokens) == (
        0.7,
        0.8,
        3,
        4,
    )
    assert (how.max_live, how.processes, how.timeout, how.attempts) == (5, 6, 7.0, 8)
    assert (how.max_observation, how.context.kind, how.context.turns) == (9, "window", 2)
    assert task.evaluation.env_args == {"split": "valid"}
    assert (task.lost, task.weight, task.mask_tokens, task.guide) == (0.1, 2.0, ("x",), "t")
    assert (task.objective.name, task.objective.needs.k) == ("trust_region", 5)
    assert task.schedule == TaskPlan(
        episodes=6,
        group=3,
        teachers={"t": 1.0},
        labels=False,
        expert_share=(1.0, 1.0),
        guided_share=0.5,
        guided_until=0.7,
        start=1,
        end=5,
        most=2,
    )


def test_a_task_without_keys_of_its_own_has_the_runs() -> None:
    rollout = {"temperature": 0.5, "max_turns": 2, "context": {"repeat_task": True}}
    config = parse_config(DATA | {"rollout": rollout, "objective": {"name": "sampled_token"}}, "")
    tasks = config.resolve()
    plain = tasks["plain"]
    assert plain.rollout == settings.rollout("tutelage/Math-v0", **rollout)
    assert (plain.objective.name, plain.guide) == ("sampled_token", None)
    # Inside a section too, the task's keys replace the run's one by one.
    assert (tasks["own"].rollout.context.kind, tasks["own"].rollout.context.repeat_task) == (
        "window",
        True,
    )
    assert rollouts_of(tasks)["evaluation:plain"] == plain.evaluation
    assert plain.lost == RolloutConfig().lost


@pytest.mark.parametrize("every", [0, 1, 3, 10, 11])
@pytest.mark.parametrize("final", [False, True])
def test_evaluations_are_as_many_as_are_due(every: int, final: bool) -> None:
    section = EvaluationConfig(every=every, final=final, live_modes=("greedy", "sampled"))
    due = sum(section.due(done) for done in range(1, 11))
    assert section.rounds(10) == 2 * due + 2 * final


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_keeps_what_plan_says(name: Any) -> None:
    student = parse_config(DATA, "test").student
    model = load_student(student, seed=0, vocabulary=1)
    optimizer = Optimizer(model, OptimizerConfig(name=name))
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    kept = sum(
        value.nbytes
        for part in optimizer.state_dict()["parts"]
        for state in part["state"].values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    )
    assert student_footprint(student).optimizer_state(name, student.dtype) == (kept, kept)
