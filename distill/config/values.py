"""The types of values that keys of a config hold."""

from __future__ import annotations

import datetime
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from tutelage.envs.names import nearest


class Section(BaseModel):
    """A mapping of keys; the text under a key is its description, shown by `tutelage config`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,  # else pydantic takes "3" for 3 and 1 for true
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the text under a key becomes Field(description=...)
    )


def whole_number(value: Any) -> Any:
    """Takes 1e3, which YAML reads as a float, for a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", text):
        raise ValueError(
            "a name has 1 to 64 letters of a to z, digits, _ and -, and begins with no -: it names"
            f" files and metrics (got {text!r:.80})"
        )
    return text


def _place(text: str) -> str:
    """A path, or a text that may be one, with ~ and $NAME replaced as in a shell."""
    if not text.strip() or "\0" in text:  # no system takes a NUL in a path
        raise ValueError(f"it must not be empty (got {text!r})")
    text = os.path.expanduser(os.path.expandvars(text))
    left = re.search(r"^~[^/]*|\$\{?\w+\}?", text)  # os.path leaves what it does not know
    if left is not None:
        raise ValueError(f"{left[0]} stands for nothing here: there is no such user or variable")
    return text


def day(value: Any) -> Any:
    """Refuses numbers, which pydantic would take for seconds since 1970."""
    if not isinstance(value, str | datetime.date) or str(value).isdigit():
        raise ValueError("it must be a day, such as 2026-01-31")
    return value


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?", text):
        near = nearest(text.partition(":")[0], ["cuda", "cpu", "auto"])
        hint = f": did you mean {near!r}?" if near else ""
        raise ValueError(f"a device is auto, cpu, cuda or cuda:N (got {text!r:.80}){hint}")
    return text


def _address(text: str) -> str:
    """The address of a Ray cluster."""
    # the last colon: an IPv6 host has others
    host, _, port = text.removeprefix("ray://").rpartition(":")
    known = re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host) and re.fullmatch(r"[0-9]{1,5}", port)
    if text not in ("local", "auto") and not (known and 0 < int(port) < 65_536):
        raise ValueError(
            "it is local, auto, HOST:PORT or ray://HOST:PORT, such as ray://head:10001 (got"
            f" {text!r:.80})"
        )
    return text


MOST, MOST_STEPS, MOST_SEED = 10**9, 10**7, 2**32 - 1
"""A whole number beyond these is a mistake; the seed's limit is NumPy's."""

Whole = Annotated[int, BeforeValidator(whole_number), Field(le=MOST)]

Count = Annotated[Whole, Field(ge=0)]

Positive = Annotated[Whole, Field(ge=1)]

Above0 = Annotated[float, Field(gt=0)]

Amount = Annotated[Above0, AfterValidator(lambda x: int(x) if x.is_integer() else x)]
"""Of a resource. A whole number stays one: messages say {GPU: 1}, as the user does."""

Share = Annotated[float, Field(ge=0, le=1)]

Part = Annotated[float, Field(gt=0, le=1)]

Beta = Annotated[float, Field(ge=0, lt=1)]

Text = Annotated[str, Field(min_length=1)]

Place = Annotated[str, AfterValidator(_place)]

Device = Annotated[str, AfterValidator(_device)]

Name = Annotated[str, AfterValidator(_name)]

LISTED = Field(strict=False)  # lets a list pass for a tuple; what it holds stays strict
