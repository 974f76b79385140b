"""Reads an ALFRED problem in PDDL into a `World`: the things of one household and its goal.

A world has objects and their types, the initial facts, names as ALFWorld's demangler gives them,
and the goal. Identifiers are lower-cased, as Fast Downward does. Everything is checked against the
one domain that the native engine knows; a problem outside it is refused, never guessed at.

Left out: type hierarchies, costs, distances, and goals over facts that no text and no action
depends on (`checked`, `isOn`).
"""

from __future__ import annotations

import itertools
import re
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Expression = Any  # nested lists of lower-case tokens; mypy can't say so usefully
Goal = Callable[["State"], bool]

_TOKEN = re.compile(r"[()]|[^\s()]+")
_SIGNATURES = {  # every predicate that an initial fact may use, with the types of its arguments
    "atlocation": ("agent", "location"),
    "receptacleatlocation": ("receptacle", "location"),
    "objectatlocation": ("object", "location"),
    "openable": ("receptacle",),
    "opened": ("receptacle",),
    "inreceptacle": ("object", "receptacle"),
    "isreceptacleobject": ("object",),
    "inreceptacleobject": ("object", "object"),
    "isreceptacleobjectfull": ("object",),
    "wasinreceptacle": ("object", "receptacle"),
    "receptacletype": ("receptacle", "rtype"),
    "cancontain": ("rtype", "otype"),
    "objecttype": ("object", "otype"),
    "full": ("receptacle",),
    "isclean": ("object",),
    "cleanable": ("object",),
    "ishot": ("object",),
    "heatable": ("object",),
    "iscool": ("object",),
    "coolable": ("object",),
    "pickupable": ("object",),
    "moveable": ("object",),
    "toggleable": ("object",),
    "istoggled": ("object",),
    "sliceable": ("object",),
    "issliced": ("object",),
}
_CHANGING: dict[
    str, Callable[[State, tuple[str, ...]], bool]
] = {  # what actions change, and how a goal reads it
    "atlocation": lambda s, a: s.location == a[1],
    "objectatlocation": lambda s, a: a[0] in s.lying.get(a[1], ()),
    "opened": lambda s, a: a[0] in s.opened,
    "inreceptacle": lambda s, a: a[0] in s.contents.get(a[1], ()),
    "holds": lambda s, a: s.holding == a[1],
    "holdsany": lambda s, a: s.holding is not None,
    "isclean": lambda s, a: a[0] in s.clean,
    "ishot": lambda s, a: a[0] in s.hot,
    "iscool": lambda s, a: a[0] in s.cool,
    "istoggled": lambda s, a: a[0] in s.toggled,
    "issliced": lambda s, a: a[0] in s.sliced,
}


class UnsupportedGame(ValueError):
    """The native engine can't play this game as TextWorld does; the message says why, and what to
    do.
    """


class State:
    """What changes while one game is played. Identifiers are the problem's own, in lower case."""

    __slots__ = (
        "clean", "contents", "cool", "holding", "hot", "location", "lying", "opened", "sliced",
        "taken", "toggled",
    )  # fmt: skip

    location: str
    holding: str | None
    opened: set[str]
    contents: dict[str, list[str]]  # receptacle -> objects in it, sorted
    lying: dict[str, set[str]]  # location -> objects there (objectAtLocation)
    taken: set[tuple[str, str]]  # (object, receptacle) it was taken from and not put back into
    clean: set[str]
    hot: set[str]
    cool: set[str]
    toggled: set[str]
    sliced: set[str]

    def copy(self) -> State:
        """An independent copy, for look-ahead."""
        twin = State()
        twin.location, twin.holding = self.location, self.holding
        twin.contents = {r: objects.copy() for r, objects in self.contents.items()}
        twin.lying = {place: objects.copy() for place, objects in self.lying.items()}
        for name in ("opened", "taken", "clean", "hot", "cool", "toggled", "sliced"):
            setattr(twin, name, getattr(self, name).copy())
        return twin


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What never changes in one household. Sequences are sorted by identifier, the order of every
    list in the texts.

    `names` maps identifiers to the names in the texts ("sidetable 2"); `at` maps a location to the
    receptacles there; `holds_types` maps a receptacle to the object types that fit; `nested` maps
    an object to the objects inside it.
    """

    names: Mapping[str, str]
    receptacles: Mapping[str, str]
    at: Mapping[str, tuple[str, ...]]
    receptacle_types: Mapping[str, frozenset[str]]
    object_types: Mapping[str, frozenset[str]]
    holds_types: Mapping[str, frozenset[str]]
    nested: Mapping[str, tuple[str, ...]]
    vessels: frozenset[str]
    openable: frozenset[str]
    pickupable: frozenset[str]
    cleanable: frozenset[str]
    heatable: frozenset[str]
    coolable: frozenset[str]
    toggleable: frozenset[str]
    sliceable: frozenset[str]
    start: State
    goal: Goal

    def fits(self, thing: str, receptacle: str) -> bool:
        """Whether the object may be put into the receptacle (when that is open)."""
        return not self.object_types.get(thing, _NONE).isdisjoint(
            self.holds_types.get(receptacle, _NONE)
        )


_NONE: frozenset[str] = frozenset()


@lru_cache(maxsize=64)  # groups of episodes replay one game; a world takes about 0.2 MB
def read_world(problem: str) -> World:
    """The world that a PDDL problem describes.

    Raises UnsupportedGame for text that isn't PDDL and for problems outside the ALFRED domain.
    """
    try:
        return _world(problem)
    except UnsupportedGame:
        raise
    except (IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        # The text closes its parentheses but is no problem: lists where words belong, and the like.
        raise UnsupportedGame(f"its PDDL problem is malformed ({error})") from error


def _world(problem: str) -> World:
    parts = _sections(problem)
    types = dict(_typed(parts[":objects"]))
    facts = _facts(parts[":init"], types)
    objects_in, lying = _grouped(facts, "inreceptacle"), _grouped(facts, "objectatlocation")
    homes = _one_each(facts, "receptacleatlocation")
    fitting = _grouped_forward(facts, "cancontain")
    receptacle_types = _grouped_forward(facts, "receptacletype")
    start = State()
    start.location = _start(facts)
    start.holding = None  # the domain's `holds` is no initial fact, see _SIGNATURES
    start.contents = {
        r: sorted(objects_in.get(r, ())) for r, kind in types.items() if kind == "receptacle"
    }
    start.lying = {place: set(things) for place, things in lying.items()}
    start.taken = set()
    start.opened, start.clean, start.hot = (
        set(_ones(facts, p)) for p in ("opened", "isclean", "ishot")
    )
    start.cool, start.toggled, start.sliced = (
        set(_ones(facts, p)) for p in ("iscool", "istoggled", "issliced")
    )
    return World(
        names=_names(
            {thing for arguments in facts.values() for fact in arguments for thing in fact}
        ),
        receptacles=homes,
        at={
            place: tuple(sorted(found))
            for place, found in _grouped(facts, "receptacleatlocation", 0, 1).items()
        },
        receptacle_types=receptacle_types,
        object_types=_grouped_forward(facts, "objecttype"),
        holds_types={
            r: frozenset(itertools.chain.from_iterable(fitting.get(kind, ()) for kind in kinds))
            for r, kinds in receptacle_types.items()
        },
        nested={
            o: tuple(sorted(inner)) for o, inner in _grouped(facts, "inreceptacleobject").items()
        },
        vessels=_ones(facts, "isreceptacleobject"),
        openable=_ones(facts, "openable"),
        pickupable=_ones(facts, "pickupable"),
        cleanable=_ones(facts, "cleanable"),
        heatable=_ones(facts, "heatable"),
        coolable=_ones(facts, "coolable"),
        toggleable=_ones(facts, "toggleable"),
        sliceable=_ones(facts, "sliceable"),
        start=start,
        goal=_Grounding(types, facts).goal(parts[":goal"][0]),
    )


# --- reading PDDL

Facts = Mapping[str, set[tuple[str, ...]]]


def _nested(text: str) -> Expression:
    lines = text.lower().replace("?", " ?").split("\n")  # "a?b" is two tokens to Fast Downward
    stack: list[list[Expression]] = [[]]
    for token in _TOKEN.findall("\n".join(line.split(";", 1)[0] for line in lines)):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) > 1:
            stack[-2].append(stack.pop())
        else:
            raise UnsupportedGame("the PDDL problem has a ')' too many")
    if len(stack) != 1 or len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise UnsupportedGame("the PDDL problem is cut off or empty: its parentheses don't close")
    return stack[0][0]


def _sections(problem: str) -> dict[str, list[Expression]]:
    parts = {part[0]: part[1:] for part in _nested(problem)[1:] if part and isinstance(part, list)}
    missing = [name for name in (":objects", ":init", ":goal") if not parts.get(name)]
    if missing:
        raise UnsupportedGame(f"the PDDL problem has no {missing[0]}")
    return parts


def _typed(tokens: list[Expression]) -> Iterator[tuple[str, str]]:
    """`a b - kind c` as (a, kind), (b, kind), (c, object)."""
    pending: list[str] = []
    words = iter(tokens)
    for word in words:
        if word == "-":
            kind = next(words, "object")
            yield from ((name, kind) for name in pending)
            pending.clear()
        else:
            pending.append(word)
    yield from ((name, "object") for name in pending)


def _facts(init: list[Expression], types: Mapping[str, str]) -> Facts:
    facts: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for predicate, *arguments in init:
        if predicate == "=":
            if not str(arguments[-1]).isdigit():  # TextWorld makes an odd fact of a fraction
                raise UnsupportedGame(f"the initial value {arguments} is not a whole number")
            continue
        fact = f"({' '.join([predicate, *map(str, arguments)])})"
        signature = _SIGNATURES.get(predicate)
        if signature is None:
            raise UnsupportedGame(
                f"the initial fact {fact} is not in the domain, or can't start so"
            )
        if tuple(types.get(a) for a in arguments) != signature:
            raise UnsupportedGame(f"the initial fact {fact} should be of types {signature}")
        facts[predicate].add(tuple(arguments))
    return facts


def _ones(facts: Facts, predicate: str) -> frozenset[str]:
    """The things of which a predicate of one argument holds."""
    return frozenset(fact[0] for fact in facts.get(predicate, ()))


def _grouped(facts: Facts, predicate: str, value: int = 0, key: int = 1) -> dict[str, list[str]]:
    """A predicate's facts by their argument at `key`: the sorted arguments at `value`."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for fact in facts.get(predicate, ()):
        insort(groups[fact[key]], fact[value])
    return groups


def _grouped_forward(facts: Facts, predicate: str) -> dict[str, frozenset[str]]:
    return {key: frozenset(values) for key, values in _grouped(facts, predicate, 1, 0).items()}


def _one_each(facts: Facts, predicate: str) -> dict[str, str]:
    pairs = sorted(facts.get(predicate, ()))
    found = {pair[0]: pair[1] for pair in pairs}
    if len(found) != len(pairs):
        raise UnsupportedGame("a receptacle stands at two locations")
    return found


def _start(facts: Facts) -> str:
    places = facts.get("atlocation", set())
    if len(places) != 1:
        raise UnsupportedGame(f"the problem places {len(places)} agents, not one")
    return next(iter(places))[1]


def _names(identifiers: Iterable[str]) -> dict[str, str]:
    """Names as ALFWorld's demangler makes them: the numbers of a class count down over its sorted
    identifiers.
    """
    ordered = sorted(identifiers)
    count: defaultdict[str, int] = defaultdict(int)
    for identifier in ordered:
        count[_class_of(identifier)] += 1
    names = {}
    for identifier in ordered:
        kind = _class_of(identifier)
        if "_bar_" not in identifier:
            names[identifier] = f"{kind} "  # the demangler's own trailing blank
            continue
        names[identifier] = f"{kind} {count[kind]}"
        count[kind] -= 1
    return names


def _class_of(identifier: str) -> str:
    kind, bar, _ = identifier.partition("_bar_")  # ALFRED's own code for "|"
    for code, sign in (("_minus_", "-"), ("_plus_", "+"), ("_dot_", "."), ("_comma_", ",")):
        kind = kind.replace(code, sign)
    return kind + "basin" if bar and "basin" in identifier else kind


# --- the goal

Node = Goal | bool  # a bool where the initial facts decide it and no action can change it


def _all(nodes: Iterable[Node]) -> Node:
    return _joined(nodes, all, decisive=False)


def _any(nodes: Iterable[Node]) -> Node:
    return _joined(nodes, any, decisive=True)


def _joined(
    nodes: Iterable[Node], join: Callable[[Iterator[bool]], bool], *, decisive: bool
) -> Node:
    """decisive: the value of one node that settles the whole."""
    goals: list[Goal] = []
    for node in nodes:
        if node is decisive:
            return decisive
        if callable(node):
            goals.append(node)
    if len(goals) > 1:
        return lambda state: join(goal(state) for goal in goals)
    return goals[0] if goals else not decisive


def _negation(node: Node) -> Node:
    if callable(node):
        goal = node
        return lambda state: not goal(state)
    return not node


class _Grounding:
    """Fills in the variables of a goal formula: what no action can change is decided here, the rest
    becomes functions of the state.

    Quantifiers range over the objects that the constant facts of their body leave possible, so that
    a formula over a hundred objects and thirty receptacles comes down to a handful of atoms.
    """

    def __init__(self, types: Mapping[str, str], facts: Facts) -> None:
        self._types = types
        self._facts = facts

    def goal(self, formula: Expression) -> Goal:
        node = self._ground(formula, {})
        return node if callable(node) else lambda state: node

    def _ground(self, formula: Expression, bound: Mapping[str, str]) -> Node:
        head, *rest = formula
        if head == "and":
            return _all(self._ground(part, bound) for part in rest)
        if head == "or":
            return _any(self._ground(part, bound) for part in rest)
        if head == "not":
            return _negation(self._ground(rest[0], bound))
        if head == "imply":
            return _any([_negation(self._ground(rest[0], bound)), self._ground(rest[1], bound)])
        if head == "exists":
            return _any(
                self._ground(rest[1], chosen) for chosen in self._choices(rest[0], rest[1], bound)
            )
        if head == "forall":
            # every binding counts, so no body may narrow the range
            return _all(
                self._ground(rest[1], chosen) for chosen in self._choices(rest[0], ["and"], bound)
            )
        return self._atom(head, tuple(bound.get(name, name) for name in rest))

    def _atom(self, predicate: str, arguments: tuple[str, ...]) -> Node:
        if predicate == "=":
            return arguments[0] == arguments[1]
        reads = _CHANGING.get(predicate)
        if reads is not None:
            return lambda state: reads(state, arguments)
        if predicate not in _SIGNATURES:
            raise UnsupportedGame(
                f"the goal uses ({predicate}), which the native engine does not follow"
            )
        return arguments in self._facts.get(predicate, ())

    def _choices(
        self, variables: list[str], body: Expression, bound: Mapping[str, str]
    ) -> Iterator[Mapping[str, str]]:
        typed = dict(_typed(variables))
        needed = [
            atom for atom in _needed(body) if atom[0] in _SIGNATURES and atom[0] not in _CHANGING
        ]
        ranges = [self._range(name, kind, needed, bound, typed) for name, kind in typed.items()]
        for values in itertools.product(*ranges):
            yield {**bound, **dict(zip(typed, values, strict=True))}

    def _range(
        self,
        name: str,
        kind: str,
        needed: list[list[str]],
        bound: Mapping[str, str],
        free: Mapping[str, str],
    ) -> list[str]:
        # In PDDL everything is an `object`, whatever its own type.
        values = {v for v, its in self._types.items() if kind in (its, "object")}
        known = {variable: value for variable, value in bound.items() if variable not in free}
        for predicate, *arguments in needed:
            if name in arguments:
                where = arguments.index(name)
                fixed = [
                    (i, known.get(a, a))
                    for i, a in enumerate(arguments)
                    if a[0] != "?" or a in known
                ]
                values &= {
                    f[where]
                    for f in self._facts.get(predicate, ())
                    if all(f[i] == v for i, v in fixed)
                }
        return sorted(values)


def _needed(formula: Expression, hidden: frozenset[str] = frozenset()) -> Iterator[list[str]]:
    """The atoms without which the formula can't hold, except those over variables that the formula
    itself binds.
    """
    head, *rest = formula
    if head == "and":
        for part in rest:
            yield from _needed(part, hidden)
    elif head == "exists":
        yield from _needed(rest[1], hidden | {name for name, _ in _typed(rest[0])})
    elif head not in ("or", "not", "imply", "forall", "=") and hidden.isdisjoint(rest):
        yield formula
