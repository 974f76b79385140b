"""The lean decoder against transformers' forward: hidden states, gradients, caches, and which
models it leaves to transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.rounding import FORWARD_SUMS, rounding
from tutelage.distill.engines.transformers import SlotCache, TransformersEngine
from tutelage.distill.models import products
from tutelage.distill.models.decoders import LeanDecoder, TransformersDecoder, decoder_of
from tutelage.distill.models.student import Student
from tutelage.scheduler.engine import Request
from tutelage.scheduler.episodes import SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"head_dim": 16},
}

IDS = torch.arange(2 * 9).reshape(2, 9) * 7 % 61


def _model(kind: str, *, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(
        kind.removesuffix("3") if kind == "llama3" else kind,
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
        }
        | KINDS.get(kind, {})
        | more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
        for weight in model.parameters():  # norms of ones and biases of zeros would hide faults
            if weight.ndim == 1:
                torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return model.to(dtype).eval()


@pytest.fixture(params=["torch's own", "oneDNN"])
def products_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine prefers, by one library and by the other."""
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    least = 0 if request.param == "oneDNN" else math.inf
    monkeypatch.setattr(products, "onednn_pays", lambda: least)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, products_by: None) -> Iterator[Any]:
    yield _model(request.param)


def _close(ours: torch.Tensor, theirs: torch.Tensor, passes: int = 2) -> None:
    """passes: of a forward, whose sums are those of conftest's two layers."""
    room = rounding(sums=FORWARD_SUMS * passes, size=float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=room)


def test_hidden_states_are_transformers(model: Any) -> None:
    assert isinstance(decoder_of(model), LeanDecoder)
    at = torch.tensor([0, 1, 1]), torch.tensor([8, 0, 5])
    with torch.no_grad():
        theirs_BTD = TransformersDecoder(model)(IDS)
        _close(LeanDecoder(model)(IDS), theirs_BTD)
        _close(LeanDecoder(model)(IDS, at=at), theirs_BTD[at])
        assert torch.equal(TransformersDecoder(model)(IDS, at=at), theirs_BTD[at])


@pytest.mark.parametrize("branched", [False, True])
def test_gradients_are_autograds_of_transformers(model: Any, branched: bool) -> None:
    """Also with a mask and positions of the caller's."""
    at = torch.tensor([0, 0, 1]), torch.tensor([8, 3, 5])
    given: dict[str, Any] = {}
    if branched:
        mask_TT = torch.ones(9, 9, dtype=torch.bool).tril()
        mask_TT[5:, 2:5] = False
        positions_T = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4, 5])
        given = {
            "mask_B1TP": mask_TT.expand(2, 1, 9, 9),
            "positions_BT": positions_T.expand(2, 9),
        }
    found = []
    for decoder in (LeanDecoder(model), TransformersDecoder(model)):
        model.zero_grad()
        hidden_ND = decoder(IDS, at=at, **given)
        (hidden_ND * torch.linspace(-1, 1, hidden_ND.numel()).view_as(hidden_ND)).sum().backward()
        found.append({name: p.grad for name, p in model.base_model.named_parameters()})
    for name, theirs in found[1].items():
        assert theirs is not None and theirs.abs().sum() > 0, name
        _close(found[0][name], theirs, passes=6)


def test_gradients_in_the_backward_are_finite_differences_of_the_forward(products_by: None) -> None:
    """In float64 where torch multiplies; oneDNN's products are float32 alone."""
    model = _model("qwen3", dtype=torch.float64, num_hidden_layers=1)
    decoder = LeanDecoder(model)
    weights = [p.requires_grad_() for p in model.base_model.layers[0].parameters()]
    at = torch.tensor([0, 1]), torch.tensor([4, 3])

    def forward(*_: torch.Tensor) -> torch.Tensor:
        return decoder(IDS[:, :5], at=at)

    assert torch.autograd.gradcheck(forward, weights, fast_mode=True)


@torch.inference_mode()
def test_token_by_token_with_a_cache_is_the_whole_text(model: Any) -> None:
    """A chunk of each row, then single tokens, at places that differ from row to row."""
    lean, cache, chunk = LeanDecoder(model), SlotCache(), [4, 6]
    cache.reserve(2, 16)
    rows_BT = IDS[:, :6].masked_fill(torch.tensor([[4], [6]]) <= torch.arange(6), 0)
    positions_BT = torch.arange(6).expand(2, 6)

    def look(ids_BT: torch.Tensor, positions_BT: torch.Tensor, at: Any) -> torch.Tensor:
        reach = int(positions_BT.max()) + 1
        cache.look(slice(2), positions_BT, reach)
        mask_B1TP = torch.arange(reach) <= positions_BT[:, None, :, None]
        return lean(ids_BT, positions_BT=positions_BT, mask_B1TP=mask_B1TP, cache=cache, at=at)

    rows = torch.arange(2)
    whole_BTD = TransformersDecoder(model)(IDS)
    _close(look(rows_BT, positions_BT, (rows, torch.tensor(chunk) - 1)), whole_BTD[rows, [3, 5]])
    for t in range(3):
        where = torch.tensor(chunk) + t
        found = look(IDS[rows, where][:, None], where[:, None], None)
        _close(found[:, 0], whole_BTD[rows, where])


def test_a_student_learns_after_it_played() -> None:
    """The engine plays in inference mode, with the learner's own decoder."""
    lean = LeanDecoder(_model("qwen2"))
    with torch.inference_mode():
        lean(IDS)
    lean(IDS).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_agree_as_far_as_they_can(dtype: torch.dtype) -> None:
    model = _model("llama", dtype=dtype)
    assert isinstance(decoder_of(model), LeanDecoder)


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "gpt2", "n_positions": 64},
        {"kind": "llama", "hidden_act": "gelu"},
        {"kind": "mistral", "sliding_window": 4},
        {"kind": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ],
    ids=lambda how: "-".join(map(str, how.values()))[:30],
)
def test_other_models_keep_transformers_forward(how: dict[str, Any]) -> None:
    if "rope_parameters" in how:
        how["rope_parameters"]["rope_theta"] = 10000.0
    assert isinstance(decoder_of(_model(**how)), TransformersDecoder)


def test_a_model_that_computes_something_else_keeps_transformers_forward() -> None:
    """Such as one whose forward somebody changed: the check at load sees it."""
    model = _model("qwen2")
    norm = model.base_model.layers[1].input_layernorm
    plain = type(norm).forward
    norm.forward = lambda x: 1.01 * plain(norm, x)
    assert isinstance(decoder_of(model), TransformersDecoder)


@pytest.mark.parametrize("fused", [False, True])
def test_after_an_update_the_engine_plays_by_the_new_weights(
    products_by: None, fused: bool
) -> None:
    """Though it keeps copies of some, and fused optimizers hide that they changed them."""
    model = _model("qwen2")
    student = Student(model, vocabulary=61)
    engine = TransformersEngine(student)

    def played() -> list[float]:
        engine.load(None, 1)
        greedy = SamplingParams(temperature=0.0, top_p=1.0)
        engine.submit(
            Request(session=0, ids=[5, 6], max_new_tokens=4, stop_ids=[], sampling=greedy, seed=0)
        )
        while not (done := engine.step()):
            pass
        return list(done[0].logprobs)

    before = played()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    student.decoder(IDS).sum().backward()
    optimizer.step()
    after = played()
    engine = TransformersEngine(Student(model, vocabulary=61))
    assert after == played() and after != before


def test_what_stands_in_a_projections_place_is_called() -> None:
    """Adapters put a module of their own there."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = 2 * self.inner(x)
            return found

    model = _model("qwen2")
    before_BTD = LeanDecoder(model)(IDS)
    model.base_model.layers[0].mlp.down_proj = Doubled(model.base_model.layers[0].mlp.down_proj)
    with torch.no_grad():
        assert not torch.allclose(LeanDecoder(model)(IDS), before_BTD)
        _close(LeanDecoder(model)(IDS), TransformersDecoder(model)(IDS))
