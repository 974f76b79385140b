"""Chat templates of the kinds that are met, written small, with their special tokens and ends."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """template: None for none. special: added tokens. eos: the tokenizer's. ends: what
    generation_config.json says, besides; end: what a reply should end with."""

    template: str | None
    special: tuple[str, ...] = ()
    eos: str = "<|end|>"
    ends: tuple[str, ...] = ()
    end: str = "<|end|>"


_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"


def _asked(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


LLAMA3 = Style(
    template="{{ '<|begin|>' }}{% set date = strftime_now('%d %b %Y') %}"
    "{% if messages[0].role == 'system' %}{% set told = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
    "{{ '<|header|>system</|header|>\\n\\nToday Date: ' + date + '\\n\\n' + told + '<|turn|>' }}"
    + _LOOP
    + "{{ '<|header|>' + m.role + '</|header|>\\n\\n' + m.content | trim + '<|turn|>' }}"
    + _END
    + _asked("<|header|>assistant</|header|>\\n\\n"),
    special=("<|begin|>", "<|header|>", "</|header|>", "<|turn|>", "<|text|>"),
    eos="<|text|>",
    ends=("<|text|>", "<|turn|>"),
    end="<|turn|>",
)
PHI3 = Style(
    template=_LOOP
    + "{{ '<|' + m.role + '|>\\n' + m.content + '<|stop|>\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    special=("<|stop|>", "<|system|>", "<|user|>", "<|assistant|>", "<|text|>"),
    eos="<|text|>",
    ends=("<|text|>", "<|stop|>"),
    end="<|stop|>",
)
GLM = Style(
    template="{{ '[gMASK]<sop>' }}"
    + _LOOP
    + "{{ '<|' + m.role + '|>\\n' + m.content }}"
    + _END
    # the next speaker's name is what ends a turn
    + _asked("<|assistant|>\\n"),
    special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|seen|>"),
    ends=("<|end|>", "<|user|>", "<|seen|>"),
    end="<|user|>",
)
GEMMA2 = Style(
    template="{{ '<bos>' }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + _LOOP
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim"
    " + '<stop>\\n' }}" + _END + _asked("<start>model\\n"),
    special=("<bos>", "<start>", "<stop>", "<eos>"),
    eos="<eos>",
    ends=("<eos>", "<stop>"),
    end="<stop>",
)
R1 = Style(
    template="{{ '<bos>' }}" + _LOOP + "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<eos>' }}{% endif %}"
    + _END
    + _asked("<|Assistant|><think>\\n"),
    special=("<bos>", "<eos>", "<|User|>", "<|Assistant|>"),
    eos="<eos>",
    end="<eos>",
)
MISTRAL = Style(
    # the system message stands before the last user's; add_generation_prompt changes nothing
    template="{{ '<s>' }}{% set told = '' %}{% if messages[0].role == 'system' %}"
    "{% set told = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}"
    + _LOOP
    + "{% if m.role == 'user' %}"
    "{{ '[INST]' + (told if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}" + _END,
    special=("<s>", "</s>", "[INST]", "[/INST]"),
    eos="</s>",
    end="</s>",
)
QWEN3 = Style(
    template="{% set n = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set n.last = loop.index0 %}{% endif %}{% endfor %}"
    + _LOOP
    + "{% set said = m.content %}{% if m.role == 'assistant' and loop.index0 < n.last %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}"
    "{% elif m.role == 'assistant' and '</think>' not in said %}"
    "{% set said = '<think>\\n\\n</think>\\n\\n' + said %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}"
    + _END
    + _asked("<|im_start|>assistant\\n"),
    special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    eos="<|im_end|>",
    ends=("<|im_end|>", "<|endoftext|>"),
    end="<|im_end|>",
)
PARTS = Style(
    template=_LOOP + "{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<image>' }}{% elif part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}"
    + _END
    + _asked("<|im_start|>assistant\\n"),
    special=("<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    end="<|im_end|>",
)
SILENT = Style(
    template=_LOOP + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}" + _END,
    special=("<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    end="<|im_end|>",
)
PLAIN = Style(
    template=_LOOP + "{{ m.role + ': ' + m.content + '\\n' }}" + _END + _asked("assistant: ")
)
NONE = Style(template=None)

STYLES = {
    "llama3": LLAMA3,
    "phi3": PHI3,
    "glm": GLM,
    "gemma2": GEMMA2,
    "r1": R1,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "parts": PARTS,
    "silent": SILENT,
    "plain": PLAIN,
    "none": NONE,
}

BAD = {
    "syntax": ("{% for m in messages %}{{ m.content }", "line 1"),
    "unclosed": ("{% if messages %}\n{{ messages[0].content }}", "line"),
    "raises": ("{{ raise_exception('no chat today') }}", "no chat today"),
    "unknown filter": ("{{ messages[0].content | shout }}", "shout"),
    "undefined": ("{{ tools | length }}{{ now() }}", "fails on user"),
    "drops replies": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "drops or repeats",
    ),
    "upper": ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "drops or repeats"),
    "random": (
        "{{ ['Hi', 'Yo'] | random }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "random",
    ),
    "first turn alone": (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
        "{{ messages[0].content }}",
        "one turn only",
    ),
}
"""Templates that do not do, and what is said of them."""


def styled(tokenizer: Any, style: Style) -> Any:
    """A copy of a tokenizer with the style's tokens and template."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": list(style.special)})
    made.chat_template, made.eos_token = style.template, style.eos
    return made


def save_student(folder: Path, tokenizer: Any, style: Style, *, scale: float = 0.3) -> str:
    """A tiny random Llama that talks in this style, with its generation_config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = styled(tokenizer, style)
    settings = AutoConfig.for_model(
        "llama",
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=made.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
    if style.ends:
        model.generation_config.eos_token_id = made.convert_tokens_to_ids(list(style.ends))
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)
