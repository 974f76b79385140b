"""What the layout promises: which part may import which, what loads with what, what is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("envs", "scheduler", "evaluation", "distill")  # each imports only those before it


def _sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def _module(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(["tutelage", *(part for part in parts if part != "__init__")])


def _imports(source: Path) -> Iterator[str]:
    """The full name of everything that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: a relative import; say tutelage.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _python(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    allowed = {f"tutelage.{name}" for name in LAYERS[: LAYERS.index(layer) + 1]}
    for source in _sources(layer):
        for name in _imports(source):
            top, _, rest = name.partition(".")
            assert top not in LAYERS, f"{source} imports {name}: say tutelage.{name}"
            if top == "tutelage":
                assert f"tutelage.{rest.split('.')[0]}" in allowed, f"{source} imports {name}"


def test_only_the_scheduler_imports_ray() -> None:
    users = {
        source.relative_to(ROOT).parts[0]
        for layer in LAYERS
        for source in _sources(layer)
        if any(name.split(".")[0] == "ray" for name in _imports(source))
    }
    assert users == {"scheduler"}


@pytest.mark.parametrize(
    ("module", "loaded", "left_out"),
    [
        ("tutelage.distill.objectives", "torch", "transformers ray"),
        ("tutelage.envs", "gymnasium", "torch transformers ray textworld alfworld"),
        ("tutelage.envs.household.generated", "gymnasium", "torch ray textworld alfworld"),
        ("tutelage.envs.math.env", "gymnasium", "torch ray datasets sympy"),
        ("tutelage.scheduler.cluster", "tutelage.scheduler.rollouts", "torch ray transformers"),
    ],
)
def test_modules_load_no_more_than_they_say(module: str, loaded: str, left_out: str) -> None:
    done = _python(f"import sys, {module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert loaded in modules
    assert modules & set(left_out.split()) == set()


def test_every_module_imports() -> None:
    names = [_module(source) for layer in LAYERS for source in _sources(layer)]
    done = _python(f"import importlib\nfor name in {names}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", LAYERS)
def test_a_part_imported_under_its_folder_name_says_so(layer: str) -> None:
    done = _python(f"import {layer}")
    assert f"ImportError: import tutelage.{layer}, not {layer}" in done.stderr


def test_every_folder_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    present = {
        ".".join(["tutelage", *path.parent.relative_to(ROOT).parts])
        for layer in (*LAYERS, "configs")
        for path in (ROOT / layer).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == present
