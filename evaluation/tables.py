"""Tables of scores with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def percent(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}], n={found['n']}"


def score_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of scores. columns: heading -> scores by task as `Run.evaluate` gives them."""
    table = Table(title=title, caption="95 % Wilson intervals in brackets")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("sampling")
    for heading in columns:
        table.add_column(heading, justify="right")
    tasks = list(dict.fromkeys(task for scores in columns.values() for task in scores))
    for task in tasks:
        held = [scores[task] for scores in columns.values() if task in scores]
        modes = [mode for mode in held[0] if mode != "metric"]
        for mode in modes:
            cells = [_cell(scores.get(task, {}).get(mode)) for scores in columns.values()]
            table.add_row(task, held[0]["metric"], mode, *cells)
    return table


def type_table(title: str, scores: Mapping[str, Any], mode: str) -> Table:
    """One row per task type."""
    table = Table(title=title)
    for heading in ("task", "type", "score"):
        table.add_column(heading, justify="left" if heading != "score" else "right")
    for task, found in scores.items():
        for kind, rate in found[mode]["by_type"].items():
            table.add_row(task, kind, f"{_cell(rate)}, n={rate['n']}")
    return table


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['value']:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"
