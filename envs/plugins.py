"""Other people's environments: where Python looks for the module that registers one, and the
message for one that cannot be made.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tutelage.envs.errors import one_line

_beside: list[str] = []


class Absent(ValueError):
    """An environment cannot be made because this machine lacks a file, a data set or a package. Its
    id and its options may be right.
    """


def look_beside(folder: Path | str) -> None:
    """Let Python find the module of `module:Id-v0` in `folder` too, after everything installed, so
    that no file there hides a package. Environments' processes look where this one does.
    """
    entry = str(Path(folder).resolve())
    if entry not in _beside:
        _beside.append(entry)
    if entry not in sys.path:
        sys.path.append(entry)


def beside() -> tuple[str, ...]:
    """The folders of `look_beside`, for processes without this one's sys.path (Ray's workers)."""
    return tuple(_beside)


def refusal(env_id: str, error: BaseException) -> tuple[str, bool]:
    """(why the environment cannot be made, in one line; whether this machine lacks something)."""
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({error.code!r}) while it is made", False
    absent = isinstance(error, FileNotFoundError | ImportError | ConnectionError)
    if isinstance(error, ModuleNotFoundError) and ":" in env_id:
        module, missing = env_id.partition(":")[0], _missing(error)
        # The module itself is there, and imports one that is not.
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
