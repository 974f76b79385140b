"""Muon (Jordan et al. 2024): a matrix moves by its momentum, made nearly orthogonal.

As torch.optim.Muon does it (Nesterov's momentum, five Newton-Schulz iterations, the update scaled
to AdamW's size by arXiv:2502.16982, equation 4), but for two things. It multiplies in float32
unless bfloat16 has a fast unit: without one that is eighty times slower, and with one on some
processors alone a run's numbers would hang on their kind. And it takes matrices of one shape
together: fewer and larger products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the iteration X <- aX + bXX'X + cXX'XX'X, that is steepest at zero."""
ITERATIONS = 5
SMALL = 1e-7
"""A matrix whose norm is below this stays small instead of becoming orthogonal."""
TOGETHER = 1 << 22
"""So many numbers are in one product at most, but one matrix at least: a large one has enough."""

Orthogonalize = Callable[[Sequence[Any]], list[Any]]
"""Matrices in, each one's nearly orthogonal matrix out, in their order."""


def orthogonalized(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """UV' of each matrix's USV', but that instead of ones the singular values are around one."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    found: dict[int, torch.Tensor] = {}
    for (rows, columns), members in alike.items():
        many = max(1, TOGETHER // max(1, rows * columns))
        for start in range(0, len(members), many):
            batch = members[start : start + many]
            done = _iterated(torch.stack([_wide(matrices[i]) for i in batch]))
            for i, wide in zip(batch, done, strict=True):
                found[i] = wide if wide.shape == matrices[i].shape else wide.mT
    return [found[i] for i in range(len(matrices))]


def precision(device: torch.device) -> torch.dtype:
    """What the products are made in: bfloat16 on GPUs that have units for it, which sum in float32;
    on every CPU float32."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """The same, or its transpose: the smaller of the two products XX' and X'X is enough."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return wide.to(precision(matrix.device))


def _iterated(x: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz on a batch of wide matrices."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALL)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """For hidden matrices alone.

    Args:
        orthogonalize: of the parameters' kind; ranks share this work (sharded.py).
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        orthogonalize: Orthogonalize = orthogonalized,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._orthogonalize = orthogonalize

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            updates = self._orthogonalize([self._update(p, group["momentum"]) for p in moved])
            for parameter, update in zip(moved, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * math.sqrt(max(parameter.shape))
                parameter.add_(update, alpha=-group["lr"] * size)

    def _update(self, parameter: Any, momentum: float) -> Any:
        """Nesterov's: the gradient, and the average of gradients that it has just joined."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)
