"""A model's size: from its config.json if that is on this machine, else from the published one
(published.py), else from the model's name.

No weights are read: the model is built on torch's meta device, whose tensors have only shapes.

Letters: D hidden size, I the feed-forward layer's inner size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tutelage.distill.config.sections import StudentConfig
from tutelage.distill.models.dtypes import BYTES
from tutelage.distill.models.loading import (
    BUILTIN,
    at_key,
    load_settings,
    resolve,
    student_settings,
)
from tutelage.distill.models.student import Student
from tutelage.distill.plan.published import PUBLISHED

# `7B` and `1.5B` of a name, but neither `4bit` nor the 2.5 of Qwen2.5
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s?([BbMm])(?![A-Za-z0-9])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that memory depends on, beside that of the weights. trainable: parameters that an
    optimizer moves; hidden_matrices: those of them that Muon moves."""

    layers: int
    hidden: int
    inner: int
    cache: int  # numbers that one token leaves in the key-value cache
    rows: int  # of the embedding
    context: int  # positions
    trainable: int
    hidden_matrices: int

    def activations(self, *, recompute: bool) -> int:
        """How many numbers the forward of one token keeps for the backward, without the head. sdpa
        attention and a gated feed-forward save 10 D + 4 I a layer (at most 5 % off for Qwen2 and
        Llama; a quarter more where keys and queries are normed). With recomputing it is one
        layer's, the input of every layer, and the last norm's two."""
        layer = 10 * self.hidden + 4 * self.inner
        return layer + (self.layers + 2) * self.hidden if recompute else self.layers * layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """A model's size. parameters: None: unknown. shape: None without a config.json; `parameters` is
    then read from the name. published: the config.json is not on this machine but in
    published.py."""

    reference: str
    parameters: int | None
    shape: Shape | None
    published: bool = False

    @property
    def here(self) -> bool:
        return self.shape is not None and not self.published

    def weights(self, dtype: str) -> int | None:
        """Bytes."""
        return None if self.parameters is None else self.parameters * BYTES[dtype]

    def gradients(self, dtype: str) -> int | None:
        """Bytes; each of the optimizer's moments has as many."""
        return self.weights(dtype) if self.shape is None else self.shape.trainable * BYTES[dtype]

    def optimizer_state(self, name: str, dtype: str) -> tuple[int | None, int | None]:
        """(at least, at most) bytes that the optimizer keeps: AdamW two moments for each parameter;
        Muon one for each of the hidden matrices, and AdamW's two for the rest."""
        moment = self.gradients(dtype)
        if moment is None or name == "adamw":
            twice = None if moment is None else 2 * moment
            return twice, twice
        if self.shape is None:  # nobody knows how many parameters Muon moves
            return moment, 2 * moment
        kept = 2 * moment - self.shape.hidden_matrices * BYTES[dtype]
        return kept, kept


def footprint(reference: str) -> Footprint:
    """The size of a folder's, hub id's or built-in model; asks no network.

    Raises:
        ConfigError: no such built-in model, or a config.json that does not load.
    """
    folder = at_hand(reference)
    if folder is None or not (folder / "config.json").is_file():
        if known := PUBLISHED.get(reference):
            from transformers import AutoConfig

            return replace(_measured(reference, AutoConfig.for_model(**known)), published=True)
        return Footprint(reference=reference, parameters=named_size(reference), shape=None)
    return _measured(reference, load_settings(str(folder)))


def student_footprint(config: StudentConfig) -> Footprint:
    """The size of the student, whether it is trained further or from scratch."""
    if config.model is not None:
        with at_key("student.model"):
            return footprint(config.model)
    if config.tokenizer is None or at_hand(config.tokenizer) is None:
        return Footprint(reference="from scratch", parameters=None, shape=None)
    return _measured("from scratch", student_settings(config))


def at_hand(reference: str) -> Path | None:
    """The folder of a model or tokenizer that is on this machine; None: it is not.

    Raises:
        ConfigError: `builtin:` with a name that is not.
    """
    if reference.startswith(BUILTIN):
        return Path(resolve(reference))
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        return None  # no hub id, which huggingface_hub would refuse with an error
    from huggingface_hub import try_to_load_from_cache

    # either file: a tokenizer may have been fetched without its model
    for file in ("config.json", "tokenizer_config.json"):
        # else None, or an object that stands for: the hub has no such file
        if isinstance(found := try_to_load_from_cache(reference, file), str):
            return Path(found).parent
    return None


def named_size(reference: str) -> int | None:
    """The parameters that a name speaks of: 7e9 for `Qwen/Qwen2.5-7B-Instruct`."""
    found = _SIZE.search(
        # to a regular expression _ is part of a word, and would hide the size behind it
        reference.rstrip("/").rsplit("/", 1)[-1].replace("-", " ").replace("_", " ")
    )
    if found is None:
        return None
    return round(float(found.group(1)) * (1e9 if found.group(2) in "Bb" else 1e6))


def _measured(reference: str, settings: Any) -> Footprint:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    text = settings.get_text_config()  # a multimodal config nests the language model's
    student = Student(model, vocabulary=text.vocab_size)
    # by id: a head that is tied to the embedding is one parameter
    trainable = {id(p): p.numel() for p in student.trainable()}
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads  # Qwen3's is its own
    # GPT-2's family shares no keys and values among heads, and has no key for it
    kept = (getattr(text, "num_key_value_heads", None) or heads) * size
    return Footprint(
        reference=reference,
        parameters=sum(p.numel() for p in model.parameters()),
        shape=Shape(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            cache=2 * text.num_hidden_layers * kept,  # 2: keys and values
            rows=text.vocab_size,
            context=text.max_position_embeddings,
            trainable=sum(trainable.values()),
            hidden_matrices=sum(trainable.get(id(p), 0) for p in student.hidden_matrices()),
        ),
    )
