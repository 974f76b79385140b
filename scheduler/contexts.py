"""What the student sees each turn: the whole history in one row, or a window with one row per turn.

`full` appends: one prompt grows, the engine keeps its key-value cache, and an episode is one
training row. `window` writes a new prompt each turn, as step-independent agents are prompted: the
task, the last turns, the current observation and (on request) the admissible actions; each turn is
a training row. A window may use a named format (scheduler/formats.py): the prompt that a teacher
was trained on, whose replies hold a thought beside the action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tutelage.scheduler.chat import Chat
from tutelage.scheduler.episodes import NO_ACTION, Row
from tutelage.scheduler.formats import Said, find_format

Kind = Literal["full", "window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSettings:
    """kind: `full` or `window`. repeat_task: (full) say the task again with every observation, so
    that it stays in view. turns: (window) how many past turns are shown. admissible: list the
    admissible actions. format: (window) the name of a prompt and reply format."""

    kind: Kind
    repeat_task: bool
    turns: int
    admissible: bool
    format: str | None
    system: str | None

    def __post_init__(self) -> None:
        if self.kind not in (kinds := get_args(Kind)):
            raise ValueError(f"context kind {self.kind!r}: it must be one of {', '.join(kinds)}")
        if self.format is None:
            return
        find_format(self.format)
        if self.kind != "window" or self.turns < 1:
            raise ValueError(
                f"context format {self.format!r} asks afresh every turn and tells the task with the"
                f" turns before: set kind: window and turns: 1 or more (got kind: {self.kind},"
                f" turns: {self.turns})"
            )

    @property
    def lists_actions(self) -> bool:
        """True when prompts need info['admissible_actions']."""
        return self.admissible or self.format is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One turn's action tokens: ids, the student's log-probabilities (NaN for an expert's tokens),
    and those under the sampling parameters (None: the engine does not know them)."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    closed: bool  # ends with an end-of-turn token
    sampling_logprobs: Sequence[float] | None = None


class _RowBuilder:
    """Grows one row, token by token, and freezes it."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._turns: list[int] = []
        self._logprobs: list[float] = []
        self._sampling: list[float] = []
        self._branches: list[int] = []

    def prompt(self, ids: Sequence[int]) -> None:
        self._add(ids, NO_ACTION)

    def trunk(self, reply: Reply, turn: int) -> None:
        self._add(reply.ids, turn, reply.logprobs, reply.sampling_logprobs)

    def off_policy(self, ids: Sequence[int], turn: int) -> None:
        self._add(ids, turn)

    def branch(self, ids: Sequence[int], turn: int) -> None:
        # + 1: turns count from 0, and branch 0 is the trunk
        self._add(ids, turn, branch=turn + 1)

    def _add(
        self,
        ids: Sequence[int],
        turn: int,
        logprobs: Sequence[float] | None = None,
        sampling: Sequence[float] | None = None,
        branch: int = 0,
    ) -> None:
        unknown = [float("nan")] * len(ids)
        self._ids.extend(ids)
        self._turns.extend([turn] * len(ids))
        self._logprobs.extend(unknown if logprobs is None else logprobs)
        self._sampling.extend(unknown if sampling is None else sampling)
        self._branches.extend([branch] * len(ids))

    def row(self) -> Row:
        return Row(
            ids_T=np.asarray(self._ids, dtype=np.int32),
            turns_T=np.asarray(self._turns, dtype=np.int32),
            behavior_logprobs_T=np.asarray(self._logprobs, dtype=np.float32),
            sampling_logprobs_T=np.asarray(self._sampling, dtype=np.float32),
            branches_T=np.asarray(self._branches, dtype=np.int32),
        )


class Context:
    """One episode's conversation: `observe`, take `prompt_ids`, `reply`, and again; then `rows`."""

    def __init__(self, chat: Chat, settings: ContextSettings) -> None:
        self._chat, self._settings = chat, settings
        self._format = None if settings.format is None else find_format(settings.format)
        self._task = ""
        self._history: list[tuple[str, str]] = []  # (observation, action), oldest first
        self._observation = ""
        self._closed = True
        self._end: int | None = None
        self._builder = _RowBuilder()
        self._rows: list[Row] = []
        self._trunk: list[int] = []

    @property
    def prompt_ids(self) -> list[int]:
        """The ids that the next reply is conditioned on."""
        return self._trunk

    @property
    def appends(self) -> bool:
        """True when each prompt extends the last one, so that an engine can keep its cache."""
        return self._settings.kind == "full"

    def read(self, text: str) -> Said:
        """The command in a reply's text: without a format, all of it. A thought that the prompt
        began counts as part of the text, so that one without an end cannot pass for an answer."""
        whole = self._chat.thought + text
        if self._format is None:
            return Said(command=whole, remembered=text)
        return self._format.read(whole)

    def say(self, command: str) -> str:
        """A command in the form of a reply in this context."""
        return command if self._format is None else self._format.say(command)

    def observe(self, observation: str, info: Mapping[str, Any]) -> None:
        """Make the next prompt of the environment's text."""
        if not self._history and not self._task:
            self._task = str(info.get("task") or "")
        self._observation = observation
        if self._settings.kind == "full":
            text = self._full_text(observation, info)
            first = not self._trunk
            ids = (
                self._chat.opening(text)
                if first
                else self._chat.following(text, closed=self._closed, end=self._end)
            )
        else:
            ids = self._chat.opening(self._window_text(observation, info))
            self._builder, self._trunk = _RowBuilder(), []
        self._builder.prompt(ids)
        self._trunk = self._trunk + ids

    def reply(self, reply: Reply, *, action: str, expert_ids: Sequence[int] | None = None) -> None:
        """Record a turn; `action` is what later prompts show of it. With `expert_ids` (the expert's
        action in the state where the student acted) the loss is taken on those instead: on a branch
        beside the student's words, or in place of them in a window's row.
        """
        turn = len(self._history)
        if expert_ids is None:
            self._builder.trunk(reply, turn)
        elif self._settings.kind == "window":
            # nothing follows in a window's row, so that it needs no branch
            self._builder.off_policy(expert_ids, turn)
        else:
            self._builder.branch(expert_ids, turn)
            self._builder.prompt(reply.ids)  # the episode continues from them; they take no loss
        self._trunk = self._trunk + list(reply.ids)
        self._closed, self._end = reply.closed, int(reply.ids[-1]) if reply.ids else None
        self._history.append((self._observation, action))
        if self._settings.kind == "window":
            self._rows.append(self._builder.row())

    def rows(self) -> tuple[Row, ...]:
        """The training rows so far, without a last observation that has no reply."""
        if self._settings.kind == "window":
            return tuple(self._rows)
        row = self._builder.row()
        actions = np.flatnonzero(row.action_mask_T)
        if not len(actions):
            return ()
        end = int(actions[-1]) + 1
        return (
            Row(
                ids_T=row.ids_T[:end],
                turns_T=row.turns_T[:end],
                behavior_logprobs_T=row.behavior_logprobs_T[:end],
                sampling_logprobs_T=row.sampling_logprobs_T[:end],
                branches_T=row.branches_T[:end],
            ),
        )

    def _full_text(self, observation: str, info: Mapping[str, Any]) -> str:
        parts = [observation]
        if self._settings.repeat_task and self._history and self._task:
            parts.append(self._task)
        parts.extend(self._admissible(info))
        return "\n".join(parts)

    def _window_text(self, observation: str, info: Mapping[str, Any]) -> str:
        if self._format is not None:
            return self._format.ask(
                task=self._task or (self._history[0][0] if self._history else observation),
                history=self._history,
                turns=self._settings.turns,
                observation=observation,
                actions=self._actions(info),
            )
        if not self._history:
            return "\n".join([observation, *self._admissible(info)])
        task = self._task or self._history[0][0]
        # [-0:] would be the whole history
        shown = self._history[-self._settings.turns :] if self._settings.turns else []
        past = [line for seen, action in shown for line in (seen, f"> {action}")]
        return "\n".join([task, *past, observation, *self._admissible(info)])

    def _admissible(self, info: Mapping[str, Any]) -> list[str]:
        if not self._settings.admissible:
            return []
        return ["Admissible actions: " + ", ".join(self._actions(info))]

    def _actions(self, info: Mapping[str, Any]) -> Sequence[str]:
        actions: Sequence[str] | None = info.get("admissible_actions")
        if actions is None:
            key = "format" if self._format is not None else "admissible"
            raise ValueError(
                f"rollout.context.{key} is on, but the environment's info has no"
                " 'admissible_actions': turn it off for this task"
            )
        return actions
