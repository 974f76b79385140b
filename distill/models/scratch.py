"""What `student.init` may say: the architecture of a student of random weights.

transformers accepts any key in a model's configuration and ignores most that it does not know, and
its defaults are those of a 7B model. Here unknown keys are refused, and the sizes that a model's
memory depends on are required.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from tutelage.distill.config.faults import ConfigError
from tutelage.envs.errors import one_line
from tutelage.envs.names import nearest

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Required, as far as the kind of model has them."""

COUNTS = (*SIZES, "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")

READ = ("rope_theta", "rope_scaling", "head_dim", "partial_rotary_factor")
"""Keys that models read although their configuration does not declare them."""

ELSEWHERE = {
    "eos_token_id": "the tokenizer's is taken",
    "pad_token_id": "the tokenizer's is taken",
    "bos_token_id": "the tokenizer's is taken",
    "dtype": "set student.dtype",
    "torch_dtype": "set student.dtype",
    "attn_implementation": "it is sdpa",
    "transformers_version": "it is the one that is installed",
}


def scratch_settings(init: Mapping[str, Any], tokenizer: Any) -> Any:
    """The configuration of a model as `init` describes it, over the tokenizer's ids.

    Raises:
        ConfigError: an unknown key or kind of model; sizes that are missing or do not fit together.
    """
    given = dict(init)
    kind = given.pop("model_type", "qwen2")
    cls = _class(kind)
    names = {ours: cls.attribute_map.get(ours, ours) for ours in COUNTS}  # GPT-2 says n_embd
    known = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map} - {"self", *ELSEWHERE}
    for key in given:
        if key in ELSEWHERE:
            raise _fault(key, ELSEWHERE[key])
        if key not in known and key not in READ:
            near = nearest(key, known)
            hint = f": did you mean {near!r}?" if near else ""
            raise _fault(key, f"a {kind} has no such key{hint}")
    for name in SIZES:
        if names[name] in known and name not in given and names[name] not in given:
            raise _fault(names[name], "required: transformers' default is that of a model of 7B")
    _check_counts(given, {*names, *names.values()})
    if given.setdefault("vocab_size", len(tokenizer)) < len(tokenizer):
        raise _fault("vocab_size", f"{given['vocab_size']}, and the tokenizer has {len(tokenizer)}")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        settings = cls(**given, **ids)
    except Exception as error:  # transformers checks types with errors of its own
        raise ConfigError(f"student.init: {' '.join(str(error).split())}") from None
    _check_heads(settings, given)
    _check_builds(settings)
    return settings


def _class(kind: Any) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        hint = f": did you mean {near!r}?" if near else ", such as qwen2 or llama"
        raise _fault("model_type", f"{kind!r} is no kind of language model{hint}")
    return type(AutoConfig.for_model(kind))


def _check_counts(given: Mapping[str, Any], names: set[str]) -> None:
    for key, value in given.items():
        if key in names and (type(value) is not int or value < 1):  # isinstance would take True
            raise _fault(key, f"it must be a whole number of 1 or more (got {value!r})")


def _check_heads(settings: Any, given: Mapping[str, Any]) -> None:
    heads = getattr(settings, "num_attention_heads", None)
    hidden = getattr(settings, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    if getattr(settings, "head_dim", None) is None and hidden % heads:
        raise _fault("hidden_size", f"{hidden} is no multiple of num_attention_heads, {heads}")
    groups = getattr(settings, "num_key_value_heads", None)
    if isinstance(groups, int) and heads % groups:
        said = "" if "num_key_value_heads" in given else " where it is not given"
        raise _fault(
            "num_key_value_heads",
            f"{groups}{said}, and num_attention_heads, {heads}, is no multiple of it",
        )


def _check_builds(settings: Any) -> None:
    """Build the model once on torch's meta device, which takes no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # a model's code raises errors of any type on unexpected values
        raise ConfigError(
            f"student.init: no {settings.model_type} of these values can be made:"
            f" {one_line(error):.300}"
        ) from None


def _fault(key: str, text: str) -> ConfigError:
    return ConfigError(f"student.init.{key}: {text}")
