"""Append-only chat: sampled ids are kept as they are; only the text around them is tokenised.

The pieces between two sampled turns are read once from the tokenizer's own chat template, by
rendering sentinels. A template that would rewrite earlier turns (Qwen3 drops earlier reasoning)
therefore gets no occasion to.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from typing import Any

from tutelage.scheduler.templates import Pieces, pieces

MARKERS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
"""Tokens that usually end a turn, where a vocabulary has them."""


class Chat:
    """Turns observations into prompt ids.

    `thought` is the "<think>" that the template itself puts before every reply (DeepSeek-R1's and
    others' do), or "": it is part of the reply that follows.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template (without one: the texts, bare).
        system: a system message for the opening, or None.
        stop_ids: ids that end a reply by the model's own settings, beside the tokenizer's.
        date: for templates that ask for today's date; None: the clock's.

    Raises:
        ValueError: no reply could end, or the template cannot be used (templates.pieces).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str | None = None,
        stop_ids: Collection[int] = (),
        date: datetime.date | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        eos = _eos_id(tokenizer)
        self.pieces = Pieces(head="", tail="\n", close="\n", again="\n")
        if tokenizer.chat_template:
            self.pieces = pieces(tokenizer, system=system, date=date)
        self.thought = _open_thought(self.pieces.tail)
        added = tokenizer.added_tokens_decoder
        opening = [i for i in self._encode(self.pieces.head) if i in added]
        self._opener = opening[-1] if opening else None
        self._special = [token.content for token in added.values() if token.special]
        self._close_ids = self._encode(self.pieces.close)
        vocabulary = tokenizer.get_vocab()
        # some tokenizers name another EOS than the token with which their chats end
        known = {int(vocabulary[marker]) for marker in MARKERS if marker in vocabulary}
        # Some models' settings keep a default id there, which in this vocabulary is part of an
        # ordinary word: only added tokens count.
        told = {int(i) for i in stop_ids if i in added}
        closing = {i for i in self._close_ids[:1] if i in added and added[i].special}
        self.eos_ids = frozenset({eos, *known, *told, *closing})
        """Every id that ends a turn."""

    def opening(self, text: str) -> list[int]:
        """The ids before the first reply."""
        return self._between(self.pieces.head, text, self.pieces.tail)

    def following(self, text: str, *, closed: bool, end: int | None = None) -> list[int]:
        """The ids between two replies. closed: the student ended its reply, with the id `end`.

        The template's closing tokens begin with the end-of-turn token, which is left out here if
        the student sampled it. It stays where it also opens the next message (GLM ends a turn with
        the next speaker's token) and the student ended with another one.
        """
        ids = self._between(self.pieces.close, text, self.pieces.again)
        said = end in (None, *ids[:1]) or ids[0] != self._opener
        if closed and said and ids and ids[0] in self.eos_ids:
            del ids[0]
        return ids

    def reply(self, text: str) -> list[int]:
        """An expert's reply as the ids that the student would have sampled for it."""
        return [*self._encode(text), self.end_id]

    @property
    def end_id(self) -> int:
        """The id that ends a reply: the template's own closing token, else the tokenizer's EOS."""
        first = self._close_ids[0] if self._close_ids else None
        return first if first in self.eos_ids else int(self.tokenizer.eos_token_id)

    def text(self, ids: Sequence[int]) -> str:
        """What a reply says, without its end-of-turn token."""
        kept = [i for i in ids if i not in self.eos_ids]
        # clean_up: it would take out spaces before punctuation, which the student said
        return str(
            self.tokenizer.decode(
                kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _between(self, before: str, text: str, after: str) -> list[int]:
        """The ids of a text between two of the template's pieces, encoded as one string, since a
        tokenizer may merge letters across their seams. A text that spells a special token is
        encoded by itself, as plain letters: an environment must not end the student's turn."""
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
        backend.encode_special_tokens = True  # for this call only: the tokenizer is shared
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        finally:
            backend.encode_special_tokens = False


def _open_thought(tail: str) -> str:
    """The thought that a prompt leaves open at its end, from "<think>" on; or empty."""
    begun = tail.rfind("<think>")
    return tail[begun:] if begun > tail.rfind("</think>") else ""


def _eos_id(tokenizer: Any) -> int:
    """The tokenizer's EOS, which it must know."""
    name, eos = tokenizer.name_or_path, tokenizer.eos_token
    if eos is None or tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token: set eos_token in its config")
    if eos not in tokenizer.get_vocab():
        raise ValueError(
            f"tokenizer {name!r}: its EOS {eos!r} is not in its vocabulary, so no reply could end:"
            " set eos_token in its config to a token that it has"
        )
    return int(tokenizer.eos_token_id)
