"""Chooses the game or problem that a reset begins: options["index"], or one drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tutelage.envs.names import unknown


def chosen_index(options: Mapping[str, Any] | None, count: int, rng: np.random.Generator) -> int:
    """The index that `options` names among `count`, or one drawn from `rng`.

    Raises:
        ValueError: an unknown option, an index that is no whole number, or one out of range.
    """
    options = options or {}
    for name in options:
        if name != "index":
            raise ValueError(unknown("reset option", name, ["index"]))
    index = options.get("index")
    if index is None:
        return int(rng.integers(count))
    if isinstance(index, bool) or not hasattr(index, "__index__"):  # NumPy's integers have it
        raise ValueError(f"index {index!r} is no whole number")
    if not 0 <= int(index) < count:
        raise ValueError(f"index {index} is outside 0..{count - 1}")
    return int(index)
