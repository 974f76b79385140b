"""Muon (Jordan et al. 2024): a matrix moves by its momentum, made nearly orthogonal.

As torch.optim.Muon does it (Nesterov's momentum, five Newton-Schulz iterations, the update scaled
to AdamW's size by arXiv:2502.16982, equation 4), with two differences. It multiplies in float32,
and in bfloat16 only on GPUs with units for it: a CPU without such units is eighty times slower in
bfloat16, and if those with them used it, a run's numbers would depend on the kind of CPU. And it
stacks matrices of one shape: fewer and larger products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the iteration X <- aX + bXX'X + cXX'XX'X, chosen for the steepest slope at zero."""
ITERATIONS = 5
SMALL = 1e-7
"""A matrix whose norm is below this stays small instead of becoming orthogonal."""
STACKED = 1 << 22
"""Numbers in one stack of matrices, at most; a larger matrix goes alone."""

Orthogonalize = Callable[[Sequence[Any]], list[Any]]
"""Maps matrices to their nearly orthogonal matrices, in the same order."""


def orthogonalized(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """About UV' of each matrix USV': five iterations bring the singular values near one, no
    further."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        # Sorted: the iteration turns tall matrices wide, so that both kinds share a stack.
        alike.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    found: dict[int, torch.Tensor] = {}
    for (rows, columns), members in alike.items():
        many = max(1, STACKED // max(1, rows * columns))
        for start in range(0, len(members), many):
            batch = members[start : start + many]
            done = _iterated(torch.stack([_wide(matrices[i]) for i in batch]))
            for i, wide in zip(batch, done, strict=True):
                found[i] = wide if wide.shape == matrices[i].shape else wide.mT
    return [found[i] for i in range(len(matrices))]


def precision(device: torch.device) -> torch.dtype:
    """The dtype of the products: bfloat16 on GPUs that have units for it, which sum in float32; on
    every CPU float32."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix or its transpose, the wide one: XX' is then the smaller of XX' and X'X."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return wide.to(precision(matrix.device))


def _iterated(x: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz on a batch of wide matrices."""
    # The Frobenius norm bounds the largest singular value: the iteration diverges far above one.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALL)
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        return _by_gram(_by_gram(x, 3), ITERATIONS - 3)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, _bent(gram), x, beta=COEFFICIENTS[0])
    return x


def _by_gram(x: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same iterations on the small square G = XX' alone, with P = aI + bG + cGG: X <- PX makes
    G <- PGP. What P amplifies of G's rounding stays below the plain iteration's for three of them;
    after five it would be forty times that."""
    gram = x @ x.mT
    product = None
    for left in reversed(range(iterations)):
        factor = _bent(gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(COEFFICIENTS[0])
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    return x if product is None else product @ x


def _bent(gram: torch.Tensor) -> torch.Tensor:
    """bG + cGG."""
    _, b, c = COEFFICIENTS
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


class Muon(torch.optim.Optimizer):
    """Takes hidden matrices only.

    Args:
        orthogonalize: works on the parameters' kind of tensor; ranks share it (sharded.py).
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
                # decoupled, as in AdamW: the decay has no part in what is made orthogonal
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # 0.2: about the RMS of AdamW's updates (arXiv:2502.16982, equation 4)
                size = 0.2 * math.sqrt(max(parameter.shape))
                parameter.add_(update, alpha=-group["lr"] * size)

    def _update(self, parameter: Any, momentum: float) -> Any:
        """Nesterov's momentum: the gradient, mixed with the average that already includes it."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)
