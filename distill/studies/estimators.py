"""Runs `tutelage study estimators`: what a discount buys and costs, in a toy and in exact sums.

Writes into its folder: table.md, estimators.json, variance_against_gamma.png,
bias_against_variance.png.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from tutelage.distill.run.progress import ConsoleObserver
from tutelage.distill.studies import enumeration, toy_control
from tutelage.distill.studies.enumeration import (
    Quality,
    SamplingShift,
    run_enumeration,
    run_sampling_shifts,
)
from tutelage.distill.studies.plots import check_matplotlib, plot_bias, plot_variance
from tutelage.distill.studies.toy_control import ToyRun, run_toy
from tutelage.evaluation import files

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (42, 43, 2026)
ITERATIONS = 2000
"""Gammas, seeds and iterations are the paper's (Revisiting-OPD, arXiv:2603.25562, appendix C)."""
BATCH = 64
"""The table's last column: the error of a gradient averaged over that many sequences."""


def run_study(
    out: Path, *, seeds: Sequence[int] = SEEDS, iterations: int = ITERATIONS
) -> tuple[list[ToyRun], list[Quality]]:
    """Run both experiments, print the tables, write everything to `out`.

    Raises:
        ValueError: no iteration, the same seed twice, or matplotlib is missing.
    """
    if iterations < 1:
        raise ValueError(f"--iterations {iterations}: it must be at least 1")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: each may stand once")
    check_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with _one_thread(), ConsoleObserver() as watcher:
        qualities = run_enumeration(GAMMAS, progress=watcher.advance)
        errors = run_sampling_shifts()
        runs = run_toy(GAMMAS, seeds, iterations, progress=watcher.advance)
    settings = {"gammas": GAMMAS, "seeds": seeds, "iterations": iterations}
    sheets = [toy_sheet(runs, iterations), enumeration_sheet(qualities), sampling_sheet(errors)]
    _write(out, sheets, runs, qualities, errors, settings)
    for sheet in sheets:
        watcher.console.print(sheet.table())
    minutes = (time.monotonic() - begun) / 60
    watcher.console.print(f"{minutes:.1f} minutes; table, plots, numbers: {out}", highlight=False)
    return runs, qualities


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrix products this small gain little from a second thread, and lose much where cores are
    shared: each of them ends with a wait for the slower thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write(
    out: Path,
    sheets: Sequence[Sheet],
    runs: Sequence[ToyRun],
    qualities: Sequence[Quality],
    errors: Sequence[SamplingShift],
    settings: dict[str, Any],
) -> None:
    text = "\n".join(sheet.markdown() for sheet in sheets)
    (out / "table.md").write_text(text, encoding="utf-8")
    found = {
        "settings": settings,
        "toy": [asdict(run) | {"reached": run.reached, "diverged": run.diverged} for run in runs],
        "enumeration": [asdict(quality) for quality in qualities],
        # by sampling parameters; files of old studies have this name
        "laws": [asdict(error) for error in errors],
    }
    files.write_json(out / "estimators.json", _finite(found))
    plot_variance(runs, out / "variance_against_gamma.png")
    plot_bias(qualities, out / "bias_against_variance.png")


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON has not and diverged runs leave."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A table, for the terminal and for a file. The first `left` columns hold words."""

    title: str
    note: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int

    def table(self) -> Table:
        table = Table(
            title=self.title,
            caption=Text(self.note),
            box=box.SIMPLE_HEAD,
            collapse_padding=True,  # fits 80 columns
            show_edge=False,
            pad_edge=False,
        )
        for number, heading in enumerate(self.headings):
            words = number < self.left
            table.add_column(heading, justify="left" if words else "right", no_wrap=words)
        for row in self.rows:
            table.add_row(*map(Text, row))  # Text: brackets are no markup here
        return table

    def markdown(self) -> str:
        rules = ["---" if number < self.left else "---:" for number in range(len(self.headings))]
        headings = [heading.replace("\n", " ") for heading in self.headings]
        lines = ["| " + " | ".join(cells) + " |" for cells in (headings, rules, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, "", self.note, ""])


def toy_sheet(runs: Sequence[ToyRun], iterations: int) -> Sheet:
    """One row a gamma."""
    rows = []
    for gamma in dict.fromkeys(run.gamma for run in runs):
        of_gamma = [run for run in runs if run.gamma == gamma]
        rows.append(
            [
                f"{gamma:g}",
                f"{sum(run.reached for run in of_gamma)} of {len(of_gamma)}",
                f"{sum(run.diverged for run in of_gamma)} of {len(of_gamma)}",
                *(_spread([run.distances[task] for run in of_gamma]) for task in (0, 1)),
                _geometric([run.variance for run in of_gamma]),
                _geometric([run.reference_variance for run in of_gamma]),
                _geometric([run.first_variance for run in of_gamma]),
            ]
        )
    return Sheet(
        title=f"Two-task toy, {iterations} iterations",
        note=(
            f"Reached: both targets, within {toy_control.REACHED:g}. Diverged: farther from a"
            " target than it began. Distances: mean over seeds [least, most]. Variances: over"
            f" {toy_control.MICRO_BATCHES} micro-batches of"
            f" {toy_control.TRAJECTORIES // toy_control.MICRO_BATCHES} trajectories, median over"
            " the iterations, geometric mean over seeds; on the γ=0 students all γ meet the same"
            " trajectories."
        ),
        headings=[
            "γ",
            "both\nreached",
            "diverged",
            "off left\ntarget",
            "off right\ntarget",
            "variance",
            "on γ=0's\nstudents",
            "first\niteration",
        ],
        rows=rows,
        left=1,
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _geometric(values: Sequence[float]) -> str:
    # Variances differ by orders of magnitude between seeds: the largest would be the mean.
    return f"{statistics.geometric_mean(values):.2g}"


def enumeration_sheet(qualities: Sequence[Quality]) -> Sheet:
    """One row an estimator, numbered as in the plot."""
    return Sheet(
        title=(
            f"Exact enumeration, {enumeration.VOCABULARY} tokens,"
            f" length {enumeration.LENGTH}, {enumeration.WORLDS} random pairs"
        ),
        note=(
            "Bias, root variance and error in units of the norm of the sequence-level gradient;"
            " variance of one sequence's estimate. Seq.: against grad KL(π(y) || q(y)); token:"
            " against the same with the prefixes held fixed. Bias counts a gradient's length as"
            " well as its direction, the cosine its direction alone. Top-K: the teacher's, or as"
            " said."
            f" Error: root mean square, of the mean over {BATCH} sequences, against the"
            f" sequence-level gradient.{_crossing(qualities)}"
        ),
        headings=[
            "#",
            "objective",
            "estimator",
            "bias,\nseq.",
            "bias,\ntoken",
            "variance",
            "cosine,\nseq.",
            f"error\nat {BATCH}",
        ],
        rows=[
            [
                str(number),
                quality.name,
                quality.label,
                f"{quality.sequence_bias:.3f}",
                f"{quality.token_bias:.3f}",
                f"{quality.variance:.3g}",
                f"{quality.cosine:.3f}",
                f"{quality.error(BATCH):.2f}",
            ]
            for number, quality in enumerate(qualities, 1)
        ],
        left=3,
    )


def sampling_sheet(errors: Sequence[SamplingShift]) -> Sheet:
    """One row an objective, one column a pair of temperature and top-p."""
    pairs = list(dict.fromkeys((error.temperature, error.top_p) for error in errors))
    rows: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        cell = f"{error.full:.1%} → {error.sampling:.1%}"
        rows.setdefault((error.name, error.label), []).append(cell)
    return Sheet(
        title=(
            f"Temperature and top-p, {enumeration.SAMPLING_VOCABULARY} tokens,"
            f" {enumeration.WORLDS} random pairs"
        ),
        note=(
            "Error of the mean gradient, relative to the length of the one with draws from the"
            " whole policy at temperature 1: with behavior: full → sampling. The error that"
            " sampling leaves comes from tokens that top-p never draws."
        ),
        headings=[
            "objective",
            "estimator",
            *(f"temperature {temperature:g},\ntop-p {top_p:g}" for temperature, top_p in pairs),
        ],
        rows=[[*key, *cells] for key, cells in rows.items()],
        left=2,
    )


def _crossing(qualities: Sequence[Quality]) -> str:
    """From how many sequences a batch on the unbiased estimator has the smaller error."""
    # error^2 = bias^2 + variance / n; gamma 1 has no bias against the sequence-level gradient
    sampled = [quality for quality in qualities if quality.name == "sampled_token"]
    token, causal = sampled[0], sampled[-1]
    count = (causal.variance - token.variance) / (token.sequence_bias**2 - causal.sequence_bias**2)
    return f" γ=1 has a smaller error than γ=0 from {math.ceil(count)} sequences a batch on."
