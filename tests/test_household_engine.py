"""The native household engine shows the very bytes that TextWorld's engine shows."""

import json
import lzma
import pickle
import random
from dataclasses import replace
from importlib import resources
from itertools import islice
from pathlib import Path

import pytest

from tutelage.envs.household.engine import NOTHING_HAPPENS, Engine, Game, NativeEngine, View
from tutelage.envs.household.games import make_game
from tutelage.envs.household.stock import StockEngine
from tutelage.envs.household.world import UnsupportedGame

HERE = Path(__file__).parent
RELEASED = HERE.parents[1] / "shared" / "data" / "alfworld"
SHIPPED = resources.files("tutelage.envs.household.data")

# Visits every oddity of data/corners.pddl once; the last command wins.
TOUR = """
look|inventory|help|examine fridge 1|go to cabinet 2|look|go to cabinet 1|go to cabinet 2
examine cabinet 2|open cabinet 2|take mug 1 from cabinet 1|open cabinet 1|examine cabinet 2
take mug 1 from cabinet 2|take mug 1 from cabinet 1|inventory|examine mug 1|examine apple 1
look|move mug 1 to cabinet 1|look|take mug 1 from cabinet 1|move mug 1 to cabinet 2|look
close cabinet 1|close cabinet 2|look|go to countertop 1|look|take apple 2 from countertop 1
examine apple 2|examine sinkbasin 1|examine countertop 1|clean apple 2 with sinkbasin 1
examine apple 2|move apple 2 to countertop 1|look|take apple 2 from sinkbasin 1|look
move apple 2 to countertop 1|look|take knife 1 from countertop 1|slice apple 2 with knife 1
slice apple 2 with knife 1|go to cabinet 2|slice apple 1 with knife 1|go to countertop 1
move knife 1 to sinkbasin 1|move knife 1 to countertop 1|take apple 2 from countertop 1
examine apple 2|go to sink 1|clean apple 2 with sink 1|go to desk 1|use desklamp 1|look
use desklamp 1|examine desklamp 1|examine bowl 1|go to microwave 1|heat apple 2 with microwave 1
examine apple 2|cool apple 2 with fridge 1|examine apple 2|heat apple 2 with microwave 1
move apple 2 to fridge 1|open fridge 1|examine fridge 1|GO TO DESK 1| look |look around||open
take egg 1 from fridge 1|move apple 2 to fridge 1
"""
CORNERS_TOUR = [command for line in TOUR.strip().split("\n") for command in line.split("|")]


def corners() -> Game:
    """The household of data/corners.pddl, in alfworld's own domain and grammar."""
    return Game(
        name="corners",
        domain=(SHIPPED / "alfred.pddl").read_text(),
        grammar=(SHIPPED / "alfred.twl2")
        .read_text()
        .replace("UNKNOWN GOAL", "put a hot apple in fridge"),
        problem=(HERE / "data" / "corners.pddl").read_text(),
        task_type="pick_heat_then_place_in_recep",
    )


def released(count: int) -> list[Game]:
    """Some released games, in the released domain and grammar."""
    if not RELEASED.is_dir():
        pytest.skip(f"no released games in {RELEASED}")
    domain = (RELEASED / "domain.pddl").read_text()
    grammar = (RELEASED / "grammar.twl2").read_text()
    with lzma.open(RELEASED / "games.jsonl.xz", "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in islice(lines, 0, 100 * count, 100)]
    return [
        Game(
            name=game["trial"],
            domain=domain,
            grammar=grammar.replace("UNKNOWN GOAL.", game["goal"]),
            problem=game["pddl_problem"],
            task_type=game["traj"]["task_type"],
            walkthrough=tuple(game["walkthrough"]),
        )
        for game in found
    ]


def play(engine: Engine, game: Game, commands: list[str]) -> list[View]:
    """Every view of an episode."""
    return [engine.reset(game), *map(engine.step, commands)]


def wander(game: Game, steps: int, seed: int) -> list[str]:
    """Commands as a poor player gives them: half of them sensible, a tenth of them nonsense."""
    rng, engine = random.Random(seed), NativeEngine()
    commands: list[str] = []
    view = engine.reset(game)
    for _ in range(steps):
        doing = [c for c in view.admissible if not c.startswith(("go to", "examine"))]
        nonsense = ["", "x" * 5000, "Look", "take", "go to", "put a in b", "é\0😀", *commands[-1:]]
        pool = rng.choices([nonsense, doing, view.admissible], [1, 5, 4])[0]
        commands.append(rng.choice(pool))
        view = engine.step(commands[-1])
    return commands


def assert_same(game: Game, commands: list[str]) -> None:
    stock = StockEngine()
    for n, (mine, theirs) in enumerate(
        zip(play(NativeEngine(), game, commands), play(stock, game, commands), strict=True)
    ):
        assert mine == theirs, f"{game.name} after {commands[:n]}"
    stock.close()


# --- against TextWorld


@pytest.mark.usefixtures("stock_alfworld")
@pytest.mark.slow
def test_corner_cases_equal_textworlds() -> None:
    assert_same(corners(), CORNERS_TOUR)


@pytest.mark.usefixtures("stock_alfworld")
@pytest.mark.slow
def test_corner_cases_equal_textworlds_in_the_released_dialect() -> None:
    game = released(1)[0]
    grammar = (RELEASED / "grammar.twl2").read_text().replace("UNKNOWN GOAL", "put a hot apple")
    assert_same(replace(corners(), domain=game.domain, grammar=grammar), CORNERS_TOUR)


@pytest.mark.usefixtures("stock_alfworld")
@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_released_games_equal_textworlds(number: int) -> None:
    game = released(number + 1)[number]
    assert_same(game, [*wander(game, 15, seed=number), *game.walkthrough])


@pytest.mark.usefixtures("stock_alfworld")
@pytest.mark.slow
@pytest.mark.parametrize("index", [2, 5])
def test_generated_games_equal_textworlds(index: int) -> None:
    game = make_game(index)
    assert_same(game, [*wander(game, 15, seed=index), *game.walkthrough])


# --- by itself


def test_first_text_lists_receptacles_and_the_task() -> None:
    view = NativeEngine().reset(corners())
    # Numbers count down over the sorted identifiers, and "basin" is in the name.
    assert view.observation == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see a cabinet 2, a "
        "cabinet 1, a countertop 1, a desk 1, a fridge 1, a microwave 1, a sinkbasin 1, and a "
        "sink 1.\n\nYour task is to: put a hot apple in fridge."
    )
    assert view.admissible == (
        *("go to cabinet 1", "go to cabinet 2", "go to countertop 1", "go to desk 1"),
        *("go to fridge 1", "go to microwave 1", "go to sink 1", "go to sinkbasin 1"),
        *("help", "inventory", "look"),
    )
    assert not view.won


@pytest.mark.parametrize(
    ("commands", "observation"),
    [
        (["look"], "You are in the middle of a room. Looking quickly around you, you see nothing."),
        (["go to desk 1", "go to desk 1"], NOTHING_HAPPENS),
        # Both cabinets stand at one place: neither can be gone to from the other.
        (["go to cabinet 1", "go to cabinet 2"], NOTHING_HAPPENS),
        (["go to desk 1", "look"], "You are facing the desk 1. Next to it, you see nothing."),
        (["go to fridge 1"], "You arrive at fridge 1. The fridge 1 is closed."),
        (
            ["go to fridge 1", "open fridge 1"],
            "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1.",
        ),
        (
            ["go to desk 1"],
            "You arrive at desk 1. On the desk 1, you see a bowl 1, a desklamp 1, and a spoon 1.",
        ),
        (["go to desk 1", "examine spoon 1"], NOTHING_HAPPENS),
        (
            ["go to desk 1", "take bowl 1 from desk 1", "examine bowl 1"],
            "This is a normal bowl 1. In it, you see a spoon 1.",
        ),
        (["go to desk 1", "use desklamp 1", "use desklamp 1"], "You turn on the desklamp 1."),
        (
            ["go to countertop 1", "take apple 2 from countertop 1", "inventory"],
            "You are carrying: a apple 2.",
        ),
    ],
)
def test_texts(commands: list[str], observation: str) -> None:
    assert play(NativeEngine(), corners(), commands)[-1].observation == observation


def test_the_tour_wins_only_with_its_last_command() -> None:
    views = play(NativeEngine(), corners(), CORNERS_TOUR)
    assert [view.won for view in views] == [False] * len(CORNERS_TOUR) + [True]


def test_only_the_released_domain_cleans_in_a_bare_sink() -> None:
    commands = ["go to countertop 1", "take apple 2 from countertop 1", "go to sink 1"]
    clean = "clean apple 2 with sink 1"
    assert clean not in play(NativeEngine(), corners(), commands)[-1].admissible
    game = replace(corners(), domain=released(1)[0].domain)
    assert clean in play(NativeEngine(), game, commands)[-1].admissible


def test_nonsense_changes_nothing() -> None:
    engine = NativeEngine()
    game = make_game(0)
    before = engine.reset(game)
    for command in ["", "go to", "LOOK", "look.", "\0", "go to desk 99", "x" * 100_000]:
        assert engine.step(command) == replace(before, observation=NOTHING_HAPPENS)
    assert engine.step("  look\n").observation != NOTHING_HAPPENS


def test_a_reset_forgets_the_episode_before() -> None:
    engine = NativeEngine()
    games = [make_game(i) for i in range(3)]
    fresh = [play(NativeEngine(), game, list(game.walkthrough)) for game in games]
    for _ in range(2):
        assert [play(engine, game, list(game.walkthrough)) for game in games] == fresh
    assert fresh[0][-1].won


def test_admissible_commands_are_exactly_those_that_do_something() -> None:
    game = make_game(3)
    commands = wander(game, 200, seed=0)
    for before, command, after in zip(
        play(NativeEngine(), game, commands),
        commands,
        play(NativeEngine(), game, commands)[1:],
        strict=False,
    ):
        assert list(before.admissible) == sorted(set(before.admissible))
        assert (command.strip() in before.admissible) == (after.observation != NOTHING_HAPPENS)


def test_what_experts_may_ask() -> None:
    engine = NativeEngine()
    engine.reset(corners())
    assert (engine.holding, engine.location, engine.visible) == (None, (), {})
    engine.step("go to cabinet 1")
    assert engine.location == ("cabinet 2", "cabinet 1")
    assert engine.visible == {"cabinet 1": ()}  # the other one is closed
    engine.step("open cabinet 2")
    engine.step("take mug 1 from cabinet 2")
    assert engine.holding == "mug 1"
    assert engine.contents["cabinet 2"] == ("apple 1",)


def test_games_can_be_sent_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(make_game(1))) == make_game(1)


# --- refusals


def refusal(game: Game) -> str:
    with pytest.raises(UnsupportedGame) as caught:
        NativeEngine().reset(replace(game, name="folder/game.tw-pddl"))
    message = str(caught.value)
    assert message.startswith("folder/game.tw-pddl: ") and "\n" not in message
    assert 'engine="textworld"' in message
    return message


def test_another_domain_is_refused() -> None:
    game = corners()
    assert "domain" in refusal(replace(game, domain=game.domain.replace("(holdsAny ?a)", "")))


def test_another_grammar_is_refused() -> None:
    game = corners()
    assert "grammar" in refusal(replace(game, grammar=game.grammar.replace("You open", "Open")))


def test_a_goal_that_is_code_to_the_grammar_is_refused() -> None:
    game = corners()
    assert "code" in refusal(replace(game, grammar=game.grammar.replace("hot apple", "#task#")))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("(:goal", "(:gaol", "no :goal"),
        ("(:init", "(:init (holds agent1 Egg_bar_1)", "holds agent1 egg_bar_1"),
        ("(:init", "(:init (openable Egg_bar_1)", "types"),
        ("(:init", "(:init ()", "malformed"),
        ("(:init", "(:init ((a))", "malformed"),
        ("(:init", "(:init (receptacleAtLocation Desk_bar_1 loc_a)", "two locations"),
        ("(:init", "(:init (atLocation agent1 loc_a)", "2 agents"),
        ("(isHot ?o)", "(checked ?r)", "checked"),
        ("(define", "((define", "parentheses"),
        ("(define", ") (define", "')' too many"),
    ],
)
def test_problems_outside_the_domain_are_refused(old: str, new: str, reason: str) -> None:
    game = corners()
    assert reason in refusal(replace(game, problem=game.problem.replace(old, new, 1)))


def test_empty_and_cut_off_problems_are_refused() -> None:
    game = corners()
    for problem in ["", "nonsense", game.problem[: len(game.problem) // 2]]:
        assert "parentheses" in refusal(replace(game, problem=problem))
