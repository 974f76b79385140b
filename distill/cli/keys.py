"""`tutelage config`: every key of a config, what it may be, its default and its reason.

All of it is read from the sections themselves (distill/config): it is written in one place.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.objectives import NAMES, build, options_of
from tutelage.envs.names import unknown

WIDTH = 80
REQUIRED = "required"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key. kind: what it may be. default: as YAML has it, or `required`; empty: a section."""

    name: str
    kind: str
    default: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A section. path: where it stands, such as `rollout.context` or `tasks.NAME`; empty: the whole
    config."""

    path: str
    text: str
    keys: tuple[Key, ...]


def sections() -> list[Keys]:
    """Every section of a config, the whole first."""
    # the schema, not the classes: pydantic has resolved types, defaults and descriptions in it
    schema = RunConfig.model_json_schema()
    return list(_sections("", schema, schema["$defs"]))


def chosen(asked: str | None) -> list[Keys]:
    """The section of that path with those inside it, or the one key; None: all of them.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    every = sections()
    if asked is None:
        return every
    paths = {section.path for section in every if section.path}
    path = _with_names(asked, paths)
    if path in paths:
        return [one for one in every if one.path == path or one.path.startswith(path + ".")]
    above, _, name = path.rpartition(".")
    section = next((one for one in every if one.path == above), None)
    if section is None:
        raise ConfigError(unknown("section", above, paths))
    found: dict[str, tuple[Key, ...]] = {key.name: (key,) for key in section.keys}
    if above == "objective":  # an option's name: the losses that have it
        for option in {option for loss in NAMES for option in options_of(loss)} - {*found}:
            own = (key for key in section.keys if key.name in NAMES)
            found[option] = tuple(key for key in own if option in options_of(key.name))
    if name not in found:
        raise ConfigError(f"{above}: " * bool(above) + unknown("key", name, found))
    return [replace(section, keys=found[name])]


def as_text(found: list[Keys]) -> str:
    """For a terminal."""
    lines = []
    for section in found:
        lines += [section.path or "the whole config", *_wrapped(section.text, 2), ""]
        for key in section.keys:
            default = f", {REQUIRED}" if key.default == REQUIRED else f" = {key.default}"
            head = f"{key.name}: {key.kind}{default * bool(key.default)}"
            lines += [*_wrapped(head, 2, hang=2), *_wrapped(key.text, 6)]
        lines.append("")
    return "\n".join(lines)


def as_markdown(found: list[Keys]) -> str:
    """For docs/config.md."""
    lines = []
    for section in found:
        lines += [f"### {section.path or 'The whole config'}", "", section.text, ""]
        lines += ["| key | what it may be | default | |", "|---|---|---|---|"]
        for key in section.keys:
            # a bar would end the table's cell
            kind = key.kind.replace("|", "\\|")
            default = f"`{key.default}`" if key.default not in ("", REQUIRED) else key.default
            lines.append(f"| `{key.name}` | {kind} | {default} | {key.text} |")
        lines.append("")
    return "\n".join(lines)


def _sections(path: str, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[Keys]:
    keys, inside = [], []
    for name, one in schema["properties"].items():
        section, many = _section_of(one)
        default = json.dumps(one["default"], ensure_ascii=False) if "default" in one else ""
        if section:
            # 0: to have no default is not to have the default null
            default = "none" if one.get("default", 0) is None else ""
            inside.append((".".join(filter(None, (path, name, "NAME" * many))), section))
        elif name in schema.get("required", ()):
            default = REQUIRED
        elif not default:
            default = "{}"  # the schema has no default_factory; all of ours make an empty dict
        text = one.get("description") or defs.get(section, {}).get("description", "")
        kind = "{name: section}" if section and many else "section" if section else _kind(one)
        # pydantic writes oneOf for a union with a discriminator: only `objective` is one
        kind += " | [section, ...]" * ("oneOf" in one)
        keys.append(Key(name=name, kind=kind, default=_yaml(default), text=_line(text)))
    if path == "objective":
        keys += [_options(name) for name in NAMES]
    yield Keys(path=path, text=_line(schema["description"]), keys=tuple(keys))
    for inner, section in inside:
        yield from _sections(inner, defs[section], defs)


def _section_of(schema: Mapping[str, Any]) -> tuple[str, bool]:
    """(the section that a key holds, or nothing; whether it holds several by name)."""
    # oneOf from its end: the losses of a list also have `weight`, which a single one lacks
    for one in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())[::-1]):
        many = one.get("additionalProperties")
        for holder, by_name in ((one, False), (one.get("items"), False), (many, True)):
            if isinstance(holder, dict) and "$ref" in holder:
                return holder["$ref"].rpartition("/")[2], by_name
    return "", False


def _kind(schema: Mapping[str, Any]) -> str:
    """What a value may be."""
    if "anyOf" in schema:
        return " | ".join("none" if k == "null" else k for k in map(_kind, schema["anyOf"]))
    # pydantic writes a Literal of one value as const
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    what = schema["type"]
    if what == "array":
        inner = schema.get("prefixItems") or [schema["items"]]
        return f"[{', '.join(map(_kind, inner))}{', ...' * ('items' in schema)}]"
    if what == "object":
        values = schema.get("additionalProperties")
        return f"{{name: {_kind(values)}}}" if isinstance(values, dict) else "{...}"
    named = {"integer": "whole number", "string": "text", "boolean": "true | false"}
    if schema.get("format") == "date":
        return "day"
    return named.get(what, what) + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    # pydantic leaves a bound that stands behind a validator under its Python name, ge or le
    low, high = (schema.get(a, schema.get(b)) for a, b in (("minimum", "ge"), ("maximum", "le")))
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if schema["type"] == "integer" and low is not None:
        return f" from {low}"  # the upper bound only catches slips (values.MOST)
    said = [f" from {low}"] * (low is not None) + [f" above {above}"] * (above is not None)
    said += [f" to {high}"] * (high is not None) + [f" below {below}"] * (below is not None)
    return "".join(said)


def _options(name: str) -> Key:
    """An objective as a key of its section: its options with their defaults."""
    given = options_of(name).values()
    options = [f"{one.name}={_yaml(json.dumps(one.default))}" for one in given]
    text = _line((inspect.getdoc(build(name).rule) or "").split("\n\n")[0])
    return Key(name=name, kind=", ".join(options), default="", text=text.rstrip(":"))


def _line(text: str) -> str:
    return " ".join(text.split())


def _yaml(text: str) -> str:
    """JSON as people write it in YAML."""
    return "none" if text == "null" else text.replace('"', "")


def _with_names(asked: str, paths: set[str]) -> str:
    """`tasks.math.env` as `tasks.NAME.env`: a path has NAME where a config has anybody's name."""
    parts = asked.split(".")
    if len(parts) > 1 and f"{parts[0]}.NAME" in paths:
        parts[1] = "NAME"
    elif f"{asked}.NAME" in paths:  # `tasks` alone means the section that each name has
        parts.append("NAME")
    return ".".join(parts)


def _wrapped(text: str, indent: int, *, hang: int = 0) -> list[str]:
    later = " " * (indent + hang)
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=later)
