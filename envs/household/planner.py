"""The planner: an expert that knows the whole household and finds a shortest plan from any state.

It sees through closed doors, so it is an upper bound and a teacher of the last steps, not of
searching. A breadth-first search over the few things that can matter replaces Fast Downward: where
the player stands, what is in hand, where the targets are and what was done to them, which doors are
open. It leaves out whatever is interchangeable (the tenth empty drawer is as good as the first) and
two walks in a row. A plan takes a millisecond where Fast Downward's blind search can take minutes,
and is as short: tests compare it with Fast Downward's walkthroughs of the released games.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from tutelage.envs.household.affordances import CHANGES
from tutelage.envs.household.engine import Game, NativeEngine, View
from tutelage.envs.household.task import Task, kind_of
from tutelage.envs.household.world import State, World


@dataclass(frozen=True, slots=True)
class _Node:
    """A state of the search. `places` follows the order of the targets."""

    location: str
    held: str | None
    places: tuple[str | None, ...]  # a receptacle, or None: in hand
    changed: frozenset[str]
    opened: frozenset[str]
    lit: frozenset[str]
    walked: bool  # the last step was a walk, so the next one is not


class Planner:
    """Follows a shortest plan, and makes a new one when a player strays from it."""

    def __init__(self) -> None:
        self._engine = NativeEngine()
        self._task: Task | None = None
        self._plan: list[str] | None = None

    def reset(self, game: Game, view: View) -> None:
        """Begin an episode; `view` must be the game's first."""
        self._engine.reset(game)
        self._task = Task.parse(view.observation)
        self._plan = None

    def observe(self, action: str, view: View) -> None:
        """Follow any player's action."""
        self._engine.step(action)
        on_plan = self._plan and self._plan[0] == action.strip()
        self._plan = self._plan[1:] if self._plan and on_plan else None  # None: plan anew

    def act(self) -> str:
        """The next command; `look` where the task is done or can't be."""
        plan = self.plan()
        return plan[0] if plan else "look"

    def plan(self) -> list[str]:
        """The commands to the goal, none where it holds."""
        if self._task is None:
            raise RuntimeError("the expert has seen no household yet: call reset first")
        if self._plan is None:
            self._plan = _Search(self._task, self._engine.world, self._engine.state).shortest()
        return self._plan


class _Search:
    """One breadth-first search."""

    def __init__(self, task: Task, world: World, state: State) -> None:
        self.task, self.world = task, world
        self.verb, appliance = CHANGES.get(task.task_type, ("", ""))
        self.need = 2 if task.task_type == "pick_two_obj_and_place" else 1
        done = {"clean": state.clean, "heat": state.hot, "cool": state.cool}.get(self.verb, set())
        holders = {o: r for r in world.receptacles for o in state.contents[r]}
        self.lamps = {
            o: world.receptacles[r]
            for o, r in holders.items()
            if o in world.toggleable and self._kind(o) == task.place
        }
        self.targets = self._distinct_targets(holders, state.holding, done)
        self.start = _Node(
            location=state.location,
            held=state.holding,
            places=tuple(holders.get(o) for o in self.targets),
            changed=frozenset(done).intersection(self.targets),
            opened=frozenset(state.opened),
            lit=frozenset(state.toggled).intersection(self.lamps),
            walked=False,
        )
        self.sources = {r for r in self.start.places if r is not None}
        special = {world.receptacles[r] for r in self.sources} | set(self.lamps.values())
        special.add(state.location)
        self.appliances = self._distinct(lambda r: self._kind(r) == appliance.lower(), special)
        special |= {world.receptacles[r] for r in self.appliances}
        self.destinations = self._distinct(lambda r: self._kind(r) == task.place, special)
        special |= {world.receptacles[r] for r in self.destinations}
        # What is in hand may be in the way: the one case in which something is put where it does
        # not belong.
        in_hand = state.holding
        self.dumps = self._distinct(lambda r: world.fits(in_hand, r), special) if in_hand else set()
        self.by_location: dict[str, list[str]] = {}
        for r in sorted(self.sources | self.appliances | self.destinations | self.dumps):
            self.by_location.setdefault(world.receptacles[r], []).append(r)
        for location in self.lamps.values():  # by any of its receptacles one gets there
            self.by_location.setdefault(location, list(world.at[location][:1]))

    def shortest(self) -> list[str]:
        """The commands of a shortest plan; none where the goal holds or can't be reached."""
        came_from: dict[_Node, tuple[_Node, str] | None] = {self.start: None}
        frontier = [self.start]
        while frontier:
            reached: list[_Node] = []
            for node in frontier:
                if self._is_goal(node):
                    return _commands_to(node, came_from)
                for command, following in self._steps(node):
                    if following not in came_from:
                        came_from[following] = (node, command)
                        reached.append(following)
            frontier = reached
        return []

    # --- the model

    def _steps(self, node: _Node) -> Iterator[tuple[str, _Node]]:
        name = self.world.names
        if not node.walked:
            for location, receptacles in self.by_location.items():
                if location != node.location:
                    there = replace(node, location=location, walked=True)
                    yield f"go to {name[receptacles[0]]}", there
        node = replace(node, walked=False)
        for receptacle in self.by_location.get(node.location, ()):
            if receptacle in self.world.openable and receptacle not in node.opened:
                opened = node.opened | {receptacle}
                yield f"open {name[receptacle]}", replace(node, opened=opened)
            elif node.held is None:
                yield from self._takes(node, receptacle)
            elif self._may_put(node.held, receptacle):
                command = f"move {name[node.held]} to {name[receptacle]}"
                yield command, replace(node, held=None, places=self._with(node, receptacle))
            if receptacle in self.appliances and node.held is not None:
                yield from self._changes(node, node.held, receptacle)
        for lamp, location in self.lamps.items():
            if location == node.location and lamp not in node.lit:
                yield f"use {name[lamp]}", replace(node, lit=node.lit | {lamp})

    def _takes(self, node: _Node, receptacle: str) -> Iterator[tuple[str, _Node]]:
        names = self.world.names
        for target, place in zip(self.targets, node.places, strict=True):
            if place == receptacle:
                taken = replace(node, held=target)
                taken = replace(taken, places=self._with(taken, None))
                yield f"take {names[target]} from {names[receptacle]}", taken

    def _changes(self, node: _Node, held: str, receptacle: str) -> Iterator[tuple[str, _Node]]:
        if held in self.targets and held not in node.changed:
            names = self.world.names
            changed = replace(node, changed=node.changed | {held})
            yield f"{self.verb} {names[held]} with {names[receptacle]}", changed

    def _may_put(self, held: str, receptacle: str) -> bool:
        if not self.world.fits(held, receptacle):
            return False
        if held == self.start.held and receptacle in self.dumps:
            return True
        return held in self.targets and receptacle in self.destinations

    def _with(self, node: _Node, place: str | None) -> tuple[str | None, ...]:
        """The targets' places once the one in hand is at `place` (None: still in hand)."""
        pairs = zip(self.targets, node.places, strict=True)
        return tuple(place if target == node.held else old for target, old in pairs)

    def _is_goal(self, node: _Node) -> bool:
        if self.task.task_type == "look_at_obj_in_light":
            in_light = any(self.lamps[lamp] == node.location for lamp in node.lit)
            return in_light and node.held in self.targets
        placed = [
            place
            for target, place in zip(self.targets, node.places, strict=True)
            if place is not None and (not self.verb or target in node.changed)
        ]
        return any(
            placed.count(r) >= self.need for r in set(placed) if self._kind(r) == self.task.place
        )

    # --- leaving out what is interchangeable

    def _kind(self, identifier: str) -> str:
        return kind_of(self.world.names[identifier])

    def _distinct_targets(
        self, holders: dict[str, str], held: str | None, done: set[str]
    ) -> list[str]:
        """The targets, of equal ones in one place only as many as the task needs."""
        targets: list[str] = []
        seen: list[tuple[str | None, bool]] = []
        for o in sorted({*holders, *([held] if held else [])}):
            key = (holders.get(o), o in done)
            if self._kind(o) == self.task.target and seen.count(key) < self.need:
                targets.append(o)
                seen.append(key)
        return targets

    def _distinct(self, wanted: Callable[[str], bool], special: Iterable[str]) -> set[str]:
        """The wanted receptacles: all at special places, of the others one open and one closed."""
        chosen: set[str] = set()
        kept: set[bool] = set()
        at_special = set(special)
        for r, location in self.world.receptacles.items():
            if not wanted(r):
                continue
            closed = r in self.world.openable and r not in self.start.opened
            if location not in at_special and closed in kept:
                continue
            if location not in at_special:
                kept.add(closed)
            chosen.add(r)
        return chosen


def _commands_to(node: _Node, came_from: dict[_Node, tuple[_Node, str] | None]) -> list[str]:
    commands: list[str] = []
    step = came_from[node]
    while step is not None:
        node, command = step
        commands.append(command)
        step = came_from[node]
    return commands[::-1]
