"""Takes plain TeX apart at its top level: brackets, parts of a list, both signs of `\\pm`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tutelage.envs.grading.text import TEXT, stripped

_OPEN, _CLOSE = "([{", ")]}"
_JOINT = re.compile(
    rf"(?:[\s{TEXT}]|\\(?=and|or))+(?:and|or|及|与)(?:[\s{TEXT}]+|(?=[-\d(\\]))|(?<=[\d)}}])\s*(?:及|与)\s*"
)
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d])")


def levels(text: str) -> list[int]:
    """How many brackets are open before each character; at a bracket itself, outside of it."""
    depth, found = 0, []
    for at, char in enumerate(text):
        if char in _CLOSE:
            depth -= 1
        found.append(depth)
        if char in _OPEN:
            depth += 1
        if char in "{}" and at and text[at - 1] == "\\":
            found[-2] = found[-1]  # the backslash of \{ belongs to its brace
    return found


def outside(text: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """The matches of `pattern` that stand in no bracket."""
    depth = levels(text)
    return [match for match in pattern.finditer(text) if depth[match.start()] == 0]


def split(text: str, separators: str) -> list[str]:
    """The parts between any of the characters `separators` that stand in no bracket."""
    parts, begin = [], 0
    for at, (char, depth) in enumerate(zip(text, levels(text), strict=True)):
        if depth == 0 and char in separators:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]]


def split_at(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """(the parts, the separators between them) of a pattern that stands in no bracket."""
    parts, between, begin = [], [], 0
    for match in outside(text, pattern):
        parts.append(text[begin : match.start()])
        between.append(match.group())
        begin = match.end()
    return [*parts, text[begin:]], between


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracketed:
    """The brackets around a whole text ("" if there are none), and what they hold."""

    opening: str = ""
    closing: str = ""
    inner: str


def brackets(text: str) -> Bracketed:
    text = stripped(text)
    for opening, closing in (("\\{", "\\}"), ("\\langle", "\\rangle")):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if _balanced(inner):
                plain = ("(", ")") if opening == "\\langle" else (opening, closing)
                return Bracketed(opening=plain[0], closing=plain[1], inner=inner)
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]" and _balanced(text[1:-1]):
        return Bracketed(opening=text[0], closing=text[-1], inner=text[1:-1])
    return Bracketed(inner=text)


def _balanced(inner: str) -> bool:
    depth = levels(inner)
    return all(level >= 0 for level in depth) and (
        not depth or depth[-1] + (inner[-1] in _OPEN) == 0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A list: its parts, and its brackets, where set braces and none at all are both ""."""

    parts: list[str]
    opening: str
    brackets: str

    @property
    def ordered(self) -> bool:
        return bool(self.brackets)


def listed(text: str, *, signs: bool | None = None) -> Listing:
    """The parts of a list. signs: write out each `\\pm`, with all signs alike (True) or in every
    combination (False).
    """
    around = brackets(text)
    inner = joined(around.inner)
    parts = [stripped(part) for part in split(inner, ",;")]
    parts = [part for part in parts if part]
    if any(re.match(r"0\d", part) for part in parts):  # 1,000 is no list of 1 and 000
        parts = [stripped(inner)]
    if len(parts) < 2 and around.opening in ("(", "["):
        around = Bracketed(inner=text)  # (x+1): only parentheses
        parts = [stripped(text)]
    if signs is not None:
        parts = [sign for part in parts for sign in _signs(part, joint=signs)]
    if around.opening == "\\{":
        around = Bracketed(inner=around.inner)
    return Listing(parts=parts, opening=around.opening, brackets=around.opening + around.closing)


def joined(text: str) -> str:
    """Commas for `and`, `or`."""
    parts, _ = split_at(f"{text} ", _JOINT)
    return ",".join(parts)


_SIGNS = re.compile(r"\\(pm|mp)(?![A-Za-z])")


def _signs(part: str, *, joint: bool) -> list[str]:
    count = len(_SIGNS.findall(part))
    if not count:
        return [part]
    # From five signs on, every combination would be too many: all upper and all lower only.
    choices = (0, 2**count - 1) if joint or count > 4 else range(2**count)
    found = []
    for bits in choices:
        at = iter(range(count))

        def sign(match: re.Match[str], bits: int = bits, at=at) -> str:  # type: ignore[no-untyped-def]
            minus = bool(bits >> next(at) & 1) != (match[1] == "mp")
            return "-" if minus else "+"

        found.append(_SIGNS.sub(sign, part))
    return found


def ungrouped(text: str) -> str:
    """Without the commas of thousands, if the list's own commas have a space: `1,000, 2,000`."""
    if not re.search(r",\s|;|\band\b|\bor\b|\\(?:pm|cup)", text):
        return text
    return grouped(text)


def grouped(text: str) -> str:
    """Without all commas that may be commas of thousands."""
    return _GROUPED.sub(lambda match: match[1].replace(",", ""), text)


# --- the same text -------------------------------------------------------------------------------

_ONE = re.compile(r"\{([\w.])\}")
_GAP = re.compile(rf"(?<=\d)[\s{TEXT}]+(?=\d)")
_SPACES = re.compile(rf"[\s{TEXT}]+")


def squeezed(text: str) -> str:
    """The text in the form in which texts are compared: no spaces but those between digits, no
    braces around one character, words in lower case.
    """
    text = _GAP.sub("\x00", text)  # keeps `1 2` apart from `12` while spaces are removed
    text = _ONE.sub(r"\1", _SPACES.sub("", text)).replace("\x00", " ")
    return text.lower() if len(text) > 1 and text.replace("'", "").isalpha() else text
