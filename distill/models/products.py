"""Matrix products of a layer by the faster of torch's two libraries for CPUs.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on AMD's processors. oneDNN,
which comes with torch too, uses it: twice the speed. On other processors both are about as fast.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

PAYS = 3 << 21
"""Multiplications from which on oneDNN is faster: it takes longer to begin, above all with matrices
of new sizes, for which it compiles."""


@cache
def onednn_pays() -> float:
    """From how many multiplications on oneDNN is faster here; infinite: it never is."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return math.inf
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # another build of torch
        return math.inf
    try:
        maker = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        maker = platform.processor()
    return PAYS if "AuthenticAMD" in maker else math.inf


JOIN = 1 << 18
"""Weights of a projection up to which a joined copy is kept: a larger one would gain nothing by it,
and hold its weights twice."""


def rounded(tokens: int, like: torch.Tensor, weights: int) -> int:
    """So many tokens or up to an eighth more: as many rows as a matrix like this should have that
    is multiplied by one of so many weights.

    oneDNN compiles for each number of rows, 0.4 ms, and keeps what it compiled.
    """
    if tokens * weights < _pays(like):
        return tokens
    step = 1 << max(0, tokens.bit_length() - 4)
    return -(-tokens // step) * step


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What `layer` makes of x [..., D]: for a plain `nn.Linear` by the faster library."""
    if type(layer) is not torch.nn.Linear:
        found: torch.Tensor = layer(x)
        return found
    return _linear(x, layer.weight, layer.bias)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.numel() * weight.shape[0] < _pays(x):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        product: torch.Tensor = _Product.apply(x, weight, bias)
        return product
    return _product(x, weight, bias)


class Projections:
    """Linear layers that read the same input. Small ones are multiplied as one: where few tokens
    come at a time, calls take more time than products."""

    def __init__(self, *layers: Any) -> None:
        self._layers = layers
        self._joins = all(
            type(layer) is torch.nn.Linear and layer.weight.numel() <= JOIN for layer in layers
        )
        self._sizes = [layer.out_features for layer in layers] if self._joins else []
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, *, join: bool) -> Sequence[torch.Tensor]:
        """What each layer makes of x. join: from a copy of all weights, without gradients."""
        if not (join and self._joins) or torch.is_grad_enabled():
            return [linear(layer, x) for layer in self._layers]
        if self._weight is None:
            self._weight = torch.cat([layer.weight for layer in self._layers])
            if self._layers[0].bias is not None:
                self._bias = torch.cat([layer.bias for layer in self._layers])
        return _linear(x, self._weight, self._bias).split(self._sizes, dim=-1)

    def forget(self) -> None:
        """Copy anew at the next call: the weights have changed. Their versions would not tell:
        fused optimizers leave them as they are."""
        self._weight = self._bias = None


def _pays(x: torch.Tensor) -> float:
    return onednn_pays() if x.dtype is torch.float32 and x.device.type == "cpu" else math.inf


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W' + b."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Product(torch.autograd.Function):
    """`_product`, which has no derivative of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        of_x, of_weight, of_bias = ctx.needs_input_grad
        left, right = grad.flatten(0, -2).t(), x.flatten(0, -2).t()
        return (
            _product(grad, weight.t(), None) if of_x else None,
            _across(left, right) if of_weight else None,
            left.sum(1) if of_bias else None,
        )


def _across(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right', begun with the smaller one, which is faster."""
    if left.shape[0] > right.shape[0]:
        return _product(right, left, None).t()
    return _product(left, right, None)
