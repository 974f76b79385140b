"""The update: one mean over the step's tokens, however it is cut into pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.rounding import UPDATE_SUMS, rounding
from tutelage.distill.config.sections import OptimizerConfig
from tutelage.distill.models.decoders import LeanDecoder, TransformersDecoder
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import (
    DenseStudent,
    Needs,
    Objective,
    TeacherScores,
    Tokens,
    build,
    weighted_sum,
)
from tutelage.distill.objectives.tokens import Case, Loss
from tutelage.distill.student.examples import Example, TaskObjective
from tutelage.distill.student.learner import Learner
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.scheduler.episodes import Row

VOCABULARY = 101
Make = Callable[..., Any]


@pytest.fixture
def rows(make_row: Callable[..., Row]) -> list[Row]:
    """Very ragged, so that a mean over rows or over batches differs from one over tokens."""
    rng = np.random.default_rng(5)

    def ids(count: int) -> list[int]:
        return [int(i) for i in rng.integers(1, VOCABULARY, count)]

    shapes = [(3, 2), (5, 17), (30, 1), (8, 6)]
    return [make_row([("prompt", ids(p)), ("said", ids(n))], seed=n) for p, n in shapes]


@pytest.fixture(scope="module")
def teacher(make_model: Make) -> TransformersTeacher:
    return TransformersTeacher(make_model(seed=9), vocabulary=VOCABULARY)


def _own(loss: Callable[[Case], torch.Tensor]) -> Objective:
    """A loss of a test's own; it asks no teacher."""

    class Rule:
        name, needs = "own", Needs()

        def __call__(self, case: Case) -> Loss:
            return loss(case), {}

    return Objective(Rule())


def _examples(
    rows: Sequence[Row], teacher: TransformersTeacher | None, k: int = 8
) -> list[Example]:
    scores: Sequence[TeacherScores | None] = [None] * len(rows)
    if teacher is not None:
        scores = teacher.score(rows, Needs(k=k))
    return [
        Example(task="t", row=row, scores=found, mask_T=row.action_mask_T.copy())
        for row, found in zip(rows, scores, strict=True)
    ]


def _learner(model: Any, *, steps: int = 10, sparse: bool = False, **options: Any) -> Learner:
    """Plain gradients are what is looked at: no clipping unless asked."""
    config = OptimizerConfig(**({"clip": 1e9, "micro_tokens": 4096} | options))
    dense = 0 if sparse else VOCABULARY
    student = Student(model, vocabulary=VOCABULARY, dense_vocabulary=dense)
    return Learner(student, config=config, steps=steps)


def _ids(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """(the row's ids [1, T], where its action tokens are)."""
    at = torch.from_numpy(np.flatnonzero(row.action_mask_T))
    return torch.from_numpy(row.ids_T.astype(np.int64))[None], at


@torch.no_grad()
def _near_policy(rows: Sequence[Row], model: Any) -> list[Row]:
    """The rows as `model` would have said them, not quite: ratios around 1, most of them inside the
    clip."""
    rng, found = np.random.default_rng(2), []
    for row in rows:
        ids_1T, at = _ids(row)
        full_NV = model(input_ids=ids_1T).logits[0, at - 1, :VOCABULARY].log_softmax(-1)
        behavior_logprobs_T = row.behavior_logprobs_T.copy()
        said_N = full_NV.gather(1, ids_1T[0, at][:, None])[:, 0].numpy()
        behavior_logprobs_T[row.action_mask_T] = said_N + 0.1 * rng.standard_normal(len(said_N))
        found.append(
            replace(
                row,
                behavior_logprobs_T=behavior_logprobs_T,
                sampling_logprobs_T=0.8 * behavior_logprobs_T,
            )
        )
    return found


def _update(
    learner: Learner, examples: Sequence[Example], objective: Any, *, weight: float = 1.0, seed: int
) -> dict[str, float]:
    """One update on the training examples of one task; its metrics."""
    task_objectives = {x.task: TaskObjective(objective=objective, weight=weight) for x in examples}
    (metrics,) = learner.update(examples, task_objectives, seed=seed).values()
    return metrics


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """But for rounding, of the size of the largest gradient: small ones are differences of large
    terms."""
    assert one.keys() == other.keys() and one
    atol = rounding(sums=UPDATE_SUMS, size=max(x.abs().max().item() for x in other.values()))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=atol, msg=name)


def _direct(
    model: Any,
    examples: Sequence[Example],
    objective: Any,
    reduce: Callable[[list[torch.Tensor]], torch.Tensor],
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by one plain forward a row, no packing, no micro-batches."""
    losses = []
    for example in examples:
        ids_T = torch.from_numpy(example.row.ids_T.astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(example.row.action_mask_T))
        logits_NV = model(input_ids=ids_T[None]).logits[0, at - 1, :VOCABULARY]
        behavior_logprobs_N = torch.from_numpy(
            example.row.behavior_logprobs_T[example.row.action_mask_T]
        )
        tokens = Tokens(
            sampling_logprobs_N=torch.from_numpy(example.row.sampling_T[example.row.action_mask_T])
        )
        loss_N, _ = objective(
            DenseStudent(logits_NV),
            example.scores,
            ids_T[at],
            behavior_logprobs_N,
            tokens=tokens,
        )
        losses.append(loss_N[torch.from_numpy(example.mask_T[example.row.action_mask_T])])
    loss = reduce(losses)
    model.zero_grad()
    loss.backward()
    found = loss.item(), _gradients(model)
    model.zero_grad()
    return found


def _token_mean(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(losses).mean()


def _sequence_mean(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss_N.mean() for loss_N in losses]).mean()


@pytest.mark.parametrize("name", ["local_support", "sampled_token", "imitation"])
@pytest.mark.parametrize(
    ("aggregate", "reduce"), [("token", _token_mean), ("sequence", _sequence_mean)]
)
def test_loss_and_gradient_are_the_mean_that_the_config_names(
    name: str,
    aggregate: str,
    reduce: Callable[[list[torch.Tensor]], torch.Tensor],
    make_model: Make,
    rows: list[Row],
    teacher: TransformersTeacher,
) -> None:
    """In micro-batches of about one row; the direct computation has none. The embedding's rows
    beyond the vocabulary take no probability, hence no gradient."""
    objective = build(name)
    model = make_model(seed=1, padding=11)
    examples = _examples(rows, teacher if objective.needs.teacher else None, k=32)
    loss, expected = _direct(model, examples, objective, reduce)
    learner = _learner(model, aggregate=aggregate, micro_tokens=40)
    metrics = _update(learner, examples, objective, weight=1.0, seed=0)
    assert metrics["loss/mean"] == pytest.approx(loss, rel=1e-4)
    _assert_same(_gradients(model), expected)
    assert not model.lm_head.weight.grad[VOCABULARY:].any()
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    assert metrics["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["tokens/trained"] == 2 + 17 + 1 + 6


def test_the_two_means_differ_on_these_rows(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    """The guard of the test above."""
    model, examples = make_model(seed=1), _examples(rows, teacher, k=32)
    by_token, _ = _direct(model, examples, build("local_support"), _token_mean)
    by_row, _ = _direct(model, examples, build("local_support"), _sequence_mean)
    assert abs(by_token - by_row) > 0.01 * by_token


@pytest.mark.parametrize("kind", [LeanDecoder, TransformersDecoder])
def test_recomputing_changes_no_bit_and_runs_each_layer_again(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher, kind: Any
) -> None:
    """And the model is as it was for rollouts: layers in evaluation mode, with their cache."""
    found, passes = [], []
    for recompute in (False, True):
        model, calls = make_model(seed=1), 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        # a projection of another class, or the lean decoder would not call it
        projection = model.base_model.layers[1].mlp.down_proj
        projection.__class__ = type("Linear", (torch.nn.Linear,), {})
        learner = _learner(model, recompute=recompute)
        learner.student.decoder = kind(model)
        projection.register_forward_pre_hook(count)
        examples = _examples(rows, teacher)
        metrics = _update(learner, examples, build("local_support", k=8), weight=1.0, seed=0)
        found.append((metrics, model.state_dict()))
        passes.append(calls)
        assert not any(module.training for module in model.modules())
    (metrics, weights), (again, other) = found
    assert metrics == again and passes[1] == 2 * passes[0]
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def test_micro_batches_do_not_change_the_update(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    found = []
    for micro_tokens in (1, 45, 10_000):
        model = make_model(seed=1)
        learner = _learner(model, micro_tokens=micro_tokens, clip=0.5, lr=1e-2)
        metrics = _update(
            learner, _examples(rows, teacher), build("local_support", k=8), weight=1.0, seed=0
        )
        found.append((metrics, _gradients(model), model.state_dict()))
    (first, gradients, weights), *others = found
    for metrics, other_gradients, other_weights in others:
        assert metrics == pytest.approx(first, rel=1e-4, abs=1e-6)
        _assert_same(other_gradients, gradients)
        # AdamW's first step is lr * sign(g): where g is nearly 0 the last bits of g show in full.
        changed = torch.cat(
            [(other_weights[n] - weights[n]).abs().flatten() for n in weights if "norm" not in n]
        )
        assert (changed > 1e-4).float().mean() < 2e-3


def test_masked_tokens_leave_numerator_and_denominator(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    model, objective = make_model(seed=1), build("local_support", k=8)
    examples = []
    for example in _examples(rows, teacher):
        mask_T = example.mask_T.copy()
        mask_T[np.flatnonzero(mask_T)[1::2]] = False
        examples.append(Example(task="t", row=example.row, scores=example.scores, mask_T=mask_T))
    loss, expected = _direct(model, examples, objective, _token_mean)
    metrics = _update(_learner(model), examples, objective, weight=1.0, seed=0)
    assert metrics["tokens/trained"] == 1 + 9 + 1 + 3
    assert metrics["loss/mean"] == pytest.approx(loss, rel=1e-4)
    _assert_same(_gradients(model), expected)


def test_an_infinite_loss_under_the_mask_does_not_count(
    make_model: Make, make_row: Callable[..., Row]
) -> None:
    """0 * inf would make the step's loss NaN."""

    objective = _own(lambda case: torch.where(case.ids_N == 3, torch.inf, -case.student_logprobs()))
    row = make_row([("prompt", [1, 2]), ("said", [3, 4])])
    mask_T = row.action_mask_T & (row.ids_T != 3)
    model = make_model()
    example = Example(task="t", row=row, scores=None, mask_T=mask_T)
    metrics = _update(_learner(model), [example], objective, weight=1.0, seed=0)
    assert math.isfinite(metrics["loss/mean"])
    assert all(gradient.isfinite().all() for gradient in _gradients(model).values())


def test_the_weight_scales_the_gradient_and_not_the_reported_loss(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    found = {}
    for weight in (1.0, 0.25):
        model = make_model(seed=1)
        metrics = _update(
            _learner(model),
            _examples(rows, teacher),
            build("local_support", k=8),
            weight=weight,
            seed=0,
        )
        found[weight] = metrics, _gradients(model)
    assert found[0.25][0]["loss/mean"] == found[1.0][0]["loss/mean"]
    quarter = {name: 0.25 * gradient for name, gradient in found[1.0][1].items()}
    _assert_same(found[0.25][1], quarter)


def test_the_gradients_norm_is_clipped_after_it_is_reported(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    model = make_model(seed=1)
    metrics = _update(
        _learner(model, clip=0.01),
        _examples(rows, teacher),
        build("local_support", k=8),
        weight=1.0,
        seed=0,
    )
    after = torch.stack([g.norm() for g in _gradients(model).values()]).norm().item()
    assert metrics["optimizer/grad_norm"] > 0.1
    assert after == pytest.approx(0.01, rel=1e-3)


def test_metrics_are_means_over_the_tokens_that_take_loss(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    """Entropy, gap to the teacher, gap to the rollout's own log-probabilities: by hand."""
    model, examples = make_model(seed=1), _examples(rows, teacher)
    entropies, gaps, mismatches = [], [], []
    with torch.no_grad():
        for example in examples:
            ids_T = torch.from_numpy(example.row.ids_T.astype(np.int64))
            at = torch.from_numpy(np.flatnonzero(example.row.action_mask_T))
            logprobs = model(input_ids=ids_T[None]).logits[0, at - 1].log_softmax(-1)
            said = logprobs.gather(1, ids_T[at][:, None])[:, 0]
            assert example.scores is not None
            entropies += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
            behavior = torch.from_numpy(example.row.behavior_logprobs_T[example.row.action_mask_T])
            gaps += (example.scores.sampled_N - behavior).tolist()
            mismatches += (said - behavior).abs().tolist()
    metrics = _update(
        _learner(model, micro_tokens=40), examples, build("local_support", k=8), weight=1.0, seed=0
    )
    assert metrics["student/entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert metrics["gap/mean"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert metrics["gap/engine"] == pytest.approx(np.mean(mismatches), rel=1e-4)


def test_an_update_lowers_the_loss_on_its_own_examples(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    learner = _learner(make_model(seed=1), lr=1e-2)
    losses = [
        _update(learner, _examples(rows, teacher), build("local_support", k=8), weight=1.0, seed=i)
        for i in range(5)
    ]
    assert losses[-1]["loss/mean"] < 0.7 * losses[0]["loss/mean"]
    assert learner.version == 5


def test_an_empty_mask_is_refused(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    empty = [
        Example(task="kitchen", row=x.row, scores=x.scores, mask_T=np.zeros_like(x.mask_T))
        for x in _examples(rows, teacher)
    ]
    learner = _learner(make_model())
    task_objectives = {"kitchen": TaskObjective(objective=build("local_support", k=8), weight=1.0)}
    for examples, said in (
        (empty, "'kitchen': no token takes loss"),
        ([], "there are no training examples"),
    ):
        with pytest.raises(ValueError, match=said):
            learner.update(examples, task_objectives, seed=0)
    assert learner.version == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_stops_before_the_weights_change(
    value: float, make_model: Make, rows: list[Row]
) -> None:
    """The optimizer's state stays too: the next update is as if the broken one had not been."""

    broken = _own(lambda case: -case.student_logprobs() * value)
    model, twin = make_model(seed=1), make_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner, untouched = _learner(model, lr=1e-2), _learner(twin, lr=1e-2)
    with pytest.raises(FloatingPointError, match="weights are as they were"):
        _update(learner, _examples(rows, None), broken, weight=1.0, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for one in (learner, untouched):
        _update(one, _examples(rows, None), build("imitation"), weight=1.0, seed=0)
    assert learner.version == untouched.version == 1
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_weight_decay_spares_norms_and_biases(make_model: Make, rows: list[Row]) -> None:
    """With a decay that dwarfs the gradient step, matrices alone shrink, by lr * decay."""
    model = make_model(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = _learner(model, lr=1e-6, weight_decay=1e5)
    _update(learner, _examples(rows, None), build("imitation"), weight=1.0, seed=0)
    for name, parameter in model.named_parameters():
        kept = 0.9 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter, kept * before[name], rtol=1e-4, atol=5e-6, msg=name)


class TestLearningRate:
    @staticmethod
    def _rates(model: Any, steps: int, **options: Any) -> list[float]:
        learner = _learner(model, steps=steps, **options)
        return [learner.learning_rate(step) for step in range(steps)]

    def test_constant(self, make_model: Make) -> None:
        assert self._rates(make_model(), 3, lr=0.5) == [0.5, 0.5, 0.5]

    def test_warm_up_rises_linearly_and_is_never_zero(self, make_model: Make) -> None:
        rates = self._rates(make_model(), 6, lr=0.4, warmup=4)
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])

    def test_cosine_falls_from_the_peak_towards_its_floor(self, make_model: Make) -> None:
        rates = self._rates(make_model(), 10, lr=1.0, warmup=2, decay="cosine", floor=0.1)
        expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
        assert rates == pytest.approx([0.5, 1.0, *expected])
        assert rates[2] == 1.0 and 0.1 < rates[-1] < 0.2

    def test_an_update_uses_the_rate_of_its_own_number(
        self, make_model: Make, rows: list[Row]
    ) -> None:
        """AdamW's first steps are about lr in size: the weights move as the schedule says."""
        model = make_model(seed=1)
        learner = _learner(model, lr=4e-4, warmup=4, weight_decay=0.0)
        moved = []
        for step in range(2):
            before = model.lm_head.weight.detach().clone()
            metrics = _update(
                learner, _examples(rows, None), build("imitation"), weight=1.0, seed=0
            )
            assert metrics["optimizer/lr"] == pytest.approx(1e-4 * (step + 1))
            moved.append((model.lm_head.weight - before).abs().median().item())
        assert moved == pytest.approx([1e-4, 2e-4], rel=0.05)


class TestLesson:
    def test_a_mask_beyond_the_action_tokens_is_refused(self, rows: list[Row]) -> None:
        mask_T = rows[0].action_mask_T.copy()
        mask_T[0] = True
        with pytest.raises(ValueError, match="covers prompt or observation tokens"):
            Example(task="t", row=rows[0], scores=None, mask_T=mask_T)

    def test_scores_of_another_length_are_refused(
        self, rows: list[Row], teacher: TransformersTeacher
    ) -> None:
        (scores,) = teacher.score(rows[:1], Needs(k=2))
        with pytest.raises(ValueError, match="2 teacher scores for 17"):
            Example(task="t", row=rows[1], scores=scores, mask_T=rows[1].action_mask_T)

    def test_a_teachers_objective_refuses_an_example_without_scores(
        self, make_model: Make, rows: list[Row]
    ) -> None:
        with pytest.raises(ValueError, match="without scores"):
            _update(
                _learner(make_model()),
                _examples(rows, None),
                build("sampled_token"),
                weight=1.0,
                seed=0,
            )


class TestSparse:
    """Above `dense_vocabulary` the head meets gathered rows alone; nothing else may change."""

    @pytest.fixture
    def full(
        self, make_row: Callable[..., Row], teacher: TransformersTeacher, make_model: Make
    ) -> list[Example]:
        """Training examples near the policy of the model of seed 1, with all possible scores."""
        rng = np.random.default_rng(5)
        rows = [
            make_row([("prompt", [1, 2]), ("said", rng.integers(1, VOCABULARY, n).tolist())])
            for n in (9, 4)
        ]
        rows = _near_policy(rows, make_model(seed=1))
        return [
            Example(task="t", row=row, scores=scores, mask_T=row.action_mask_T.copy())
            for row, scores in zip(rows, teacher.score(rows, Needs(k=8, full=True)), strict=True)
        ]

    def test_every_objective_updates_as_the_dense_learner_does(
        self, variant: tuple[str, dict[str, Any]], full: list[Example], make_model: Make
    ) -> None:
        """Gradients of every weight, losses and all diagnostics."""
        name, options = variant
        found = []
        for sparse in (False, True):
            model = make_model(seed=1, padding=11)
            metrics = _update(_learner(model, sparse=sparse), full, build(name, **options), seed=0)
            found.append((metrics, _gradients(model)))
        (dense_metrics, dense), (metrics, gradients) = found
        assert metrics == pytest.approx(dense_metrics, rel=1e-4, abs=1e-5)
        assert metrics["optimizer/grad_norm"] > 1e-3
        _assert_same(gradients, dense)
        assert not gradients["lm_head.weight"][VOCABULARY:].any()

    @pytest.mark.parametrize("name", ["local_support", "sampled_token", "full_vocabulary"])
    def test_a_tied_head_gets_what_it_gets_as_embedding_and_as_head(
        self, name: str, full: list[Example], make_model: Make
    ) -> None:
        """Against transformers' own logits, in micro-batches of one row."""
        model = make_model(seed=1, padding=11, tied=True)
        examples = [
            replace(x, row=row)
            for x, row in zip(full, _near_policy([x.row for x in full], model), strict=True)
        ]
        objective = build(name, **({"k": 8} if name == "local_support" else {}))
        loss, expected = _direct(model, examples, objective, _token_mean)
        metrics = _update(_learner(model, sparse=True, micro_tokens=1), examples, objective, seed=0)
        assert metrics["loss/mean"] == pytest.approx(loss, rel=1e-4)
        assert "lm_head.weight" not in expected
        _assert_same(_gradients(model), expected)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_its_own_support_is_the_top_k_of_each_row(
        self, sparse: bool, rows: list[Row], make_model: Make
    ) -> None:
        """In the rows' order, however they were packed; padded ids never."""
        model = make_model(seed=1, padding=11)
        learner = _learner(model, sparse=sparse, micro_tokens=40)
        for row, found_NK in zip(rows, learner.own_support(rows, 5), strict=True):
            ids_1T, at = _ids(row)
            with torch.no_grad():
                logits_NV = model(input_ids=ids_1T).logits[0, at - 1, :VOCABULARY]
            assert found_NK.dtype == np.int32
            assert found_NK.tolist() == logits_NV.topk(5).indices.tolist()

    def test_a_teacher_answers_at_each_rows_own_ids(
        self, rows: list[Row], make_model: Make, teacher: TransformersTeacher
    ) -> None:
        """Row by row, though they are packed by length, with and without its whole distribution."""
        own = _learner(make_model(seed=1)).own_support(rows, 5)
        answers = teacher.score(rows, Needs(k=2, student_k=5, full=True), own)
        for row, ids_NJ, scores in zip(rows, own, answers, strict=True):
            query_ids_NJ = torch.from_numpy(ids_NJ).long()
            ids_1T, at = _ids(row)
            with torch.no_grad():
                logits_NV = teacher.model(input_ids=ids_1T).logits[0, at - 1, :VOCABULARY]
            full_NV = logits_NV.log_softmax(-1)
            assert scores.query_ids_NJ is not None and torch.equal(
                scores.query_ids_NJ, query_ids_NJ
            )
            for found, wanted in (
                (scores.query_logprobs_NJ, full_NV.gather(1, query_ids_NJ)),
                (scores.full_NV, full_NV),
            ):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class TestSeveralTasks:
    """Thirty tokens of one task against three of another."""

    def _examples(self, make_row: Callable[..., Row]) -> dict[str, list[Example]]:
        rng, examples = np.random.default_rng(1), {}
        for task, lengths in (("chains", (18, 7, 5)), ("answers", (1, 2))):
            rows = [
                make_row([("prompt", [1, 2]), ("said", rng.integers(1, VOCABULARY, n).tolist())])
                for n in lengths
            ]
            examples[task] = [
                Example(task=task, row=row, scores=None, mask_T=row.action_mask_T) for row in rows
            ]
        return examples

    @pytest.mark.parametrize(
        ("aggregate", "normalize", "shares"),
        [
            # of weights 1 and 0.5
            ("token", "task", (1.0, 0.5)),
            ("token", "all", (30 / 33, 0.5 * 3 / 33)),
            ("sequence", "task", (1.0, 0.5)),
            ("sequence", "all", (3 / 5, 0.5 * 2 / 5)),
        ],
    )
    def test_a_task_has_the_share_of_the_gradient_that_the_config_gives_it(
        self,
        aggregate: str,
        normalize: str,
        shares: tuple[float, float],
        make_model: Make,
        make_row: Callable[..., Row],
    ) -> None:
        """normalize=task: its weight, however few its tokens; all: by its tokens (or rows) too, so
        that the short answers have a tenth. Interleaved, in micro-batches of a row or two."""
        model, examples, objective = (
            make_model(seed=1),
            self._examples(make_row),
            build("imitation"),
        )
        reduce = _token_mean if aggregate == "token" else _sequence_mean
        alone = {task: _direct(model, own, objective, reduce) for task, own in examples.items()}
        learner = _learner(model, aggregate=aggregate, normalize=normalize, micro_tokens=24)
        weights = {"chains": 1.0, "answers": 0.5}
        task_objectives = {
            t: TaskObjective(objective=objective, weight=w) for t, w in weights.items()
        }
        one, other = examples["chains"], examples["answers"]
        found = learner.update(
            [one[0], other[0], one[1], other[1], one[2]], task_objectives, seed=0
        )
        gradients = _gradients(model)
        for task, (loss, _) in alone.items():
            assert found[task]["loss/mean"] == pytest.approx(loss, rel=1e-4)
        wanted = {
            name: sum(
                share * alone[task][1][name] for share, task in zip(shares, alone, strict=True)
            )
            for name in gradients
        }
        _assert_same(gradients, wanted)
        assert found["chains"]["tokens/trained"] == 10 * found["answers"]["tokens/trained"]
        assert found["chains"]["optimizer/grad_norm"] == found["answers"]["optimizer/grad_norm"]

    def test_each_has_its_own_objective_and_teacher(
        self, make_model: Make, rows: list[Row], teacher: TransformersTeacher
    ) -> None:
        model = make_model(seed=1)
        of = {
            "match": (_examples(rows[:2], teacher), build("local_support", k=8)),
            "copy": (_examples(rows[2:], None), build("imitation")),
        }
        alone = {task: _direct(model, own, how, _token_mean) for task, (own, how) in of.items()}
        examples = [replace(x, task=task) for task, (own, _) in of.items() for x in own]
        task_objectives = {
            task: TaskObjective(objective=how, weight=1.0) for task, (_, how) in of.items()
        }
        found = _learner(model).update(examples, task_objectives, seed=0)
        assert {task: x["loss/mean"] for task, x in found.items()} == pytest.approx(
            {task: loss for task, (loss, _) in alone.items()}, rel=1e-4
        )
        assert "gap/mean" in found["match"] and "gap/mean" not in found["copy"]
        gradients = _gradients(model)
        wanted = {n: alone["match"][1][n] + alone["copy"][1][n] for n in gradients}
        _assert_same(gradients, wanted)


class TestMicroBatches:
    """How an update is cut into micro-batches is a matter of memory, and of nothing else."""

    @pytest.fixture
    def full(
        self, make_model: Make, rows: list[Row], teacher: TransformersTeacher
    ) -> list[Example]:
        """Ragged examples near the policy, a third of their tokens masked."""
        rows = _near_policy(rows, make_model(seed=1))
        scores = teacher.score(rows, Needs(k=8, full=True))
        masks = [row.action_mask_T & (np.arange(len(row.ids_T)) % 3 > 0) for row in rows]
        return [
            Example(task="t", row=row, scores=own, mask_T=mask_T)
            for row, own, mask_T in zip(rows, scores, masks, strict=True)
        ]

    @pytest.mark.parametrize("aggregate", ["token", "sequence"])
    @pytest.mark.slow
    def test_no_objective_sees_them(
        self,
        aggregate: str,
        variant: tuple[str, dict[str, Any]],
        full: list[Example],
        make_model: Make,
    ) -> None:
        """Losses, diagnostics and the gradient of every weight."""
        name, options = variant
        found = []
        for micro_tokens in (1, 45, 10_000):
            model = make_model(seed=1)
            learner = _learner(model, micro_tokens=micro_tokens, aggregate=aggregate)
            metrics = _update(learner, full, build(name, **options), seed=0)
            found.append((metrics, _gradients(model)))
        (whole_metrics, whole) = found[-1]
        size = sum(float(gradient.square().sum()) for gradient in whole.values()) ** 0.5
        assert size > 1e-3
        for metrics, gradients in found[:-1]:
            assert metrics == pytest.approx(whole_metrics, rel=1e-3, abs=1e-5)
            off = sum(float((gradients[n] - whole[n]).square().sum()) for n in whole) ** 0.5
            assert off < 1e-4 * size  # float32's rounding: 1e-6; another quantile: 0.4 and more

    @pytest.mark.parametrize("micro_tokens", [1, 10_000])
    @pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
    def test_the_undecided_tokens_are_those_of_the_whole_optimizer_step(
        self, share: float, micro_tokens: int, full: list[Example], make_model: Make
    ) -> None:
        """Of every task by itself: the highest entropies of all of its tokens that take loss,
        computed row by row."""
        examples = [*full, *(replace(example, task="other") for example in full[:1])]
        model, entropies = make_model(seed=1), []
        for example in full:
            ids_1T, at = _ids(example.row)
            with torch.no_grad():
                logits_NV = model(input_ids=ids_1T).logits[0, at - 1, :VOCABULARY]
            own_N = DenseStudent(logits_NV).entropy()
            entropies.append(own_N[torch.from_numpy(example.mask_T[example.row.action_mask_T])])
        objective = build("reward_clipped", switch=0.5, share=share)
        task_objectives = {
            task: TaskObjective(objective=objective, weight=1.0) for task in ("t", "other")
        }
        learner = _learner(model, micro_tokens=micro_tokens)
        found = learner.update(examples, task_objectives, seed=0, progress=0.5)
        for task, own in {"t": torch.cat(entropies), "other": entropies[0]}.items():
            kept = (own >= own.double().quantile(1 - share) - 1e-6).double().mean().item()
            assert found[task]["reward/kept"] == pytest.approx(kept)
        each = [int((own >= own.quantile(1 - share) - 1e-6).sum()) for own in entropies if len(own)]
        whole = found["t"]["reward/kept"] * sum(map(len, entropies))
        assert share == 1 or sum(each) != round(whole)  # what quantiles of single rows would keep


class TestTokens:
    """What the learner tells an objective of its tokens."""

    def test_trust_is_drawn_by_the_steps_seed_whatever_the_micro_batches(
        self, make_model: Make, rows: list[Row], teacher: TransformersTeacher
    ) -> None:
        rows = _near_policy(rows, make_model(seed=1))
        found: dict[tuple[int, int], Any] = {}
        for seed, micro_tokens in ((0, 1), (0, 45), (0, 10_000), (1, 45)):
            model = make_model(seed=1)
            metrics = _update(
                _learner(model, micro_tokens=micro_tokens),
                _examples(rows, teacher),
                build("trust_region", k=8),
                seed=seed,
            )
            found[seed, micro_tokens] = metrics["trust/share"], _gradients(model)
        share, gradients = found[0, 1]
        assert 0 < share < 1
        for micro_tokens in (45, 10_000):
            other, other_gradients = found[0, micro_tokens]
            assert other == pytest.approx(share, rel=1e-6)
            _assert_same(other_gradients, gradients)
        moved = (found[1, 45][1]["lm_head.weight"] - gradients["lm_head.weight"]).abs().max()
        assert moved > 1e-3

    def test_every_token_has_a_draw_of_its_own(
        self, make_model: Make, make_row: Callable[..., Row]
    ) -> None:
        """Distinct over rows, the same however they are packed, others for another seed."""
        ids = list(range(1, 41))
        rows = [make_row([("prompt", [50]), ("said", part)]) for part in (ids[:25], ids[25:])]

        def draws(seed: int, micro_tokens: int) -> dict[int, float]:
            seen: dict[int, float] = {}

            def look(case: Case) -> torch.Tensor:
                assert case.tokens.uniforms_N is not None
                seen.update(zip(case.ids_N.tolist(), case.tokens.uniforms_N.tolist(), strict=True))
                return -case.student_logprobs()

            learner = _learner(make_model(seed=1), micro_tokens=micro_tokens)
            _update(learner, _examples(rows, None), _own(look), seed=seed)
            return seen

        one = draws(0, 1)
        assert set(one) == set(ids) and len(set(one.values())) == 40
        assert all(0 <= value < 1 for value in one.values())
        assert draws(0, 10_000) == one
        assert not set(draws(1, 1).values()) & set(one.values())

    @pytest.mark.parametrize(("micro_tokens", "aggregate"), [(1, "token"), (10_000, "sequence")])
    @pytest.mark.slow
    def test_a_row_that_is_masked_whole_changes_nothing(
        self,
        micro_tokens: int,
        aggregate: str,
        variant: tuple[str, dict[str, Any]],
        make_model: Make,
        make_row: Callable[..., Row],
        teacher: TransformersTeacher,
    ) -> None:
        """Alone in its micro-batch or beside others, though its teacher rules out all that it
        said: no share of the mean, no NaN."""
        name, options = variant
        rows = [make_row([("prompt", [1, 2]), ("said", ids)]) for ids in ([5, 9, 30], [7, 7, 2, 3])]
        rows = _near_policy(rows, make_model(seed=1))
        example, masked = (
            Example(task="t", row=row, scores=scores, mask_T=row.action_mask_T.copy())
            for row, scores in zip(rows, teacher.score(rows, Needs(k=8, full=True)), strict=True)
        )
        assert masked.scores is not None
        ruled_out = torch.full_like(masked.scores.sampled_N, -torch.inf)
        masked = replace(
            masked,
            mask_T=np.zeros_like(masked.mask_T),
            scores=replace(masked.scores, sampled_N=ruled_out),
        )
        found = []
        for examples in ([example], [example, masked]):
            model = make_model(seed=1)
            learner = _learner(model, aggregate=aggregate, micro_tokens=micro_tokens)
            metrics = _update(learner, examples, build(name, **options), seed=0)
            found.append((metrics, _gradients(model)))
        (metrics, gradients), (with_masked, with_masked_gradients) = found
        assert with_masked == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        _assert_same(with_masked_gradients, gradients)

    def test_returns_and_masks_reach_the_objective(
        self, make_model: Make, make_row: Callable[..., Row], teacher: TransformersTeacher
    ) -> None:
        """gamma = 1 over a row of two replies with a masked token in the second: the costs of a
        reply stay in it, and the masked one's nowhere, as computed from the tokens by hand."""
        parts = [("prompt", [1, 2]), ("said", [5, 9]), ("prompt", [3]), ("said", [7, 4, 8])]
        (row,) = _near_policy([make_row(parts)], make_model(seed=1))
        (scores,) = teacher.score([row], Needs(k=1))
        mask_T = row.action_mask_T.copy()
        mask_T[6] = False  # the 4
        example = Example(task="t", row=row, scores=scores, mask_T=mask_T)
        objective = build("sampled_token", gamma=1.0, clip=0.9)
        model = make_model(seed=1)
        ids_1T, at = _ids(row)
        old_N = torch.from_numpy(row.behavior_logprobs_T)[at]
        with torch.no_grad():
            full_NV = model(input_ids=ids_1T).logits[0, at - 1, :VOCABULARY].log_softmax(-1)
        ratios = (full_NV.gather(1, ids_1T[0, at][:, None])[:, 0] - old_N).exp().tolist()
        reward = (scores.sampled_N - old_N).tolist()
        advantages = [reward[0] + reward[1], reward[1], reward[2] + reward[4], None, reward[4]]
        wanted = -sum(a * r for a, r in zip(advantages, ratios, strict=True) if a is not None) / 4
        metrics = _update(_learner(model), [example], objective, seed=0)
        assert metrics["loss/mean"] == pytest.approx(wanted, rel=1e-4)

    def test_progress_turns_the_phase(
        self, make_model: Make, rows: list[Row], teacher: TransformersTeacher
    ) -> None:
        rows = _near_policy(rows, make_model(seed=1))
        examples, objective = _examples(rows, teacher), build("reward_clipped", switch=0.5)
        losses = {}
        for progress in (0.0, 0.49, 0.5, 1.0):
            task_objectives = {"t": TaskObjective(objective=objective, weight=1.0)}
            learner = _learner(make_model(seed=1))
            found = learner.update(examples, task_objectives, seed=0, progress=progress)
            losses[progress] = found["t"]["loss/mean"]
        assert losses[0.0] == losses[0.49] != losses[0.5] == losses[1.0]

    def test_every_task_of_an_update_is_at_its_own_progress(
        self, make_model: Make, rows: list[Row], teacher: TransformersTeacher
    ) -> None:
        rows = _near_policy(rows, make_model(seed=1))
        examples, objective = _examples(rows, teacher), build("reward_clipped", switch=0.5)
        examples += [replace(example, task="late") for example in examples]
        task_objectives = {
            task: TaskObjective(objective=objective, weight=1.0) for task in ("t", "late")
        }

        def losses(progress: Any) -> list[float]:
            learner = _learner(make_model(seed=1))
            found = learner.update(examples, task_objectives, seed=0, progress=progress)
            return [found[task]["loss/mean"] for task in task_objectives]

        own = losses({"t": 0.9, "late": 0.1})
        assert own == [losses(0.9)[0], losses(0.1)[1]] != losses(0.9)

    def test_the_engines_mismatch_is_a_mean_over_sampled_tokens(
        self, make_model: Make, rows: list[Row], teacher: TransformersTeacher
    ) -> None:
        """Given tokens in the same micro-batch have no recorded log-probability: they leave the
        mean, and do not take it with them. Cheap diagnostics are there without the costly ones."""
        near = _near_policy(rows, make_model(seed=1))
        given = []
        for row in near:
            behavior_logprobs_T = row.behavior_logprobs_T.copy()
            behavior_logprobs_T[np.flatnonzero(row.action_mask_T)[::2]] = np.nan
            given.append(replace(row, behavior_logprobs_T=behavior_logprobs_T))
        mismatches = []
        with torch.no_grad():
            for row in given:
                ids_1T, at = _ids(row)
                logits_NV = make_model(seed=1)(input_ids=ids_1T).logits[0, at - 1]
                said_N = logits_NV.log_softmax(-1).gather(1, ids_1T[0, at][:, None])[:, 0]
                mismatch_N = (said_N - torch.from_numpy(row.behavior_logprobs_T)[at]).abs()
                mismatches += mismatch_N[mismatch_N.isfinite()].tolist()
        examples = _examples(given, teacher)
        task_objectives = {"t": TaskObjective(objective=build("trust_region", k=8), weight=1.0)}
        found = _learner(make_model(seed=1)).update(examples, task_objectives, seed=0)["t"]
        assert found["gap/engine"] == pytest.approx(np.mean(mismatches), rel=1e-3)
        assert found["trust/given"] == pytest.approx((1 + 9 + 1 + 3) / 26)
        cheap = _learner(make_model(seed=1)).update(
            examples, task_objectives, seed=0, diagnose=False
        )["t"]
        assert "gap/mean" in cheap and not {"gap/engine", "student/entropy"} & set(cheap)


def test_a_minibatch_is_an_update_of_its_own_at_the_steps_learning_rate(
    make_model: Make, rows: list[Row], teacher: TransformersTeacher
) -> None:
    """Every second row, then the others: as two updates in a row, but one step of the schedule."""
    objective = build("local_support", k=8)
    examples = _examples(rows, teacher)
    split, whole = (_learner(make_model(seed=1), lr=1e-2, minibatch=size) for size in (2, 9))
    by_hand, once = (_learner(make_model(seed=1), lr=1e-2) for _ in range(2))
    metrics = _update(split, examples, objective, seed=0)
    found = [_update(by_hand, examples[part::2], objective, seed=0) for part in (0, 1)]
    for name, tensor in by_hand.student.model.state_dict().items():
        assert torch.equal(split.student.model.state_dict()[name], tensor), name
    assert metrics["loss/mean"] == pytest.approx(sum(f["loss/mean"] for f in found) / 2)
    assert metrics["tokens/trained"] == sum(f["tokens/trained"] for f in found)
    assert (split.version, by_hand.version) == (1, 2)
    _update(whole, examples, objective, seed=0)  # larger than the step: one update
    _update(once, examples, objective, seed=0)
    for name, tensor in once.student.model.state_dict().items():
        assert torch.equal(whole.student.model.state_dict()[name], tensor), name


class TestNumbersThatAreNone:
    @pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_broken_student_is_named_at_the_token(
        self, value: float, sparse: bool, make_model: Make, rows: list[Row], teacher: Any
    ) -> None:
        """One NaN of the head makes NaN of every log-probability, an infinity of about half; the
        weights stay."""
        model = make_model(seed=1)
        with torch.no_grad():
            model.get_output_embeddings().weight[7, 3] = value
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        said = (
            r"task 't': .* \(first at action token \d+ of a row, id \d+: the student's"
            rf" log-probability is {'nan' if math.isnan(value) else '(nan|-)'}.*, the teacher's -\d"
        )
        with pytest.raises(FloatingPointError, match=said):
            objective = build("local_support", k=8, renormalize=False)
            _update(_learner(model, sparse=sparse), _examples(rows, teacher), objective, seed=0)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())

    def test_a_loss_alone_that_is_none_is_named_with_sound_numbers(
        self, make_model: Make, rows: list[Row], teacher: Any
    ) -> None:
        """A recorded log-probability that no engine would give: the student's own is sound."""
        near = _near_policy(rows, make_model(seed=1))
        behavior_logprobs_T = near[0].behavior_logprobs_T.copy()
        behavior_logprobs_T[np.flatnonzero(near[0].action_mask_T)[0]] = -1e30
        examples = _examples(
            [replace(near[0], behavior_logprobs_T=behavior_logprobs_T), *near[1:]], teacher
        )
        with pytest.raises(FloatingPointError, match=r"token 0 of a row.*log-probability is -\d"):
            _update(_learner(make_model(seed=1)), examples, build("reward_clipped"), seed=0)


class TestAdvantages:
    def test_a_loss_gets_each_tokens_own(
        self, make_model: Make, rows: list[Row], teacher: TransformersTeacher
    ) -> None:
        """Through ragged batches, beside a teacher's scores: the row's number and the token's."""
        given = [
            replace(row, advantage_T=(100 * i + np.arange(len(row.ids_T))).astype(np.float32))
            for i, row in enumerate(rows)
        ]
        seen: dict[float, int] = {}

        def look(case: Case) -> torch.Tensor:
            assert case.tokens.advantage_N is not None
            said = case.tokens.advantage_N.tolist()
            seen.update(zip(said, case.ids_N.tolist(), strict=True))
            return -case.tokens.advantage_N * case.student_logprobs()

        objective = weighted_sum([(1.0, build("local_support", k=8)), (0.1, _own(look))])
        learner = _learner(make_model(), micro_tokens=44)  # two rows, and two alone
        metrics = _update(learner, _examples(given, teacher), objective, seed=0)
        assert seen == {
            float(100 * i + t): int(row.ids_T[t])
            for i, row in enumerate(rows)
            for t in np.flatnonzero(row.action_mask_T)
        }
        assert metrics["loss/mean"] == pytest.approx(
            metrics["loss/local_support"] + 0.1 * metrics["loss/own"]
        )

    def test_all_rows_of_a_batch_have_them_or_none(self, make_model: Make, rows: list[Row]) -> None:
        some = [replace(rows[0], advantage_T=np.zeros_like(rows[0].behavior_logprobs_T)), *rows[1:]]
        objective = _own(lambda case: -case.student_logprobs())
        with pytest.raises(ValueError, match="1 of 4 rows have advantages"):
            _update(_learner(make_model()), _examples(some, None), objective, seed=0)

    @pytest.mark.parametrize(
        ("advantages", "message"),
        [([0.0, 1.0], "differ in length"), ([0.0, 0.0, np.nan], "must be finite")],
    )
    def test_a_rows_are_checked_at_birth(
        self, make_row: Callable[..., Row], advantages: list[float], message: str
    ) -> None:
        row = make_row([("prompt", [1, 2]), ("said", [3])])
        with pytest.raises(ValueError, match=message):
            replace(row, advantage_T=np.array(advantages, dtype=np.float32))
        replace(row, advantage_T=np.array([np.nan, np.nan, 1.0], dtype=np.float32))
