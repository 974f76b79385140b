"""The architectures of the papers' models, for `plan`, which asks no network.

They hold those keys of each model's config.json on the hub that its size depends on. A model that
is on this machine is measured by its own file.
"""

from __future__ import annotations

from typing import Any

# The embedding of Qwen2.5 has 152,064 rows at 7B and 151,936 up to 3B; its tokenizer fewer ids.
_QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
}
_QWEN2_1_5B = _QWEN2_7B | {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B,
    "open-thoughts/OpenThinker3-7B": _QWEN2_7B,  # both trained from Qwen2.5-7B-Instruct
    "langfeng01/GiGPO-Qwen2.5-7B-Instruct-ALFWorld": _QWEN2_7B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_1_5B | {"tie_word_embeddings": True},
    # From Qwen2.5-Math, with positions for long replies; at 1.5B the head is its own.
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2_1_5B | {"max_position_embeddings": 131_072},
    "Skywork/Skywork-OR1-Math-7B": _QWEN2_7B | {"max_position_embeddings": 131_072},
}
