"""What README, CONTRIBUTING and docs/ name is there: links, files, keys, commands, configs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house import WINGS
from tutelage.distill.cli import main
from tutelage.distill.cli.keys import as_markdown, sections
from tutelage.distill.config.faults import settled
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.reading import parse
from tutelage.distill.config.run import RunConfig
from tutelage.distill.objectives import NAMES, options_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPS = tuple(f"{top}/" for top in (*WINGS, "benchmarks", "configs", "docs", "examples", "tests"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language; "": of none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [block for said, block in found if said == language]


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    heads = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", _prose(page))
    for link in links:
        if link.startswith("https:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in _anchors(target), link


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    words = re.findall(r"[\w.*/-]+", page.read_text(encoding="utf-8"))
    named = {word.rstrip(".") for word in words if word.startswith(TOPS)}
    for name in named:
        assert name.isupper() or any(ROOT.glob(name.replace("NAME", "*"))), name


def test_the_tree_is_the_tree() -> None:
    """Its folders and files are there, and every folder of distill/ is in it."""
    (tree,) = [block for block in _blocks(ROOT / "README.md", "") if "envs/  " in block]
    top, named = ROOT, set()
    for line in tree.splitlines():
        path = line.split()[0]
        top = top if line.startswith(" ") else ROOT / path
        folder = top / path
        for name in re.findall(r"\w+(?:\.py|/)", line):
            assert any((place / name).exists() for place in (ROOT, top, folder)), line
        named.add(folder)
    assert {path.parent for path in (ROOT / "distill").glob("*/__init__.py")} <= named


@each_page
def test_keys_that_are_named_exist(page: Path) -> None:
    sections = "|".join(RunConfig.model_fields)
    for key in re.findall(rf"`((?:{sections})\.[\w.]+)(?:=[^`]*)?`", _prose(page)):
        settled(RunConfig, _nested(key))


def _nested(key: str) -> Any:
    """A config with this dotted key alone."""
    first, _, rest = key.partition(".")
    return {first: _nested(rest)} if rest else {first: None}


@each_page
def test_configs_are_configs(page: Path) -> None:
    for block in _blocks(page, "yaml"):
        parse_config(_whole(parse(block)), page.name)


def test_every_key_stands_in_the_docs() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page.partition("<!-- keys -->\n")[2] == as_markdown(sections()), (
        "sed -i '/<!-- keys -->/q' docs/config.md; tutelage config --markdown >> docs/config.md"
    )


def _whole(data: dict[str, Any]) -> dict[str, Any]:
    """A config with the sections of a snippet: each teacher has a task, each task its teacher."""
    task = {"env": "tutelage/Math-v0", "teacher": dict.fromkeys(data.get("teachers", {}), 1)}
    base = {"run": "runs/x", "steps": 2, "student": {"model": "builtin:start"}}
    whole = base | {"tasks": {"any": task}, "objective": {"name": "imitation"}} | data
    if "teachers" not in data:
        taught = [one["teacher"] for one in whole["tasks"].values() if one["teacher"]]
        whole["teachers"] = {name: {"model": "builtin:start"} for name in taught}
    return whole


def _commands(page: Path) -> Iterator[str]:
    for block in _blocks(page, ""):
        yield from (line for line in block.splitlines() if line.startswith("tutelage "))


@each_page
def test_commands_are_taken(page: Path) -> None:
    for line in _commands(page):
        _, *words = shlex.split(line, comments=True)
        main._parse([word.strip("[]") for word in words if word not in ("[key=value", "...]")])


@each_page
def test_code_runs(page: Path) -> None:
    for block in _blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})


def test_the_table_of_objectives_has_their_options_and_defaults() -> None:
    """It groups them by hand, what they may be beside them; tutelage config has what holds."""
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.M)
    found = {name: re.findall(r"`(\w+)(?:: ([^\\` ]+))?", options) for name, options in rows[:8]}
    assert {*found} == {*NAMES}
    for name, options in found.items():
        known = options_of(name)
        assert [key for key, _ in options] == [key for key in known if key != "behavior"], name
        for key, value in options:
            assert yaml.safe_load(value or "null") == known[key].default, (name, key)
