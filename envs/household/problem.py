"""Describes a household (the goal, what stands and lies where) and writes it as a PDDL problem.

ALFWorld's engine plays such a problem. Its text depends on goal and world alone.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

from tutelage.envs.household.affordances import (
    CAN_CONTAIN,
    CHANGES,
    CLEANABLE,
    COOLABLE,
    HEATABLE,
    LAMP,
    OPENABLE,
    SLICEABLE,
)

_CHANGED: Final = {"clean": "isClean", "heat": "isHot", "cool": "isCool"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is to be done. `place` is the receptacle class, or the lamp for looking at something."""

    task_type: str
    room: str
    target: str
    place: str

    @property
    def is_two(self) -> bool:
        """Whether two objects are wanted."""
        return self.task_type == "pick_two_obj_and_place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A receptacle or an object: its class, its number among its class, and where it lies."""

    kind: str
    number: int
    where: "Thing | None" = None

    @property
    def name(self) -> str:
        """The name in the texts."""
        return f"{self.kind.lower()} {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A furnished room."""

    receptacles: tuple[Thing, ...]
    objects: tuple[Thing, ...]


def problem_text(goal: Goal, world: World) -> str:
    """The PDDL problem. Equal goals in equal worlds give equal texts: games.py hashes the text to
    name a game and to choose its split.
    """
    places = {receptacle: f"loc_bar_{n}" for n, receptacle in enumerate(world.receptacles, 1)}
    start = f"loc_bar_{len(places) + 1}"  # the middle of the room, where no receptacle stands
    counts = Counter(thing.kind for thing in (*world.receptacles, *world.objects))
    receptacle_kinds = sorted({r.kind for r in world.receptacles})
    object_kinds = sorted({o.kind for o in world.objects})
    objects = ["agent1 - agent"]
    facts = [f"(atLocation agent1 {start})"]
    for receptacle, place in places.items():
        name = _identifier(receptacle, counts)
        objects.append(f"{name} - receptacle")
        facts.append(f"(receptacleType {name} {receptacle.kind}Type)")
        facts.append(f"(receptacleAtLocation {name} {place})")
        if receptacle.kind in OPENABLE:
            facts.append(f"(openable {name})")
    for r in receptacle_kinds:
        held = (o for o in object_kinds if o in CAN_CONTAIN[r])
        facts += [f"(canContain {r}Type {o}Type)" for o in held]
    for thing in world.objects:
        assert thing.where is not None
        name = _identifier(thing, counts)
        objects.append(f"{name} - object")
        facts.append(f"(objectType {name} {thing.kind}Type)")
        facts.append(f"(inReceptacle {name} {_identifier(thing.where, counts)})")
        facts.append(f"(objectAtLocation {name} {places[thing.where]})")
        facts += [f"({ability} {name})" for ability in _abilities(thing.kind)]
    objects += [f"{place} - location" for place in (*places.values(), start)]
    objects += [f"{kind}Type - rtype" for kind in receptacle_kinds]
    objects += [f"{kind}Type - otype" for kind in object_kinds]
    listed, stated = "\n  ".join(objects), "\n  ".join(facts)
    return (
        f"(define (problem household)\n(:domain alfred)\n(:objects\n  {listed}\n)\n"
        f"(:init\n  {stated}\n)\n(:goal\n  {_goal_formula(goal)}\n))\n"
    )


def _identifier(thing: Thing, counts: Counter[str]) -> str:
    """The PDDL id that ALFWorld reads as this thing's name.

    It numbers a class's ids from the last to the first in sorted order, and calls a sink's basin
    "sinkbasin" because its id starts with "Sink" and holds "basin": "SinkBasin_bar_01" would be
    read as "sinkbasinbasin".
    """
    order = counts[thing.kind] - thing.number + 1
    # Two digits, because identifiers are sorted as text.
    if thing.kind.endswith("Basin"):
        return f"{thing.kind.removesuffix('Basin')}_bar_{order:02d}_bar_{thing.kind}"
    return f"{thing.kind}_bar_{order:02d}"


def _abilities(kind: str) -> list[str]:
    if kind == LAMP:
        return ["toggleable"]  # not pickupable, as in the released games
    kinds = {"heatable": HEATABLE, "coolable": COOLABLE, "cleanable": CLEANABLE}
    kinds["sliceable"] = SLICEABLE
    return ["pickupable", *(ability for ability, known in kinds.items() if kind in known)]


def _goal_formula(goal: Goal) -> str:
    target, place = f"{goal.target}Type", f"{goal.place}Type"
    if goal.place == LAMP:
        return (
            "(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and "
            f"(objectType ?ot {place}) (toggleable ?ot) (isToggled ?ot) "
            "(receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r))) "
            f"(exists (?o - object ?a - agent) (and (objectType ?o {target}) (holds ?a ?o))))"
        )
    if goal.is_two:
        return (
            "(exists (?r - receptacle ?o1 - object ?o2 - object) (and (not (= ?o1 ?o2)) "
            f"(receptacleType ?r {place}) (objectType ?o1 {target}) (inReceptacle ?o1 ?r) "
            f"(objectType ?o2 {target}) (inReceptacle ?o2 ?r)))"
        )
    verb, _ = CHANGES.get(goal.task_type, ("", ""))
    changed = f"({verb}able ?o) ({_CHANGED[verb]} ?o) " if verb else ""
    return (
        f"(exists (?r - receptacle ?o - object) (and {changed}(objectType ?o {target}) "
        f"(receptacleType ?r {place}) (inReceptacle ?o ?r)))"
    )
