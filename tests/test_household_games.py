"""Generated household games: the same everywhere, solvable, within their bounds, in one split."""

import os
import re
import subprocess
import sys
from collections import Counter

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import tutelage.envs  # noqa: F401  # registers the ids
from tutelage.envs.household import affordances
from tutelage.envs.household.difficulty import PRESETS
from tutelage.envs.household.engine import Game, NativeEngine
from tutelage.envs.household.games import SPLITS, make_game
from tutelage.envs.household.generated import GeneratedGames, HouseholdEnv

OPENABLE = {kind.lower() for kind in affordances.OPENABLE}


def receptacles(game: Game) -> dict[str, str]:
    """Identifier -> class."""
    return dict(re.findall(r"\(receptacleType ([^?\s]+) (\w+)Type\)", game.problem))


def objects(game: Game) -> dict[str, str]:
    """Identifier -> class."""
    return dict(re.findall(r"\(objectType ([^?\s]+) (\w+)Type\)", game.problem))


def places(game: Game) -> dict[str, str]:
    """Object identifier -> receptacle identifier."""
    return dict(re.findall(r"\(inReceptacle ([^?\s]+) ([^?\s]+)\)", game.problem))


def goal(game: Game) -> tuple[str, str, str]:
    assert game.traj is not None
    parameters = game.traj["pddl_params"]
    scene = game.traj["scene"]["floor_plan"]
    return scene, parameters["object_target"], parameters["parent_target"] + game.task_type


def target_class(game: Game) -> str:
    return goal(game)[1]


def test_a_game_is_the_same_in_a_fresh_process_with_another_hash_seed() -> None:
    code = (
        "from tutelage.envs.household.games import make_game\n"
        "print([make_game(i, s, d) for i in range(6)"
        " for s in ('train', 'valid_unseen') for d in ('tiny', 'full')])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 10_000


@pytest.mark.slow
def test_no_game_and_no_held_out_goal_is_in_two_splits() -> None:
    worlds: dict[str, set[str]] = {}
    goals: dict[str, set[tuple[str, str, str]]] = {}
    for split in SPLITS:
        games = [make_game(i, split, d) for d in ("tiny", "small") for i in range(500)]
        worlds[split] = {game.problem for game in games}
        goals[split] = {goal(game) for game in games}
    assert not worlds["train"] & worlds["valid_seen"]
    assert not goals["train"] & goals["valid_unseen"]
    assert not goals["valid_seen"] & goals["valid_unseen"]
    assert len(goals["valid_seen"] & goals["train"]) > 0.5 * len(goals["valid_seen"])
    # Every word of a held-out goal is known from training; only the combination is new.
    known = {target for _, target, _ in goals["train"]}
    assert len({target for _, target, _ in goals["valid_unseen"]} - known) <= 2


def test_a_held_out_split_hardly_repeats_itself() -> None:
    for split in ("valid_seen", "valid_unseen"):
        games = GeneratedGames(split, "tiny")
        assert len(games) == 200
        assert len({games[i].problem for i in range(len(games))}) >= 198


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_walkthrough_wins_with_its_last_step(preset: str, split: str) -> None:
    engine = NativeEngine()
    for index in range(30):
        game = make_game(index, split, preset)
        view = engine.reset(game)
        for command in game.walkthrough:
            assert not view.won
            assert command in view.admissible
            view = engine.step(command)
        assert view.won


@pytest.mark.parametrize("preset", PRESETS)
def test_consecutive_indexes_cycle_through_the_task_types(preset: str) -> None:
    types = [make_game(index, "valid_unseen", preset).task_type for index in range(12)]
    assert types[:6] == types[6:] == list(PRESETS[preset].task_types)
    assert len(set(types)) == 6


def test_tiny_and_small_keep_their_bounds() -> None:
    for index in range(200):
        tiny = make_game(index, "train", "tiny")
        assert len(receptacles(tiny)) <= 7
        assert len(set(receptacles(tiny).values())) == len(receptacles(tiny))
        kinds = Counter(objects(tiny).values())
        targets = kinds.pop(target_class(tiny))
        assert targets == (2 if tiny.task_type == "pick_two_obj_and_place" else 1)
        if tiny.task_type == "look_at_obj_in_light":
            assert kinds.pop("DeskLamp") == 1
        assert kinds.total() <= 4
        assert not kinds or max(kinds.values()) == 1
        assert 3 <= len(tiny.walkthrough) <= 12

        small = make_game(index, "train", "small")
        assert max(Counter(receptacles(small).values()).values()) <= 2
        assert max(Counter(objects(small).values()).values()) <= 2


def test_full_games_have_the_released_sizes() -> None:
    games = [make_game(index, "train", "full") for index in range(300)]
    sizes = [len(receptacles(game)) for game in games]
    assert min(sizes) >= 4 and max(sizes) <= 54  # the released games have 6 to 54
    assert 20 <= sum(sizes) / len(sizes) <= 27  # their mean is 23.6
    steps = [len(game.walkthrough) for game in games]
    assert 5.5 <= sum(steps) / len(steps) <= 6.5  # their mean is 5.8


def test_open_places_only_where_nothing_may_be_hidden() -> None:
    for index in range(60):
        game = make_game(index, "train", {"preset": "tiny", "closed": False})
        kinds, where = receptacles(game), places(game)
        targets = [o for o, kind in objects(game).items() if kind == target_class(game)]
        assert not {kinds[where[o]].lower() for o in targets} & OPENABLE


def test_the_target_never_starts_where_it_belongs() -> None:
    for index in range(120):
        game = make_game(index, "train", "full")
        assert game.traj is not None
        destination = game.traj["pddl_params"]["parent_target"]
        kinds, where = receptacles(game), places(game)
        targets = [o for o, kind in objects(game).items() if kind == target_class(game)]
        assert destination not in {kinds[where[o]] for o in targets}


def test_rooms_and_task_types_are_obeyed() -> None:
    only = "pick_clean_then_place_in_recep"
    games = GeneratedGames("train", {"preset": "tiny", "rooms": ["bath"], "task_types": [only]})
    for index in range(20):
        game = games[index]
        assert game.task_type == only
        assert game.traj is not None and game.traj["scene"]["floor_plan"] == "Generated-bath"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": "tnyi"}, "did you mean 'tiny'"),
        ({"difficulty": {"recepticles": 9}}, "did you mean 'receptacles'"),
        ({"difficulty": {"receptacles": 2}}, "from 4"),
        ({"difficulty": {"rooms": ["kitchn"]}}, "did you mean 'kitchen'"),
        ({"difficulty": {"rooms": ["bath"]}}, "needs one of the rooms"),
        ({"split": "valid_sene"}, "did you mean 'valid_seen'"),
        ({"task_types": ["look_at_obj"]}, "did you mean 'look_at_obj_in_light'"),
        ({"num_games": 0}, "from 1"),
        ({"dificulty": "tiny"}, "did you mean 'difficulty'"),
    ],
)
def test_what_is_unknown_is_refused_in_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        HouseholdEnv(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_environment_obeys_gymnasium(preset: str) -> None:
    env = gym.make("tutelage/Household-v0", difficulty=preset, expert=True)
    check_env(env.unwrapped, skip_render_check=True)


def test_every_game_of_a_split_can_be_asked_for_by_its_index() -> None:
    env = HouseholdEnv("valid_seen", num_games=7)
    assert env.num_episodes == 7
    names = [env.reset(options={"index": index})[1]["game"] for index in range(7)]
    assert names == [env.reset(options={"index": index})[1]["game"] for index in range(7)]
    with pytest.raises(ValueError, match=r"outside 0\.\.6"):
        env.reset(options={"index": 7})


@pytest.mark.usefixtures("stock_alfworld")
def test_what_may_lie_where_is_alfworlds_own_table() -> None:
    from alfworld.gen import constants

    for receptacle, kinds in affordances.CAN_CONTAIN.items():
        theirs = set(constants.VAL_RECEPTACLE_OBJECTS[receptacle])
        assert kinds == {kind for kind in theirs if not kind.endswith("Sliced")}


@pytest.mark.slow
@pytest.mark.usefixtures("stock_alfworld")
def test_the_stock_engine_plays_them_with_the_same_texts() -> None:
    from tutelage.envs.household.stock import StockEngine

    native, stock = NativeEngine(), StockEngine()
    for index in range(6):
        game = make_game(index, "valid_unseen", "tiny")
        assert native.reset(game) == stock.reset(game)
        for command in game.walkthrough:
            assert native.step(command) == stock.step(command)
    stock.close()
