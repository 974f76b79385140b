"""Append-only chat: what was sampled is kept as ids; only what surrounds it is tokenised.

The pieces between two sampled turns are read once from the tokenizer's own chat template, by
rendering sentinels. A template that rewrites earlier turns (Qwen3 drops earlier reasoning) is
therefore never asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SENTINELS = ("⟦first user⟧", "⟦first reply⟧", "⟦second user⟧")


class Chat:
    """Turns observations into prompt ids.

    `thought` is the "<think>" that the template itself puts before every reply (DeepSeek-R1's and
    others' do), or "": whoever reads a reply reads it after that.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template (without one: the texts, bare).
        system: a system message for the opening, or None.
    """

    def __init__(self, tokenizer: Any, *, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = _eos_ids(tokenizer)
        if tokenizer.chat_template:
            self._head, self._close, self._tail = _pieces(tokenizer, system)
        else:
            self._head, self._close, self._tail = "", "\n", "\n"
        self.thought = _open_thought(self._tail)
        self._special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._close_ids = self._encode(self._close)

    def opening(self, text: str) -> list[int]:
        """The ids before the first reply."""
        return self._between(self._head, text, self._tail)

    def following(self, text: str, *, closed: bool) -> list[int]:
        """The ids between two replies; `closed` says that the student ended its reply itself.

        The template's closing tokens begin with the end-of-turn token: it is not repeated when it
        was sampled.
        """
        ids = self._between(self._close, text, self._tail)
        if closed and ids and ids[0] in self.eos_ids:
            del ids[0]
        return ids

    def reply(self, text: str) -> list[int]:
        """A given reply (an expert's action) as the ids that the student would have sampled."""
        return [*self._encode(text), self.end_id]

    @property
    def end_id(self) -> int:
        """The id that ends a reply: the template's own closing token, else the tokenizer's EOS."""
        first = self._close_ids[0] if self._close_ids else None
        return first if first in self.eos_ids else int(self.tokenizer.eos_token_id)

    def text(self, ids: Sequence[int]) -> str:
        """What a reply says, without its end-of-turn token."""
        kept = [i for i in ids if i not in self.eos_ids]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def _between(self, before: str, text: str, after: str) -> list[int]:
        """The ids of a text among the template's pieces, as one string, so that no word is split at
        their seams. Where the text itself spells a special token it is encoded apart, as the plain
        letters that it is: an environment cannot end the student's turn."""
        if not any(token in text for token in self._special):
            return self._encode(before + text + after)
        return [*self._encode(before), *self._encode(text, plain=True), *self._encode(after)]

    def _encode(self, text: str, *, plain: bool = False) -> list[int]:
        # The backend directly: a third of the cost of __call__, and no special tokens are added.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            given = {"split_special_tokens": True} if plain else {}
            return list(self.tokenizer.encode(text, add_special_tokens=False, **given))
        if not plain:
            return list(backend.encode(text, add_special_tokens=False).ids)
        backend.encode_special_tokens = True  # of the tokenizer that everyone shares: for this call
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        finally:
            backend.encode_special_tokens = False


def _open_thought(tail: str) -> str:
    """The thought that a prompt leaves open at its end."""
    begun = tail.rfind("<think>")
    return tail[begun:] if begun > tail.rfind("</think>") else ""


def _eos_ids(tokenizer: Any) -> frozenset[int]:
    """Every id that ends a turn: the tokenizer's EOS and those usual end-of-turn markers it has."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token: set eos_token in its config"
        )
    ids = {int(tokenizer.eos_token_id)}
    vocabulary = tokenizer.get_vocab()
    for marker in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>"):
        if marker in vocabulary:
            ids.add(int(vocabulary[marker]))
    return frozenset(ids)


def _pieces(tokenizer: Any, system: str | None) -> tuple[str, str, str]:
    """(before the first user text, between a reply and the next user text, after a user text)."""
    first, reply, second = SENTINELS
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = [
        *opening,
        {"role": "user", "content": first},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": second},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    try:
        head, rest = rendered.split(first)
        middle, rest = rest.split(reply)
        close, tail = rest.split(second)
    except ValueError:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} drops or repeats a message: a"
            " template must show each user and assistant text exactly once; give the"
            " model one that does"
        ) from None
    alone = tokenizer.apply_chat_template(
        messages[: len(opening) + 1], tokenize=False, add_generation_prompt=True
    )
    if alone != head + first + tail and not middle.startswith(tail):
        # What follows the first user text differs when a reply comes: trust what a live chat sees.
        tail = alone.split(first)[1]
    return head, close, tail
