"""A learner of two processes learns what one of one process learns, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.distill.assembly import rank_model
from tutelage.distill.config import OptimizerConfig, StudentConfig
from tutelage.distill.data_parallel import DataParallelLearner, Setup
from tutelage.distill.learner import Course, Learner, Lesson
from tutelage.distill.models import load_student
from tutelage.distill.objectives import build
from tutelage.distill.teachers import TransformersTeacher
from tutelage.scheduler.episodes import Row

VOCABULARY = 101
STEPS = 3
Make = Callable[..., Any]


class Pair:
    """The same student twice: in this process, and over two."""

    def __init__(self, folder: Path, *, sparse: bool = False, **options: Any) -> None:
        self._given: dict[str, Any] = {
            "vocabulary": VOCABULARY,
            "config": OptimizerConfig(**({"lr": 1e-3, "micro_tokens": 45} | options)),
            "steps": 10,
            "dense_vocabulary": 0 if sparse else VOCABULARY,
        }
        self._student = StudentConfig(model=str(folder), device="cpu")
        make_model = partial(rank_model, self._student, 0)
        self.over_two = DataParallelLearner(
            Setup(make_model=make_model, processes=2, timeout=30.0, threads=1, **self._given)
        )
        self._fresh = self.over_two.optimizer_state()

    def reset(self) -> tuple[Learner, DataParallelLearner]:
        """Both as at first."""
        alone = Learner(load_student(self._student, seed=0), **self._given)
        self.over_two.copy.load_state_dict(alone.model.state_dict())
        self.over_two.restore(self._fresh, version=0)
        return alone, self.over_two


Open = Callable[..., Pair]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, make_model: Make) -> Iterator[Open]:
    """A Pair of these options; one at a time is open."""
    opened: dict[str, Pair] = {}

    def open_pair(*, tied: bool = False, **options: Any) -> Pair:
        key = f"{tied} {options}"
        if key not in opened:
            for old in opened.values():
                old.over_two.close()
            opened.clear()
            folder = tmp_path_factory.mktemp("student")
            make_model(seed=1, padding=11, tied=tied).save_pretrained(folder)
            opened[key] = Pair(folder, **options)
        return opened[key]

    yield open_pair
    for old in opened.values():
        old.over_two.close()


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
        logprobs_T = row.logprobs_T.copy()
        logprobs_T[prompt:] = said_N[prompt - 1 :].numpy() + 0.1 * rng.standard_normal(said)
        rows.append(replace(row, logprobs_T=logprobs_T))
    return rows


def _lessons(
    learner: Learner,
    rows: Sequence[Row],
    teacher: TransformersTeacher,
    objective: Any,
    task: str = "t",
) -> list[Lesson]:
    asked = learner.own_support(rows, 8) if objective.student_k else None
    scores: Sequence[Any] = [None] * len(rows)
    if objective.needs_teacher:
        scores = teacher.score(rows, k=8, full=objective.needs_full, asked=asked)
    return [
        Lesson(task=task, row=row, scores=one, mask_T=row.chosen_T.copy())
        for row, one in zip(rows, scores, strict=True)
    ]


def _assert_same_updates(
    pair: Pair,
    lessons: Callable[[Learner], list[Lesson]],
    courses: dict[str, Course],
) -> None:
    """Every metric of every task to 1e-5, over several updates, and the weights after them. AdamW
    moves what has no gradient but rounding by lr all the same: few weights may be such."""
    alone, over_two = pair.reset()
    moved = {name: tensor.clone() for name, tensor in alone.model.state_dict().items()}
    for step in range(STEPS):
        one, two = (
            learner.update(lessons(learner), courses, seed=step, progress=step / STEPS)
            for learner in (alone, over_two)
        )
        assert one.keys() == two.keys()
        for task in one:
            assert two[task] == pytest.approx(one[task], rel=1e-5, abs=1e-5)
            assert one[task]["optimizer/grad_norm"] > 1e-3
    own, theirs = alone.model.state_dict(), over_two.copy.state_dict()
    off = torch.cat([(own[n] - theirs[n]).abs().flatten() for n in own if "k_proj.bias" not in n])
    assert (off > 1e-5).float().mean() < 2e-3
    assert any((own[name] - moved[name]).abs().max() > 1e-3 for name in own)


OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("local_support", {"k": 8}),
    ("local_support", {"k": 8, "support": "student"}),
    ("local_support", {"k": 8, "renormalize": False, "tail": "sampled"}),
    ("full_vocabulary", {"direction": "jsd"}),
    ("sampled_token", {"gamma": 0.5}),
    ("trust_region", {"k": 8}),
    ("reward_clipped", {"floor": -0.5, "switch": 0.5, "share": 0.5}),
    ("imitation", {}),
]


@pytest.mark.parametrize(
    "options",
    [{}, {"sparse": True, "tied": True}],
    ids=["dense", "sparse-tied"],
)
@pytest.mark.parametrize(("name", "how"), OBJECTIVES)
def test_two_processes_learn_what_one_does(
    options: dict[str, Any],
    name: str,
    how: dict[str, Any],
    pair: Open,
    student_rows: list[Row],
    teacher: TransformersTeacher,
) -> None:
    objective = build(name, **how)
    _assert_same_updates(
        pair(**options),
        lambda learner: _lessons(learner, student_rows, teacher, objective),
        {"t": Course(objective=objective, weight=0.7)},
    )
