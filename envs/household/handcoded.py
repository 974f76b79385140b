"""ALFWorld's own handcoded expert behind the project's interface (needs the `alfworld` extra).

It explores as a player does, in the style of ALFWorld's AlfredExpert wrapper: its first action is
"look", and so is every action that turns out not to be admissible. It wins 80 to 90 % of the
released games, of pick_two 17 %.

It needs facts (what it holds, what is hot, what lies in the goal) that a view doesn't show: they
come from an engine in here, which plays the same commands. Where ALFWorld's expert gives up or
raises in a state that only a learner gets into, this one says "look".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tutelage.envs.household.engine import Game, NativeEngine, View

_FALLBACK = "look"


class Fact(NamedTuple):
    """A fact as ALFWorld's expert reads it: a predicate and the names of its arguments."""

    name: str
    names: tuple[str, ...]


class Handcoded:
    """ALFWorld's expert; its tie-breaks are drawn from a stream seeded by the game's name.

    Raises ModuleNotFoundError at construction if the `alfworld` extra is missing, and ValueError at
    `reset` for a game without the fields of traj_data.json or outside the native engine.
    """

    def __init__(self) -> None:
        try:
            from alfworld.agents import expert
            from alfworld.gen import constants
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"expert=\"handcoded\" needs {error.name}: pip install 'tutelage[alfworld]'",
                name=error.name,
            ) from None
        self._library: Any = expert
        self._classes = frozenset(constants.OBJECTS)
        self._engine = NativeEngine()
        self._agent: Any = None
        self._random: Any = None
        self._plan = _FALLBACK

    def reset(self, game: Game, view: View) -> None:
        """Begin an episode at its first text."""
        if not game.traj or "pddl_params" not in game.traj:
            raise ValueError(
                f'{game.name}: expert="handcoded" needs its traj_data.json with "pddl_params"'
            )
        self._engine.reset(game)
        self._random = random.Random(game.name).getstate()
        self._agent = self._library.HandCodedTWAgent(max_steps=200)  # as in ALFWorld's own wrapper
        # From here on what its `reset` does, which would read traj_data.json from a file.
        parameters = {**game.traj["pddl_params"], "task_type": game.task_type}
        self._agent.task_params = {
            k: v.lower() if v in self._classes else v for k, v in parameters.items()
        }
        policy = self._agent.get_task_policy(self._agent.task_params)
        self._agent.policy = policy(self._agent.task_params, max_steps=self._agent.max_steps)
        self._agent.observe(view.observation)
        self._plan = _FALLBACK

    def observe(self, action: str, view: View) -> None:
        """Take in what any player's action led to."""
        self._engine.step(action)
        state = {
            "feedback": view.observation,
            "admissible_commands": list(view.admissible),
            "facts": list(self._facts()),
        }
        with self._own_random():
            try:
                plan = self._agent.act(state, 0, view.won, action)
            except (
                self._library.HandCodedAgentTimeout,
                self._library.handcoded_expert.HandCodedAgentFailed,
                IndexError,  # it takes the first of what it believes to see or hold
                KeyError,
                ValueError,
            ):
                plan = _FALLBACK
        self._plan = plan if plan in view.admissible else _FALLBACK

    def act(self) -> str:
        """The next command."""
        return self._plan

    def _facts(self) -> Iterator[Fact]:
        state, names = self._engine.state, self._engine.world.names
        if state.holding is not None:
            yield Fact("holds", ("agent1", names[state.holding]))
        for receptacle, objects in state.contents.items():
            yield from (Fact("inreceptacle", (names[o], names[receptacle])) for o in objects)
        for predicate, things in (
            ("ishot", state.hot),
            ("iscool", state.cool),
            ("isclean", state.clean),
        ):
            yield from (Fact(predicate, (names[o],)) for o in sorted(things))

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """ALFWorld's expert draws from Python's global generator: meanwhile that one has this
        episode's state, and afterwards everybody else's again.
        """
        others = random.getstate()
        random.setstate(self._random)
        try:
            yield
        finally:
            self._random = random.getstate()
            random.setstate(others)
