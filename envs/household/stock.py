"""TextWorld's own engine behind the native engine's interface: the reference, and the way to play
games of other grammars.

It is slow (over a second for a new game, 20 steps a second) and not thread-safe, and needs the
`alfworld` extra.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tutelage.envs.household.engine import Game, View


class StockEngine:
    """Plays games with TextWorld, Fast Downward and ALFWorld's demangler, unpatched.

    Raises ModuleNotFoundError at construction if the `alfworld` extra is missing.
    """

    def __init__(self) -> None:
        try:
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld.envs.pddl import PddlEnv
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"engine=\"textworld\" needs {error.name}: pip install 'tutelage[alfworld]'",
                name=error.name,
            ) from None
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._env: Any = AlfredDemangler(PddlEnv(infos))

    def reset(self, game: Game) -> View:
        """Start the game; what TextWorld raises on a broken one becomes a ValueError naming it."""
        data = {"pddl_domain": game.domain, "grammar": game.grammar, "pddl_problem": game.problem}
        try:
            with _own_argv():
                self._env.load(data)
                return self._view(self._env.reset())
        except (Exception, SystemExit) as error:  # the translator exits on some syntax errors
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(f"{game.name}: TextWorld can't load it ({why})") from error

    def step(self, command: str) -> View:
        """Carry out the command, or let nothing happen."""
        state, _, _ = self._env.step(command)
        return self._view(state)

    def close(self) -> None:
        """Release Fast Downward's library."""
        self._env.close()

    @staticmethod
    def _view(state: Any) -> View:
        return View(
            observation=state.feedback,
            admissible=tuple(state["admissible_commands"]),
            won=bool(state["won"]),
        )


@contextmanager
def _own_argv() -> Iterator[None]:
    """Fast Downward's translator overwrites sys.argv; give it back."""
    kept = sys.argv
    try:
        yield
    finally:
        sys.argv = kept
