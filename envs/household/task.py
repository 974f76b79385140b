"""Reads the task's sentence: one of ALFWorld's templates with an object and a place in it."""

import re
from dataclasses import dataclass
from typing import Final

_GOALS: Final = (  # the more specific ones first
    ("look_at_obj_in_light", r"(?:look at|examine the) (\w+) (?:under|with) the (\w+)"),
    ("pick_clean_then_place_in_recep", r"put a clean (\w+) in (\w+)"),
    ("pick_clean_then_place_in_recep", r"clean some (\w+) and put it in (\w+)"),
    ("pick_heat_then_place_in_recep", r"put a hot (\w+) in (\w+)"),
    ("pick_heat_then_place_in_recep", r"heat some (\w+) and put it in (\w+)"),
    ("pick_cool_then_place_in_recep", r"put a cool (\w+) in (\w+)"),
    ("pick_cool_then_place_in_recep", r"cool some (\w+) and put it in (\w+)"),
    ("pick_two_obj_and_place", r"(?:find|put) two (\w+) (?:and put them )?in (\w+)"),
    ("pick_and_place_simple", r"put (?:a|some) (\w+) (?:in|on) (\w+)"),
)
_TASK: Final = re.compile(r"Your task is to: (.*?)\.?\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the sentence says. `place` is a receptacle class, or the lamp's."""

    task_type: str
    target: str
    place: str

    @classmethod
    def parse(cls, text: str) -> "Task":
        """Read the sentence after "Your task is to:".

        Raises:
            ValueError: a sentence of none of ALFWorld's templates.
        """
        found = _TASK.search(text)
        sentence = found.group(1) if found else text
        for task_type, pattern in _GOALS:
            if match := re.fullmatch(pattern, sentence):
                return cls(task_type=task_type, target=match[1], place=match[2])
        raise ValueError(f"the explorer can't read the task {sentence!r}")


def kind_of(name: str) -> str:
    """The class of a numbered thing: "mug 2" is a "mug"."""
    return name.rpartition(" ")[0]
