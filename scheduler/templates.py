"""Reads the pieces between messages once from a tokenizer's chat template.

A template is foreign code: it may refuse a system message, want a message's content in parts, leave
out what opens a reply, ask for the date, draw at random, or not be Jinja at all. Where a
conversation can do without, a way around is found here; the rest is refused in one line.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tutelage.envs.errors import one_line

SENTINELS = FIRST, REPLY, SECOND = "⟦first user⟧", "⟦first reply⟧", "⟦second user⟧"

Messages = Sequence[Mapping[str, Any]]
Spoken = Callable[[str], Any]

_CLOCK = "strftime_now"
"""The function through which transformers lets a template ask for the time."""

# Jinja's own two sources of chance: the filter `random`, and `lipsum()`.
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What a template writes. head, tail: before and after the first user text. close, again:
    between a reply and the next user text, and after that one. unasked: the end of `tail` and
    `again` that the template writes only before a finished reply, not when it is asked to open
    one."""

    head: str
    tail: str
    close: str
    again: str
    unasked: str = ""


def reads_clock(tokenizer: Any) -> bool:
    """Whether the template's text depends on the date."""
    return _CLOCK in str(tokenizer.chat_template or "")


def render(
    tokenizer: Any, messages: Messages, *, date: datetime.date | None, opens: bool = True
) -> str:
    """The template's own text of a conversation. date: for templates that ask for one; None:
    the clock's. opens: add what opens the next reply."""
    clock = {}
    if date is not None:
        # A fixed hour: a template may ask for the time of day, too, and a run must repeat.
        noon = datetime.datetime.combine(date, datetime.time(12))
        clock[_CLOCK] = noon.strftime
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opens, **clock
        )
    )


def conversation(
    texts: Sequence[str], *, system: str | None, spoken: Spoken = str
) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn, after a system message if there is one."""
    said = [] if system is None else [{"role": "system", "content": spoken(system)}]
    roles = ("user", "assistant")
    return said + [{"role": roles[n % 2], "content": spoken(text)} for n, text in enumerate(texts)]


def in_parts(text: str) -> list[dict[str, str]]:
    """A message's content in the form that templates of multimodal models want."""
    return [{"type": "text", "text": text}]


def spoken_of(tokenizer: Any, date: datetime.date | None) -> Spoken:
    """How the template wants a message's content: as it is, or in parts."""
    try:
        shown = render(tokenizer, conversation([FIRST], system=None), date=date)
    except Exception:  # a template may raise anything; `pieces` reports it
        shown = ""
    if FIRST in shown:
        return str
    try:
        shown = render(tokenizer, conversation([FIRST], system=None, spoken=in_parts), date=date)
    except Exception:
        return str
    return in_parts if FIRST in shown else str


def pieces(tokenizer: Any, *, system: str | None, date: datetime.date | None) -> Pieces:
    """The pieces of a tokenizer's template.

    Raises:
        ValueError: in one line, why there are none.
    """
    who = f"the chat template of {tokenizer.name_or_path!r}"
    # searched for, not tried: two renderings may agree by chance
    if _CHANCE.search(str(tokenizer.chat_template)):
        raise ValueError(
            f"{who} draws at random: no run could be repeated: take the random filter out of its"
            " chat_template"
        )
    try:
        return _pieces(tokenizer, system, date)
    except _Unshown as unshown:
        raise ValueError(f"{who} {unshown}") from None
    except Exception as error:
        said = one_line(error)
        if line := getattr(error, "lineno", None):
            said += f", in its line {line}"
        if system is not None and _works(tokenizer, date):
            raise ValueError(
                f"{who} takes no system message ({said}): remove rollout.context.system, or say it"
                " in the environment's own prompt"
            ) from None
        raise ValueError(
            f"{who} fails on user and assistant in turn ({said}): correct chat_template in its"
            " folder, or take it out: texts are then joined bare"
        ) from None


def _works(tokenizer: Any, date: datetime.date | None) -> bool:
    try:
        _pieces(tokenizer, None, date)
    except Exception:
        return False
    return True


class _Unshown(ValueError):
    """A rendering leaves a message out, or repeats it."""


def _pieces(tokenizer: Any, system: str | None, date: datetime.date | None) -> Pieces:
    spoken = spoken_of(tokenizer, date)

    def shown(texts: Sequence[str], *, opens: bool = True, told: str | None = system) -> str:
        messages = conversation(texts, system=told, spoken=spoken)
        return render(tokenizer, messages, date=date, opens=opens)

    first = shown([FIRST])
    head, tail = _split(first, [FIRST])
    _, middle, close, again = _split(shown(SENTINELS), SENTINELS)
    if system is not None and (said := system.strip()):
        if said not in first:
            raise _Unshown(
                "leaves the system message out: remove rollout.context.system, or say it in the"
                " environment's own prompt"
            )
        # some templates put it before the last message, wherever that is: in the middle of an
        # append-only chat it would be said again every turn
        if said in close:
            _, middle, close, again = _split(shown(SENTINELS, told=None), SENTINELS)
    found = Pieces(head=head, tail=tail, close=close, again=again)
    # Some begin a finished reply with more (an empty thought, say) than they open one with.
    unasked = middle.removeprefix(tail) if middle.startswith(tail) else ""
    if unasked.strip() and shown([FIRST], opens=False) == first:
        return replace(found, tail=tail + unasked, again=again + unasked, unasked=unasked)
    return found


def _split(rendered: str, texts: Sequence[str]) -> list[str]:
    """What stands around `texts`, each of which must be there once, in their order."""
    found = re.split("|".join(map(re.escape, texts)), rendered)
    if rendered != "".join(itertools.chain(*zip(found, [*texts, ""], strict=False))):
        raise _Unshown(
            "drops or repeats a message: a template must show each user and assistant text exactly"
            " once; give the model one that does"
        )
    return found
