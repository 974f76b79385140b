"""`tutelage/ALFWorld-v0`: the released games, from the folder that `alfworld-download` fills.

The same games as ALFWorld's own environment collects (in the order of their paths), each read when
it is played.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tutelage.envs.household.engine import Game
from tutelage.envs.household.env import TASK_TYPES, HouseholdGameEnv
from tutelage.envs.names import unknown

SPLITS = ("train", "valid_seen", "valid_unseen", "valid_train")
RELEASE = "json_2.1.1"
_OPTIONS = ("split", "path", "task_types", "expert", "engine", "max_steps", "render_mode")
_SOLVABLE = re.compile(rb'"solvable":\s*(true|false)')
_TAIL = 8192  # bytes: the flag stands behind the problem, with only the walkthrough after it


class ALFWorldEnv(HouseholdGameEnv):
    """ALFWorld's released games.

    Args:
        split: "train", "valid_seen", "valid_unseen" or "valid_train".
        path: the folder that holds json_2.1.1; $ALFWORLD_DATA, or ~/.cache/alfworld, by default.
        task_types: only these of the six task types.
        options: expert, engine, max_steps and render_mode, as for every household.

    Raises, in one line, FileNotFoundError for a folder that isn't there and ValueError for unknown
    names and for a split without games; `reset` raises ValueError for a broken game file, naming
    it.
    """

    def __init__(
        self,
        split: str = "train",
        path: str | os.PathLike[str] | None = None,
        *,
        task_types: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise ValueError(unknown("option", name, _OPTIONS) + " (tutelage/ALFWorld-v0)")
        super().__init__(ReleasedGames(split, path, task_types), **options)


class ReleasedGames:
    """The games of one split, listed at once and read one by one."""

    def __init__(
        self,
        split: str,
        path: str | os.PathLike[str] | None = None,
        task_types: Iterable[str] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(unknown("split", split, SPLITS))
        wanted = _wanted(task_types)
        folder = _root(path) / RELEASE / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no ALFWorld games: {folder} is not a folder; run alfworld-download, or set "
                f"$ALFWORLD_DATA or path= to the folder that holds {RELEASE}"
            )
        self.files = sorted(_playable(folder, wanted))
        if not self.files:
            raise ValueError(f"{folder} holds no solvable game of the types {', '.join(wanted)}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Game:
        return read_game(self.files[index])


def read_game(file: Path) -> Game:
    """The game of a `game.tw-pddl` file and the traj_data.json beside it.

    Raises ValueError, naming the file, if one of the two is broken.
    """
    data, traj = _object(file), _object(file.with_name("traj_data.json"))
    for key in ("pddl_domain", "grammar", "pddl_problem"):
        if not isinstance(data.get(key), str):
            raise ValueError(f"{file} is broken: it has no text {key!r}; download or make it again")
    return Game(
        name=str(file),
        domain=data["pddl_domain"],
        grammar=data["grammar"],
        problem=data["pddl_problem"],
        task_type=str(traj.get("task_type", "")),
        walkthrough=tuple(data.get("walkthrough") or ()),  # older releases have none
        traj=traj,
    )


def _root(path: str | os.PathLike[str] | None) -> Path:
    chosen = path if path is not None else os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld"
    return Path(os.path.expandvars(chosen)).expanduser()


def _wanted(task_types: Iterable[str] | None) -> tuple[str, ...]:
    if task_types is None:
        return TASK_TYPES
    wanted = (task_types,) if isinstance(task_types, str) else tuple(task_types)
    for name in wanted:
        if name not in TASK_TYPES:
            raise ValueError(unknown("task type", name, TASK_TYPES))
    if not wanted:
        raise ValueError(f"task_types is empty; leave it out for all of {', '.join(TASK_TYPES)}")
    return wanted


def _playable(folder: Path, wanted: tuple[str, ...]) -> Iterator[Path]:
    """What ALFWorld's collect_game_files keeps: solvable, described, nothing movable or sliced."""
    for root, _, names in os.walk(folder):
        inside = os.path.relpath(root, folder)
        if "movable" in inside or "Sliced" in inside:
            continue
        if not {"traj_data.json", "game.tw-pddl"} <= set(names):
            continue
        file = Path(root, "game.tw-pddl")
        if _is_of(file, wanted) and _is_solvable(file):
            yield file


# These two run for each of 3,553 games, so they open as little as they can. A broken file passes
# both: `reset` then raises with its name, where leaving it out would hide it.


def _is_of(file: Path, wanted: tuple[str, ...]) -> bool:
    kind = file.parent.parent.name.partition("-")[0]  # <task type>-<object>-...
    if kind not in TASK_TYPES:
        try:
            kind = str(_object(file.with_name("traj_data.json")).get("task_type"))
        except ValueError:
            return True
    return kind in wanted


def _is_solvable(file: Path) -> bool:
    with file.open("rb") as data:
        size = data.seek(0, os.SEEK_END)
        data.seek(max(0, size - _TAIL))
        flags = _SOLVABLE.findall(data.read())
    if flags:
        return bool(flags[-1] == b"true")
    try:
        return bool(_object(file).get("solvable"))
    except ValueError:
        return True


def _object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is broken: {error}; download or make it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} is broken: it holds no JSON object; download or make it again")
    return data
