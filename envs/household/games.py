"""Makes household games from a seed alone: no download, no simulator, each proven solvable.

`make_game(index, split, difficulty)` draws a goal, then a room around it, writes both as the PDDL
problem that ALFWorld's engine plays, and replays a walkthrough of it in the engine before the game
is handed out. A draw that can't be won, or not within the turns by looking everywhere, or that is
of another split, is drawn again, all from one random stream that is seeded with SHA-256, so that a
game is the same in every process.

Splits are disjoint by construction, because what a game *is* decides where it belongs:

- the goal (task type, object, receptacle, room) is hashed; a sixth of all goals are `valid_unseen`
  and never occur in the other two splits;
- of the other games the whole world (everything in the PDDL problem) is hashed; a fifth of them are
  `valid_seen`, the rest `train`. A game of one difficulty can therefore never be in another split
  at another difficulty either.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any, Final

from tutelage.envs.household import rooms
from tutelage.envs.household.affordances import (
    CAN_CONTAIN,
    CHANGES,
    CLEANABLE,
    COOLABLE,
    HEATABLE,
    LAMP,
    LAMP_SPOTS,
    OPENABLE,
)
from tutelage.envs.household.difficulty import Difficulty, as_dict, resolve
from tutelage.envs.household.engine import Game, NativeEngine
from tutelage.envs.household.problem import Goal, Thing, World, problem_text
from tutelage.envs.names import unknown

SPLITS: Final = ("train", "valid_seen", "valid_unseen")
UNSEEN_GOALS: Final = 1 / 6  # enough goals of every task type, and every word is still in train
SEEN_WORLDS: Final = 1 / 5  # five draws for a valid_seen game; train has no end anyway
MAX_DRAWS: Final = 1000
TURNS: Final = 50  # ALFWorld's limit on an episode

_WORDINGS: Final = {  # ALFWorld's own templates
    "pick_and_place_simple": ("put a {o} in {r}", "put some {o} on {r}"),
    "look_at_obj_in_light": ("look at {o} under the {r}", "examine the {o} with the {r}"),
    "pick_clean_then_place_in_recep": (
        "put a clean {o} in {r}",
        "clean some {o} and put it in {r}",
    ),
    "pick_heat_then_place_in_recep": ("put a hot {o} in {r}", "heat some {o} and put it in {r}"),
    "pick_cool_then_place_in_recep": ("put a cool {o} in {r}", "cool some {o} and put it in {r}"),
    "pick_two_obj_and_place": ("put two {o} in {r}", "find two {o} and put them in {r}"),
}
_CHANGEABLE: Final = {"clean": CLEANABLE, "heat": HEATABLE, "cool": COOLABLE}
# Beyond AI2-THOR's scene numbers (1 to 430), so that no game is named as a released one.
_FLOOR_PLANS: Final = {"kitchen": 1001, "living": 1201, "bed": 1301, "bath": 1401}


def make_game(
    index: int, split: str = "train", difficulty: str | Mapping[str, Any] | Difficulty = "full"
) -> Game:
    """The game with this index: the same in every process, and of no other split.

    Indexes cycle through the difficulty's task types, so that any run of consecutive games has
    each of them equally often.

    Raises:
        ValueError: an unknown split or difficulty, a negative index, or knobs that leave no game.
    """
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    if index < 0:
        raise ValueError(f"game index {index}: must be at least 0")
    knobs = resolve(difficulty)
    rng = random.Random(_digest([split, index, as_dict(knobs)]))
    for _ in range(MAX_DRAWS):
        goal = _draw_goal(rng, knobs, index, unseen=split == "valid_unseen")
        world = _draw_world(rng, goal, knobs)
        if world is None or split_of(goal, world) != split:
            continue
        game = _write_game(rng, goal, world)
        if _search_cost(goal, world) + len(game.walkthrough) > TURNS:
            continue  # a player who looks everywhere before acting must still win in time
        if wins_by_walkthrough(game):
            return game
    raise ValueError(
        f"no {split} game {index} in {MAX_DRAWS} draws: allow more rooms, receptacles or task "
        f"types than {as_dict(knobs)}"
    )


def split_of(goal: Goal, world: World) -> str:
    """The only split that a game of this goal in this world can be in."""
    if _is_unseen(goal):
        return "valid_unseen"
    return "valid_seen" if _share(problem_text(goal, world)) < SEEN_WORLDS else "train"


def wins_by_walkthrough(game: Game) -> bool:
    """Whether the engine accepts every step of the walkthrough and the last one, no other, wins."""
    engine = NativeEngine()
    view = engine.reset(game)
    for command in game.walkthrough:
        if view.won or command not in view.admissible:
            return False
        view = engine.step(command)
    return view.won


# --- goals


def _draw_goal(rng: random.Random, knobs: Difficulty, index: int, *, unseen: bool) -> Goal:
    task_type = knobs.task_types[index % len(knobs.task_types)]
    weights = {r: w for r, w in rooms.TASKS[task_type].items() if r in knobs.rooms}
    options = {room: _goals(task_type, room, unseen) for room in weights}
    weights = {room: weight for room, weight in weights.items() if options[room][0]}
    if not weights:
        raise ValueError(f"no held-out goal of {task_type} in the rooms {knobs.rooms}: allow more")
    room = rng.choices(list(weights), list(weights.values()))[0]
    goals, shares = options[room]
    return rng.choices(goals, shares)[0]


@cache
def _goals(task_type: str, room: str, unseen: bool) -> tuple[list[Goal], list[float]]:
    """Every goal of this type in this room, of one side of the split, with its weight.

    Weighted by how usual the object and the place are there, as the released games are.
    """
    verb, appliance = CHANGES.get(task_type, ("", ""))
    goals: list[Goal] = []
    shares: list[float] = []
    for target, share in rooms.OBJECTS[room].items():
        if target == LAMP or target not in _CHANGEABLE.get(verb, rooms.OBJECTS[room]):
            continue
        homes = [r for r in rooms.RECEPTACLES[room] if target in CAN_CONTAIN[r]]
        if task_type == "look_at_obj_in_light":
            places = {LAMP: 1.0} if homes else {}
        else:
            # The target must start in another class of place than its goal (see _may_start_in), and
            # putting it back into the appliance would make the change look like an accident.
            places = {
                r: rooms.RECEPTACLES[room][r][0] for r in homes if r != appliance and len(homes) > 1
            }
        for place, chance in places.items():
            goal = Goal(task_type=task_type, room=room, target=target, place=place)
            if _is_unseen(goal) == unseen:
                goals.append(goal)
                shares.append(share * chance / len(places))
    return goals, shares


@cache
def _is_unseen(goal: Goal) -> bool:
    return _share([goal.task_type, goal.room, goal.target, goal.place]) < UNSEEN_GOALS


# --- worlds


def _draw_world(rng: random.Random, goal: Goal, knobs: Difficulty) -> World | None:
    """A room in which the goal can be reached, or None where the draw leaves no home for it."""
    needed = _needed_receptacles(rng, goal, knobs)
    if needed is None:
        return None
    receptacles = _draw_receptacles(rng, goal.room, needed, knobs)
    if knobs.receptacles is not None and len(receptacles) > knobs.receptacles:
        return None
    kinds = _draw_objects(rng, goal, {r.kind for r in receptacles}, knobs)
    return World(receptacles=receptacles, objects=_place(rng, goal, kinds, receptacles, knobs))


def _needed_receptacles(rng: random.Random, goal: Goal, knobs: Difficulty) -> set[str] | None:
    """The classes that reaching the goal takes: its place, an appliance, a home, a lamp's spot."""
    chances = {kind: chance for kind, (chance, _, _) in rooms.RECEPTACLES[goal.room].items()}
    homes = [r for r in chances if _may_start_in(goal, goal.target, r, knobs)]
    if not homes:
        return None
    needed = set(rng.choices(homes, [chances[r] for r in homes]))
    if goal.place == LAMP:
        spots = [r for r in chances if r in LAMP_SPOTS]
        needed.update(rng.choices(spots, [chances[r] for r in spots]))
    else:
        needed.add(goal.place)
    if goal.task_type in CHANGES:
        needed.add(CHANGES[goal.task_type][1])
    return needed


def _draw_receptacles(
    rng: random.Random, room: str, needed: set[str], knobs: Difficulty
) -> tuple[Thing, ...]:
    spare: list[str] = []
    for kind, (chance, fewest, most) in rooms.RECEPTACLES[room].items():
        if kind not in needed and rng.random() >= chance:
            continue
        # Squared: most rooms have few cabinets and drawers, and some have very many.
        count = fewest + int((most - fewest) * rng.random() ** 2 + 0.5)
        spare += [kind] * (min(count, knobs.per_class or count) - (kind in needed))
    if knobs.receptacles is not None:
        rng.shuffle(spare)
        spare = spare[: max(0, knobs.receptacles - len(needed))]
    return tuple(_numbered(Counter([*sorted(needed), *spare])))


def _draw_objects(rng: random.Random, goal: Goal, places: set[str], knobs: Difficulty) -> list[str]:
    """The classes of the objects, with repetitions: the targets first, then the distractors."""
    count = min(rng.choice((1, 1, 1, 2, 2, 3)), knobs.instances)
    targets = [goal.target] * (max(2, count) if goal.is_two else count)
    lamp = [LAMP] if goal.place == LAMP else []
    others: list[str] = []
    for kind, chance in rooms.OBJECTS[goal.room].items():
        present = rng.random() < chance * knobs.object_share
        count = min(rng.choice((1, 1, 1, 2, 2, 3)), 1 if kind == LAMP else knobs.instances)
        if present and kind not in (goal.target, *lamp) and any(_holds(r, kind) for r in places):
            others += [kind] * count
    rng.shuffle(others)
    return targets + lamp + others[: knobs.distractors]


def _place(
    rng: random.Random,
    goal: Goal,
    kinds: Iterable[str],
    receptacles: tuple[Thing, ...],
    knobs: Difficulty,
) -> tuple[Thing, ...]:
    """Put each object somewhere: uniform over classes first, or drawers would swallow most."""
    by_class: dict[str, list[Thing]] = {}
    for receptacle in receptacles:
        by_class.setdefault(receptacle.kind, []).append(receptacle)
    objects = []
    for thing in _numbered(Counter(kinds)):
        homes = [r for r in by_class if _may_start_in(goal, thing.kind, r, knobs)]
        where = rng.choice(by_class[rng.choice(homes)])
        objects.append(Thing(kind=thing.kind, number=thing.number, where=where))
    return tuple(objects)


def _may_start_in(goal: Goal, kind: str, receptacle: str, knobs: Difficulty) -> bool:
    if kind != goal.target:
        return _holds(receptacle, kind)
    if not knobs.closed and receptacle in OPENABLE:
        return False
    # A target that started where it belongs would leave nothing to do.
    return _holds(receptacle, kind) and receptacle != goal.place


def _search_cost(goal: Goal, world: World) -> int:
    """The steps that it takes to look into every place where the target, or the lamp, may be."""
    kinds = [r.kind for r in world.receptacles]
    cost = sum(1 + (kind in OPENABLE) for kind in kinds if _holds(kind, goal.target))
    return cost + sum(kind in LAMP_SPOTS for kind in kinds if goal.place == LAMP)


def _holds(receptacle: str, kind: str) -> bool:
    return receptacle in LAMP_SPOTS if kind == LAMP else kind in CAN_CONTAIN[receptacle]


def _numbered(counts: Counter[str]) -> list[Thing]:
    return [Thing(kind=k, number=n + 1) for k, count in counts.items() for n in range(count)]


# --- games


def _write_game(rng: random.Random, goal: Goal, world: World) -> Game:
    problem = problem_text(goal, world)
    wording = rng.choice(_WORDINGS[goal.task_type])
    sentence = wording.format(o=goal.target.lower(), r=goal.place.lower())
    looking = goal.place == LAMP
    floor_plan = _FLOOR_PLANS[goal.room]
    fingerprint = hashlib.sha256(problem.encode()).hexdigest()[:16]
    name = f"{goal.task_type}-{goal.target}-None-{goal.place}-{floor_plan}/trial_{fingerprint}"
    domain, grammar = _engine_texts()
    return Game(
        name=name,
        domain=domain,
        grammar=grammar.replace("UNKNOWN GOAL", sentence),
        problem=problem,
        task_type=goal.task_type,
        walkthrough=_walkthrough(goal, world),
        traj={  # the fields of traj_data.json that ALFWorld's handcoded expert reads
            "task_id": f"trial_{fingerprint}",
            "task_type": goal.task_type,
            "pddl_params": {
                "object_target": goal.target,
                "parent_target": "" if looking else goal.place,
                "toggle_target": LAMP if looking else "",
                "mrecep_target": "",
                "object_sliced": False,
            },
            "scene": {"floor_plan": f"Generated-{goal.room}", "scene_num": floor_plan},
            "turk_annotations": {"anns": [{"task_desc": sentence, "high_descs": []}]},
        },
    )


def _walkthrough(goal: Goal, world: World) -> tuple[str, ...]:
    """A plan that wins, straight from the world; the closed places last."""
    targets = [thing for thing in world.objects if thing.kind == goal.target]
    targets.sort(key=lambda thing: thing.where is not None and thing.where.kind in OPENABLE)
    plan = _Plan()
    if goal.place == LAMP:
        plan.take(targets[0])
        lamp = next(thing for thing in world.objects if thing.kind == LAMP)
        assert lamp.where is not None
        plan.go(lamp.where)
        return (*plan.steps, f"use {lamp.name}")
    destination = next(r for r in world.receptacles if r.kind == goal.place)
    for target in targets[: 2 if goal.is_two else 1]:
        plan.take(target)
        if goal.task_type in CHANGES:
            verb, kind = CHANGES[goal.task_type]
            appliance = next(r for r in world.receptacles if r.kind == kind)
            plan.go(appliance)
            plan.steps.append(f"{verb} {target.name} with {appliance.name}")
        plan.go(destination)
        plan.open(destination)
        plan.steps.append(f"move {target.name} to {destination.name}")
    return tuple(plan.steps)


class _Plan:
    """Commands under construction, with the place and the open receptacles that they lead to."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._here: Thing | None = None
        self._opened: set[str] = set()

    def go(self, receptacle: Thing) -> None:
        if self._here != receptacle:
            self.steps.append(f"go to {receptacle.name}")
            self._here = receptacle

    def open(self, receptacle: Thing) -> None:
        if receptacle.kind in OPENABLE and receptacle.name not in self._opened:
            self.steps.append(f"open {receptacle.name}")
            self._opened.add(receptacle.name)

    def take(self, thing: Thing) -> None:
        assert thing.where is not None
        self.go(thing.where)
        self.open(thing.where)
        self.steps.append(f"take {thing.name} from {thing.where.name}")


@cache
def _engine_texts() -> tuple[str, str]:
    """ALFWorld's PDDL domain and text grammar, as shipped with alfworld."""
    folder = resources.files("tutelage.envs.household.data")
    return folder.joinpath("alfred.pddl").read_text(), folder.joinpath("alfred.twl2").read_text()


# --- hashes


def _digest(value: object) -> int:
    """An integer that depends on nothing but the value (Python's own hash changes by process)."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _share(value: object) -> float:
    """A number in [0, 1) that depends on nothing but the value, evenly spread over values."""
    return _digest(value) / 2**64
