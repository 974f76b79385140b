"""Tells what is wrong with a configuration, in one line that names the key and the cure.

`settled` comes before pydantic. It walks the data along the sections' annotations, refuses unknown
keys with the nearest known one of any section, and turns each unquoted scalar into what its key
takes. `said` then puts pydantic's faults into words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tutelage.distill.config.reading import Scalar, scalar
from tutelage.envs.names import nearest, synonym, unknown

DEEPEST = 40  # levels of nesting; Python's own recursion would end at some hundreds

NOT_THERE = {
    "top_k": "there is no top-k sampling: rollout.top_p cuts the tail",
    "min_p": "there is no min-p sampling: rollout.top_p cuts the tail",
    "repetition_penalty": "there is none: the student learns from samples of its own policy",
    "fp16": "there is no float16: student.dtype is float32 or bfloat16",
    "bf16": "set student.dtype=bfloat16",
    "trust_remote_code": "code of a model's own is never run",
}
"""Keys of other systems that have no counterpart, and what to do instead."""

# of the section `objective`, whose fields do not list the options of the losses
OBJECTIVE_OPTIONS = ("k", "support", "direction", "renormalize", "gamma", "beta", "tail")


@dataclass(frozen=True, slots=True)
class Like:
    """Marks a plain dict that holds some keys of a section. A model would fill in the defaults, and
    nobody could tell which keys were given."""

    section: type[BaseModel]


def settled(root: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """The data as pydantic can read it into `root`, without Scalars.

    Raises:
        ValueError: `key.path: what is wrong`.
    """
    found: dict[str, Any] = _Walk(root).section(root, data, "", 0)
    return found


class _Walk:
    def __init__(self, root: type[BaseModel]) -> None:
        self._root = root

    def section(
        self, section: type[BaseModel], data: Mapping[str, Any], where: str, depth: int
    ) -> dict[str, Any]:
        found = {}
        for key, value in data.items():
            path = _joined(where, key)
            field = section.model_fields.get(key) if isinstance(key, str) else None
            if field is None and section.model_config.get("extra") != "allow":  # else: options
                raise ValueError(f"{path}: {unknown_key(self._root, section, key, where)}")
            shapes = [Any] if field is None else list(_shapes_of(field))
            found[key] = self.value(shapes, value, path, depth + 1)
        return found

    def value(self, shapes: Sequence[Any], value: Any, where: str, depth: int) -> Any:
        """shapes: what the key may hold."""
        if depth > DEEPEST:
            raise ValueError(f"{where}: is nested too deeply")
        if isinstance(value, Scalar):
            return _of_scalar(shapes, value, where)
        if isinstance(value, Mapping):
            return self._mapping(shapes, value, where, depth)
        if isinstance(value, list | tuple):
            items = [one for shape in shapes for one in _items(shape)] or [Any]
            return [
                self.value(items, item, f"{where}.{at}", depth + 1) for at, item in enumerate(value)
            ]
        _check(value, where)
        return value

    def _mapping(
        self, shapes: Sequence[Any], value: Mapping[str, Any], where: str, depth: int
    ) -> dict[str, Any]:
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} is not text: put it in quotes")
            _check(key, where)
        for shape in shapes:
            if isinstance(shape, type) and issubclass(shape, BaseModel):
                return self.section(shape, value, where, depth)
        inner = [
            one for shape in shapes if get_origin(shape) is dict for one in get_args(shape)[1:]
        ]
        inner = [one for kind in inner for one in _shapes(kind)] or [Any]
        return {
            key: self.value(inner, item, _joined(where, key), depth + 1)
            for key, item in value.items()
        }


def _of_scalar(shapes: Sequence[Any], scalar: Scalar, where: str) -> Any:
    """Its text where text is taken, unless it says true, false or null; else its value."""
    # a bool is an int in Python
    number = isinstance(scalar.value, int | float) and not isinstance(scalar.value, bool)
    if str in shapes and (scalar.doubt or number):
        return scalar.text
    if scalar.doubt:
        raise ValueError(f"{where}: {scalar.doubt}")
    _check(scalar.value, where)
    return scalar.value


def _check(value: Any, where: str) -> None:
    """Raises ValueError for infinity, NaN, and text that cannot be written as UTF-8."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: it must be a finite number (got {value})")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: the text {value!r:.60} holds half a character (a lone surrogate)"
            ) from None


def _joined(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _shapes_of(field: FieldInfo) -> Iterator[Any]:
    yield from (note.section for note in field.metadata if isinstance(note, Like))
    yield from _shapes(field.annotation)


def _shapes(annotation: Any) -> Iterator[Any]:
    """What an annotation allows, its unions taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        first, *notes = get_args(annotation)
        yield from (note.section for note in notes if isinstance(note, Like))
        yield from _shapes(first)
    elif origin in (Union, UnionType):
        for one in get_args(annotation):
            yield from _shapes(one)
    else:
        yield annotation


def _items(shape: Any) -> Iterator[Any]:
    """What the items of a list or tuple may be."""
    if get_origin(shape) in (list, tuple):
        for one in get_args(shape):
            if one is not Ellipsis:
                yield from _shapes(one)


# --- unknown keys --------------------------------------------------------------------------------


def unknown_key(root: type[BaseModel], section: type[BaseModel], key: object, where: str) -> str:
    """The message about a key that the section at `where` does not have."""
    if str(key) in NOT_THERE:
        return f"unknown key {key!r}: {NOT_THERE[str(key)]}"
    known, said = section.model_fields, unknown("key", key, section.model_fields)
    if section is not root and key in root.model_fields:
        return f"{key!r} is a key of the run's, at the top of the file; here: {said}"
    if synonym(key, known) or not (places := _places(root, key, where)):
        return said
    meant = [*places, *([f"{near} here"] if (near := nearest(key, known)) else [])]
    return (
        f"unknown key {key!r}: did you mean {' or '.join(meant)}? here: {', '.join(sorted(known))}"
    )


def _places(root: type[BaseModel], key: object, where: str) -> list[str]:
    """The paths of keys in other sections that `key` may mean: at most two, those of the same
    section's kind first."""
    paths = [*_paths(root, ""), *(f"objective.{option}" for option in OBJECTIVE_OPTIONS)]
    meant = synonym(key, [path.rpartition(".")[2] for path in paths])
    kind, *name = where.split(".")[:2]
    own = f"{kind}.{name[0]}" if name else kind
    found = []
    for path in paths:
        if path.rpartition(".")[2] == meant:
            if name and path.startswith(f"{kind}.NAME."):
                path = path.replace("NAME", name[0], 1)
            elif kind == "tasks" and path.startswith(("rollout.", "objective.")):
                path = f"{own}.{path}"  # a task may have it for itself
            found.append(path)
    return sorted(found, key=lambda path: not path.startswith(own))[:2]


def _paths(section: type[BaseModel], where: str) -> Iterator[str]:
    """The path of every key; NAME stands for a task's or teacher's name. The keys of a task's own
    objective and rollout are left out: they are the run's."""
    for key, field in section.model_fields.items():
        path = _joined(where, key)
        yield path
        for shape in _shapes(field.annotation):
            many = get_origin(shape) is dict
            for kind in get_args(shape)[1:] if many else [shape]:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from _paths(kind, f"{path}.NAME" if many else path)


# --- what pydantic says --------------------------------------------------------------------------

_WORDED = {
    "int_type": "it must be a whole number",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "string_type": "it must be text, in quotes where it looks like something else",
    "tuple_type": "it must be a list",
    "dict_type": "it must be a mapping, such as {key: value}",
    "model_type": "it must be a section of keys, such as {key: value}",
    "string_too_short": "it must not be empty",
    "missing": "required, and not given",
    "finite_number": "it must be a finite number",
}


def said(error: ValidationError, data: Any) -> str:
    """The first fault in one line, `.key.path: what is wrong`, or `: what is wrong` where it is the
    whole data's. data: what was read."""
    first, place = _meant(error, data)
    kind, value = first["type"], first.get("input")
    key = "".join(f".{part}" for part in place)
    message = _WORDED.get(kind, first["msg"].removeprefix("Value error, "))
    # pydantic's own words, turned to "it must be ..."
    message = message.replace("Tuple should", "it must").replace(" after validation", "")
    message = message.replace("Input should be", "it must be").replace("List should", "it must")
    if kind == "literal_error" and (near := nearest(value, _choices(first))):
        message += f": did you mean {near!r}?"
    if kind.endswith("_type") and isinstance(value, str) and kind in ("int_type", "float_type"):
        message += ", without quotes" if _is_number(value) else ""
    # A section is too long to show, what is missing has no value, and some messages show it.
    hidden = (
        isinstance(value, Mapping)
        or kind == "missing"
        or (kind == "value_error" and "(got" in message)
    )
    return f"{key}: {message}" + ("" if hidden else f" (got {shown(value)})")


def _meant(error: ValidationError, data: Any) -> tuple[Any, tuple[int | str, ...]]:
    """The first fault and its place. Of a union pydantic tells the faults of all branches: the one
    furthest inside the data is that of the branch that was meant."""
    faults = [
        (fault, tuple(_written(fault["loc"], data, missing=fault["type"] == "missing")))
        for fault in error.errors()
    ]
    _, place = faults[0]
    branches = [one for one in faults if one[1][: len(place)] == place]
    return max(branches, key=lambda one: len(one[1]))


def _written(loc: Sequence[int | str], data: Any, *, missing: bool = False) -> Iterator[int | str]:
    """The parts of pydantic's `loc` that are in the data, and the key that is missing there. `loc`
    also names a union's branch, which nobody wrote."""
    for at, part in enumerate(loc):
        if isinstance(data, Mapping) and part in data:
            data = data[str(part)]
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif at < len(loc) - 1 or not missing or (isinstance(part, str) and _branch(part, data)):
            continue
        yield part


def _branch(part: str, data: Any) -> bool:
    """Whether a part of pydantic's `loc` names a union's branch, such as `tuple[...]`, and no
    key."""
    return not isinstance(data, Mapping) or "[" in part


def _choices(fault: Mapping[str, Any]) -> list[str]:
    # pydantic has them only as one text: 'a', 'b' or 'c'
    return str(fault["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")


def _is_number(text: str) -> bool:
    return isinstance(found := scalar(text), Scalar) and isinstance(found.value, int | float)


def shown(value: Any) -> str:
    """A value as YAML writes it, cut short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def printable(message: str) -> str:
    """`message` as one line, with line ends and control characters that it quotes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


class ConfigError(ValueError):
    """The user's mistake: its text names the file, the key and the cure."""


AnySection = TypeVar("AnySection", bound=BaseModel)


def validated(kind: type[AnySection], data: Any, where: str) -> AnySection:
    """A section that is checked by itself, such as a task's; its faults begin with `where`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(where + said(error, data)) from None


def _kind(data: Any) -> str:
    if data is None:
        return "an empty file"
    return "a list" if isinstance(data, list) else "a single value"
