"""API keys and passwords: read from environment variables only, and hidden in everything printed.

A URL that holds one is refused. `hidden` replaces them in messages.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import TracebackType
from urllib.parse import urlsplit

HIDDEN = "[hidden]"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]+")  # what a header carries
_KNOWN = (
    (re.compile(r"(://)[^/\s@]+@"), rf"\1{HIDDEN}@"),  # https://user:password@host
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{16,}"), HIDDEN),
    (
        re.compile(
            r"(?i)(\bbearer |[?&][\w-]*(?:key|token|secret|password)=)"
            r"(?!\[hidden\])[^\s&'\"]+"  # a text may be hidden already
        ),
        rf"\1{HIDDEN}",
    ),
)
"""Patterns of credentials, and what is shown in their place."""

_given: set[str] = set()  # the keys that `api_key` read: no pattern knows what they look like


def api_key(subject: str, variable: str) -> str:
    """The key in the environment's `variable`, without the spaces and line ends around it.

    Raises:
        ValueError: the variable is missing, empty, or holds what cannot be a key; the message names
            the variable and never its value.
    """
    # Somebody may have written the key itself where its variable's name belongs: not shown, then.
    named = variable if variable.isupper() else "variable of the name that is given there"
    if variable not in os.environ:
        raise ValueError(
            f"{subject}.api_key_env: the environment has no {named}: set it where the teacher runs"
            " (the key itself stands in the environment, its variable's name here)"
        )
    key = os.environ[variable].strip()
    if not key:
        raise ValueError(
            f"{subject}.api_key_env: {variable} is empty in the environment: set it to the key, or"
            " leave api_key_env out"
        )
    _given.add(key)  # before anything can raise with it in its text
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{subject}.api_key_env: {variable} holds spaces, control characters or others beyond"
            " ASCII, which no key has and no header carries: set it to the key alone"
        )
    return key


def check_variable(variable: str) -> None:
    """Raises ValueError for what is no variable's name. It may be a key: the message hides it."""
    if not _NAME.fullmatch(variable) or hidden(variable) != variable:
        raise ValueError(
            "api_key_env is not the name of an environment variable: put the key into a variable,"
            " such as TEACHER_API_KEY, and its name here"
        )


def check_url(key: str, url: str) -> None:
    """Raises ValueError for a server's url that holds a credential or is no address.

    key: the configuration's, for the message.
    """
    try:
        where = urlsplit(url)
        port, host = where.port, where.hostname or ""  # .port raises for what is no port
        # as the socket will: labels that are empty or too long fail here rather than in the run
        host.encode("idna" if host.isascii() and not host.startswith("[") else "ascii")
    except ValueError:  # its text quotes the address: it is neither shown nor chained
        raise ValueError(
            f"{key} is no address: {hidden(url)!r}: write it as http://host:8000"
        ) from None
    if "@" in where.netloc:
        raise ValueError(
            f"{key} holds a user or password, which would be seen wherever the address is: take it"
            " out, and name the environment variable that holds the key in api_key_env"
        )
    if where.query or where.fragment:
        raise ValueError(
            f"{key} holds a query (what follows ? or #): take it out; a key belongs into an"
            " environment variable that api_key_env names"
        )
    # port 0 stands for any free port: no server listens there
    if where.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError(f"engine: server needs url, such as http://host:8000 (it is {url!r})")
    if not re.fullmatch(r"[\x21-\x7e]+", url):
        raise ValueError(
            f"{key}: {url!r} holds spaces or characters that no address has: write it as"
            " http://host:8000"
        )


def hidden(text: str) -> str:
    """`text` without credentials, and with control characters escaped: a server's message must not
    steer the terminal."""
    for key in sorted(_given, key=len, reverse=True):  # a key may be the beginning of another
        text = text.replace(key, HIDDEN)
    for pattern, shown in _KNOWN:
        text = pattern.sub(shown, text)
    # half a character (a lone surrogate) would make print raise
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def hide_in_tracebacks() -> None:
    """Print uncaught errors through `hidden`, too, from now on."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = traceback.format_exception(kind, error, trace)
        print(hidden("".join(lines)), end="", file=sys.stderr)

    sys.excepthook = show
