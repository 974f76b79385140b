"""Which models can be students and teachers here: what their configuration tells before weights
load, and what their first forward tells after.

Scores are the output embedding of the last hidden state, nothing more, and a token sees those
before it, nothing else. A model of another kind would train or teach, in silence, something that
it is not.

Letters: B rows, T tokens, D hidden size, V embedding rows.
"""

from __future__ import annotations

from typing import Any

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.envs.errors import one_line

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Under which names transformers' configurations keep a soft cap of the logits. Those of attention
scores and of routers stay inside the model: they are computed like any other layer."""

SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "output_multiplier",
)
"""Under which names they keep a factor or divisor of the logits."""

LOUD = 1e3
"""What the largest logit is brought to before it is looked at: caps are at 15 to 30, and a model
with small random weights never comes near one."""


def check_architecture(settings: Any, who: str) -> None:
    """Refuse, by its configuration, a model that cannot be computed here.

    Raises:
        ConfigError: what it is, and what to take instead.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(settings.model_type)
    text = settings.get_text_config()
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or settings.is_encoder_decoder:
        raise ConfigError(
            f"{who} is of type {kind!r}, no causal language model: choose one that goes on from a"
            " prompt (llama, qwen2, mistral, ...)"
        )
    if text is not settings:
        raise ConfigError(
            f"{who} is of type {kind!r}, which reads more than text: choose a model of text alone"
            " (the same family's, as a rule)"
        )
    # (a GPT-NeoX is causal whatever its is_decoder says)
    if getattr(settings, "is_decoder", None) is False and not kind.startswith("gpt_neox"):
        raise ConfigError(
            f"{who} is of type {kind!r} with is_decoder false: an encoder, in which a token sees"
            " those after it: choose a causal language model"
        )
    if quantised := getattr(settings, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ConfigError(
            f"{who} is quantised ({method}): its weights would not be what they are said to be:"
            " give the checkpoint that it was made from, in float32 or bfloat16"
        )
    for name, value in _more_than_the_head(settings):
        raise ConfigError(
            f"{who} caps or scales its logits ({name}: {value:g} in its config.json), and here they"
            " are the output embedding of the last hidden state: choose another model; as a teacher"
            " it can be asked in an engine of its own (engine: server)"
        )
    context_of(settings, who)


def _more_than_the_head(settings: Any) -> list[tuple[str, float]]:
    """What a configuration does to the logits after the head: names and numbers."""
    caps = [(name, getattr(settings, name, None)) for name in CAPS]
    scales = [(name, getattr(settings, name, None)) for name in SCALES]
    found = [(name, cap) for name, cap in caps if cap is not None]
    found += [(name, by) for name, by in scales if by is not None and by != 1]
    # mpt's `logit_scale` may be a word, and its model does nothing with it
    return [(name, value) for name, value in found if isinstance(value, int | float)]


def context_of(settings: Any, who: str = "the model") -> int:
    """How many positions a model of these settings has.

    Raises:
        ConfigError: it does not say.
    """
    found = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        raise ConfigError(
            f"{who} (type {settings.model_type!r}) says no max_position_embeddings, so how long a"
            " text may be is unknown: choose a model with a context of known length"
        )
    return found


def window_of(settings: Any) -> int | None:
    """The shortest span that a layer looks back over; None: every layer sees all that was."""
    text = settings.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


def check_weights(model: Any, who: str) -> None:
    """Refuse a model with weights that are no numbers.

    Raises:
        ConfigError: which tensor, and how many.
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
    """Refuse a model whose logits are more than its head's, or in which a token sees those after
    it. Both are looked for in one forward of two rows that differ in their last token.

    Raises:
        ConfigError: which of the two.
    """
    ids_BT = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)
    ids_BT %= model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()
    kept: list[torch.Tensor] = []
    kind = f"{who} ({type(model).__name__})"

    def louder(module: Any, given: Any, found: Any) -> Any:
        hidden_BTD = found.last_hidden_state
        kept.append(hidden_BTD)
        most = float(head(hidden_BTD).abs().max())
        found.last_hidden_state = hidden_BTD * (LOUD / most if most else 1.0)
        kept.append(found.last_hidden_state)
        return found

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
    if not kept:  # it goes to its decoder past its base model
        kept = [model.base_model(input_ids=ids_BT).last_hidden_state] * 2
    hidden_BTD, loud_BTD = kept
    if not torch.allclose(logits_BTV.float(), head(loud_BTD).float(), rtol=0, atol=1e-3 * LOUD):
        raise ConfigError(
            f"{kind} does more to its logits than its output embedding does (a soft cap, a scale):"
            " not supported: choose another model"
        )
    before_BTD = hidden_BTD[:, :-1].float()
    room = 1e-2 * float(before_BTD.abs().max())
    if not torch.allclose(before_BTD[0], before_BTD[1], rtol=0, atol=room):
        raise ConfigError(
            f"{kind} is not causal: what it makes of a token depends on those after it: choose a"
            " causal language model"
        )
