"""A check's result: ok, a note or a fault, and its cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """subject: `student`, `teachers.NAME`, `tasks.NAME` or `grader`. A fault has a cure."""

    subject: str
    check: str
    level: Level
    text: str
    cure: str = ""

    def __post_init__(self) -> None:
        if self.level == "fault" and not self.cure:
            raise ValueError(f"{self.subject}, {self.check}: a fault without a cure: {self.text}")


@dataclass(frozen=True, slots=True)
class Check:
    """A check of a subject; its methods make the findings."""

    subject: str
    name: str

    def ok(self, text: str) -> Finding:
        return self._found("ok", text)

    def note(self, text: str, cure: str = "") -> Finding:
        return self._found("note", text, cure)

    def fault(self, text: str, cure: str) -> Finding:
        return self._found("fault", text, cure)

    def _found(self, level: Level, text: str, cure: str = "") -> Finding:
        return Finding(subject=self.subject, check=self.name, level=level, text=text, cure=cure)
