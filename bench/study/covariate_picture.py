"""The two explanations as a picture, a row of panels for each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.files import atomic
from bench.pictures import finish
from bench.study.covariate_figures import DRIFT, SMOOTHNESS, over_layers

Row = dict[str, Any]
STYLES = {True: ("#7f7f7f", "no batch norm"), False: ("#1f4e8c", "batch norm")}
LAST = -1  # the hidden layer that is shown


def draw(rows: Sequence[Row], data: str, path: Path) -> None:
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    above, below = parts
    panels: Any = above.subplots(1, 3)
    typical(panels[0], rows)
    lines(panels[1], rows, lambda row: row["layers"][LAST]["change"])
    panels[1].set_title("change between two moments, widths")
    lines(panels[2], rows, lambda row: over_layers("distance", row))
    panels[2].set_title("internal covariate shift as (2) defines it")
    above.suptitle(f"(1) {DRIFT}: last hidden layer; {data}", fontsize="medium")
    panels = below.subplots(1, 3)
    ranges(panels[0], rows, "loss_low", "loss_high")
    panels[0].set_title("loss along the gradient, nats")
    ranges(panels[1], rows, "change_low", "change_high")
    panels[1].set_title("change of the gradient along it")
    lines(panels[2], rows, lambda row: row["landscape"]["beta"])
    panels[2].set_title("effective beta-smoothness")
    below.suptitle(f"(2) {SMOOTHNESS}; lines: mean over seeds, bands: range", fontsize="medium")
    for axes in figure.axes:
        finish(axes)
    for axes in figure.axes[1:-1]:
        axes.set_yscale("log")
    figure.axes[1].legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)


def typical(axes: Axes, rows: Sequence[Row]) -> None:
    """Percentiles 15, 50, 85 of the typical unit's input, of the first seed."""
    for row in rows:
        if row["seed"] == rows[0]["seed"]:
            color, _ = STYLES[row["arm"] == "none"]
            steps, low, middle, high = zip(*row["layers"][LAST]["percentiles"], strict=True)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(steps, middle, color=color, linewidth=2)
            for edge in (low, high):
                axes.plot(steps, edge, color=color, linewidth=0.8)
    axes.set_title("input of a typical sigmoid: 15, 50, 85%")


def lines(axes: Axes, rows: Sequence[Row], of: Callable[[Row], Sequence[float | None]]) -> None:
    """The mean over seeds and their range."""
    for none, (color, label) in STYLES.items():
        times, seeds = series(rows, none, of)
        axes.fill_between(times, [min(s) for s in seeds], [max(s) for s in seeds], color=color, alpha=0.25, linewidth=0)
        axes.plot(times, [sum(s) / len(s) for s in seeds], color=color, linewidth=1.4, label=label)


def ranges(axes: Axes, rows: Sequence[Row], low: str, high: str) -> None:
    """What lies between the smallest and the largest along the gradient, both means over seeds."""
    for none, (color, _) in STYLES.items():
        times, lows = series(rows, none, lambda row: row["landscape"][low])
        _, highs = series(rows, none, lambda row: row["landscape"][high])
        lower, upper = ([sum(s) / len(s) for s in edge] for edge in (lows, highs))
        axes.fill_between(times, lower, upper, color=color, alpha=0.5, linewidth=0.4)


def series(
    rows: Sequence[Row], none: bool, of: Callable[[Row], Sequence[float | None]]
) -> tuple[list[int], list[tuple[float, ...]]]:
    """The moments that have values, and there the values of all seeds."""
    mine = [row for row in rows if (row["arm"] == "none") is none]
    found = zip(mine[0]["moments"], zip(*map(of, mine), strict=True), strict=True)
    known = [(time, values) for time, values in found if None not in values]
    return [time for time, _ in known], [tuple(value or 0.0 for value in values) for _, values in known]
