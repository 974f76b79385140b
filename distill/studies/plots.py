"""Draws the estimator study's two plots. matplotlib loads inside the functions that draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.distill.studies.enumeration import Quality
from tutelage.distill.studies.toy_control import ToyRun

# The first five are from Okabe and Ito's palette, which color-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#7f5539",
    "#6c757d",
)
NEAR = 0.03
"""Points closer than this share one label: in decades of variance, and in bias."""
LABEL = (0.033, 0.03)
"""About the size of a label, as a share of its panel's width and height."""
SIDES = ((0, 1), (1, 0), (-1, 0), (0, -1))
"""Where a label may stand from its point, the best first."""


def check_matplotlib() -> None:
    """Called first, since the study computes for minutes before it draws.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the study's plots need matplotlib, which is not installed: run"
            " pip install 'tutelage[plots]' (in the repository: make install)"
        ) from error


def _figure(width: float, height: float, ratios: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, of these relative widths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: that keeps figures alive, and may look for a display
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0].tolist()
    for axis in axes:
        axis.grid(True, which="major", color="#e5e5e5", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_variance(runs: Sequence[ToyRun], path: Path) -> None:
    """Gradient variance against gamma in the toy: on the same students for every gamma (the
    estimator's effect alone), and on the students that each gamma trained.
    """
    figure, (axis,) = _figure(7.0, 4.6, [1])
    gammas = sorted({run.gamma for run in runs})

    def line(field: str, label: str, color: str, style: str) -> None:
        means = [
            # as on the axis, which is logarithmic
            statistics.geometric_mean([getattr(run, field) for run in runs if run.gamma == gamma])
            for gamma in gammas
        ]
        axis.plot(gammas, means, style, color=color, label=label, linewidth=1.8, markersize=5)

    first = f"γ={gammas[0]:g}"
    line("first_variance", "first iteration: the same untrained student", GREY, "s:")
    line("variance", "while training: each γ's own student", RED, "o-")
    line("reference_variance", f"while training: the {first} student for every γ", BLUE, "^--")
    for runs_of, marker, label in (
        ([run for run in runs if not run.diverged], "o", "a seed"),
        ([run for run in runs if run.diverged], "x", "a seed that diverged"),
    ):
        if runs_of:
            axis.plot(
                [run.gamma for run in runs_of],
                [run.variance for run in runs_of],
                marker,
                color=RED,
                alpha=0.55,
                markersize=5 if marker == "o" else 8,
                markeredgewidth=0 if marker == "o" else 2,
                label=label,
            )
    axis.set_yscale("log")
    axis.set_xticks(gammas)
    axis.set_xlabel("discount γ of the return-to-go")
    axis.set_ylabel("variance of the output layer's gradient")
    axis.set_title("Two-task toy: gradient variance against γ", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=8.5, loc="upper left", handlelength=3.5)
    figure.savefig(path)


def _style(quality: Quality) -> tuple[str, str, str]:
    """(family, color, marker)"""
    if quality.name == "sampled_token":
        return "sampled token, γ", RED, "o"
    if quality.name == "full_vocabulary":
        return "full vocabulary", BROWN, "D"
    if quality.name == "trust_region":
        return "trust region (TrOPD), outlier:", PURPLE, "s"
    if quality.name != "local_support":
        return "other baselines", GREY, "P"
    if "tail" in quality.label:
        return "local support, sampled tail", GREEN, "v"
    if "unnormalised" in quality.label:
        return "local support, unnormalised", ORANGE, "X"
    return "local support, renormalised", BLUE, "^"


def plot_bias(qualities: Sequence[Quality], path: Path) -> None:
    """Bias against variance of every estimator, against both truths. Numbers are the table's."""
    figure, (left, right, key) = _figure(13.0, 6.2, [1, 1, 0.52])
    _bias_panel(left, qualities, "sequence_bias", "Bias against the sequence-level gradient")
    _bias_panel(right, qualities, "token_bias", "Bias against the token-level gradient")
    left.set_ylabel("bias / ‖sequence-level gradient‖")
    right.sharey(left)
    _key(key, qualities)
    figure.savefig(path)


def _bias_panel(axis: Any, qualities: Sequence[Quality], field: str, title: str) -> None:
    places: list[tuple[float, float, list[str]]] = []
    for number, quality in enumerate(qualities, 1):
        x, y = quality.variance, getattr(quality, field)
        _, color, marker = _style(quality)
        axis.plot(x, y, marker, color=color, markersize=7, alpha=0.9)
        for other_x, other_y, numbers in places:
            if abs(math.log10(x / other_x)) < NEAR and abs(y - other_y) < NEAR:
                numbers.append(str(number))
                break
        else:
            places.append((x, y, [str(number)]))
    axis.set_xscale("log")
    axis.set_xlabel("variance of one sequence's estimate / ‖sequence-level gradient‖²")
    axis.set_title(title, loc="left", fontsize=11)
    axis.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    _label(axis, places)


def _label(axis: Any, places: Sequence[tuple[float, float, list[str]]]) -> None:
    """Write each point's numbers on its least crowded side."""
    scaled = axis.transScale.transform([(x, y) for x, y, _ in places])
    points = (axis.transLimits.transform(scaled) / LABEL).tolist()
    taken = list(points)  # by points and by labels, in sizes of a label
    for (x, y, numbers), (left, bottom) in zip(places, points, strict=True):
        text = ", ".join(numbers)
        width = 0.5 + len(text) / 4
        spots = [(left + across * width, bottom + up) for across, up in SIDES]
        crowds = [_crowd(spot, taken, width) for spot in spots]
        free = crowds.index(min(crowds))
        taken.append(spots[free])
        across, up = SIDES[free]
        axis.annotate(
            text,
            (x, y),
            xytext=(6 * across, 5 * up),
            textcoords="offset points",
            ha=("center", "left", "right")[across],
            va=("center", "bottom", "top")[up],
            fontsize=7.5,
        )


def _crowd(spot: Sequence[float], taken: Sequence[Sequence[float]], width: float) -> float:
    """How much of what is there a label at `spot` would cover."""
    gaps = (max(abs(spot[0] - x) / width, abs(spot[1] - y)) for x, y in taken)
    return sum(max(0.0, 1 - gap) for gap in gaps)


def _key(axis: Any, qualities: Sequence[Quality]) -> None:
    """Which number is which, family by family."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    row, family = 0.0, ""
    for number, quality in enumerate(qualities, 1):
        name, color, marker = _style(quality)
        if name != family:
            family, row = name, row + 1.5
            axis.plot(0.02, -row, marker, color=color, markersize=7, clip_on=False)
            axis.text(0.08, -row, name, fontsize=8.5, fontweight="bold", va="center")
            row += 1
        axis.text(0.15, -row, str(number), fontsize=8, va="center", ha="right")
        axis.text(0.18, -row, quality.label, fontsize=8, va="center")
        row += 1
    axis.set_ylim(-row, 0)
