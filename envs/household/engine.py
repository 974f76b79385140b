"""Plays ALFWorld's text game natively: TextWorld's texts, byte for byte, a thousand times faster.

The rules are those of ALFRED's domain and grammar, written out in Python. Quirks that were copied
on purpose:

- A command counts only if it equals one of the admissible ones after `strip()`; all else is
  "Nothing happens.".
- Every list is in the order of the PDDL identifiers, which ALFWorld's demangler numbers downwards:
  hence "drawer 4, a drawer 3, ...".
- Locations may be shared by receptacles: "go to" works only towards another location, and
  everything that stands at a location is within reach (`examine`, `open`, `take` and `move` name
  the receptacle).
- Objects that a problem puts into two receptacles stay in the second when taken from the first.
- `look` lists what was taken from a receptacle of this location and put into another one of it;
  before the first `go to` it says "you see nothing".
- Only the object in hand can be examined (the domain's condition for others holds a stray comma and
  never applies).
- `slice` needs no open receptacle; `use` always turns on.

Left out: the planner, TextWorld's other infos, every domain and grammar but the two below (released
games, alfworld's package). Those differ only in whether a bare sink can clean.
"""

from __future__ import annotations

import hashlib
import json
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

from tutelage.envs.household.world import State, UnsupportedGame, World, read_world

NOTHING_HAPPENS = "Nothing happens."

_CLEANERS_OF_DOMAIN = {  # SHA-256 of the domain's text -> the receptacle types that clean
    "f1473041ed01da514de1f87adfd7ef0804862361f83ccf63c75e43633b0eb280": frozenset(
        {"sinkbasintype"}  # alfworld's package
    ),
    "0af55e7f92d12b09d28515aa730e4d03fddd17228ef1fd7b18a3ee8ba49b27b9": frozenset(
        {"sinktype", "sinkbasintype"}  # the released games
    ),
}
# SHA-256 of the grammar's text without the goal. A text of any other hash may have other rules.
_GRAMMARS = {
    "c294eb280206a4428664cdb4e2037e267e86de5b7fa862212718a961513a7de4",  # alfworld's package
    "10da93e13b58e1a6039723f5d4a59ceae7c60772515bfab9fc603bafa7f8ee06",  # the released games
}
_GOAL_OPENS, _GOAL_CLOSES = '"rhs": "Your task is to: ', '"\n'
# TextWorld's grammar would read a goal with one of these characters as code.
_GRAMMAR_SIGNS = frozenset(';|"<>[]#{}\\\n\r\t')
_KNIVES = frozenset({"knifetype", "butterknifetype"})
_MICROWAVES = frozenset({"microwavetype"})
_FRIDGES = frozenset({"fridgetype"})
# TextWorld's grammar parser eats the newline that the help text opens with.
_HELP = """\
Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """Plain data of one game: the texts of its `game.tw-pddl` (the goal already filled into the
    grammar), its walkthrough, and its `traj_data.json`.
    """

    name: str
    domain: str
    grammar: str
    problem: str
    task_type: str
    walkthrough: tuple[str, ...] = ()
    traj: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What an engine shows after a reset or a step."""

    observation: str
    admissible: tuple[str, ...]
    won: bool


class Engine(Protocol):
    """What plays a game: the native engine here, or TextWorld's in `stock`."""

    def reset(self, game: Game) -> View: ...
    def step(self, command: str) -> View: ...
    def close(self) -> None: ...


Action = Callable[[], str]  # carries itself out and returns the feedback


class NativeEngine:
    """Plays one game at a time.

    `world` and `state` are open to experts; only `reset` and `step` change them.
    """

    def __init__(self) -> None:
        self.game: Game | None = None
        self.world: World
        self.state: State

    def reset(self, game: Game) -> View:
        """Start the game.

        Raises UnsupportedGame (a ValueError) for a game whose texts would differ from TextWorld's.
        """
        try:
            self._cleaners = _cleaners(game.domain)
            task = _task(game.grammar)
            self.world = read_world(game.problem)
        except UnsupportedGame as error:
            raise UnsupportedGame(
                f'{game.name}: {error}; play it with engine="textworld", or repair the file'
            ) from None
        self.game = game
        self.state = self.world.start.copy()
        self._travel = _travel(self.world)
        self._refresh()
        room = self._look(everywhere=True)
        self._show(f"-= Welcome to TextWorld, ALFRED! =-\n\n{room}\n\nYour task is to: {task}")
        return self._view

    def step(self, command: str) -> View:
        """Carry out an admissible command; any other changes nothing. A won game can be played
        further, as in TextWorld.
        """
        command = command.strip()
        action = self._actions.get(command)
        if action is not None:
            self._show(action())
        elif self._destination(command) is not None:
            self._show(self._go(command))
        else:
            self._show(NOTHING_HAPPENS)
        return self._view

    def close(self) -> None:
        """This engine has nothing to release; TextWorld's has."""

    # --- what experts may read

    @property
    def holding(self) -> str | None:
        """The name of the object in hand."""
        held = self.state.holding
        return None if held is None else self.world.names[held]

    @property
    def location(self) -> tuple[str, ...]:
        """The names of the receptacles where the agent stands; empty before the first `go to`."""
        return tuple(self.world.names[r] for r in self._here())

    @property
    def visible(self) -> dict[str, tuple[str, ...]]:
        """Receptacle name -> object names, for what stands here and isn't closed."""
        names, contents = self.world.names, self.state.contents
        return {
            names[r]: tuple(names[o] for o in contents[r])
            for r in self._here()
            if self._reachable(r)
        }

    @property
    def contents(self) -> dict[str, tuple[str, ...]]:
        """Receptacle name -> object names, closed ones too: for planners, not for explorers."""
        names = self.world.names
        return {
            names[r]: tuple(names[o] for o in self.state.contents[r])
            for r in self.world.receptacles
        }

    # --- what is possible

    def _here(self) -> tuple[str, ...]:
        return self.world.at.get(self.state.location, ())

    def _reachable(self, receptacle: str) -> bool:
        return receptacle not in self.world.openable or receptacle in self.state.opened

    def _destination(self, command: str) -> str | None:
        """The receptacle that `go to ...` means, if it stands elsewhere."""
        receptacle = self._travel.receptacles.get(command)
        if receptacle is None or self.world.receptacles[receptacle] == self.state.location:
            return None
        return receptacle

    def _refresh(self) -> None:
        """Work out the commands and the outcome of the state as it is now."""
        actions: dict[str, Action] = {
            "help": lambda: _HELP,
            "inventory": self._inventory,
            "look": self._look,
        }
        for receptacle in self._here():
            self._offer_receptacle(receptacle, actions)
        if self.state.holding is not None:
            self._offer_held(self.state.holding, actions)
        self._actions = actions
        travel = self._travel.elsewhere.get(self.state.location, self._travel.everywhere)
        self._admissible = tuple(sorted([*travel, *actions]))
        self._won = self.world.goal(self.state)

    def _offer_receptacle(self, r: str, actions: dict[str, Action]) -> None:
        world, state, names = self.world, self.state, self.world.names
        name, held, reachable = names[r], state.holding, self._reachable(r)
        actions[f"examine {name}"] = partial(self._contents, r)
        if r in world.openable:
            actions[f"close {name}" if reachable else f"open {name}"] = partial(
                self._close if reachable else self._open, r
            )
        for o in state.contents[r]:
            if reachable and held is None and o in world.pickupable:
                actions[f"take {names[o]} from {name}"] = partial(self._take, o, r)
            if o in world.toggleable:  # the domain asks for no open receptacle
                actions[f"use {names[o]}"] = partial(self._use, o)
        if held is not None:
            self._offer_held_at(held, r, actions)

    def _offer_held_at(self, held: str, r: str, actions: dict[str, Action]) -> None:
        world, names = self.world, self.world.names
        name = names[r]
        if self._reachable(r) and world.fits(held, r):
            actions[f"move {names[held]} to {name}"] = partial(self._put, held, r)
        kinds = world.receptacle_types.get(r, frozenset())
        if held in world.cleanable and kinds & self._cleaners:
            actions[f"clean {names[held]} with {name}"] = partial(self._clean, held, r)
        if held in world.heatable and kinds & _MICROWAVES:
            actions[f"heat {names[held]} with {name}"] = partial(self._heat, held, r)
        if held in world.coolable and kinds & _FRIDGES:
            actions[f"cool {names[held]} with {name}"] = partial(self._cool, held, r)

    def _offer_held(self, held: str, actions: dict[str, Action]) -> None:
        world, names = self.world, self.world.names
        actions[f"examine {names[held]}"] = partial(self._examine, held)
        if world.object_types.get(held, frozenset()) & _KNIVES:
            # Whatever lies at this location, also in a closed receptacle: so the domain has it.
            for o in self.state.lying.get(self.state.location, ()):
                if o in world.sliceable:
                    actions[f"slice {names[o]} with {names[held]}"] = partial(self._slice, o, held)

    # --- what happens

    def _go(self, command: str) -> str:
        receptacle = self._travel.receptacles[command]
        self.state.location = self.world.receptacles[receptacle]
        self._refresh()
        return f"You arrive at {self.world.names[receptacle]}. {self._contents(receptacle)}"

    def _open(self, r: str) -> str:
        self.state.opened.add(r)
        self._refresh()
        return f"You open the {self.world.names[r]}. {self._contents(r)}"

    def _close(self, r: str) -> str:
        self.state.opened.discard(r)
        self._refresh()
        return f"You close the {self.world.names[r]}."

    def _take(self, o: str, r: str) -> str:
        state = self.state
        state.contents[r].remove(o)  # if the problem puts it into a second one, it stays there
        state.taken.add((o, r))
        state.lying.get(state.location, set()).discard(o)
        state.holding = o
        self._refresh()
        return f"You pick up the {self.world.names[o]} from the {self.world.names[r]}."

    def _put(self, o: str, r: str) -> str:
        state = self.state
        if o not in state.contents[r]:
            insort(state.contents[r], o)
        state.taken.discard((o, r))
        state.lying.setdefault(state.location, set()).add(o)
        state.holding = None
        self._refresh()
        return f"You move the {self.world.names[o]} to the {self.world.names[r]}."

    def _clean(self, o: str, r: str) -> str:
        self.state.clean.add(o)
        self._refresh()
        return f"You clean the {self.world.names[o]} using the {self.world.names[r]}."

    def _heat(self, o: str, r: str) -> str:
        self.state.hot.add(o)
        self.state.cool.discard(o)
        self._refresh()
        return f"You heat the {self.world.names[o]} using the {self.world.names[r]}."

    def _cool(self, o: str, r: str) -> str:
        self.state.cool.add(o)
        self.state.hot.discard(o)
        self._refresh()
        return f"You cool the {self.world.names[o]} using the {self.world.names[r]}."

    def _use(self, o: str) -> str:
        self.state.toggled.add(o)
        self._refresh()
        return f"You turn on the {self.world.names[o]}."

    def _slice(self, o: str, knife: str) -> str:
        self.state.sliced.add(o)
        self._refresh()
        return f"You sliced the {self.world.names[o]} with the {self.world.names[knife]}."

    # --- what is seen

    def _show(self, observation: str) -> None:
        self._view = View(observation=observation, admissible=self._admissible, won=self._won)

    def _contents(self, r: str) -> str:
        """What examining a receptacle shows."""
        name = self.world.names[r]
        if not self._reachable(r):
            return f"The {name} is closed."
        seen = _listed([f"a {self.world.names[o]}" for o in self.state.contents[r]])
        return (
            f"The {name} is open. In it, you see {seen}."
            if r in self.world.openable
            else f"On the {name}, you see {seen}."
        )

    def _inventory(self) -> str:
        held = self.state.holding
        return (
            "You are not carrying anything."
            if held is None
            else f"You are carrying: a {self.world.names[held]}."
        )

    def _look(self, everywhere: bool = False) -> str:
        """What `look` shows; `everywhere` in the opening text, before a location is bound."""
        here, names = self._here(), self.world.names
        if not here:
            room = _listed([f"a {names[r]}" for r in self.world.receptacles] if everywhere else [])
            return f"You are in the middle of a room. Looking quickly around you, you see {room}."
        moved = [  # only these: the grammar asks for "taken from here" and "lying here"
            f"a {names[o]}"
            for o in sorted(self.state.lying.get(self.state.location, ()))
            for r in here
            if (o, r) in self.state.taken
        ]
        faced = _listed([names[r] for r in here])
        return f"You are facing the {faced}. Next to it, you see {_listed(moved)}."

    def _examine(self, o: str) -> str:
        """What examining the object in hand shows: the grammar's first line that applies."""
        world, state, name = self.world, self.state, self.world.names[o]
        if o in world.vessels:
            inside = _listed([f"a {world.names[inner]}" for inner in world.nested.get(o, ())])
            return f"This is a normal {name}. In it, you see {inside}."
        clean, hot, cool, is_sliced = (
            o in kept for kept in (state.clean, state.hot, state.cool, state.sliced)
        )
        warmth = "hot" if hot else "cool" if cool else ""
        if clean or (warmth and is_sliced):
            looks = " and ".join(filter(None, [warmth, "clean" if clean else ""]))
            return f"This is a {looks} {'sliced ' if is_sliced else ''}{name}."
        if warmth:  # alone it is "cold", beside another state "cool": so the grammar has it
            return f"This is a {'hot' if hot else 'cold'} {name}."
        if o in world.toggleable and o in state.toggled:
            return f"This {name} is on."
        if o in world.sliceable and is_sliced:
            return f"This is a sliced {name}."
        return f"There's nothing special about {name}."


def _listed(parts: list[str]) -> str:
    """ "a, b, and c", the grammar's way: the comma before "and" stays even between two."""
    if len(parts) < 2:
        return parts[0] if parts else "nothing"
    return ", ".join(parts[:-1]) + ", and " + parts[-1]


@dataclass(frozen=True, slots=True)
class _Travel:
    """The `go to` commands of a world: what each means, and which lead away from a location."""

    receptacles: Mapping[str, str]
    everywhere: tuple[str, ...]
    elsewhere: Mapping[str, tuple[str, ...]]


def _travel(world: World) -> _Travel:
    commands = {f"go to {world.names[r]}": r for r in world.receptacles}
    everywhere = tuple(sorted(commands))
    elsewhere = {
        place: tuple(c for c in everywhere if world.receptacles[commands[c]] != place)
        for place in world.at
    }
    return _Travel(commands, everywhere, elsewhere)


@lru_cache(maxsize=8)
def _cleaners(domain: str) -> frozenset[str]:
    """The receptacle types that clean in this domain, which must be one of the two known texts."""
    cleaners = _CLEANERS_OF_DOMAIN.get(hashlib.sha256(domain.encode()).hexdigest())
    if cleaners is None:
        raise UnsupportedGame(
            "its PDDL domain is neither that of the released games nor alfworld's own"
        )
    return cleaners


@lru_cache(maxsize=256)  # grammars differ in their goal only
def _task(grammar: str) -> str:
    """The goal text in the grammar; the rest of the grammar must be one of the two known texts."""
    before, opens, rest = grammar.partition(_GOAL_OPENS)
    goal, closes, after = rest.partition(_GOAL_CLOSES)
    skeleton = before + opens + closes + after
    if hashlib.sha256(skeleton.encode()).hexdigest() not in _GRAMMARS:
        raise UnsupportedGame(
            "its grammar (the goal aside) is neither that of the released games nor alfworld's own"
        )
    try:
        text = str(json.loads(f'"{goal}"'))
    except json.JSONDecodeError:
        raise UnsupportedGame(f"its goal {goal!r} is not a JSON string") from None
    if _GRAMMAR_SIGNS & set(text):
        raise UnsupportedGame(
            f"its goal {text!r} holds a sign that TextWorld's grammar reads as code"
        )
    return text
