"""What an error says, in one line of a message."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """All that it says, or its class where that is nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what it says, or its class where that is nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
