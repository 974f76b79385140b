"""Puts what an error says into one line, for messages."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Its whole text, or the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of its text, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
