"""The experts: the explorer knows only what it saw, both win from any state, plans are shortest."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import pytest

from tutelage.envs.household.affordances import CAN_CONTAIN
from tutelage.envs.household.difficulty import PRESETS
from tutelage.envs.household.engine import Game, NativeEngine, View
from tutelage.envs.household.expert import Explorer, Planner
from tutelage.envs.household.games import make_game
from tutelage.envs.household.task import Task


class Player(Protocol):
    def reset(self, game: Game, view: View) -> None: ...
    def observe(self, action: str, view: View) -> None: ...
    def act(self) -> str: ...


def begin(player: Player, game: Game) -> tuple[NativeEngine, View]:
    engine = NativeEngine()
    view = engine.reset(game)
    player.reset(game, view)
    return engine, view


def finish(player: Player, engine: NativeEngine, view: View, limit: int = 50) -> list[str]:
    """Let the player act until it wins; fails at the limit and at an action that does nothing."""
    actions: list[str] = []
    while not view.won:
        assert len(actions) < limit, actions
        actions.append(player.act())
        assert actions[-1] in view.admissible
        view = engine.step(actions[-1])
        player.observe(actions[-1], view)
    return actions


def wander(
    player: Player, engine: NativeEngine, view: View, steps: int, rng: random.Random
) -> View:
    """A poor learner's actions: hardly walking, opening and taking what it can, or nonsense."""
    for _ in range(steps):
        if view.won:
            break
        handy = [c for c in view.admissible if not c.startswith("go to")]
        pool = handy if rng.random() < 0.6 else list(view.admissible)
        action = rng.choice(pool) if rng.random() < 0.9 else "put the mug on the moon"
        view = engine.step(action)
        player.observe(action, view)
    return view


@pytest.mark.parametrize("preset", PRESETS)
def test_the_explorer_wins_every_game_without_a_wasted_word(preset: str) -> None:
    for split in ("train", "valid_unseen"):
        for index in range(150):
            player = Explorer()
            actions = finish(player, *begin(player, make_game(index, split, preset)))
            idle = ("look", "inventory", "help", "examine", "close")
            assert not [action for action in actions if action.startswith(idle)]
            opened = [action for action in actions if action.startswith("open")]
            assert len(opened) == len(set(opened))


def test_tiny_episodes_are_short() -> None:
    lengths = []
    for index in range(300):
        player = Explorer()
        actions = finish(player, *begin(player, make_game(index, "train", "tiny")), limit=20)
        lengths.append(len(actions))
    assert 6 < sum(lengths) / len(lengths) < 9


@pytest.mark.parametrize("kind", [Explorer, Planner])
@pytest.mark.parametrize("steps", [5, 40])
def test_an_expert_wins_from_wherever_a_learner_got_to(kind: type[Player], steps: int) -> None:
    rng = random.Random(steps)
    for preset in ("tiny", "full"):
        for index in range(60):
            player = kind()
            engine, view = begin(player, make_game(index, "train", preset))
            finish(player, engine, wander(player, engine, view, steps, rng))


def test_the_same_history_gives_the_same_action_whoever_acted() -> None:
    for index in range(30):
        game = make_game(index, "train", "tiny")
        actor, watcher = Explorer(), Explorer()
        engine, view = begin(actor, game)
        watcher.reset(game, view)
        while not view.won:
            action = actor.act()
            assert watcher.act() == watcher.act() == action
            view = engine.step(action)
            actor.observe(action, view)
            watcher.observe(action, view)


def with_unseen_objects_moved(game: Game, seen: set[str], rng: random.Random) -> Game:
    """Every object that lies in none of the seen receptacles, at another unseen one that fits."""
    problem = game.problem
    kinds = dict(re.findall(r"\(receptacleType ([^?\s]+) (\w+)Type\)", problem))
    at = dict(re.findall(r"\(receptacleAtLocation ([^?\s]+) (\S+)\)", problem))
    classes = dict(re.findall(r"\(objectType ([^?\s]+) (\w+)Type\)", problem))
    for thing, where in re.findall(r"\(inReceptacle ([^?\s]+) ([^?\s]+)\)", problem):
        fits = [
            r for r in kinds if classes[thing] in CAN_CONTAIN[kinds[r]] and r not in {*seen, where}
        ]
        if where not in seen and fits:
            new = rng.choice(fits)
            problem = problem.replace(
                f"(inReceptacle {thing} {where})", f"(inReceptacle {thing} {new})"
            ).replace(
                f"(objectAtLocation {thing} {at[where]})", f"(objectAtLocation {thing} {at[new]})"
            )
    return replace(game, problem=problem)


def prefixes(game: Game) -> Iterator[tuple[list[str], set[str], str]]:
    """The explorer's actions up to each point, the receptacles it saw into, and its next action."""
    player = Explorer()
    engine, view = begin(player, game)
    identifiers = {name: identifier for identifier, name in engine.world.names.items()}
    actions: list[str] = []
    while not view.won:
        action = player.act()
        seen = {identifiers[name] for name in player.belief.contents}
        yield list(actions), seen, action
        actions.append(action)
        view = engine.step(action)
        player.observe(action, view)


def test_the_explorer_never_uses_what_it_has_not_seen() -> None:
    rng = random.Random(0)
    moved = 0
    for index in range(36):
        game = make_game(index, "train", "tiny")
        spelled = {i.lower(): i for i in re.findall(r"receptacleType ([^?\s]+)", game.problem)}
        for actions, seen, following in prefixes(game):
            other = with_unseen_objects_moved(game, {spelled[i] for i in seen}, rng)
            moved += other.problem != game.problem
            player = Explorer()
            engine, _ = begin(player, other)
            for action in actions:
                player.observe(action, engine.step(action))
            assert player.act() == following
    assert moved > 50


def test_an_object_that_was_heated_and_then_cooled_is_heated_again() -> None:
    game = make_game(0, "train", {"task_types": ["pick_heat_then_place_in_recep"]})
    player = Explorer()
    engine, view = begin(player, game)
    heated = ""
    while not heated:
        action = player.act()
        heated = action if action.startswith("heat") else ""
        view = engine.step(action)
        player.observe(action, view)
    assert not player.act().startswith("heat")
    thing = heated.split(" with ")[0].removeprefix("heat ")
    for action in ("go to fridge 1", f"cool {thing} with fridge 1"):
        view = engine.step(action)
        player.observe(action, view)
    assert player.act() == "go to microwave 1"
    assert heated in finish(player, engine, view)


def test_a_wrong_object_in_hand_is_put_back_at_once() -> None:
    game = make_game(0, "train", "tiny")
    player = Explorer()
    engine, view = begin(player, game)
    target = Task.parse(view.observation).target
    for receptacle in player.belief.receptacles:
        for action in (f"go to {receptacle}", f"open {receptacle}"):
            view = engine.step(action)
            player.observe(action, view)
        takes = [c for c in view.admissible if c.startswith("take") and target not in c]
        if takes:
            view = engine.step(takes[0])
            player.observe(takes[0], view)
            thing, where = takes[0].removeprefix("take ").split(" from ")
            assert player.act() == f"move {thing} to {where}"
            finish(player, engine, view)
            return
    pytest.fail("the game has no distractor")


@pytest.mark.parametrize(
    ("sentence", "task_type", "target", "place"),
    [
        ("put a mug in desk", "pick_and_place_simple", "mug", "desk"),
        ("put some mug on desk", "pick_and_place_simple", "mug", "desk"),
        ("look at cd under the desklamp", "look_at_obj_in_light", "cd", "desklamp"),
        ("examine the cd with the desklamp", "look_at_obj_in_light", "cd", "desklamp"),
        ("put a clean cup in shelf", "pick_clean_then_place_in_recep", "cup", "shelf"),
        ("clean some cup and put it in shelf", "pick_clean_then_place_in_recep", "cup", "shelf"),
        ("put a hot egg in fridge", "pick_heat_then_place_in_recep", "egg", "fridge"),
        ("heat some egg and put it in fridge", "pick_heat_then_place_in_recep", "egg", "fridge"),
        ("put a cool pan in cabinet", "pick_cool_then_place_in_recep", "pan", "cabinet"),
        ("cool some pan and put it in cabinet", "pick_cool_then_place_in_recep", "pan", "cabinet"),
        ("put two pen in drawer", "pick_two_obj_and_place", "pen", "drawer"),
        ("find two pen and put them in drawer", "pick_two_obj_and_place", "pen", "drawer"),
    ],
)
def test_every_wording_of_alfworld_is_read(
    sentence: str, task_type: str, target: str, place: str
) -> None:
    text = f"You see a bed 1.\n\nYour task is to: {sentence}."
    assert Task.parse(text) == Task(task_type=task_type, target=target, place=place)


def test_a_sentence_of_no_template_is_refused() -> None:
    with pytest.raises(ValueError, match="water the plants"):
        Task.parse("Your task is to: water the plants.")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_planner_is_never_longer_than_the_walkthrough(preset: str) -> None:
    for index in range(90):
        game = make_game(index, "train", preset)
        player = Planner()
        engine, view = begin(player, game)
        planned = player.plan()
        assert len(planned) <= len(game.walkthrough)
        assert finish(player, engine, view) == planned


def test_no_plan_of_any_commands_is_shorter() -> None:
    """Against every sequence of admissible commands, on games that are small enough for that."""
    rooms = {"preset": "tiny", "receptacles": 4, "distractors": 1}
    for index in (0, 1, 6, 7):  # picking and looking: the short ones
        game = make_game(index, "train", rooms)
        player = Planner()
        begin(player, game)
        assert len(player.plan()) == shortest_by_brute_force(game, limit=6)


def shortest_by_brute_force(game: Game, limit: int) -> int:
    engine = NativeEngine()
    engine.reset(game)
    frontier: list[tuple[str, ...]] = [()]
    known = set()
    for length in range(limit + 1):
        reached = []
        for commands in frontier:
            view = engine.reset(game)
            for command in commands:
                view = engine.step(command)
            if view.won:
                return length
            state = engine.state
            key = repr((state.location, state.holding, sorted(state.opened), state.contents))
            key += repr(sorted(state.toggled))
            if key not in known:
                known.add(key)
                reached += [(*commands, command) for command in view.admissible]
        frontier = reached
    raise AssertionError(f"no plan of {limit} commands")
