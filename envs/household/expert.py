"""The explorer: an expert that searches a household as a player must, so that it can be imitated.

It knows what a player knows: the task's sentence, the texts and the admissible commands so far.
From these it keeps a belief (what lies where, what is open, what it holds, what it has changed) and
acts by a fixed rule without chance: look through the plausible places in the order in which the
first text lists them, those that need no opening first, take the object, change it, bring it.
(Opening cabinets as they come in the list loses 2 % of the released games to the limit of 50 steps,
and takes 14 steps on average where this order takes 8.5.) The belief is built from the texts
alone and not from its own intentions, so it gives the right action in any state that a learner got
itself into (on-policy imitation, DAgger), and the same history always gives the same action.

It says `look` where nothing can be done: some released games have things, a teddy bear among them,
that once taken fit nowhere, so that the hand is never free again.

Left out on purpose: `inventory`, `help`, `close`, and any shortest-route planning. What a small
network is to imitate must follow from few facts in view.
"""

import re
from collections.abc import Callable
from typing import Final

from tutelage.envs.household.affordances import CAN_CONTAIN, CHANGES, LAMP_SPOTS, OPENABLE
from tutelage.envs.household.engine import Game, View
from tutelage.envs.household.planner import Planner
from tutelage.envs.household.task import Task, kind_of

__all__ = ["Belief", "Explorer", "Planner"]

_ROOM: Final = re.compile(r"Looking quickly around you, you see (.*?)\.")
_CONTENTS: Final = re.compile(
    r"(?:On the (.+?), you see|The (.+?) is open\. In it, you see) (.*?)\."
)
_TAKEN: Final = re.compile(r"You pick up the (.+?) from the (.+?)\.")
# Older releases of the games say "put ... in/on".
_MOVED: Final = re.compile(r"You (?:move|put) the (.+?) (?:to|in/on) the (.+?)\.")
_CHANGED: Final = re.compile(r"You (clean|heat|cool) the (.+?) using the ")
_NAME: Final = re.compile(r"\ban? (\w+ \d+)")

_HOMES: Final = {
    receptacle.lower(): frozenset(kind.lower() for kind in kinds)
    for receptacle, kinds in CAN_CONTAIN.items()
}
_OPENABLE: Final = frozenset(kind.lower() for kind in OPENABLE)
_LAMP_SPOTS: Final = frozenset(kind.lower() for kind in LAMP_SPOTS)


class Belief:
    """What a player can know of the household after a number of texts."""

    def __init__(self, view: View) -> None:
        listing = _ROOM.search(view.observation)
        self.receptacles: tuple[str, ...] = tuple(_NAME.findall(listing[1] if listing else ""))
        self.contents: dict[str, list[str]] = {}  # by receptacle; absent: never seen inside
        self.held: str | None = None
        self.changes: dict[str, set[str]] = {}  # object -> the verbs whose effect it shows
        self.lamps: dict[str, str] = {}  # lamp -> the receptacle it stands on
        self.visited: set[str] = set()  # searched for lamps: at one, `use` is admissible at once
        self.here: tuple[str, ...] = ()
        self.admissible: frozenset[str] = frozenset()
        self.update(view)

    def update(self, view: View) -> None:
        """Take in the answer to any action, also to one that did nothing."""
        self._read(view.observation)
        self.admissible = frozenset(view.admissible)
        # Several receptacles can share a place; what can be examined is where the player stands.
        self.here = tuple(r for r in self.receptacles if f"examine {r}" in self.admissible)
        accessible = [r for r in self.here if not self.is_closed(r)]
        self.visited.update(self.here)
        if self.held is None:
            for receptacle in accessible:
                self._reach_into(receptacle)
        for command in view.admissible:
            if command.startswith("use ") and self.here:
                self.lamps.setdefault(command.removeprefix("use "), self.here[0])

    def is_closed(self, receptacle: str) -> bool:
        """Whether the receptacle, which must be here, is closed."""
        return f"open {receptacle}" in self.admissible

    def places_of(self, kind: str) -> list[tuple[str, str]]:
        """Where objects of this class were last seen, as (receptacle, object), in listing order."""
        return [
            (receptacle, name)
            for receptacle in self.receptacles
            for name in self.contents.get(receptacle, ())
            if kind_of(name) == kind
        ]

    def _read(self, text: str) -> None:
        for match in _CONTENTS.finditer(text):
            self.contents[match[1] or match[2]] = _NAME.findall(match[3])
        if taken := _TAKEN.search(text):
            self.held = taken[1]
            for names in self.contents.values():
                if taken[1] in names:
                    names.remove(taken[1])
        if moved := _MOVED.search(text):
            self.held = None
            self.contents.setdefault(moved[2], []).append(moved[1])
        if changed := _CHANGED.search(text):
            shown = self.changes.setdefault(changed[2], set())
            # Heating undoes cooling and the other way round; nothing undoes cleaning.
            shown -= {"heat", "cool"} if changed[1] != "clean" else set()
            shown.add(changed[1])

    def _reach_into(self, receptacle: str) -> None:
        """With an empty hand the `take` commands show what a receptacle holds, also one that shares
        the location and was never examined.
        """
        suffix = f" from {receptacle}"
        known = self.contents.setdefault(receptacle, [])
        takes = (c for c in self.admissible if c.startswith("take ") and c.endswith(suffix))
        names = {c.removeprefix("take ").removesuffix(suffix) for c in takes}
        known += sorted(names.difference(known))


class Explorer:
    """Searches, takes, changes and brings, from whatever state the household is in."""

    def __init__(self) -> None:
        self._belief: Belief | None = None
        self._task: Task | None = None
        self._refused: set[tuple[str, str]] = set()

    def reset(self, game: Game, view: View) -> None:
        """Begin an episode at its first text. The game itself is not looked into."""
        self._belief = Belief(view)
        self._task = Task.parse(view.observation)
        self._refused = set()

    def observe(self, action: str, view: View) -> None:
        """Take in what any player's action led to."""
        self.belief.update(view)

    @property
    def belief(self) -> Belief:
        """What is known by now."""
        if self._belief is None:
            raise RuntimeError("the expert has seen no household yet: call reset first")
        return self._belief

    @property
    def task(self) -> Task:
        """What is to be done."""
        if self._task is None:
            raise RuntimeError("the expert has seen no task yet: call reset first")
        return self._task

    def act(self) -> str:
        """The next command."""
        held = self.belief.held
        if held is None:
            return self._fetch()
        if kind_of(held) != self.task.target:
            return self._put_away(held)
        if self.task.task_type == "look_at_obj_in_light":
            return self._light()
        return self._change(held) or self._bring(held)

    # --- the phases of a task

    def _fetch(self) -> str:
        """Take a target that was seen, or look for one."""
        belief, goal = self.belief, self._destination()
        verb = CHANGES.get(self.task.task_type, ("", ""))[0]
        two = self.task.task_type == "pick_two_obj_and_place"
        # One of the two that lies at the goal already stays there.
        seen = [(r, o) for r, o in belief.places_of(self.task.target) if not (two and r == goal)]
        if not seen:
            return self._explore(lambda kind: self.task.target in _HOMES.get(kind, ()))
        receptacle, name = min(  # stable: of equals the first one listed
            seen,
            key=lambda place: (
                verb not in belief.changes.get(place[1], ()),
                place[0] not in belief.here,
            ),
        )
        return self._at(receptacle) or f"take {name} from {receptacle}"

    def _put_away(self, held: str) -> str:
        """Get rid of what is not needed: here where possible, else at the first place listed."""
        for receptacle in self.belief.here:
            if f"move {held} to {receptacle}" in self.belief.admissible:
                return f"move {held} to {receptacle}"
        kind = kind_of(held)
        self._note_refusals(kind)
        places = sorted(
            (r for r in self.belief.receptacles if (kind, r) not in self._refused),
            key=lambda r: (kind not in _HOMES.get(kind_of(r), ()), kind_of(r) in _OPENABLE),
        )
        return self._at(places[0]) or "look" if places else "look"

    def _change(self, held: str) -> str | None:
        """Clean, heat or cool what is held, where the task asks for it and it is not done."""
        verb, appliance = CHANGES.get(self.task.task_type, ("", ""))
        if not verb or verb in self.belief.changes.get(held, ()):
            return None
        place = self._nearest(appliance.lower())
        if place is None:
            return "look"
        # No appliance needs opening for this.
        return f"{verb} {held} with {place}" if place in self.belief.here else f"go to {place}"

    def _bring(self, held: str) -> str:
        """Put what is held where it belongs."""
        self._note_refusals(kind_of(held))
        goal = self._destination()
        if goal is None:
            return "look"
        return self._at(goal) or f"move {held} to {goal}"

    def _light(self) -> str:
        """With the object in hand, use a lamp that was seen, or look for one."""
        for lamp, receptacle in self.belief.lamps.items():
            if kind_of(lamp) == self.task.place:
                if f"use {lamp}" in self.belief.admissible:
                    return f"use {lamp}"
                return f"go to {receptacle}"
        return self._explore(lambda kind: kind in _LAMP_SPOTS, for_lamp=True)

    # --- what the phases share

    def _explore(self, plausible: Callable[[str], bool], *, for_lamp: bool = False) -> str:
        """Keep looking: plausible places first, then open ones, each group in listing order."""
        belief = self.belief
        known = belief.visited if for_lamp else belief.contents
        unknown = [r for r in belief.receptacles if r not in known]
        if not unknown:
            return "look"  # everything was seen: no game that can be won gets here
        receptacle = min(
            unknown,
            key=lambda r: (
                not plausible(kind_of(r)),
                r not in belief.here,
                kind_of(r) in _OPENABLE,
            ),
        )
        return self._at(receptacle) or f"examine {receptacle}"

    def _destination(self) -> str | None:
        """Where the object belongs; for two objects, where one of them lies already."""
        belief = self.belief
        target, place = self.task.target, self.task.place
        places = [
            r
            for r in belief.receptacles
            if kind_of(r) == place and (target, r) not in self._refused
        ]
        two = self.task.task_type == "pick_two_obj_and_place"
        here = belief.places_of(target)
        return min(
            places,
            key=lambda r: (-sum(two and r == where for where, _ in here), r not in belief.here),
            default=None,
        )

    def _nearest(self, kind: str) -> str | None:
        """A receptacle of this class: one that is here, else the first one listed."""
        places = [r for r in self.belief.receptacles if kind_of(r) == kind]
        return min(places, key=lambda r: r not in self.belief.here, default=None)

    def _at(self, receptacle: str) -> str | None:
        """What is still to do before reaching into a receptacle, or None."""
        if receptacle not in self.belief.here:
            return f"go to {receptacle}"
        return f"open {receptacle}" if self.belief.is_closed(receptacle) else None

    def _note_refusals(self, kind: str) -> None:
        """Remember open places here that don't take what is held, so as not to come back."""
        for receptacle in self.belief.here:
            allowed = f"move {self.belief.held} to {receptacle}" in self.belief.admissible
            if not allowed and not self.belief.is_closed(receptacle):
                self._refused.add((kind, receptacle))
