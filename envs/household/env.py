"""Makes a Gymnasium environment of any sequence of household games.

Observations are the engine's texts and actions are its commands. The reward is 1.0 on the step that
wins, which also ends the episode. `max_steps` cuts an episode off; like ALFWorld's own limit it
counts commands that did nothing, too.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import gymnasium as gym
from gymnasium import spaces

from tutelage.envs.household.engine import Engine, Game, NativeEngine, View
from tutelage.envs.names import unknown
from tutelage.envs.selection import chosen_index

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
ENGINES = ("native", "textworld")
EXPERTS = {  # imported only when used: handcoded needs alfworld
    "explorer": "tutelage.envs.household.expert:Explorer",
    "planner": "tutelage.envs.household.expert:Planner",
    "handcoded": "tutelage.envs.household.handcoded:Handcoded",
}


class Games(Protocol):
    """Where the games come from; reading a broken game raises."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Game: ...


class Expert(Protocol):
    """Says what to do next, in whatever state the player got into."""

    def reset(self, game: Game, view: View) -> None: ...

    def observe(self, action: str, view: View) -> None: ...

    def act(self) -> str: ...


class HouseholdGameEnv(gym.Env[str, str]):
    """Plays the games of a sequence, one an episode.

    Args:
        games: what `reset(options={"index": i})` chooses from; without an index, one is drawn.
        expert: put an expert's action into info["expert_action"]: "explorer" (also True), "planner"
            (knows hidden places) or "handcoded" (ALFWorld's own; needs the `alfworld` extra).
        engine: "native", or "textworld" (ALFWorld's stock engine: the same texts, slowly; needs the
            `alfworld` extra).
        max_steps: commands an episode, those that did nothing included.
        render_mode: None or "ansi", which returns the episode's transcript.

    `info` holds success, task_type, task (the sentence that sets it), admissible_actions and game
    (its name). Raises ValueError for unknown names and values, and at `reset` for a game that can't
    be read or played.
    """

    # Gymnasium's own type for it, hence no ClassVar.
    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        games: Games,
        *,
        expert: bool | str = False,
        engine: str = "native",
        max_steps: int = 50,
        render_mode: str | None = None,
    ) -> None:
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps {max_steps!r} should be a whole number from 1")
        if render_mode not in (None, "ansi"):
            raise ValueError(unknown("render_mode", render_mode, ["ansi"]))
        self.render_mode = render_mode
        # Bounds that Gymnasium wants, far above the longest text (about 2,000 characters); `step`
        # refuses no action.
        self.observation_space = spaces.Text(100_000, min_length=0, charset=string.printable)
        self.action_space = spaces.Text(1_000, min_length=0, charset=string.printable)
        self._games = games
        self._max_steps = max_steps
        self._expert = _expert(expert)
        self._engine = _engine(engine)
        self._game: Game | None = None  # None between episodes
        self._steps = 0
        self._transcript: list[str] = []

    @property
    def num_episodes(self) -> int:
        """How many games there are: the indexes that `reset` takes."""
        return len(self._games)

    def __len__(self) -> int:
        return self.num_episodes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start a game: the one of options["index"], or one drawn at random."""
        super().reset(seed=seed)
        self._game = None  # a reset that fails leaves no half-begun episode
        game = self._games[chosen_index(options, self.num_episodes, self.np_random)]
        view = self._engine.reset(game)
        if self._expert is not None:
            self._expert.reset(game, view)
        self._game, self._steps, self._transcript = game, 0, [view.observation]
        self._task = view.observation.rpartition("\n\n")[2]  # "Your task is to: ..."
        return view.observation, self._info(game, view)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out a command. Anything that isn't an admissible one answers "Nothing happens.".

        A leading "<think>" is removed: some chat templates write it before every reply, and a model
        that does not think writes its command right after it.
        """
        game = self._game
        if game is None:
            raise gym.error.ResetNeeded("no episode is running: call reset first")
        command = action.removeprefix("<think>").strip() if isinstance(action, str) else ""
        view = self._engine.step(command)
        if self._expert is not None:
            self._expert.observe(command, view)
        self._steps += 1
        self._transcript += [f"> {command}", view.observation]
        truncated = not view.won and self._steps >= self._max_steps
        if view.won or truncated:
            self._game = None  # from here on `step` raises, where the engine would play on
        return view.observation, float(view.won), view.won, truncated, self._info(game, view)

    def render(self) -> str | None:  # type: ignore[override]  # Gymnasium has no type for text
        """The transcript so far, in render mode "ansi"."""
        return "\n".join(self._transcript) if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Release the engine."""
        self._game = None
        self._engine.close()

    def _info(self, game: Game, view: View) -> dict[str, Any]:
        info: dict[str, Any] = {
            "success": view.won,
            "task_type": game.task_type,
            "task": self._task,
            "admissible_actions": list(view.admissible),
            "game": game.name,
        }
        if self._expert is not None:
            # A won game has no next action, and experts needn't know what to do in one.
            info["expert_action"] = "look" if view.won else self._expert.act()
        return info


def _expert(choice: bool | str) -> Expert | None:
    if choice is False or choice is None:
        return None
    name = "explorer" if choice is True else choice
    if not isinstance(name, str) or name not in EXPERTS:
        raise ValueError(unknown("expert", choice, EXPERTS))
    module, _, kind = EXPERTS[name].partition(":")
    make: Callable[[], Expert] = getattr(import_module(module), kind)
    return make()


def _engine(name: str) -> Engine:
    if name == "native":
        return NativeEngine()
    if name == "textworld":
        from tutelage.envs.household.stock import StockEngine

        return StockEngine()
    raise ValueError(unknown("engine", name, ENGINES))
