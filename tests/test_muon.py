"""Muon is torch's, in float32, and does not depend on the processor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.distill.config.sections import OptimizerConfig
from tutelage.distill.models.student import Student
from tutelage.distill.student import muon
from tutelage.distill.student.muon import ITERATIONS, Muon, orthogonalized, precision
from tutelage.distill.student.optimizers import Optimizer

SHAPES = [(16, 16), (16, 48), (48, 16), (5, 48), (1, 7), (16, 16)]


def _matrices(seed: int, shapes: list[tuple[int, int]] = SHAPES) -> list[torch.Tensor]:
    """Ill-conditioned, as gradients are: singular values over four decades."""
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy((rng.standard_normal(s) * np.logspace(0, -4, s[1])).astype(np.float32))
        for s in shapes
    ]


def _reference(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64, from the singular values: the iteration is a polynomial of them."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values = values / max(np.linalg.norm(values), 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.asarray(left * values @ right)


def test_a_matrix_becomes_the_polynomial_of_its_singular_values() -> None:
    """To float32's rounding at its worst, three products an iteration of at most 48 terms below
    one. bfloat16 is off by 1e-2."""
    worst = 3 * ITERATIONS * 48 * 2.0**-24
    for matrix, found in zip(_matrices(0), orthogonalized(_matrices(0)), strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, _reference(matrix.numpy()), rtol=0, atol=worst)


def test_matrices_keep_their_order_and_a_zero_one_stays() -> None:
    """Alone, or among others of its shape and of its transpose's, or in several batches."""
    matrices = [*_matrices(1), torch.zeros(16, 48), *_matrices(2)]
    worst = 2 * 3 * ITERATIONS * 48 * 2.0**-24
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "STACKED", 2 * 16 * 48)
        in_parts = orthogonalized(matrices)
    for matrix, together, part in zip(matrices, orthogonalized(matrices), in_parts, strict=True):
        (alone,) = orthogonalized([matrix])
        torch.testing.assert_close(together, alone, rtol=0, atol=worst)
        torch.testing.assert_close(part, alone, rtol=0, atol=worst)
    assert not orthogonalized(matrices)[len(SHAPES)].any()
    assert orthogonalized([]) == []


def _train(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: range) -> None:
    """The same gradients for everybody: of another size in every step."""
    shapes = [(p.shape[0], p.shape[1]) for p in parameters]
    for step in steps:
        for parameter, gradient in zip(parameters, _matrices(step, shapes), strict=True):
            parameter.grad = (step + 1) * gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon: before 2.9")
def test_steps_are_those_of_torch_to_its_bfloat16() -> None:
    """Weights that move by 0.2 lr sqrt(48) a step, and torch's direction is off by some 2^-8 of
    it, all over; no decay or other momentum would be near."""
    lr, decay, steps = 1e-2, 0.5, 4
    own, theirs = ([m.clone() for m in _matrices(9)] for _ in range(2))
    _train(Muon(own, lr=lr, weight_decay=decay), own, range(steps))
    reference = torch.optim.Muon(theirs, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    _train(reference, theirs, range(steps))
    for mine, other, start in zip(own, theirs, _matrices(9), strict=True):
        moved = (other - start).norm()
        assert (mine - other).norm() < 2**-5 * moved


def test_a_saved_state_goes_on_to_the_bit() -> None:
    """Also one of torch's Muon, whose groups hold more."""
    whole, stopped = ([m.clone() for m in _matrices(9)] for _ in range(2))
    _train(Muon(whole, lr=1e-2, weight_decay=0.1), whole, range(5))
    first = Muon(stopped, lr=1e-2, weight_decay=0.1)
    _train(first, stopped, range(2))
    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0] |= {"nesterov": True, "ns_steps": 5}
    again = Muon(stopped, lr=9.0, weight_decay=0.9)
    again.load_state_dict(saved)
    _train(again, stopped, range(2, 5))
    assert all(map(torch.equal, whole, stopped))


def test_half_precision_weights_move_by_a_float32_direction() -> None:
    """But for the rounding of the momentum and of the weights themselves."""
    (start,) = _matrices(9, [(16, 48)])
    half = [start.bfloat16()]
    _train(Muon(half, lr=1e-2, weight_decay=0.0), half, range(1))
    (gradient,) = _matrices(0, [(16, 48)])
    (direction,) = orthogonalized([gradient.bfloat16()])
    moved = start.bfloat16().float() - 1e-2 * 0.2 * 48**0.5 * direction
    torch.testing.assert_close(half[0].float(), moved, rtol=2**-8, atol=2**-6 * 1e-2)


@pytest.mark.parametrize(
    ("kind", "capability", "made_in"),
    [
        ("cpu", None, torch.float32),
        ("cuda", (7, 5), torch.float32),  # a T4: no unit for bfloat16
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (9, 0), torch.bfloat16),
    ],
)
def test_bfloat16_is_for_gpus_that_have_units_for_it(
    kind: str, capability: Any, made_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision(torch.device(kind)) is made_in


def test_muon_needs_no_torch_that_has_one(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    model = make_model(seed=1)
    optimizer = Optimizer(Student(model, vocabulary=101), OptimizerConfig(name="muon", lr=1e-3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step(1e-3)
    assert all((p != before[name]).any() for name, p in model.named_parameters())
