"""Reads and writes plain data: YAML with the scalars of its version 1.2, and `key.path=value`.

PyYAML reads version 1.1, in which 1e-4 is text, 010 is 8, 1:30 is 90 and `off` is false. Here
unquoted 3e2, -2e0 and 1e-4 are numbers, what is quoted is always text, and there are no dates.
Scalars that the two versions read differently are never guessed: a key that takes text gets the
text, any other key refuses them and says what to write instead. A number keeps its spelling, so
that a folder named 1e5 keeps its name. Keys are text, and none is given twice.

Every function raises ValueError, in one line, with the number of the file's line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES, MOST_VALUES = 262_144, 100_000
"""The limits of a file's bytes, and of its values when each alias counts as all that it stands for:
a few lines of nested aliases can stand for billions ("billion laughs")."""

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False,
}  # fmt: skip
# What version 1.1 reads otherwise than 1.2, see `_doubt`.
_ZERO = re.compile(r"[-+]?0[0-9_]+")
_SIXTY = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_BROKEN_UP = re.compile(
    r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?)"
)
_SWITCH = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
_DIGITS = 400  # of a number; Python itself refuses to read more than 4,300


@dataclass(frozen=True, slots=True)
class Scalar:
    """An unquoted scalar that is not simply text. text: as it was written. value: a number, true,
    false or null. doubt: why its value is not clear, and what to write instead."""

    text: str
    value: int | float | bool | None
    doubt: str = ""


def read_file(path: Path) -> Any:
    """A YAML file's content."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # not all: it may be /dev/zero or a checkpoint
        if len(content) > MOST_BYTES:
            raise ValueError(f"is too large: a configuration has {MOST_BYTES:,} bytes at most")
        text = content.decode("utf-8-sig")  # Windows' editors put a byte order mark before it
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("is not text: a configuration is YAML in UTF-8") from None
    return parse(text)


def parse(text: str) -> Any:
    """YAML as dicts, lists, text and Scalars."""
    try:
        # Nodes, not values: they tell what is quoted, and BaseLoader resolves nothing by itself.
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {_described(error)}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return None if node is None else _Builder().build(node)


def parse_pair(text: str, example: str) -> tuple[list[str], Any]:
    """(the parts of the key, the value) of `key.path=value`. example: how to write it."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r}: write it as {example}")
    try:
        return key.split("."), parse_value(value)
    except ValueError as error:
        raise ValueError(
            f'{text!r}: the value {error}: text goes in quotes, inside those of the shell: "{key}='
            "'...'\""
        ) from None


def parse_value(text: str) -> Any:
    """A value of the command line: YAML if it begins with a bracket, a brace or a quote; else a
    number, true, false, null, or text as it is.

    It is also text if more follows after the bracket, brace or quote is closed, as in
    `{problem} Think step by step.`
    """
    text = text.strip()
    if text[:1] not in ("[", "{", "'", '"'):
        return scalar(text)
    try:
        return parse(text)
    except ValueError:
        if _continues(text):
            return text
        raise


def _continues(text: str) -> bool:
    """Whether more follows after the text's first YAML value."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            ended = isinstance(event, yaml.ScalarEvent | yaml.CollectionEndEvent)
            if ended and depth == 0 and event.end_mark is not None:
                return bool(
                    text[event.end_mark.index :].strip()
                )  # before PyYAML reads on and fails
    except (yaml.YAMLError, RecursionError):
        return False
    return False


def scalar(text: str) -> str | Scalar:
    """An unquoted scalar's text, or a Scalar where it is not simply text."""
    if text in _WORDS:
        return Scalar(text, _WORDS[text])
    if doubt := _doubt(text):  # first: _FLOAT would take 010 for ten
        return Scalar(text, None, doubt)
    if _INT.fullmatch(text):
        return Scalar(text, int(text, 0 if text[:2] in ("0o", "0x") else 10))
    if _FLOAT.fullmatch(text):
        return Scalar(text, float(text))
    if found := _SPECIAL.fullmatch(text):
        return Scalar(text, float(found[1] + "inf" if found[2] else "nan"))
    return text


def _doubt(text: str) -> str:
    """Why a scalar's value is not clear, with the cure; empty where it is."""
    if len(text) > _DIGITS and (_INT.fullmatch(text) or _FLOAT.fullmatch(text)):
        return f"a number of {len(text)} characters"
    quoted = f"or {text!r} in quotes, if it is text"
    if _SWITCH.fullmatch(text):
        return f"{text} is text in YAML 1.2: write true or false, {quoted}"
    if _ZERO.fullmatch(text):
        plain = text.replace("_", "")
        sign, digits = ("-" if plain[0] == "-" else ""), plain.lstrip("+-0") or "0"
        return (
            f"{text} begins with a zero, which one version of YAML reads as octal and another as"
            f" decimal: write {sign}{digits}, {quoted}"
        )
    if _SIXTY.fullmatch(text):
        return (
            f"{text} is a number to the base of sixty in one version of YAML and text in another:"
            f" write the number, {quoted}"
        )
    if _BROKEN_UP.fullmatch(text) and ("_" in text or text.lstrip("+-")[:2] == "0b"):
        return (
            f"{text} is a number in one version of YAML and text in another: write it in plain"
            f" digits, {quoted}"
        )
    return ""


class _Builder:
    """Turns YAML's nodes into data. Each alias becomes a copy of its value; the number of values is
    limited, and an alias inside its own value is refused."""

    def __init__(self) -> None:
        self._values = 0
        self._open: set[int] = set()  # the nodes around this one

    def build(self, node: yaml.Node) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            raise ValueError(f"holds more than {MOST_VALUES:,} values, its aliases written out")
        if id(node) in self._open:  # PyYAML makes an alias the very node that it names
            raise ValueError(f"line {_line(node)}: an alias stands inside its own value")
        # BaseLoader itself gives only these three: any other was written in the file
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in (
            "str",
            "seq",
            "map",
        ):
            raise ValueError(f"line {_line(node)}: the tag {node.tag!r} is not taken: leave it out")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item) for item in node.value]
            quoted = isinstance(node, yaml.ScalarNode) and bool(node.style)  # or a | block
            return node.value if quoted else scalar(node.value)
        except RecursionError:
            raise ValueError("is nested too deeply") from None
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = self._key(key_node), _line(key_node)
            if key in lines:
                raise ValueError(
                    f"line {line}: the key {key!r} is given twice, first in line {lines[key]}:"
                    " leave one"
                )
            lines[key] = line
            if key == "<<" and key_node.style is None:  # in quotes it is a key
                for part in self._merged(value_node):
                    merged = part | merged  # the first mapping wins, and own keys over all
            else:
                own[key] = self.build(value_node)
        return merged | own

    def _key(self, node: yaml.Node) -> str:
        key = self.build(node)
        if isinstance(key, Scalar) and key.doubt:
            return key.text  # `on:`, `off:`, `no:` are names like others
        if not isinstance(key, str):
            shown = key.text or "null" if isinstance(key, Scalar) else type(key).__name__
            raise ValueError(
                f"line {_line(node)}: the key {shown} is not text: keys are text, in quotes where"
                " they look like something else"
            )
        return key

    def _merged(self, node: yaml.Node) -> Iterator[dict[str, Any]]:
        """The mappings that `<<` merges in, the one that wins first."""
        found = self.build(node)
        for part in found if isinstance(found, list) else [found]:
            if not isinstance(part, dict):
                raise ValueError(f"line {_line(node)}: << takes a mapping, or a list of them")
            yield part


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _described(error: yaml.YAMLError) -> str:
    """`line 3, column 7: what is wrong`."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    # PyYAML's ReaderError, of characters that YAML forbids, has only a reason, and no mark
    said = [getattr(error, name, None) for name in ("context", "problem", "reason")]
    text = ", ".join(str(one) for one in said if one) or str(error)
    if "\\t" in text:  # PyYAML quotes the character as repr() does
        text += " (a tab: YAML is indented by spaces)"
    if mark is None:
        return " ".join(text.split())
    return " ".join(f"line {mark.line + 1}, column {mark.column + 1}: {text}".split())


def plain(value: Any) -> Any:
    """The data with each Scalar's value in its place; raises ValueError where it is not clear."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Scalar):
        if value.doubt:
            raise ValueError(value.doubt)
        return value.value
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would not read as text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # else one list in two places would be `&id001` and `*id001`

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "'" if isinstance(scalar(data), Scalar) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(data: Any) -> str:
    """YAML that `parse` and readers of version 1.1 read as the same data."""
    # unsorted: the order of the tasks is that of their turns (schedule.policy alternate)
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False))
