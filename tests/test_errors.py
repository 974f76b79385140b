"""An error in one line of a message."""

from __future__ import annotations

import pytest

from tutelage.envs.errors import first_line, one_line


@pytest.mark.parametrize(
    ("said", "whole", "first"),
    [
        ("\n a\tbad \r\n  file\n", "a bad file", "a\tbad "),
        ("one line", "one line", "one line"),
        ("", "MemoryError", "MemoryError"),
        (" \n\n", "MemoryError", "MemoryError"),
    ],
)
def test_an_error_is_told_in_one_line_that_is_never_empty(
    said: str, whole: str, first: str
) -> None:
    assert one_line(MemoryError(said)) == whole
    assert first_line(MemoryError(said)) == first
