"""The wheel is the whole project: installed elsewhere it imports, lists, trains, with no tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGED = ("envs", "scheduler", "evaluation", "distill", "configs")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder that would end up in later wheels."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in PACKAGED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and, of ours, only what it needs."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    # A line with a path adds the packages there, but runs no .pth of theirs: not the editable tree.
    site = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _install(python, wheel)
    return python.parent


def _install(python: Path, source: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(python), "install", "--no-deps"]
    _run(*pip, "--no-build-isolation", "--force-reinstall", str(source))


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    expected = {
        "tutelage/" + path.relative_to(ROOT).as_posix()
        for folder in PACKAGED
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        present = {name for name in archive.namelist() if name.startswith("tutelage/")}
    assert present == expected


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, tutelage\n"
        "found = list(pkgutil.walk_packages(tutelage.__path__, 'tutelage.'))\n"
        "for module in found: print(importlib.import_module(module.name).__file__)"
    )
    files = _run(installed / "python", "-c", code, cwd=tmp_path).split()
    modules = [path for folder in PACKAGED for path in (ROOT / folder).rglob("*.py")]
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def test_gymnasium_finds_the_environments(installed: Path, tmp_path: Path) -> None:
    plugged_in = version("gymnasium").startswith("0.")  # later versions must be told the module
    name = "tutelage/Math-v0" if plugged_in else "tutelage.envs:tutelage/Math-v0"
    code = f"import gymnasium; print(gymnasium.make({name!r}).reset(seed=0)[0])"
    assert "=" in _run(installed / "python", "-c", code, cwd=tmp_path)


def test_the_command_line_lists_them(installed: Path, tmp_path: Path) -> None:
    listed = _run(installed / "tutelage", "envs", cwd=tmp_path)
    assert {"tutelage/ALFWorld-v0", "tutelage/Household-v0", "tutelage/Math-v0"} <= set(
        listed.split()
    )


def test_a_third_party_package_trains(installed: Path, tmp_path: Path) -> None:
    example = tmp_path / "guess_number"
    shutil.copytree(ROOT / "examples" / "guess_number", example)
    _install(installed / "python", example)
    command = (installed / "tutelage", "train", example / "config.yaml")
    _run(*command, "steps=3", "evaluation={every: 0}", cwd=tmp_path)
    assert len((tmp_path / "runs/guess_number/metrics.jsonl").read_text().splitlines()) == 3
