"""`tutelage config`: every key with what it may be, its default and its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from tutelage.distill.cli.keys import as_text, chosen, sections
from tutelage.distill.cli.main import main
from tutelage.distill.config.run import RunConfig
from tutelage.distill.objectives import NAMES


def _models(value: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names."""
    if isinstance(value, type) and issubclass(value, BaseModel):
        yield value
    for inner in getattr(value, "__args__", ()):
        yield from _models(inner)


def _paths(model: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{path}{name}"
        for inner in _models(field.annotation):
            by_name = "NAME." if getattr(field.annotation, "__origin__", None) is dict else ""
            yield from _paths(inner, f"{path}{name}.{by_name}")


def test_every_key_is_there_once_with_a_reason() -> None:
    found = [f"{one.path}.{key.name}".lstrip(".") for one in sections() for key in one.keys]
    assert sorted(found) == sorted({*_paths(RunConfig), *(f"objective.{name}" for name in NAMES)})
    for section in sections():
        assert section.text
        for key in section.keys:
            assert len(key.text) > 8, f"{section.path}.{key.name}"


def _default(path: str, name: str) -> str:
    [section] = [one for one in sections() if one.path == path]
    return {key.name: key.default for key in section.keys}[name]


def test_defaults_are_those_of_the_config() -> None:
    assert _default("", "steps") == "required"
    assert _default("rollout", "timeout") == "60.0"
    assert _default("evaluation", "modes") == "[greedy, sampled]"
    assert _default("", "cluster") == "none"
    assert _default("tasks.NAME", "env_args") == "{}"


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("rollout", ["rollout", "rollout.context"]),
        ("tasks", ["tasks.NAME", "tasks.NAME.guidance"]),
        ("tasks.household.guidance", ["tasks.NAME.guidance"]),
        ("teachers.one.vllm.dtype", ["teachers.NAME.vllm"]),
        ("steps", [""]),
    ],
)
def test_a_section_comes_with_those_inside_it(asked: str, shown: list[str]) -> None:
    assert [section.path for section in chosen(asked)] == shown


def test_one_key_comes_alone() -> None:
    [section] = chosen("optimizer.lr")
    assert [key.name for key in section.keys] == ["lr"]


def test_an_option_of_objectives_shows_those_that_have_it() -> None:
    [section] = chosen("objective.tau")
    shown = {key.name for key in section.keys}
    assert shown == {"trust_region", "entropy_aware", "advantage_gated"}


def test_what_is_required_is_not_shown_as_a_default() -> None:
    lines = as_text(chosen(None)).splitlines()
    assert "  run: text, required" in lines
    assert not [line for line in lines if line.endswith("= required")]


def test_an_objective_tells_its_options() -> None:
    text = " ".join(as_text(chosen("objective.local_support")).split())
    assert "k=32, support=teacher, renormalize=true" in text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("rolout", "did you mean 'rollout'?"),
        ("tasks.math.env_arg", "tasks.NAME: unknown key 'env_arg': did you mean 'env_args'?"),
        ("a.b.c", "unknown section 'a.b'"),
    ],
)
def test_a_slip_is_named(asked: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["config", asked])
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_pages_are_80_columns_wide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["config"])
    assert error.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 200
    assert max(map(len, lines)) <= 80
