"""A number to be guessed, as a Gymnasium environment with text in and text out.

Nothing here imports Tutelage. It reads three keys of `info`: `success`, `expert_action` (which
imitation needs) and `admissible_actions` (which `tutelage play --policy random` needs). Importing
the module registers the id, so that a config only says "guess_number:GuessNumber-v0".
"""

from __future__ import annotations

import re
import string
from typing import Any

import gymnasium
from gymnasium import spaces


class GuessNumber(gymnasium.Env[str, str]):
    """Find a number from 1 to `highest` in `guesses` guesses, each answered: higher, or lower.

    Four guesses are just enough for fifteen numbers, if each halves what is left.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(self, highest: int = 15, guesses: int = 4) -> None:
        if not 1 <= highest < 2**guesses:
            raise ValueError(
                f"highest is {highest}: {guesses} guesses find a number up to {2**guesses - 1}"
            )
        self.observation_space = spaces.Text(max_length=200, charset=string.printable)
        self.action_space = spaces.Text(max_length=200, charset=string.printable)
        self.num_episodes = highest  # how many games reset(options={"index": i}) can choose from
        self._highest, self._guesses = highest, guesses

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        index = (options or {}).get("index")
        drawn = int(self.np_random.integers(self._highest)) if index is None else int(index)
        # Every index has its number, so that an evaluation of all indexes asks for all numbers.
        self._number = 1 + drawn % self._highest
        self._low, self._high, self._left = 1, self._highest, self._guesses
        return f"Guess a number from 1 to {self._highest}.", self._info(False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        guess = int(action) if re.fullmatch(r"\s*[0-9]{1,9}\s*", action) else None
        won = guess == self._number
        lost = not won and self._left == 0
        return self._answer(guess), float(won), won or lost, False, self._info(won)

    def _answer(self, guess: int | None) -> str:
        if guess is None:
            return "That is no number."
        if guess < self._number:
            self._low = max(self._low, guess + 1)
            return "Higher."
        if guess > self._number:
            self._high = min(self._high, guess - 1)
            return "Lower."
        return "Yes!"

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": success,
            "expert_action": str((self._low + self._high) // 2),
            "admissible_actions": [str(number) for number in range(self._low, self._high + 1)],
        }


gymnasium.register("GuessNumber-v0", entry_point="guess_number:GuessNumber")
