"""Refusing an unknown name, with the nearest known one in the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

if __name__ == "envs.names":
    raise ImportError("import tutelage.envs, not envs: install the project first")


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One line: `unknown split 'tset': did you mean 'test'? known: test, train, valid`."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known: {', '.join(names)}"
