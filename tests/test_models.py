"""Models that cannot be trained here, or are not what they say, are named as what they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.sections import StudentConfig
from tutelage.distill.engines.transformers import TransformersEngine
from tutelage.distill.models.architecture import check_architecture, check_forward, window_of
from tutelage.distill.models.loading import load_model, load_student, load_tokenizer
from tutelage.distill.models.student import Student

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def _settings(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **SMALL | more)


def _model(kind: str, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(_settings(kind, **more)).eval()


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("gemma2", {}, "final_logit_softcapping: 30"),
        ("gemma3_text", {"final_logit_softcapping": 20.0}, "final_logit_softcapping: 20"),
        ("recurrent_gemma", {}, "logits_soft_cap: 30"),
        ("nanochat", {}, "final_logit_softcapping: 15"),
        ("cohere", {}, "logit_scale: 0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling: 8"),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, "lm_head_multiplier: 0.5"),
        ("bert", {}, "an encoder"),
        ("roberta", {}, "an encoder"),
        ("bart", {}, "no causal language model"),
        ("t5", {}, "no causal language model"),
        ("mamba", {"max_position_embeddings": None}, "no max_position_embeddings"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq)"),
    ],
)
def test_a_configuration_tells_what_cannot_be_computed(
    kind: str, more: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_architecture(_settings(kind, **more), "student.model")
    assert str(refused.value).startswith("student.model") and why in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma3_text", {}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
        ("gpt_neox", {}),
        ("qwen3", {}),
    ],
)
def test_factors_of_one_and_caps_that_are_not_set_are_no_fault(
    kind: str, more: dict[str, Any]
) -> None:
    check_architecture(_settings(kind, **more), "student.model")
    check_forward(_model(kind, **more), "student.model")


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_small_random_weights_hide_no_cap_from_the_forward(kind: str) -> None:
    """At a scale of 0.02 the logits are below 1, where a cap of 30 changes nothing that shows."""
    with pytest.raises(ConfigError, match="does more to its logits"):
        check_forward(_model(kind, initializer_range=0.02), "it")


def test_a_model_that_looks_ahead_is_found_by_its_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _model("qwen3", initializer_range=0.3)
    check_forward(model, "it")
    plain = model.model.forward

    def prefetch(*given: Any, **named: Any) -> Any:
        found = plain(*given, **named)
        last = found.last_hidden_state
        found.last_hidden_state = last + last.mean(1, keepdim=True)
        return found

    monkeypatch.setattr(model.model, "forward", prefetch)
    with pytest.raises(ConfigError, match="not causal"):
        check_forward(model, "it")


def test_a_model_with_states_of_its_own_plays_nowhere() -> None:
    model = _model("falcon_h1", mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8)
    with pytest.raises(ConfigError, match="cannot generate token by token"):
        TransformersEngine(Student(model, vocabulary=101))


def test_a_sliding_window_bounds_what_is_played() -> None:
    """The engine's mask knows no window: within one, it is the model's own."""
    assert (
        TransformersEngine(
            Student(_model("mistral", sliding_window=16), vocabulary=101)
        ).max_context
        == 16
    )
    assert (
        TransformersEngine(Student(_model("qwen2", sliding_window=16), vocabulary=101)).max_context
        == 64
    )
    assert window_of(_settings("mistral", sliding_window=None)) is None


@pytest.mark.parametrize("kind", ["gemma2", "bert"])
def test_a_student_from_scratch_is_looked_at_too(kind: str) -> None:
    init = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    init.pop("pad_token_id")
    config = StudentConfig(init={"model_type": kind} | init, tokenizer="builtin:vocabulary")
    with pytest.raises(ConfigError, match=r"^student\.init"):
        load_student(config, seed=0, vocabulary=101)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, save_model: Callable[..., str]) -> Path:
    return Path(save_model(tmp_path / "model", tokenizer, seed=1))


def _with(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        load_model(str(folder), dtype="float32", device="cpu")
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "32 NaN"), (-math.inf, "32 infinite")])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float, said: str) -> None:
    _with(folder, lambda weights: weights["lm_head.weight"][7].fill_(value))
    assert f"lm_head.weight holds {said} of " in _refused(folder)


def test_weights_that_are_missing_are_not_drawn_at_random(folder: Path) -> None:
    _with(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "have no 'model.layers.1.mlp.up_proj.weight'" in _refused(folder)


def test_weights_that_nobody_knows_are_not_left_out(folder: Path) -> None:
    _with(folder, lambda weights: weights.update({"model.adapter.weight": torch.ones(2)}))
    assert "hold an unknown 'model.adapter.weight'" in _refused(folder)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    _with(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    assert "model.norm.weight has shape (31,) in its files and (32,)" in _refused(folder)


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text("raise SystemExit('it ran')\n")
    assert "needs code of its own (auto_map), which is never run here" in _refused(folder)


def test_a_tokenizer_file_that_cuts_or_pads_does_neither(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    backend = load_tokenizer(str(folder)).backend_tokenizer
    assert len(backend.encode("1 2 3 4 5 6 7 8 9").ids) > 4
