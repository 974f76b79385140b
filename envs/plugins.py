"""Environments of other people: where the module that registers one is looked for, and what to say
of one that cannot be made.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tutelage.envs.errors import one_line

_beside: list[str] = []


class Absent(ValueError):
    """An environment cannot be made, since something is not on this machine: a file, a data set, a
    package. What was asked for may be right.
    """


def look_beside(folder: Path | str) -> None:
    """From here on `module:Id-v0` is found in `folder` too, after all that is installed: nothing
    there takes the place of a package. Environments' processes look where this one does.
    """
    entry = str(Path(folder).resolve())
    if entry not in _beside:
        _beside.append(entry)
    if entry not in sys.path:
        sys.path.append(entry)


def beside() -> tuple[str, ...]:
    """The folders of `look_beside`, for processes that do not start from this one's sys.path."""
    return tuple(_beside)


def refusal(env_id: str, error: BaseException) -> tuple[str, bool]:
    """(why the environment cannot be made, in one line; whether that is something's absence)."""
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({error.code!r}) while it is made", False
    absent = isinstance(error, FileNotFoundError | ImportError | ConnectionError)
    if isinstance(error, ModuleNotFoundError) and ":" in env_id:
        module, missing = env_id.partition(":")[0], _missing(error)
        if missing and missing != module and not module.startswith(f"{missing}."):
            return f"module {module!r} imports {missing!r}, which is not installed", True
        places = ", ".join(["the installed packages", *_own_folders()])
        return f"there is no module {module!r}: looked for in {places}", True
    return one_line(error), absent


def _missing(error: BaseException | None) -> str | None:
    """The module that was not found; Gymnasium raises the error anew without its name."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name
        error = error.__cause__ or error.__context__
    return None


def _own_folders() -> list[str]:
    """The entries of sys.path that no installation put there."""
    installed = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    entries = [entry for entry in sys.path if entry and not entry.startswith(installed)]
    return [entry for entry in dict.fromkeys(entries) if Path(entry).is_dir()]
