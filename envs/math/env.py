"""`tutelage/Math-v0`: one problem, one response, one grade.

`reset` returns the prompt; `step` takes the whole response and ends the episode, with reward 1.0 or
0.0. Problems come by index from a source: generated arithmetic (the default) or a file.
"""

from __future__ import annotations

import string
from typing import Any, Protocol

import gymnasium as gym
from gymnasium import spaces

from tutelage.envs.grading import Verdict, judge
from tutelage.envs.math.arithmetic import ArithmeticProblems, sizes
from tutelage.envs.math.problems import Problem, load
from tutelage.envs.names import unknown
from tutelage.envs.selection import chosen_index
from tutelage.envs.worker import Undecided

BARE_PROMPT = "{problem}"  # a model of a million parameters has no budget for boilerplate
PAPER_PROMPT = (
    "Math problem: {problem}\n\n"
    "Please carefully reason through the math problem step by step and derive the correct answer. "
    "You must conduct reasoning inside <think> and </think> and give the final answer within "
    "\\boxed{}.\n"  # the line break is the paper's, too
)
# Of an observation or action: a bound that Gymnasium wants, not a limit on models.
MAX_CHARACTERS = 1_000_000
# Seconds on the clock in which a busy machine may find the processor time for one grade: less than
# rollout.timeout, after which this environment's whole process would count as hung.
WAIT = 45.0

_ARITHMETIC_OPTIONS: tuple[str, ...] = ("preset", "kinds", "digits", "length")
_FILE_OPTIONS: tuple[str, ...] = (
    "problem_column",
    "answer_column",
    "solution_column",
    "kind_column",
    "gold_format",
    "layout",
)
_OPTIONS = (
    "problems", "split", "prompt", "expert", "require_box", "strict", "timeout",
    *_ARITHMETIC_OPTIONS, *_FILE_OPTIONS,
)  # fmt: skip


class Problems(Protocol):
    """A source of problems."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...


class AnyText(spaces.Text):
    """Text in any script: problems and responses hold more than a fixed alphabet. Samples stay
    printable.
    """

    def __init__(self) -> None:
        # Samples are short; checkers and wrappers call `contains`, which has a bound of its own.
        super().__init__(max_length=64, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= MAX_CHARACTERS


class MathEnv(gym.Env[str, str]):
    """A single-turn environment over mathematics problems.

    Args:
        problems: "arithmetic", a .jsonl/.json/.parquet path, or the name of a data set on the
            Hugging Face hub.
        split: which disjoint part: train, valid or test for arithmetic; the split or a `{split}` in
            the path for files.
        prompt: a template with `{problem}`; the default is the bare problem for arithmetic and the
            paper's prompt for files.
        expert: put a worked solution into info["expert_action"].
        require_box: grade only what stands in a `\\boxed{}`.
        strict: an integer is answered by a numeral, not by an expression with its value (`10!`).
        timeout: processor seconds that grading one response may take. A machine that can't give
            them within WAIT seconds decides nothing: `step` raises Undecided.
        preset, kinds, digits, length: the size of generated arithmetic, see `arithmetic.sizes`.
        problem_column, answer_column, solution_column, kind_column, gold_format, layout: see
            `problems.load`.

    Raises ValueError, in one line, for unknown options, splits, presets or kinds (naming the
    nearest one) and for files that can't be read.

    `num_episodes` is how many indexes `reset(options={"index": i})` takes; without an index one is
    drawn.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        problems: str = "arithmetic",
        *,
        split: str = "train",
        prompt: str | None = None,
        expert: bool = False,
        require_box: bool = True,
        strict: bool = False,
        timeout: float = 5.0,
        render_mode: None = None,
        **options: Any,
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._problems = _source(problems, split, options)
        self._prompt = _template(prompt, BARE_PROMPT if problems == "arithmetic" else PAPER_PROMPT)
        self._expert = expert
        self._require_box = require_box
        self._strict = strict
        self._timeout = _seconds(timeout)
        self._current: Problem | None = None

    @property
    def num_episodes(self) -> int:
        return len(self._problems)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._current = self._problems[chosen_index(options, self.num_episodes, self.np_random)]
        # Not str.format: a prompt with \boxed{} has braces that are TeX.
        return self._prompt.replace("{problem}", self._current.question), self._info(self._current)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._current is None:
            raise gym.error.ResetNeeded("a problem takes one response: call reset for the next one")
        problem, self._current = self._current, None
        verdict = self._judge(action, problem)
        info = self._info(problem)
        info |= {"success": verdict.correct, "reason": verdict.reason}
        said = "Correct." if verdict.correct else f"Wrong: the answer is {problem.answer}."
        return said, float(verdict.correct), True, False, info

    def _judge(self, action: str, problem: Problem) -> Verdict:
        """The grade. Where a busy machine gave none, the answer is not wrong: Undecided makes the
        caller repeat the episode.
        """
        verdict = judge(
            action,
            problem.answer,
            timeout=self._timeout,
            wait=max(WAIT, self._timeout),
            require_box=self._require_box,
            strict=self._strict,
        )
        if verdict.undecided:
            raise Undecided(
                f"no grade within {max(WAIT, self._timeout):g} s ({verdict.reason}): this machine"
                " is too busy, or kills the grader's processes"
            )
        return verdict

    def _info(self, problem: Problem) -> dict[str, Any]:
        info: dict[str, Any] = {
            "success": False,
            "task_type": problem.kind,
            "answer": problem.answer,
        }
        if self._expert:
            info["expert_action"] = problem.solution
        return info


def _source(problems: str, split: str, options: dict[str, Any]) -> Problems:
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(unknown("option", name, _OPTIONS) + " (tutelage/Math-v0)")
    others, what = _FILE_OPTIONS, "problem files"
    if problems != "arithmetic":
        others, what = _ARITHMETIC_OPTIONS, "generated arithmetic"
    for name in options:
        if name in others:
            raise ValueError(f"{name} is an option of {what}, and problems is {problems!r}")
    if problems == "arithmetic":
        return ArithmeticProblems(split, sizes(**options))
    return load(problems, split=split, **options)


def _seconds(timeout: Any) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < 3600:
        raise ValueError(f"timeout={timeout!r}: it is in seconds, above 0 and below 3600")
    return float(timeout)


def _template(prompt: str | None, default: str) -> str:
    if prompt is None:
        return default
    if not isinstance(prompt, str):
        raise ValueError(
            f"prompt {prompt!r} is no text: write it in quotes, such as '{{problem}}' (in a shell"
            " \"prompt='{problem}'\")"
        )
    if "{problem}" not in prompt:
        raise ValueError(
            f"prompt {prompt!r} has no {{problem}} in it, so the problem would not be shown"
        )
    return prompt
