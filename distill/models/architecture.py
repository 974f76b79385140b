"""Which models can be students and teachers: checked on their configuration before weights load,
and on their first forward after.

Here logits are the output embedding of the last hidden state, nothing more, and a token attends to
those before it and to nothing else. A model of another kind would silently train or teach with
logits that are not its own.

Letters: B rows, T tokens, D hidden size, V embedding rows.
"""

from __future__ import annotations

from typing import Any

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.envs.errors import one_line

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""transformers' names for a soft cap of the logits. Caps of attention scores and of routers need no
care: they stay inside the model and are computed like any other layer."""

SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "output_multiplier",
)
"""transformers' names for a factor or divisor of the logits."""

LOUD = 1e3
"""The largest logit of the check is scaled to this: caps are at 15 to 30, and the logits of a model
with small random weights would never come near one."""


def check_architecture(settings: Any, who: str) -> None:
    """Refuse, by its configuration, a model that cannot be computed here.

    Raises:
        ConfigError: names what it is, and what to take instead.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(settings.model_type)
    text = settings.get_text_config()
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or settings.is_encoder_decoder:
        raise ConfigError(
            f"{who} is of type {kind!r}, no causal language model: choose one that continues a"
            " prompt (llama, qwen2, mistral, ...)"
        )
    # models of images or sound keep the text's part in a configuration of its own
    if text is not settings:
        raise ConfigError(
            f"{who} is of type {kind!r}, which reads more than text: choose a model of text alone"
            " (the same family's, as a rule)"
        )
    # BERT and its kin are in transformers' table of causal models, and are encoders unless
    # is_decoder is set. GPT-NeoX is causal whatever its is_decoder says.
    if getattr(settings, "is_decoder", None) is False and not kind.startswith("gpt_neox"):
        raise ConfigError(
            f"{who} is of type {kind!r} with is_decoder false: an encoder, in which a token sees"
            " those after it: choose a causal language model"
        )
    if quantised := getattr(settings, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ConfigError(
            f"{who} is quantised ({method}), which is not supported: give the checkpoint that it"
            " was made from, in float32 or bfloat16"
        )
    for name, value in _more_than_the_head(settings):
        raise ConfigError(
            f"{who} caps or scales its logits ({name}: {value:g} in its config.json), and here they"
            " are the output embedding of the last hidden state: choose another model; as a teacher"
            " it can be asked in an engine of its own (engine: server)"
        )
    context_of(settings, who)


def _more_than_the_head(settings: Any) -> list[tuple[str, float]]:
    """What a configuration does to the logits after the head, by name."""
    caps = [(name, getattr(settings, name, None)) for name in CAPS]
    scales = [(name, getattr(settings, name, None)) for name in SCALES]
    found = [(name, cap) for name, cap in caps if cap is not None]
    found += [(name, by) for name, by in scales if by is not None and by != 1]
    # MPT's `logit_scale` may be a string, and transformers' MPT ignores it.
    return [(name, value) for name, value in found if isinstance(value, int | float)]


def context_of(settings: Any, who: str = "the model") -> int:
    """How many positions a model of these settings has.

    Raises:
        ConfigError: they do not tell it.
    """
    found = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        raise ConfigError(
            f"{who} (type {settings.model_type!r}) says no max_position_embeddings, so how long a"
            " text may be is unknown: choose a model with a context of known length"
        )
    return found


def window_of(settings: Any) -> int | None:
    """The size of the sliding window of attention; None: every layer attends to all tokens."""
    text = settings.get_text_config()
    # Qwen2's configuration has a sliding_window also where no layer uses it.
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


def check_weights(model: Any, who: str) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises:
        ConfigError: names the tensor, and how many of its numbers.
    """
    sick = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            sick.append((name, int(tensor.isnan().sum()), int(tensor.isinf().sum())))
    if not sick:
        return
    name, nans, infinite = sick[0]
    count = " and ".join(
        f"{many:,} {what}" for many, what in ((nans, "NaN"), (infinite, "infinite")) if many
    )
    more = f" (and {len(sick) - 1} more tensors)" if len(sick) > 1 else ""
    raise ConfigError(
        f"{who}: its weights are broken: {name} holds {count} of"
        f" {model.state_dict()[name].numel():,} numbers{more}: take an earlier checkpoint, or fetch"
        " the files again"
    )


@torch.inference_mode()
def check_forward(model: Any, who: str) -> None:
    """Refuse a model that changes its logits after the head, or in which a token attends to those
    after it. One forward of two rows that differ in their last token shows both.

    Raises:
        ConfigError: names which of the two.
    """
    ids_BT = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)
    ids_BT %= model.get_input_embeddings().weight.shape[0]  # a vocabulary may be smaller
    head = model.get_output_embeddings()
    kept: list[torch.Tensor] = []
    kind = f"{who} ({type(model).__name__})"

    def louder(module: Any, inputs: Any, outputs: Any) -> Any:
        hidden_BTD = outputs.last_hidden_state
        kept.append(hidden_BTD)
        most = float(head(hidden_BTD).abs().max())
        outputs.last_hidden_state = hidden_BTD * (LOUD / most if most else 1.0)
        kept.append(outputs.last_hidden_state)
        return outputs

    handle = model.base_model.register_forward_hook(louder)
    try:
        logits_BTV = model(input_ids=ids_BT).logits
    except Exception as error:  # transformers' models raise what comes
        raise ConfigError(
            f"{kind} does not go through its first forward ({one_line(error):.300}): its"
            " config.json does not fit together, or its type is none that can be used here"
        ) from None
    finally:
        handle.remove()
    # Some call a decoder inside the base model, past the hook: then the plain logits are compared.
    if not kept:
        kept = [model.base_model(input_ids=ids_BT).last_hidden_state] * 2
    hidden_BTD, loud_BTD = kept
    if not torch.allclose(logits_BTV.float(), head(loud_BTD).float(), rtol=0, atol=1e-3 * LOUD):
        raise ConfigError(
            f"{kind} does more to its logits than its output embedding does (a soft cap, a scale):"
            " not supported: choose another model"
        )
    # The rows agree up to here, so a causal model's hidden states do too, up to rounding.
    before_BTD = hidden_BTD[:, :-1].float()
    room = 1e-2 * float(before_BTD.abs().max())
    if not torch.allclose(before_BTD[0], before_BTD[1], rtol=0, atol=room):
        raise ConfigError(
            f"{kind} is not causal: what it makes of a token depends on those after it: choose a"
            " causal language model"
        )
