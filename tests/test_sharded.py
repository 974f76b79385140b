"""A learner of two processes learns what one of one process learns, and leaves nothing behind."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.rounding import UPDATE_SUMS, rounding
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.config.sections import OptimizerConfig, StudentConfig
from tutelage.distill.objectives import Objective, build
from tutelage.distill.run.observers import Observer
from tutelage.distill.student.examples import Example, TaskObjective
from tutelage.distill.student.learner import Learner
from tutelage.distill.student.ranks import split
from tutelage.distill.student.sharded import Setup, start
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.scheduler.episodes import Row, SamplingParams

pytestmark = pytest.mark.runs

VOCABULARY = 101
STEPS = 3
SAME = rounding(sums=3 * STEPS * UPDATE_SUMS)
"""Of a metric around one, or its share, after several updates of three minibatches."""
SMOOTH = 1e-3
"""AdamW's epsilon here. With 1e-8 it moves by lr what has no gradient but rounding, up or down by
the processor; with this a step is as exact as its gradient."""
Make = Callable[..., Any]


class Pair:
    """The same student twice: in this process, and over two."""

    def __init__(
        self, folder: Path, *, sparse: bool = False, timeout: float = 60.0, **options: Any
    ) -> None:
        self._given: dict[str, Any] = {
            "config": OptimizerConfig(**({"lr": 1e-3, "micro_tokens": 45} | options)),
            "steps": 10,
        }
        student = StudentConfig(model=str(folder), device="cpu")
        make = "trapped:gathered" if sparse else "tutelage.distill.student.build:rank_student"
        self._make_student = partial(resolve_name(make), student, 0, VOCABULARY)
        self.over_two = start(
            Setup(
                make_student=self._make_student,
                processes=2,
                timeout=timeout,
                threads=1,
                **self._given,
            )
        )
        self._fresh = self.over_two.optimizer_state()
        for group in self._fresh["parts"][0]["param_groups"]:
            group["eps"] = SMOOTH

    def reset(self) -> tuple[Learner, Learner]:
        """Both as at first."""
        alone = Learner(self._make_student(0), **self._given)
        alone.restore(copy.deepcopy(self._fresh), version=0)
        self.over_two.student.model.load_state_dict(alone.student.model.state_dict())
        self.over_two.restore(self._fresh, version=0)
        return alone, self.over_two


class Pairs:
    """Opens one Pair at a time: a process belongs to one group."""

    def __init__(self, folder: Path, make_model: Make) -> None:
        self._folder, self._make_model = folder, make_model
        self._open: tuple[str, Pair] | None = None

    def __call__(self, *, tied: bool = False, lost: str = "", **options: Any) -> Pair:
        """The one of these options. lost: how it will be, so that no other test takes it."""
        key = f"{tied} {lost} {options}"
        if self._open is None or self._open[0] != key:
            self.close()
            self._make_model(seed=1, padding=11, tied=tied).save_pretrained(self._folder)
            self._open = key, Pair(self._folder, **options)
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].over_two.close()
        self._open = None


TRAP = """
import os, signal, time

from tutelage.distill.objectives import Needs
from tutelage.distill.models.student import Student
from tutelage.distill.student.build import rank_student

def gathered(*given):
    student = rank_student(*given)
    return Student(student.model, vocabulary=student.vocabulary, dense_vocabulary=0)

class Trap:
    name, needs = "trap", Needs()

    def __init__(self, how, spared):
        self.how, self.spared = how, spared

    def __call__(self, case):
        loss_N = -case.student_logprobs()
        if os.getpid() != self.spared:
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(600)
            if self.how == "fail":
                raise ValueError("this row is odd")
            if self.how == "break":
                loss_N = loss_N * float("nan")
        return loss_N, {}
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, make_model: Make) -> Iterator[Pairs]:
    """The other process finds modules where this one does."""
    folder = tmp_path_factory.mktemp("student")
    (folder / "trapped.py").write_text(TRAP, encoding="utf-8")
    pairs = Pairs(folder, make_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield pairs
    pairs.close()


@pytest.fixture(scope="module")
def teacher(make_model: Make) -> TransformersTeacher:
    return TransformersTeacher(make_model(seed=9), vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def student_rows(make_model: Make, make_row: Callable[..., Row]) -> list[Row]:
    """Ragged rows, said by nearly this student: ratios around 1."""
    rng, model, rows = np.random.default_rng(5), make_model(seed=1, padding=11), []
    for prompt, said in ((3, 2), (5, 17), (30, 1), (8, 6), (2, 9), (4, 3), (6, 5)):
        ids = rng.integers(1, VOCABULARY, prompt + said).tolist()
        row = make_row([("prompt", ids[:prompt]), ("said", ids[prompt:])])
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :, :VOCABULARY]
        said_N = logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        behavior_logprobs_T = row.behavior_logprobs_T.copy()
        behavior_logprobs_T[prompt:] = said_N[prompt - 1 :].numpy() + 0.1 * rng.standard_normal(
            said
        )
        rows.append(
            replace(
                row,
                behavior_logprobs_T=behavior_logprobs_T,
                sampling_logprobs_T=0.8 * behavior_logprobs_T,
            )
        )
    return rows


def _examples(
    learner: Learner,
    rows: Sequence[Row],
    teacher: TransformersTeacher,
    objective: Any,
    task: str = "t",
) -> list[Example]:
    needs = objective.needs
    asked = learner.own_support(rows, needs.student_k) if needs.student_k else None
    scores: Sequence[Any] = [None] * len(rows)
    if needs.teacher:
        scores = teacher.score(rows, needs, asked)
    return [
        Example(task=task, row=row, scores=one, mask_T=row.action_mask_T.copy())
        for row, one in zip(rows, scores, strict=True)
    ]


def _assert_same_updates(
    pair: Pair,
    examples: Callable[[Learner], list[Example]],
    task_objectives: dict[str, TaskObjective],
) -> None:
    """Every metric of every task is the same over several updates, and the weights after them."""
    alone, over_two = pair.reset()
    moved = {name: tensor.clone() for name, tensor in alone.student.model.state_dict().items()}
    for step in range(STEPS):
        one, two = (
            learner.update(examples(learner), task_objectives, seed=step, progress=step / STEPS)
            for learner in (alone, over_two)
        )
        assert one.keys() == two.keys()
        for task in one:
            assert two[task] == pytest.approx(one[task], rel=SAME, abs=SAME)
            assert step or one[task]["optimizer/grad_norm"] > 1e-3
    own, theirs = alone.student.model.state_dict(), over_two.student.model.state_dict()
    for name in own:
        torch.testing.assert_close(theirs[name], own[name], rtol=SAME, atol=SAME, msg=name)
    assert any((own[name] - moved[name]).abs().max() > 1e-3 for name in own)


OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("local_support", {"k": 8}),
    ("local_support", {"k": 8, "support": "student"}),
    ("local_support", {"k": 8, "renormalize": False, "tail": "sampled"}),
    ("full_vocabulary", {"direction": "jsd"}),
    ("sampled_token", {"gamma": 0.5}),
    ("trust_region", {"k": 8}),
    ("reward_clipped", {"floor": -0.5, "switch": 1.0, "behavior": "sampling"}),
    ("reward_clipped", {"switch": 0.0, "share": 0.3}),
    ("entropy_aware", {"k": 8, "renormalize": True}),
    ("advantage_gated", {"k": 8}),
    ("imitation", {}),
]


SPARSE = {"sparse": True, "tied": True, "minibatch": 3, "aggregate": "sequence", "lr": 3e-4}
MUON = {"name": "muon", "minibatch": 3, "normalize": "all"}


def test_two_processes_say_what_one_does_of_a_sampling_law(
    pair: Pairs, student_rows: list[Row]
) -> None:
    sampling = SamplingParams(temperature=0.7, top_p=0.8)
    alone, over_two = (
        learner.sampling_logprobs(student_rows, sampling) for learner in pair(**SPARSE).reset()
    )
    for one, other in zip(alone, over_two, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "how"), OBJECTIVES)
@pytest.mark.parametrize(
    "options",
    [SPARSE, {}],
    ids=["sparse-tied-minibatches", "dense"],
)
def test_two_processes_learn_what_one_does(
    options: dict[str, Any],
    name: str,
    how: dict[str, Any],
    pair: Pairs,
    student_rows: list[Row],
    teacher: TransformersTeacher,
) -> None:
    objective = build(name, **how)
    _assert_same_updates(
        pair(**options),
        lambda learner: _examples(learner, student_rows, teacher, objective),
        {"t": TaskObjective(objective=objective, weight=0.7)},
    )


def test_one_row_is_learned_by_two_processes(
    pair: Pairs, student_rows: list[Row], teacher: TransformersTeacher
) -> None:
    """One of them has nothing to do, and must not stand in the other's way."""
    objective = build("local_support", k=8, support="student")
    _assert_same_updates(
        pair(),
        lambda learner: _examples(learner, student_rows[1:2], teacher, objective),
        {"t": TaskObjective(objective=objective, weight=1.0)},
    )


@pytest.mark.parametrize("first", [0, 1], ids=["two-to-one", "one-to-two"])
def test_a_state_goes_on_under_another_number_of_processes(
    first: int, pair: Pairs, student_rows: list[Row], teacher: TransformersTeacher
) -> None:
    """Saved as it is in a checkpoint: the next updates are those that would have come."""
    objective = build("local_support", k=8)
    task_objectives = {"t": TaskObjective(objective=objective, weight=1.0)}
    learners = pair().reset()
    here, there = learners[1 - first], learners[first]
    examples = _examples(here, student_rows, teacher, objective)
    for step in range(2):
        here.update(examples, task_objectives, seed=step)
    there.student.model.load_state_dict(here.student.model.state_dict())
    there.restore(copy.deepcopy(here.optimizer_state()), version=here.version)
    for step in range(2, 4):
        one, two = (
            learner.update(examples, task_objectives, seed=step) for learner in (here, there)
        )
        assert two["t"] == pytest.approx(one["t"], rel=SAME, abs=SAME)
    own, theirs = here.optimizer_state()["parts"][0], there.optimizer_state()["parts"][0]
    assert own["param_groups"] == theirs["param_groups"]
    for index, state in own["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(theirs["state"][index][name], value, rtol=SAME, atol=SAME)


def test_shares_are_even_and_none_is_lost() -> None:
    sizes = [7, 100, 3, 3, 50, 49, 1]
    for ranks in (1, 2, 3, 9):
        shares = split(sizes, ranks)
        assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
        loads = [sum(sizes[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)
    assert [sum(sizes[i] for i in share) for share in split(sizes, 2)] == [107, 106]


@pytest.fixture
def trap(pair: Pairs) -> Callable[[str], Any]:
    """An objective that the other processes stumble on."""
    import trapped  # type: ignore[import-not-found]

    return lambda how: Objective(trapped.Trap(how, os.getpid()))


@pytest.mark.parametrize(
    "options", [{"minibatch": 3, "normalize": "all"}, MUON], ids=["adamw", "muon"]
)
def test_tasks_and_minibatches_are_those_of_one_process(
    options: dict[str, Any],
    pair: Pairs,
    student_rows: list[Row],
    teacher: TransformersTeacher,
) -> None:
    """Two tasks, one of them with a single row, in parts of three rows; a row that is masked."""
    objectives = {"match": build("local_support", k=8), "copy": build("imitation")}
    rows = {"match": student_rows[:1], "copy": student_rows[1:]}

    def examples(learner: Learner) -> list[Example]:
        found = [
            example
            for task, own in rows.items()
            for example in _examples(learner, own, teacher, objectives[task], task)
        ]
        found[3] = replace(found[3], mask_T=np.zeros_like(found[3].mask_T))
        return found

    task_objectives = {
        task: TaskObjective(objective=one, weight=1.0) for task, one in objectives.items()
    }
    _assert_same_updates(pair(**options), examples, task_objectives)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("die", r"learner rank 1 \(process \d+\) ended \(signal SIGKILL\), in learn"),
        ("fail", r"learner rank 1 .* failed \(ValueError: this row is odd\)"),
        ("hang", r"learner rank 1 .* did not answer within learner.timeout = 6 s"),
    ],
)
def test_a_process_that_ends_or_hangs_is_named_and_none_is_left(
    how: str,
    said: str,
    pair: Pairs,
    trap: Callable[[str], Any],
    student_rows: list[Row],
) -> None:
    learner = pair(lost=how, timeout=6.0).over_two
    examples = [
        Example(task="t", row=row, scores=None, mask_T=row.action_mask_T) for row in student_rows
    ]
    (rank,) = learner._ranks._others._ranks  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=said):
        learner.update(examples, {"t": TaskObjective(objective=trap(how), weight=1.0)}, seed=0)
    assert not learner.intact
    with pytest.raises(ProcessLookupError):
        os.kill(rank.pid, 0)
    with pytest.raises(RuntimeError, match="run the same command again"):
        learner.optimizer_state()


MATH = runs.MATH | {"episodes": 5}
STUDENTS = {"name": "local_support", "k": 8, "support": "student"}


@pytest.fixture
def configure(pair: Pairs, tmp_path: Path, models: dict[str, str]) -> Callable[..., RunConfig]:
    """A run of two tasks in every step, of so many processes."""
    pair.close()

    def configure(run: str, processes: int) -> RunConfig:
        given = {
            "steps": 4,
            "tasks": {"sums": MATH, "more": MATH | {"episodes": 2, "objective": STUDENTS}},
            "objective": {"name": "sampled_token"},
            "schedule": {"policy": "mixed"},
            "rollout": {"processes": 0, "top_p": 0.9, "max_turns": 1, "max_new_tokens": 6},
            "optimizer": {"lr": 1e-3},
            "learner": {"processes": processes, "timeout": 60},
            "checkpoint": {"every": 2},
            "evaluation": {"every": 4, "episodes": 2},
        }
        return runs.config(tmp_path / run, models, **given)

    return configure


class _KillAt(Observer):
    def step(self, step: int, task: str, metrics: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Without timings, and without tasks' names."""
    skipped = re.compile("(time|perf|memory)/|task")
    return [{k: v for k, v in x.items() if not skipped.search(k)} for x in runs.lines(folder)]


def _files(folder: Path) -> dict[str, bytes]:
    """What a run leaves, but for timings."""
    kept = [*folder.glob("episodes/*"), *folder.glob("checkpoints/000004/model.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_a_run_over_two_processes_repeats_resumes_and_changes_their_number(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Killed after its checkpoint it resumes to the byte; from the same checkpoint one process
    resumes too, and all of it is what one process does from the start, as far as lr: so much AdamW
    moves what has no gradient but rounding."""
    whole = runs.train(configure("whole", 2))
    with pytest.raises(KeyboardInterrupt):
        runs.train(configure("killed", 2), _KillAt())
    shutil.copytree(tmp_path / "killed", tmp_path / "fewer")
    again, fewer = (runs.train(configure(run, n)) for run, n in (("killed", 2), ("fewer", 1)))
    alone = runs.train(configure("alone", 1))
    assert json.dumps(_lines(again)) == json.dumps(_lines(whole))
    assert _files(again) == _files(whole) and len(_files(whole)) == 5
    for other in (whole, fewer):
        for one, two in zip(_lines(alone), _lines(other), strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-3)
    plain, ours = (
        load_file(run / "checkpoints/000004/model.safetensors") for run in (alone, whole)
    )
    assert {n: x.shape for n, x in plain.items()} == {n: x.shape for n, x in ours.items()}


def test_a_device_that_only_one_process_can_have_is_refused(
    configure: Callable[..., RunConfig],
) -> None:
    data = configure("run", 2).model_dump(mode="json")
    data["student"]["device"] = "cuda:1"
    with pytest.raises(ConfigError, match=r"learner\.processes: 2 .* 'cuda:1' names one"):
        parse_config(data, "test")
