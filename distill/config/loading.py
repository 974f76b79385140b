"""Reads a file and `key=value` arguments into a checked config."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutelage.distill.config import reading
from tutelage.distill.config.faults import ConfigError, _kind, printable, said, settled
from tutelage.distill.config.run import RunConfig
from tutelage.envs.plugins import look_beside


def load_config(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `key.path=value` overrides (the last one of a key holds), check
    everything.

    Raises:
        ConfigError: with the file, the key and the cure in one line.
    """
    path = Path(path)
    look_beside(path.parent)  # for environments of the user's own
    try:
        data = reading.read_file(path)
        if not isinstance(data, dict):
            raise ValueError(f"must be a mapping of keys, not {_kind(data)}")
        for override in overrides or []:
            _override(data, override)
    except ValueError as error:
        raise ConfigError(printable(f"{path}: {error}")) from None
    config = parse_config(data, str(path))
    # here and not in the section: the config is parsed again in every process, and once is enough
    if config.optimizer.warmup > config.steps:
        warnings.warn(
            f"optimizer.warmup: {config.optimizer.warmup} steps, and the run has {config.steps}: it"
            f" ends before the learning rate is {config.optimizer.lr:g}",
            stacklevel=1,  # a line of this package: the command line shows its warnings in one line
        )
    return config


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """Check plain data, or what reading.py made of a file; messages name `source`."""
    try:
        data = settled(RunConfig, data)
        return RunConfig.model_validate(data)
    except ValidationError as error:
        fault = said(error, data).lstrip(".: ")  # at the top no key comes before it
    except ValueError as error:
        fault = str(error)
    raise ConfigError(printable(f"{source}: {fault}"))  # outside: no chain of pydantic's errors


def _override(data: dict[str, Any], override: str) -> None:
    parts, value = reading.parse_pair(override, "key.path=value")
    place: Any = data
    for at in range(len(parts) - 1):
        key = _key(place, parts, at, override)
        child = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
        if isinstance(child, reading.Scalar) and child.value is None and not child.doubt:
            child = place[key] = {}  # `cluster: null` in the file, cluster.workers=2 behind it
        if not isinstance(child, dict | list):
            path = ".".join(parts[: at + 1])
            raise ValueError(f"{override!r}: {path} holds no keys in the file: give {path}={{...}}")
        place = child
    place[_key(place, parts, len(parts) - 1, override)] = value


def _key(place: Any, parts: list[str], at: int, override: str) -> str | int:
    """Part `at` of a path, as `place` takes it: a key, or the number of a list's entry, from 0."""
    if isinstance(place, dict):
        return parts[at]
    if parts[at].isdecimal() and int(parts[at]) < len(place):
        return int(parts[at])
    path = ".".join(parts[:at])
    raise ValueError(
        f"{override!r}: {path} is a list of {len(place)} in the file: name one of its entries, from"
        f" {path}.0 on, or give it whole: {path}=[...]"
    )
