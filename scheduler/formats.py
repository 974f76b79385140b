"""Named prompt and reply formats of step-independent agents.

A teacher that was trained on one prompt is good with that prompt alone, to the character. So the
text here is its authors' own, spaces at the ends of lines included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tutelage.envs.names import unknown

_HAN = re.compile("[\u4e00-\u9fff]")
_OPEN, _CLOSE = "<action>", "</action>"
_TAIL = 30  # characters of a reply without tags that later prompts show as its action


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a reply says. command: the environment gets it. remembered: later prompts show it as the
    turn's action. valid: the reply keeps to the format."""

    command: str
    remembered: str
    valid: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Templates with named fields.

    first: of the first turn. later: of those with a past. Their fields: {task}, {taken} (turns so
    far), {shown} (how many of them `history` holds), {history}, {step}, {observation}, {actions}.
    past: one turn of `history`, with {number}, {observation}, {action}.
    unlisted: admissible actions that `actions` leaves out.
    """

    first: str
    later: str
    past: str
    unlisted: frozenset[str] = frozenset()

    def ask(
        self,
        *,
        task: str,
        history: Sequence[tuple[str, str]],
        turns: int,
        observation: str,
        actions: Sequence[str],
    ) -> str:
        """The next prompt. history: (observation, action) of every turn so far; the last `turns` of
        them are shown. task: the sentence that sets it, with or without "Your task is to: "."""
        # ContextSettings asks for at least 1: [-0:] would be the whole history.
        taken, shown = len(history), history[-turns:]
        past = [
            self.past.format(number=number, observation=seen, action=action)
            for number, (seen, action) in enumerate(shown, start=taken - len(shown) + 1)
        ]
        return (self.later if history else self.first).format(
            task=(task.partition("Your task is to: ")[2] or task).strip(),
            taken=taken,
            shown=len(shown),
            history="\n".join(past),
            step=taken + 1,
            observation=observation,
            # a newline and a space, as the authors join them
            actions="\n ".join(f"'{action}'" for action in actions if action not in self.unlisted),
        )

    def read(self, reply: str) -> Said:
        """Read a reply. Its command stands between the first opening and the first closing tag, in
        lower case. A thought that is missing or has Chinese in it makes the reply invalid, yet
        its command is carried out. Without both tags the command is empty, and the environment
        answers as to anything that is no command."""
        lowered = reply.lower()
        opened, closed = lowered.find(_OPEN), lowered.find(_CLOSE)
        if opened < 0 or closed < 0:
            return Said(command="", remembered=lowered[-_TAIL:], valid=False)
        command = lowered[opened + len(_OPEN) : closed].strip()
        thought = "<think>" in reply and "</think>" in reply and not _HAN.search(reply)
        return Said(command=command, remembered=command, valid=thought)

    def say(self, command: str) -> str:
        """An expert's reply: the command without a thought."""
        return f"{_OPEN}{command}{_CLOSE}"


# langfengQ/verl-agent and hhh675597/revisiting_opd@d10aedb (both Apache-2.0, Copyright 2025 Nanyang
# Technological University and the verl-agent (GiGPO) team): ALFWORLD_TEMPLATE_NO_HIS and
# ALFWORLD_TEMPLATE in agent_system/environments/prompts/alfworld.py, the history as in
# agent_system/memory/memory.py, the reading of replies as in env_package/alfworld/projection.py.
# There a reply without tags has its last 30 characters carried out, so that a bare command counts.
_ASK = """
Your admissible actions of the current situation are: [{actions}].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. This reasoning process MUST be \
enclosed within <think> </think> tags.\x20
Once you've finished your reasoning, you should choose an admissible action for current step and \
present it within <action> </action> tags.
"""
GIGPO = Format(
    first="""
You are an expert agent operating in the ALFRED Embodied Environment.
Your current observation is: {observation}"""
    + _ASK,
    later="""
You are an expert agent operating in the ALFRED Embodied Environment. Your task is to: {task}
Prior to this step, you have already taken {taken} step(s). Below are the most recent {shown} \
observations and the corresponding actions you took: {history}
You are now at step {step} and your current observation is: {observation}"""
    + _ASK,
    past="[Observation {number}: '{observation}', Action {number}: '{action}']",
    unlisted=frozenset({"help"}),
)

FORMATS = {"gigpo": GIGPO}


def find_format(name: str) -> Format:
    """Raises ValueError, with the nearest name, for an unknown one."""
    if name not in FORMATS:
        raise ValueError(unknown("context format", name, FORMATS))
    return FORMATS[name]
