"""How hard a generated household is: the knobs, and three named settings of them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from tutelage.envs.household import rooms as room_tables
from tutelage.envs.names import unknown


def _known(name: str, known: Iterable[str], what: str) -> str:
    """`name`, if it is one of the `known` names of a `what`."""
    if name not in known:
        raise ValueError(unknown(what, name, known))
    return name


def _at_least(least: int, name: str, value: int | None) -> None:
    if value is None and name != "instances":  # of which a game needs the number, see games.py
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r} should be a whole number from {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """Bounds on one household. `None` means: as many as the released games have.

    Attributes:
        rooms: the kinds of room that games may play in.
        task_types: the kinds of task that games may set, in the order in which indexes cycle.
        receptacles: at most this many receptacles.
        per_class: at most this many receptacles of one class.
        object_share: how much of the room's usual objects is there, from 0 to 1.
        distractors: at most this many objects besides the targets and the task's lamp.
        instances: at most this many objects of one class (two targets stay two).
        closed: whether targets may start inside closed receptacles.
    """

    rooms: tuple[str, ...] = ("kitchen", "living", "bed", "bath")
    task_types: tuple[str, ...] = tuple(room_tables.TASKS)
    receptacles: int | None = None
    per_class: int | None = None
    object_share: float = 1.0
    distractors: int | None = None
    instances: int = 3
    closed: bool = True

    def __post_init__(self) -> None:
        for room in self.rooms:
            _known(room, room_tables.RECEPTACLES, "room")
        for task_type in self.task_types:
            _known(task_type, room_tables.TASKS, "task type")
            if not set(self.rooms) & set(room_tables.TASKS[task_type]):
                cure = ", ".join(room_tables.TASKS[task_type])
                raise ValueError(
                    f"{task_type} needs one of the rooms {cure}: add one to rooms, or leave it out "
                    "of task_types"
                )
        if not self.task_types:
            raise ValueError("task_types is empty: name at least one task type")
        _at_least(4, "receptacles", self.receptacles)  # the longest tasks need so many classes
        _at_least(1, "per_class", self.per_class)
        _at_least(0, "distractors", self.distractors)
        _at_least(1, "instances", self.instances)
        if not isinstance(self.object_share, float | int) or not 0 <= self.object_share <= 1:
            raise ValueError(f"object_share {self.object_share!r} should lie between 0 and 1")
        if not isinstance(self.closed, bool):
            raise ValueError(f"closed {self.closed!r} should be true or false")


PRESETS: Final[Mapping[str, Difficulty]] = {
    # The released games' own sizes.
    "full": Difficulty(),
    # What a network of a million parameters learns in tens of minutes: every class of a room still
    # occurs, but seldom twice, so that a search is short and numbers matter little.
    "small": Difficulty(per_class=2, object_share=0.35, instances=2),
    # What it learns in minutes: a handful of places, each class once.
    "tiny": Difficulty(receptacles=7, per_class=1, distractors=4, instances=1),
}


def resolve(difficulty: "str | Mapping[str, Any] | Difficulty") -> Difficulty:
    """A preset's name, or knobs over those of a preset (`{"preset": "tiny", "receptacles": 9}`).

    Raises:
        ValueError: an unknown preset, knob or value, with the nearest known one.
    """
    if isinstance(difficulty, Difficulty):
        return difficulty
    if isinstance(difficulty, str):
        return PRESETS[_known(difficulty, PRESETS, "difficulty")]
    if not isinstance(difficulty, Mapping):
        raise ValueError(f"difficulty {difficulty!r} should be a name or a mapping of knobs")
    knobs = dict(difficulty)
    preset = PRESETS[_known(str(knobs.pop("preset", "full")), PRESETS, "difficulty")]
    names = [field.name for field in fields(Difficulty)]
    for name, value in knobs.items():
        _known(name, ["preset", *names], "difficulty knob")
        if name in ("rooms", "task_types"):  # YAML has no tuples
            knobs[name] = (value,) if isinstance(value, str) else tuple(value)
    return replace(preset, **knobs)


def as_dict(difficulty: Difficulty) -> dict[str, Any]:
    """The knobs as plain data, for records and for the seeds of the draws."""
    return asdict(difficulty)
