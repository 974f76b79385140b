"""What the layout promises: which wing may import which, what loads with what, what is packaged."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house import WINGS, floors, imports, module_arrows, opened, room_arrows

ROOT = Path(__file__).parent.parent
FLOORS = (
    "objectives",
    "config",
    "models",
    "engines student",
    "teachers plan",
    "run",
    "doctor studies tiny",
    "cli",
)
"""Of distill/, from the ground up: a wing imports only those of lower floors."""


def _sources(wing: str) -> list[Path]:
    return sorted((ROOT / wing).rglob("*.py"))


def _module(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(["tutelage", *(part for part in parts if part != "__init__")])


def _python(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("wing", WINGS)
def test_imports_point_down(wing: str) -> None:
    allowed = {f"tutelage.{name}" for name in WINGS[: WINGS.index(wing) + 1]}
    for source in _sources(wing):
        for name in imports(source):
            top, _, rest = name.partition(".")
            assert top not in WINGS, f"{source} imports {name}: say tutelage.{name}"
            if top == "tutelage":
                assert f"tutelage.{rest.split('.')[0]}" in allowed, f"{source} imports {name}"


def test_distill_stands_floor_on_floor() -> None:
    arrows = room_arrows(module_arrows(ROOT, "distill"))
    floor = {wing: number for number, wings in enumerate(FLOORS) for wing in wings.split()}
    assert arrows.keys() == floor.keys()
    upward = [(a, b) for a, targets in arrows.items() for b in targets if floor[b] >= floor[a]]
    assert upward == []


@pytest.mark.parametrize("wing", WINGS)
def test_no_modules_import_each_other_in_a_circle(wing: str) -> None:
    assert opened(module_arrows(ROOT, wing))[1] == []


def test_a_circle_is_found_and_floors_are_counted() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": set[str](), "d": {"a", "c"}}
    assert opened(arrows)[1] == []
    assert floors(arrows) == {"c": 1, "b": 2, "a": 3, "d": 4}
    assert [set(found) for found in opened(arrows | {"c": {"a"}})[1]] == [{"a", "b", "c"}]


def test_only_the_scheduler_imports_ray() -> None:
    users = {
        source.relative_to(ROOT).parts[0]
        for wing in WINGS
        for source in _sources(wing)
        if any(name.split(".")[0] == "ray" for name in imports(source))
    }
    assert users == {"scheduler"}


LOADS = {
    # each after those above it: what it loads, and what nobody has loaded by then
    "tutelage.envs": ("gymnasium", "torch transformers ray textworld alfworld"),
    "tutelage.envs.household.generated": ("gymnasium", "torch ray textworld alfworld"),
    "tutelage.envs.math.env": ("gymnasium", "torch ray datasets sympy"),
    "tutelage.scheduler.cluster": ("tutelage.scheduler.rollouts", "torch ray transformers"),
    "tutelage.distill.objectives": ("torch", "transformers ray"),
    "tutelage.distill.config.loading": ("pydantic", "transformers ray httpcore2"),
}


@pytest.fixture(scope="module")
def opened_modules() -> dict[str, set[str]]:
    """What a process has loaded after each of LOADS."""
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module({module!r}); print(*sys.modules)\n" for module in LOADS
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {module: set(line.split()) for module, line in zip(LOADS, lines, strict=True)}


@pytest.mark.parametrize("module", LOADS)
def test_modules_load_no_more_than_they_say(
    module: str, opened_modules: dict[str, set[str]]
) -> None:
    loaded, left_out = LOADS[module]
    assert loaded in opened_modules[module]
    assert opened_modules[module] & set(left_out.split()) == set()


def test_every_module_imports() -> None:
    names = [_module(source) for wing in WINGS for source in _sources(wing)]
    for name in names:
        importlib.import_module(name)


@pytest.mark.parametrize("wing", WINGS)
def test_a_part_imported_under_its_folder_name_says_so(wing: str) -> None:
    done = _python(f"import {wing}")
    assert f"ImportError: import tutelage.{wing}, not {wing}" in done.stderr


def test_every_folder_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    present = {
        ".".join(["tutelage", *path.parent.relative_to(ROOT).parts])
        for wing in (*WINGS, "configs")
        for path in (ROOT / wing).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == present
