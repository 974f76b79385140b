"""Checks what depends on this machine and can be known before a model loads: devices, files, the
run's folder, environments. Each fault is a ConfigError that names its key.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.run import RunConfig
from tutelage.distill.models.loading import at_key, resolve
from tutelage.distill.plan.footprint import student_footprint
from tutelage.envs.errors import one_line
from tutelage.envs.plugins import Absent
from tutelage.evaluation.run_folder import FILES, FOLDERS, METRICS
from tutelage.scheduler.rollouts import EnvironmentPools, TaskRollout


def check_machine(config: RunConfig) -> None:
    """Check that this machine has what the run needs. Environments: see `open_once`.

    Raises:
        ConfigError: the key, what is missing, and the cure.
    """
    check_devices(config)
    _check_wheel(config)
    if config.student.model is not None:
        _check_weights("student.model", config.student.model)
    for name, teacher in config.teachers.items():
        if teacher.engine != "server" and _local(config):
            _check_weights(f"teachers.{name}.model", teacher.model)


def check_folder(config: RunConfig) -> None:
    """Raises ConfigError where the run's folder is the working directory, one above it, or the home
    directory: a run's files would mix with others there. Likewise where something else stands in
    the place of one of the run's files or folders."""
    folder = Path(config.run).resolve()
    for names, right in ((FOLDERS, Path.is_dir), (FILES, Path.is_file)):
        if wrong := [
            path for name in names if (path := folder / name).exists() and not right(path)
        ]:
            kind = "folder" if names is FOLDERS else "file"
            raise ConfigError(
                f"run: {wrong[0]} is no {kind}, as a run's would be: move it away, or choose"
                " another run folder"
            )
    here = Path.cwd().resolve()
    # a folder that holds a run already may be resumed from inside: `run: .`
    if folder in (here, *here.parents, Path.home()) and not (folder / METRICS).is_file():
        raise ConfigError(
            f"run: {folder} holds more than a run: name a folder of its own, such as runs/first"
        )


def check_room(config: RunConfig) -> None:
    """Raises ConfigError where the disk has no room for one checkpoint: the weights, and the
    optimizer's state."""
    student, dtype = student_footprint(config.student), config.student.dtype
    state, _ = student.optimizer_state(config.optimizer.name, dtype)
    need = (student.weights(dtype) or 0) + (state or 0)  # None: a size that is not known
    if (free := shutil.disk_usage(config.run).free) < need:
        raise ConfigError(
            f"run: {config.run} has {free / 2**20:,.0f} MiB free, and one checkpoint takes"
            f" {need / 2**20:,.0f} MiB: make room, or choose another folder"
        )


def _local(config: RunConfig) -> bool:
    """Whether the whole run is on this machine."""
    return config.cluster is None or config.cluster.address == "local"


def check_devices(config: RunConfig) -> None:
    """Raises ConfigError for a device that is not here."""
    asked = {"student.device": config.student.device}  # the learner is here, also with Ray
    if _local(config):
        asked |= {f"teachers.{name}.device": one.device for name, one in config.teachers.items()}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanting = {key: name for key, name in asked.items() if _index(name) >= count}
    if wanting:
        have = f"{count} of them, from cuda:0 on" if count else "no CUDA device that torch can use"
        cure = "auto" if count == 0 else f"cuda:{count - 1}, auto"
        said = ", ".join(f"{key}: {name}" for key, name in wanting.items())
        raise ConfigError(f"{said}: this machine has {have}: set {cure} or cpu")


def _index(device: str) -> int:
    """The number of a CUDA device; -1: of none."""
    kind, _, number = device.partition(":")
    return int(number or 0) if kind == "cuda" else -1


def _check_wheel(config: RunConfig) -> None:
    wheel = None if config.cluster is None else config.cluster.wheel
    if wheel is None:
        return
    if not Path(wheel).is_file():
        raise ConfigError(f"cluster.wheel: there is no file {wheel!r}: make it (python -m build)")
    if not zipfile.is_zipfile(wheel):
        raise ConfigError(f"cluster.wheel: {wheel!r} is no wheel: make it anew (python -m build)")


def _check_weights(key: str, reference: str) -> None:
    """Check that a folder's files of weights are there and whole, by their headers alone."""
    with at_key(key):
        folder = Path(resolve(reference))
    if not folder.is_dir():
        return  # a hub id: the hub's client checks what it downloads
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ()
    # JSON that is no index of weights fails in one of the last three ways.
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        raise ConfigError(f"{key}: {index} is damaged: copy it anew") from None
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if missing := sorted(str(name) for name in named if not (folder / str(name)).is_file()):
        raise ConfigError(f"{key}: {reference!r} lacks {missing[0]}: copy it anew, whole")
    if not files:
        raise ConfigError(f"{key}: {reference!r} holds no weights (*.safetensors): is it whole?")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            # Opening reads the header, and compares the length that it tells with the file's.
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{key}: {file} is damaged ({one_line(error)}): copy it anew"
            ) from None


def open_once(rollouts: Mapping[str, TaskRollout]) -> list[str]:
    """Open each task's environments once, for training and for evaluation, in a child process that
    has a deadline and no network. Returns a line for each environment that could not be tried,
    because its files or packages are not on this machine.

    Raises:
        ValueError: an environment that cannot be made as the configuration says.
    """
    absent = []
    for name, how in rollouts.items():
        # one process, also where the run has none: its deadline guards against a hang
        pools = EnvironmentPools({name: replace(how, processes=1)})
        try:
            with _offline(), at_key(f"tasks.{name.rpartition(':')[2]}", but=Absent):
                pools.open([name])
        except Absent as error:
            absent.append(str(error))
        finally:
            pools.close()
    return list(dict.fromkeys(absent))


def open_all(rollouts: Iterable[str], pools: EnvironmentPools) -> None:
    """Start each task's environments, for training and for evaluation.

    Raises:
        ConfigError: the task, and why its environment cannot be made.
    """
    for name in rollouts:
        with at_key(f"tasks.{name.rpartition(':')[2]}"):
            pools.open([name])


@contextmanager
def _offline() -> Iterator[None]:
    """Child processes that start inside ask no hub. (This one read the setting at its import.)"""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
