"""`tutelage/Household-v0`: ALFWorld's rules on games made from a seed, with nothing to download."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from tutelage.envs.household.difficulty import PRESETS, Difficulty, resolve
from tutelage.envs.household.engine import Game
from tutelage.envs.household.env import HouseholdGameEnv
from tutelage.envs.household.games import SPLITS, TURNS, make_game
from tutelage.envs.names import unknown

TRAIN_GAMES: Final = 1_000_000  # each is made when it is played: as good as infinitely many
HELD_OUT_GAMES: Final = 200  # an interval of +-4 % at 90 % success
TINY_TURNS: Final = 30  # the explorer needs 8 on average and 16 at most
_OPTIONS: Final = (
    *("split", "difficulty", "task_types", "num_games"),
    *("max_steps", "expert", "engine", "render_mode"),
)


class HouseholdEnv(HouseholdGameEnv):
    """Generated households.

    Args:
        split: "train", "valid_seen" (new games of goals that train has) or "valid_unseen" (goals
            that it has not).
        difficulty: "tiny", "small" or "full" (the released games' sizes), or knobs over one of
            these: `{"preset": "tiny", "receptacles": 9}`; see `Difficulty`.
        task_types: only these of the six task types; consecutive indexes cycle through them.
        num_games: how many games the split has; by default a million to train on and 200 of each
            held-out split.
        max_steps: commands an episode; 30 for "tiny" and 50 for the others by default.
        options: expert, engine and render_mode, as for every household.

    Raises ValueError, in one line, for unknown names and for knobs that no game fits.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        difficulty: str | Mapping[str, Any] = "tiny",
        task_types: Iterable[str] | None = None,
        num_games: int | None = None,
        max_steps: int | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise ValueError(unknown("option", name, _OPTIONS) + " (tutelage/Household-v0)")
        games = GeneratedGames(split, difficulty, task_types, num_games)
        if max_steps is None:
            max_steps = TINY_TURNS if difficulty == "tiny" else TURNS
        super().__init__(games, max_steps=max_steps, **options)


class GeneratedGames:
    """The games of one split at one difficulty, made one by one."""

    def __init__(
        self,
        split: str,
        difficulty: str | Mapping[str, Any],
        task_types: Iterable[str] | None = None,
        num_games: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(unknown("split", split, SPLITS))
        knobs = resolve(difficulty)
        if task_types is not None:
            types = (task_types,) if isinstance(task_types, str) else tuple(task_types)
            knobs = replace(knobs, task_types=types)
        if num_games is None:
            num_games = TRAIN_GAMES if split == "train" else HELD_OUT_GAMES
        if isinstance(num_games, bool) or not isinstance(num_games, int) or num_games < 1:
            raise ValueError(f"num_games {num_games!r} should be a whole number from 1")
        self.split, self.difficulty, self._count = split, knobs, num_games
        if knobs not in PRESETS.values():  # say now, not in the middle of a run, that nothing fits
            for index in range(min(len(knobs.task_types), num_games)):
                _make(index, split, knobs)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Game:
        if not 0 <= index < self._count:
            raise IndexError(f"game {index} is outside 0..{self._count - 1}")
        return _make(index, self.split, self.difficulty)


@lru_cache(maxsize=64)  # a group of episodes plays one game again and again
def _make(index: int, split: str, difficulty: Difficulty) -> Game:
    return make_game(index, split, difficulty)
