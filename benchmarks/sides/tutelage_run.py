"""This project's side of peers.py: a run with a single task, as `tutelage train` would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turns import JOB, Turns

from tutelage.distill.config.loading import parse_config
from tutelage.distill.run.observers import Observer
from tutelage.distill.run.training import Run


class Watch(Observer):
    """Stands where the terminal's progress would be."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def start(self, config: Any, step: int) -> None:
        self._turns.begin()

    def written(self, step: int, task: str, metrics: Mapping[str, Any]) -> None:
        chosen, played = metrics["tokens/chosen"], metrics["episodes/played"]
        self._turns.done(
            reply=chosen / played,
            prompt=(metrics["tokens/seen"] - chosen) / played,
            parts={name: metrics[f"time/{name}"] for name in ("rollout", "score", "update")},
        )


def main() -> None:
    turns = Turns()  # the first: from here on nothing else is printed to standard output
    with Run(parse_config(JOB["config"], "peers.py"), watch=Watch(turns)) as run:
        run.train()


if __name__ == "__main__":
    main()
