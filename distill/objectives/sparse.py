"""The student as hidden states and an output head: no [tokens, vocabulary] tensor, ever.

A softmax over the K ids of a support needs K logits: the normaliser over the vocabulary cancels.
So the head is applied to K gathered rows a token. What needs the normaliser (a full
log-probability, an entropy) takes it block by block and computes the blocks again for the gradient.
Products are accumulated in float32 whatever the weights are in.

Letters: N tokens, K ids a token, D hidden size, V vocabulary, C tokens of a chunk, U head rows of a
block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tutelage.distill.objectives.largest import top_k
from tutelage.distill.objectives.scores import CHUNK
from tutelage.distill.objectives.students import sampling_logprobs

GATHERED = 1 << 21
"""Elements of gathered head rows at once: 8 MB in float32, what a CPU's cache holds."""

BLOCK = 8192
"""Head rows of one block of the normaliser: their float32 copy is 29 MB at D = 896."""


class SparseStudent:
    """A student given by the hidden states that predict N tokens, and its output head.

    Args:
        hidden_ND: what the head is applied to.
        head: a linear layer (weight [>= V, D], perhaps a bias); tied or not.
        vocabulary: V; head rows beyond it are padding and take no probability.
    """

    def __init__(self, hidden_ND: torch.Tensor, head: Any, *, vocabulary: int) -> None:
        self._weight_VD, self._bias_V = head.weight, getattr(head, "bias", None)
        # Widened once: a log-probability's gradient is a small difference of two parts (its own row
        # minus the mean row), which must meet before they are narrowed.
        self._hidden_ND, self.vocabulary = hidden_ND.to(_wide(head.weight)), vocabulary
        self._normaliser_N: torch.Tensor | None = None
        self._surveyed_N: torch.Tensor | None = None  # the same without its gradient

    def __len__(self) -> int:
        return len(self._hidden_ND)

    def logits_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        logits_NK: torch.Tensor = _GatheredLogits.apply(
            self._hidden_ND, self._weight_VD, self._bias_V, ids_NK
        )
        return logits_NK

    def logprobs_at(self, ids_NK: torch.Tensor) -> torch.Tensor:
        if self._surveyed_N is not None and not torch.is_grad_enabled():
            return self.logits_at(ids_NK) - self._surveyed_N[:, None]
        if self._normaliser_N is None:
            with torch.enable_grad():  # kept: a later caller may need its gradient
                self._normaliser_N = self._normaliser(ids_NK[:, 0])
        return self.logits_at(ids_NK) - self._normaliser_N[:, None]

    def _normaliser(self, ids_N: torch.Tensor) -> torch.Tensor:
        """log sum exp of every token's logits [N]. A fused kernel computes -log pi(y) instead, from
        which it follows with any id y."""
        fused = fused_cross_entropy(self._weight_VD, self._bias_V)
        if fused is None:
            normaliser_N: torch.Tensor = _LogSumExp.apply(
                self._hidden_ND, self._weight_VD, self._bias_V, self.vocabulary
            )
            return normaliser_N
        narrow_ND = self._hidden_ND.to(self._weight_VD.dtype)
        # log sum exp = -log pi(y) + logit(y)
        surprise_N = fused(narrow_ND, self._weight_VD[: self.vocabulary], ids_N)
        return surprise_N.to(self._hidden_ND.dtype) + self.logits_at(ids_N[:, None])[:, 0]

    @torch.no_grad()
    def top_k(self, k: int) -> torch.Tensor:
        weight_VD, bias_V = self._head()
        return torch.cat(
            [
                _affine(hidden_CD, weight_VD, bias_V).topk(k, dim=-1).indices
                for hidden_CD in self._chunks()
            ]
        )

    @torch.no_grad()
    def sampling_logprobs_at(
        self, ids_N: torch.Tensor, *, temperature: float, top_p: float
    ) -> torch.Tensor:
        weight_VD, bias_V = self._head()
        chunks = self._chunks()
        parts = zip(chunks, ids_N.split([len(chunk) for chunk in chunks]), strict=True)
        return torch.cat(
            [
                sampling_logprobs(
                    _affine(hidden_CD, weight_VD, bias_V),
                    ids_C,
                    temperature=temperature,
                    top_p=top_p,
                )
                for hidden_CD, ids_C in parts
            ]
        )

    def entropy(self) -> torch.Tensor:
        return self.survey(0)[0]

    @torch.no_grad()
    def survey(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._surveyed_N, mean_N, ids_NK = _surveyed(
            self._hidden_ND, self._weight_VD, self._bias_V, self.vocabulary, k
        )
        # H = log Z - E[logit]: it needs no log-probabilities [N, V]
        return self._surveyed_N - mean_N, ids_NK

    def over_vocabulary(
        self,
        measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        teacher_NV: torch.Tensor,
    ) -> torch.Tensor:
        weight_VD, bias_V = self._head()

        def part(hidden_CD: torch.Tensor, teacher_CV: torch.Tensor) -> torch.Tensor:
            return measure(_affine(hidden_CD, weight_VD, bias_V).log_softmax(-1), teacher_CV)

        chunks = self._chunks()
        sizes = [len(chunk) for chunk in chunks]
        return torch.cat(
            [
                # checkpoint: the logits [C, V] are computed again in the backward, not kept
                checkpoint(part, hidden_CD, teacher_CV, use_reentrant=False)
                for hidden_CD, teacher_CV in zip(chunks, teacher_NV.split(sizes), strict=True)
            ]
        )

    def _chunks(self) -> tuple[torch.Tensor, ...]:
        """The hidden states in chunks whose logits have at most CHUNK elements."""
        return self._hidden_ND.split(max(1, CHUNK // self.vocabulary))

    def _head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows that take probability, at the width of the products: cast once for all chunks,
        so that their gradients too are summed before they are narrowed."""
        wide = _wide(self._weight_VD)
        bias_V = self._bias_V
        return (
            self._weight_VD[: self.vocabulary].to(wide),
            None if bias_V is None else bias_V[: self.vocabulary].to(wide),
        )


def fused_cross_entropy(
    weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """cut-cross-entropy's kernel (Wijmans et al. 2024, arXiv:2411.09009) for narrow weights on a
    GPU, where it is installed; None: use the blocks below."""
    if not weight_VD.is_cuda or weight_VD.dtype == _wide(weight_VD) or bias_V is not None:
        return None
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return None
    # filter_eps would drop small gradients
    return partial(linear_cross_entropy, reduction="none", filter_eps=None)


class _GatheredLogits(Function):
    """hidden_n . weight_v + bias_v at the ids v of each n [N, K]."""

    # By hand, since autograd would keep the gathered rows [N, K, D] for the backward; here the
    # backward gathers them again, part by part.

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_NK: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK)
        logits_NK = hidden_ND.new_empty(ids_NK.shape, dtype=_wide(weight_VD))
        for part in _parts(ids_NK, weight_VD.shape[1]):
            rows_CKD = weight_VD[ids_NK[part]].to(logits_NK.dtype)
            hidden_CD1 = hidden_ND[part, :, None].to(logits_NK.dtype)
            torch.bmm(rows_CKD, hidden_CD1, out=logits_NK[part, :, None])
        return logits_NK if bias_V is None else logits_NK + bias_V[ids_NK]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_NK,) = gradients
        hidden_ND, weight_VD, bias_V, ids_NK = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = gradient_NK.dtype
        # Empty, not zero: the parts below cover every token.
        hidden_gradient_ND = torch.empty_like(hidden_ND) if need_hidden else None
        # A frozen head (adapters) needs no gradient of its weight, the largest tensor here.
        rows = _RowSums(weight_VD, ids_NK, wide) if need_weight else None
        for part in _parts(ids_NK, weight_VD.shape[1]):
            gradient_CK = gradient_NK[part]
            if hidden_gradient_ND is not None:
                rows_CKD = weight_VD[ids_NK[part]].to(wide)
                summed_C1D = torch.bmm(gradient_CK[:, None], rows_CKD)
                hidden_gradient_ND[part] = summed_C1D[:, 0].to(hidden_ND.dtype)
            if rows is not None:
                outer_CKD = gradient_CK[:, :, None] * hidden_ND[part, None].to(wide)
                rows.add(part, outer_CKD.flatten(0, 1))
        bias_gradient_V = None
        if need_bias:
            summed_V = gradient_NK.new_zeros(len(bias_V))
            summed_V.index_add_(0, ids_NK.flatten(), gradient_NK.flatten())
            bias_gradient_V = summed_V.to(bias_V.dtype)
        weight_gradient_VD = None if rows is None else rows.total()
        return hidden_gradient_ND, weight_gradient_VD, bias_gradient_V, None


class _RowSums:
    """Sums rows into a [V, D] gradient. For narrow weights (bfloat16) it sums in float32, only the
    rows that some token uses, and narrows the sums at the end."""

    def __init__(self, weight_VD: torch.Tensor, ids_NK: torch.Tensor, wide: torch.dtype) -> None:
        self._gradient_VD = torch.zeros_like(weight_VD)
        self._used_U: torch.Tensor | None = None
        self._index_NK, self._sums_UD = ids_NK, self._gradient_VD
        if weight_VD.dtype != wide:
            self._used_U, self._index_NK = ids_NK.unique(return_inverse=True)
            shape = (len(self._used_U), weight_VD.shape[1])
            self._sums_UD = weight_VD.new_zeros(shape, dtype=wide)

    def add(self, part: slice, rows_XD: torch.Tensor) -> None:
        self._sums_UD.index_add_(0, self._index_NK[part].flatten(), rows_XD)

    def total(self) -> torch.Tensor:
        if self._used_U is not None:
            self._gradient_VD[self._used_U] = self._sums_UD.to(self._gradient_VD.dtype)
        return self._gradient_VD


class _LogSumExp(Function):
    """log sum_v exp(hidden_n . weight_v + bias_v) over the vocabulary [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        vocabulary: int,
    ) -> torch.Tensor:
        normaliser_N, _, _ = _surveyed(hidden_ND, weight_VD, bias_V, vocabulary, 0)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, normaliser_N)
        ctx.vocabulary = vocabulary
        return normaliser_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_N,) = gradients
        hidden_ND, weight_VD, bias_V, normaliser_N = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide_ND = hidden_ND.to(gradient_N.dtype)
        hidden_sum_ND = torch.zeros_like(wide_ND) if need_hidden else None
        weight_gradient_VD = torch.zeros_like(weight_VD) if need_weight else None
        bias_gradient_V = torch.zeros_like(bias_V) if need_bias else None
        # Blocks outside, tokens inside: a block's float32 sum is complete before it is narrowed.
        for block, rows_UD, bias_U in _blocks(weight_VD, bias_V, ctx.vocabulary):
            rows_sum_UD, bias_sum_U = torch.zeros_like(rows_UD), rows_UD.new_zeros(len(rows_UD))
            for tokens in _spans(len(hidden_ND)):
                share_CU = _affine(wide_ND[tokens], rows_UD, bias_U)
                # d logsumexp / d logit is the softmax
                share_CU.sub_(normaliser_N[tokens, None]).exp_().mul_(gradient_N[tokens, None])
                if hidden_sum_ND is not None:
                    hidden_sum_ND[tokens].addmm_(share_CU, rows_UD)
                if weight_gradient_VD is not None:
                    rows_sum_UD.addmm_(share_CU.T, wide_ND[tokens])
                if bias_gradient_V is not None:
                    bias_sum_U += share_CU.sum(0)
            if weight_gradient_VD is not None:
                weight_gradient_VD[block] = rows_sum_UD.to(weight_VD.dtype)
            if bias_gradient_V is not None:
                bias_gradient_V[block] = bias_sum_U.to(bias_V.dtype)
        hidden_gradient_ND = None if hidden_sum_ND is None else hidden_sum_ND.to(hidden_ND.dtype)
        return hidden_gradient_ND, weight_gradient_VD, bias_gradient_V, None


def _surveyed(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    vocabulary: int,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log sum exp of the logits, their mean under the softmax [N], the K most probable ids [N, K],
    largest first) in one pass over blocks."""
    # -inf: the first block's maximum always replaces it, and its scale exp(-inf) is 0
    top_N = hidden_ND.new_full((len(hidden_ND),), -torch.inf, dtype=_wide(weight_VD))
    sum_N, weighted_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
    wide_ND = hidden_ND.to(top_N.dtype)
    best: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each block: logits and ids [N, K]
    for block, rows_UD, bias_U in _blocks(weight_VD, bias_V, vocabulary):
        width = min(k, len(rows_UD))
        best_NK = top_N.new_empty(len(top_N), width)
        ids_NK = torch.empty_like(best_NK, dtype=torch.long)
        best.append((best_NK, ids_NK))
        for tokens in _spans(len(hidden_ND)):
            logits_CU = _affine(wide_ND[tokens], rows_UD, bias_U)
            if k:
                best_NK[tokens], ids_NK[tokens] = top_k(logits_CU, width)
            # The streaming softmax: sums so far are rescaled whenever a larger logit turns up.
            higher_C = torch.maximum(top_N[tokens], logits_CU.amax(-1))
            scale_C = (top_N[tokens] - higher_C).exp()
            share_CU = (logits_CU - higher_C[:, None]).exp_()
            sum_N[tokens] = sum_N[tokens] * scale_C + share_CU.sum(-1)
            weighted_N[tokens] = weighted_N[tokens] * scale_C + share_CU.mul_(logits_CU).sum(-1)
            top_N[tokens] = higher_C
        ids_NK += block.start
    _, order_NK = top_k(torch.cat([best_NK for best_NK, _ in best], 1), k)
    found_NK = torch.cat([ids_NK for _, ids_NK in best], 1).gather(1, order_NK)
    return top_N + sum_N.log(), weighted_N / sum_N, found_NK


def _blocks(
    weight_VD: torch.Tensor, bias_V: torch.Tensor | None, vocabulary: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """(where, head rows [U, D], their bias [U]) at the width of the products."""
    wide = _wide(weight_VD)
    for start in range(0, vocabulary, BLOCK):
        block = slice(start, min(start + BLOCK, vocabulary))
        bias_U = None if bias_V is None else bias_V[block].to(wide)
        yield block, weight_VD[block].to(wide), bias_U


def _spans(count: int) -> Iterator[slice]:
    """Slices of tokens whose logits over one block have at most CHUNK elements."""
    size = max(1, CHUNK // BLOCK)
    for first in range(0, count, size):
        yield slice(first, first + size)


def _affine(
    hidden_CD: torch.Tensor, weight_UD: torch.Tensor, bias_U: torch.Tensor | None
) -> torch.Tensor:
    """hidden weight^T + bias [C, U], a new tensor of the weight's type."""
    logits_CU = hidden_CD.to(weight_UD.dtype) @ weight_UD.T
    return logits_CU if bias_U is None else logits_CU + bias_U


def _wide(tensor: torch.Tensor) -> torch.dtype:
    # float64, in which the tests compare, is not narrowed
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _parts(ids_NK: torch.Tensor, hidden_size: int) -> Iterator[slice]:
    """Slices of tokens whose gathered rows stay within GATHERED elements."""
    size = max(1, GATHERED // max(1, ids_NK.shape[1] * hidden_size))
    for first in range(0, len(ids_NK), size):
        yield slice(first, first + size)
