"""`tutelage/ALFWorld-v0`: which games it lists, what an episode is, and what it refuses."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import tutelage.envs  # noqa: F401  # registers the ids
from tutelage.envs.household.engine import Game, NativeEngine, View
from tutelage.envs.household.env import TASK_TYPES, HouseholdGameEnv
from tutelage.envs.household.games import make_game
from tutelage.envs.household.released import ReleasedGames, read_game

GAMES = 6  # one of each task type

Edit = Callable[[dict[str, Any]], None]


def write(folder: Path, game: Game, edit: Edit = lambda data: None) -> Path:
    """A game in the released layout; `edit` may spoil what goes into game.tw-pddl."""
    trial = folder / f"{game.task_type}-Thing-None-Place-1" / f"trial_{Path(game.name).name}"
    trial.mkdir(parents=True)
    data: dict[str, Any] = {
        "pddl_domain": game.domain,
        "grammar": game.grammar,
        "pddl_problem": game.problem,
        "solvable": True,
        "walkthrough": list(game.walkthrough),
    }
    edit(data)
    (trial / "game.tw-pddl").write_text(json.dumps(data))
    (trial / "traj_data.json").write_text(json.dumps(game.traj))
    return trial / "game.tw-pddl"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as alfworld-download leaves it, with one small game of each type."""
    root = tmp_path_factory.mktemp("alfworld")
    for index in range(GAMES):
        write(root / "json_2.1.1" / "valid_seen", make_game(index, "train", "tiny"))
    return root


@pytest.fixture
def own_release(release: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(release, tmp_path / "alfworld"))


def make(path: Path, **options: Any) -> gym.Env[str, str]:
    return gym.make("tutelage/ALFWorld-v0", split="valid_seen", path=path, **options)


def base(env: gym.Env[str, str]) -> HouseholdGameEnv:
    unwrapped = env.unwrapped
    assert isinstance(unwrapped, HouseholdGameEnv)
    return unwrapped


# --- episodes


@pytest.mark.parametrize("expert", [False, True, "planner"])
def test_follows_gymnasiums_rules(release: Path, expert: bool | str) -> None:
    check_env(make(release, expert=expert, render_mode="ansi").unwrapped)


def test_index_picks_the_game_and_lists_them_by_path(release: Path) -> None:
    env = make(release)
    seen = [env.reset(options={"index": i})[1] for i in range(base(env).num_episodes)]
    assert len(seen) == len(base(env)) == GAMES
    assert [info["game"] for info in seen] == sorted(info["game"] for info in seen)
    assert {info["task_type"] for info in seen} == set(TASK_TYPES)


def test_the_walkthrough_wins_once(release: Path) -> None:
    env = make(release)
    for index, file in enumerate(ReleasedGames("valid_seen", release).files):
        *first, last = read_game(file).walkthrough
        _, info = env.reset(options={"index": index})
        assert not info["success"]
        for action in first:
            assert env.step(action)[1:4] == (0.0, False, False)
        _, reward, terminated, truncated, info = env.step(last)
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_the_limit_counts_commands_that_do_nothing(release: Path) -> None:
    env = make(release, max_steps=3)
    env.reset(options={"index": 0})
    assert [env.step("sing")[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]
    with pytest.raises(gym.error.ResetNeeded):
        env.step("look")


@pytest.mark.parametrize("action", ["", "\0", "go to", "Look", "x" * 100_000, "é😀", None, 3])
def test_malformed_actions_are_answered(release: Path, action: Any) -> None:
    env = make(release)
    _, before = env.reset(options={"index": 0})
    observation, reward, _, _, info = env.step(action)
    assert (observation, reward) == ("Nothing happens.", 0.0)
    assert info == before


def test_a_seed_is_an_episode(release: Path) -> None:
    def episode(env: gym.Env[str, str], seed: int) -> list[Any]:
        rng, seen = random.Random(seed), [env.reset(seed=seed)]
        for _ in range(8):
            seen.append(env.step(rng.choice(seen[-1][-1]["admissible_actions"])))  # type: ignore[arg-type]
        return seen

    env = make(release, expert=True)
    once = [episode(env, seed) for seed in range(6)]
    assert [episode(env, seed) for seed in range(6)] == once
    assert [episode(make(release, expert=True), seed) for seed in range(6)] == once
    assert len({first[0][1]["game"] for first in once}) > 1


def test_the_explorer_wins_by_what_info_says(release: Path) -> None:
    env = make(release, expert=True)
    for index in range(GAMES):
        _, info = env.reset(options={"index": index})
        done = False
        while not done:
            assert info["expert_action"] in info["admissible_actions"]
            _, _, terminated, truncated, info = env.step(info["expert_action"])
            done = terminated or truncated
        assert info["success"]


def test_ansi_shows_the_transcript(release: Path) -> None:
    env = make(release, render_mode="ansi")
    opening, _ = env.reset(options={"index": 0})
    env.step(" look ")
    shown = env.render()
    assert isinstance(shown, str)
    assert shown.startswith(f"{opening}\n> look\nYou are in the middle of a room.")
    env.reset(options={"index": 1})
    assert "> look" not in str(env.render())


# --- the handcoded expert and the stock engine


@pytest.mark.slow
@pytest.mark.usefixtures("stock_alfworld")
def test_the_stock_engine_plays_the_same_episode(release: Path) -> None:
    native, stock = make(release, expert=True), make(release, expert=True, engine="textworld")
    for index in (0, 5):
        mine = native.reset(options={"index": index})
        assert stock.reset(options={"index": index}) == mine
        action = mine[1]["expert_action"]
        for _ in range(3):
            step = native.step(action)
            assert stock.step(action) == step
            action = step[-1]["expert_action"]


@pytest.mark.slow
@pytest.mark.usefixtures("stock_alfworld")
def test_handcoded_is_alfworlds_own(release: Path) -> None:
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredExpert
    from textworld.envs.pddl import PddlEnv

    infos = textworld.EnvInfos(won=True, admissible_commands=True)
    stock = AlfredExpert(AlfredDemangler(PddlEnv(infos)))
    env = make(release, expert="handcoded")
    for index in (0, 2):
        _, info = env.reset(options={"index": index})
        argv = sys.argv  # Fast Downward's translator overwrites it
        stock.load(info["game"])
        random.seed(info["game"])
        state = stock.reset()
        sys.argv = argv
        done = False
        while not done:
            (action,) = state["extra.expert_plan"]
            assert info["expert_action"] == action
            state, _, _ = stock.step(action)
            _, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
        assert info["success"]


@pytest.mark.usefixtures("stock_alfworld")
def test_handcoded_leaves_everybody_elses_randomness_alone(release: Path) -> None:
    env = make(release, expert="handcoded")
    random.seed(0)
    expected = random.Random(0).random()
    _, info = env.reset(options={"index": 0})
    for _ in range(5):
        _, _, _, _, info = env.step(info["expert_action"])
    assert random.random() == expected


@pytest.mark.parametrize("option", [{"engine": "textworld"}, {"expert": "handcoded"}])
def test_a_missing_extra_is_named(
    release: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, str]
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] in ("alfworld", "textworld")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "alfworld", None)
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tutelage\[alfworld\]'"):
        make(release, **option)


# --- which games


def test_the_same_games_as_alfworld_collects(own_release: Path) -> None:
    folder = own_release / "json_2.1.1" / "valid_seen"
    kept = ReleasedGames("valid_seen", own_release).files
    game = make_game(99, "train", "tiny")
    write(folder / "movable_recep", game)
    write(folder / "pick-AppleSliced-None", game)
    write(folder / "unsolvable", game, lambda data: data.update(solvable=False))
    write(folder / "unknown", game, lambda data: data.pop("solvable"))
    write(folder / "no_traj", game).with_name("traj_data.json").unlink()
    write(folder / "no_game", game).unlink()
    assert ReleasedGames("valid_seen", own_release).files == kept


def test_task_types_choose(release: Path) -> None:
    env = make(release, task_types=["look_at_obj_in_light"])
    assert env.reset()[1]["task_type"] == "look_at_obj_in_light"
    assert base(env).num_episodes == 1


def test_the_folder_comes_from_the_environment(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(release))
    env = gym.make("tutelage/ALFWorld-v0", split="valid_seen")
    assert base(env).num_episodes == GAMES


# --- refusals


@pytest.mark.filterwarnings("ignore:.*render_mode:UserWarning")
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"split": "valid_unsen"}, ValueError, "'valid_unsen': did you mean 'valid_unseen'"),
        ({"split": "train"}, FileNotFoundError, "alfworld-download"),
        ({"engine": "nativ"}, ValueError, "'nativ': did you mean 'native'"),
        ({"expert": "explore"}, ValueError, "'explore': did you mean 'explorer'"),
        ({"task_types": ["pick_two"]}, ValueError, "unknown task type 'pick_two'"),
        ({"task_types": []}, ValueError, "task_types is empty"),
        ({"max_step": 3}, ValueError, "did you mean 'max_steps'"),
        ({"max_steps": 0}, ValueError, "max_steps 0"),
        ({"render_mode": "ansy"}, ValueError, "render_mode 'ansy'"),
    ],
)
def test_bad_options_are_refused(
    release: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        gym.make("tutelage/ALFWorld-v0", **{"split": "valid_seen", "path": release, **options})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json_2.1.1" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no solvable game"):
        gym.make("tutelage/ALFWorld-v0", path=tmp_path)


@pytest.mark.parametrize("options", [{"index": GAMES}, {"index": -1}, {"index": "0"}, {"idx": 0}])
def test_bad_reset_options_are_refused(release: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="index"):
        make(release).reset(options=options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("game.tw-pddl", spoilt) for spoilt in ("", "{", "[]", "\xff", '{"solvable": true}')),
        *(("traj_data.json", spoilt) for spoilt in ("", "{", "[]", "\xff")),
    ],
)
def test_a_broken_file_is_named_when_it_is_played(
    own_release: Path, name: str, content: str
) -> None:
    files = ReleasedGames("valid_seen", own_release).files
    broken = files[2].with_name(name)
    broken.write_text(content, encoding="latin-1")
    env = make(own_release)
    with pytest.raises(ValueError, match="is broken") as caught:
        env.reset(options={"index": 2})
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(gym.error.ResetNeeded):  # nothing half-begun is left
        env.step("look")
    env.reset(options={"index": 1})
    assert env.step("look")[0] != "Nothing happens."


def test_a_problem_cut_short_is_named_when_it_is_played(own_release: Path) -> None:
    file = ReleasedGames("valid_seen", own_release).files[0]
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "pddl_problem": data["pddl_problem"][:500]}))
    with pytest.raises(ValueError, match="parentheses") as caught:
        make(own_release).reset(options={"index": 0})
    assert str(file) in str(caught.value)


# --- the package


def test_environments_load_neither_torch_nor_ray_nor_textworld(release: Path) -> None:
    code = (
        "import sys, gymnasium, tutelage.envs\n"
        f"env = gymnasium.make('tutelage/ALFWorld-v0', split='valid_seen', path={str(release)!r}, "
        "expert=True)\n"
        "env.reset(seed=0); env.step('look')\n"
        "print([m for m in ('torch', 'ray', 'textworld', 'alfworld') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_id_may_name_the_module_that_registers_it(release: Path) -> None:
    code = (
        "import gymnasium\n"
        "env = gymnasium.make('tutelage.envs:tutelage/ALFWorld-v0', split='valid_seen')\n"
        "print(env.reset(seed=0)[1]['success'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ALFWORLD_DATA": str(release)},
    )
    assert done.stdout.strip() == "False"


def test_an_expert_sees_every_view_in_turn(release: Path) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.seen: list[tuple[str, View]] = []

        def reset(self, game: Game, view: View) -> None:
            self.seen = [("", view)]

        def observe(self, action: str, view: View) -> None:
            self.seen.append((action, view))

        def act(self) -> str:
            return f"after {len(self.seen)}"

    env, watcher = base(make(release)), Watcher()
    env._expert = watcher
    games = ReleasedGames("valid_seen", release)
    engine = NativeEngine()
    for index in (1, 0):
        _, info = env.reset(options={"index": index})
        expected = [("", engine.reset(games[index]))]
        for action in ("look", "inventory", "fly"):
            info = env.step(f" {action} ")[-1]
            expected.append((action, engine.step(action)))
        assert watcher.seen == expected
        assert info["expert_action"] == "after 4"
