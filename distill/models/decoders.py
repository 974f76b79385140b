"""The forward of a decoder: transformers' own, or a lean one that computes the same with less work.

In a small model the calls of Python and of small operators take much of a forward: masks, hooks,
keyword arguments, a norm in six steps. The lean one has none of them, multiplies by the faster of
torch's libraries, and computes the last layer only of the tokens that somebody asks for.

Letters: B rows, T tokens a row, S the tokens of all rows and some zeros (see `rounded`), P
positions that a query may look at, H heads, K head size, D hidden size, N tokens asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tutelage.distill.models.architecture import window_of
from tutelage.distill.models.products import Projections, linear, rounded

LEAN = ("llama", "mistral", "qwen2", "qwen3")
"""Types whose layers are those of `LeanDecoder`, up to what `_reads` looks at."""

ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not change with the length of the text."""

BLOCK = 256
"""Positions are given their turns in blocks of so many."""

NEAR = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""How far the lean hidden states may be from transformers', relative to the largest. float32's are
about 1e-6 apart."""

At = tuple[torch.Tensor, torch.Tensor]
"""Tokens of a batch: their rows [N] and columns [N]."""


class Cache(Protocol):
    """Keys and values of earlier tokens. room: every position is below it."""

    room: int

    def update(
        self, keys_BHTK: torch.Tensor, values_BHTK: torch.Tensor, layer: int, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new ones; return all that the queries may look at [B, H, P, K]."""


class Decoder(Protocol):
    """A causal language model without its head."""

    def __call__(
        self,
        ids_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor | None = None,
        mask_B1TP: torch.Tensor | None = None,
        cache: Cache | None = None,
        at: At | None = None,
    ) -> torch.Tensor:
        """The last hidden states [N, D] of the tokens `at`; None: of all [B, T, D].

        positions_BT: None: 0, 1, 2, ... mask_B1TP: True where a query may look; None: at its own
        row up to itself.
        """

    def forget(self) -> None:
        """Keep no copies of weights: they may have changed. Due before a call with a cache that
        follows such a change; calls without a cache use the model's own."""


def decoder_of(model: Any) -> Decoder:
    """The lean decoder where it computes what transformers' does, else transformers'."""
    plain = TransformersDecoder(model)
    if _reads(model):
        lean = LeanDecoder(model)
        if _agree(lean, plain, model):
            return lean
    return plain


class TransformersDecoder:
    """transformers' forward, of any model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self,
        ids_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor | None = None,
        mask_B1TP: torch.Tensor | None = None,
        cache: Cache | None = None,
        at: At | None = None,
    ) -> torch.Tensor:
        if cache is not None and mask_B1TP is None:  # models would ask the cache for its shape
            seen_TT = torch.ones(2 * ids_BT.shape[1:], dtype=torch.bool, device=ids_BT.device)
            mask_B1TP = seen_TT.tril()[None, None]
        given: dict[str, Any] = {"attention_mask": mask_B1TP, "use_cache": cache is not None}
        # Left out where they are the usual ones: then models number positions themselves, and sdpa
        # may take its causal kernel instead of one with a mask.
        if positions_BT is not None:
            given["position_ids"] = positions_BT
        if cache is not None:
            given["past_key_values"] = cache
        hidden_BTD: torch.Tensor = self._model.base_model(
            input_ids=ids_BT, **given
        ).last_hidden_state
        return hidden_BTD if at is None else hidden_BTD[at]

    def forget(self) -> None:
        """It has no copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer's modules at hand: to find one in transformers' takes as long as a small operator."""

    whole: Any
    norm: Any
    second_norm: Any
    reads: Projections  # queries, keys and values
    query_norm: Any  # Qwen3's; None: others have none
    key_norm: Any
    writes: Any
    widens: Projections  # gate and up
    narrows: Any

    @property
    def recomputed(self) -> bool:
        """In the backward; transformers' own flags."""
        return bool(self.whole.training and self.whole.gradient_checkpointing)

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            whole=layer,
            norm=layer.input_layernorm,
            second_norm=layer.post_attention_layernorm,
            reads=Projections(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
            writes=attention.o_proj,
            widens=Projections(mlp.gate_proj, mlp.up_proj),
            narrows=mlp.down_proj,
        )


class LeanDecoder:
    """The decoder of Llama, Mistral, Qwen2 and Qwen3 without sliding windows.

    What stands in a projection's place (an adapter, say) is called.
    """

    def __init__(self, model: Any) -> None:
        base, settings = model.base_model, model.config
        self._embed, self._norm = base.embed_tokens, base.norm
        self._layers = [_Layer.of(layer) for layer in base.layers]
        self._rotary = base.rotary_emb
        self._most = settings.hidden_size * settings.intermediate_size
        self._size = int(
            getattr(settings, "head_dim", None)
            or settings.hidden_size // settings.num_attention_heads
        )
        self._heads = settings.num_key_value_heads
        self._groups = settings.num_attention_heads // self._heads
        self._turns = torch.empty(2, 0, 0)  # cosines and sines [2, positions, K]

    def __call__(
        self,
        ids_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor | None = None,
        mask_B1TP: torch.Tensor | None = None,
        cache: Cache | None = None,
        at: At | None = None,
    ) -> torch.Tensor:
        rows, width = ids_BT.shape
        x_SD = self._embed(ids_BT.flatten())
        x_SD = _padded(x_SD, rounded(x_SD.shape[0], x_SD, self._most))
        turns = self._turned(width if cache is None else cache.room, x_SD)
        if positions_BT is None:
            cos, sin = turns[:, None, :width, None]
        else:
            cos, sin = turns[:, positions_BT, None]
        if width == 1 and mask_B1TP is not None:
            mask_B1TP = self._bias(mask_B1TP, x_SD)
        places_N = None if at is None else at[0] * width + at[1]
        if places_N is not None:
            places_N = _padded(places_N, rounded(places_N.shape[0], x_SD, self._most))
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            wanted_N = places_N if i == last else None
            given = i, layer, x_SD, (rows, width), cos, sin, mask_B1TP, cache, wanted_N
            if torch.is_grad_enabled() and layer.recomputed:
                x_SD = checkpoint(self._layer, *given, use_reentrant=False)
            else:
                x_SD = self._layer(*given)
        if at is None:
            return _normed(self._norm, x_SD[: rows * width]).view(rows, width, -1)
        return _normed(self._norm, x_SD[: at[0].shape[0]])

    def forget(self) -> None:
        for layer in self._layers:
            layer.reads.forget()
            layer.widens.forget()

    def _layer(
        self,
        i: int,
        layer: _Layer,
        x_SD: torch.Tensor,
        shape: tuple[int, int],
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask_B1TP: torch.Tensor | None,
        cache: Cache | None,
        places_N: torch.Tensor | None,
    ) -> torch.Tensor:
        join = cache is not None  # to generate: few tokens at a time
        query_BTHK, key_BTHK, value_BTHK = (
            projected_S[: shape[0] * shape[1]].view(*shape, -1, self._size)
            for projected_S in layer.reads(_normed(layer.norm, x_SD), join=join)
        )
        value_BHTK = value_BTHK.transpose(1, 2)
        if layer.query_norm is not None:
            query_BTHK = _normed(layer.query_norm, query_BTHK)
            key_BTHK = _normed(layer.key_norm, key_BTHK)
        query_BHTK = _turned(query_BTHK, cos, sin).transpose(1, 2)
        key_BHTK = _turned(key_BTHK, cos, sin).transpose(1, 2)
        if cache is not None:
            key_BHTK, value_BHTK = cache.update(key_BHTK, value_BHTK, i)
        seen_SD = self._attend(query_BHTK, key_BHTK, value_BHTK, mask_B1TP).flatten(0, 1)
        if places_N is None:
            seen_SD = _padded(seen_SD, x_SD.shape[0])
        else:
            x_SD, seen_SD = x_SD[places_N], seen_SD[places_N]
        x_SD = x_SD + linear(layer.writes, seen_SD)
        gate, up = layer.widens(_normed(layer.second_norm, x_SD), join=join)
        return x_SD + linear(layer.narrows, _gated(gate, up))

    def _attend(
        self,
        query_BHTK: torch.Tensor,
        key_BHPK: torch.Tensor,
        value_BHPK: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the queries see [B, T, H K]; heads of keys and values may be fewer."""
        rows, _heads, queries, size = query_BHTK.shape
        if queries == 1 and mask is not None:
            # The heads of a group look at the same keys: here they are queries of one head.
            query = query_BHTK.reshape(-1, self._groups, size)
            key, value = key_BHPK.flatten(0, 1), value_BHPK.flatten(0, 1)
            scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=size**-0.5)
            return torch.bmm(scores.softmax(-1), value).view(rows, 1, -1)
        grouped, whole = self._groups > 1, query_BHTK.dtype is torch.float32
        if grouped and query_BHTK.is_cuda and (whole or mask is not None):
            # with groups these go to CUDA's kernel that keeps a score for every pair of tokens
            key_BHPK = key_BHPK.repeat_interleave(self._groups, dim=1)
            value_BHPK = value_BHPK.repeat_interleave(self._groups, dim=1)
            grouped = False
        seen_BHTK = F.scaled_dot_product_attention(
            query_BHTK,
            key_BHPK,
            value_BHPK,
            attn_mask=mask,
            is_causal=mask is None and queries > 1,
            enable_gqa=grouped,
        )
        return seen_BHTK.transpose(1, 2).reshape(rows, queries, -1)

    def _bias(self, mask_B11P: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What a single query adds to its scores [B H, groups, P]: 0 or minus infinity."""
        bias = torch.zeros_like(mask_B11P, dtype=like.dtype)
        bias.masked_fill_(~mask_B11P, float("-inf"))
        return bias.expand(-1, self._heads, self._groups, -1).flatten(0, 1)

    def _turned(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Cosines and sines [2, P, K] of at least the first `count` positions. The sines' first
        half is negative, as `_Turn` wants them."""
        kept = self._turns
        if kept.shape[1] < count or kept.device != like.device or kept.dtype != like.dtype:
            # an engine calls in inference mode, whose tensors no backward could keep
            with torch.inference_mode(False), torch.no_grad():
                positions_1P = torch.arange(-(-count // BLOCK) * BLOCK, device=like.device)[None]
                cos, sin = self._rotary(like, positions_1P)
                left, right = sin[0].chunk(2, dim=-1)
                kept = self._turns = torch.stack([cos[0], torch.cat([-left, right], dim=-1)])
        return kept


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    """With zeros behind the first dimension."""
    more = length - x.shape[0]
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, more]) if more else x


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        found: torch.Tensor = _Norm.apply(x, norm.weight, norm.variance_epsilon)
        return found
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        found: torch.Tensor = _Turn.apply(x, cos, sin)
        return found
    return _turn(x, cos, sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([right, left], dim=-1), sin)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        found: torch.Tensor = _Gated.apply(gate, up)
        return found
    return F.silu(gate).mul_(up)


class _Norm(torch.autograd.Function):
    """A root mean square norm. torch's own is one operator forward and, on a CPU, ten backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.rms_norm(x, weight.shape, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        x, dtype = x.to(torch.promote_types(x.dtype, torch.float32)), x.dtype
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(ctx.epsilon).rsqrt_()
        unit = x * scale
        product = grad * unit
        along = (product @ weight.to(x.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        of_x = torch.addcmul(grad * weight, unit, along, value=-1).mul_(scale)
        return of_x.to(dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None


class _Turn(torch.autograd.Function):
    """Rotary position embedding: a turn of each pair (k, k + K / 2), whose derivative is the turn
    back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up, of which nothing but the two is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gate, up), grad = ctx.saved_tensors, grads[0]
        of_gate: torch.Tensor = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, F.silu(gate).mul_(grad)


def _reads(model: Any) -> bool:
    """Whether the model's layers are those of `LeanDecoder`."""
    settings = model.config
    rope = getattr(settings, "rope_parameters", None) or {}
    return (
        settings.model_type in LEAN
        and settings.hidden_act == "silu"
        and window_of(settings) is None
        and rope.get("rope_type", "default") in ROPES
    )


@torch.no_grad()
def _agree(lean: Decoder, plain: Decoder, model: Any) -> bool:
    """Whether both make the same hidden states of a few tokens, up to rounding."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids_BT = (torch.arange(14, device=model.device).reshape(2, 7) * 7919 + 1) % rows
    ours_BTD, theirs_BTD = lean(ids_BT).float(), plain(ids_BT).float()
    apart = (ours_BTD - theirs_BTD).abs().max()
    return bool(apart <= NEAR.get(model.dtype, 0.0) * theirs_BTD.abs().max())
