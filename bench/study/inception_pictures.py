"""The paper's figure 2: validation accuracy over steps, and over seconds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.files import atomic
from bench.study.inception_runs import Point, Row
from bench.study.inception_summary import Line, Summary

COLOURS = {
    "Inception": "#222222", "BN-Baseline": "#7f7f7f", "BN-x5": "#1f4e8c", "BN-x30": "#c2571a",
    "BN-x5-Sigmoid": "#2e8b57", "Inception-x5": "#c62828", "Inception-Sigmoid": "#8e6bb0",
}  # fmt: skip
WIDTHS = {None: (2.2, "-"), "tritonbn": (1.6, "-"), "torch": (1.2, "--")}


def figure_2(rows: Sequence[Row], summary: Summary, title: str, path: Path) -> None:
    with atomic(path) as temporary:
        drawn(rows, summary, title).savefig(temporary, dpi=150)


def drawn(rows: Sequence[Row], summary: Summary, title: str) -> Figure:
    """A line per arm and batch norm, the mean of its seeds in a band of their range; marks where it arrives."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    several = len({line["norm"] for line in summary["lines"]} - {None}) > 1
    for line in summary["lines"]:
        mine = [row for row in rows if (row["arm"], row["norm"]) == (line["arm"], line["norm"])]
        label = f"{line['arm']}, {line['norm']}" if several and line["norm"] else line["arm"]
        for axes, seconds in ((over_steps, False), (over_seconds, True)):
            curve(axes, mine, line, seconds, label)
    for axes, name in ((over_steps, "training steps"), (over_seconds, "seconds of training")):
        if summary["target"] is not None:
            axes.axhline(summary["target"], color="#222222", linewidth=0.8, linestyle=":")
        finish(axes, name)
    over_steps.set_ylabel("validation accuracy, %")
    if any(row["curve"] for row in rows):
        figure.legend(*over_steps.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(title, fontsize="small", color="#555555")
    return figure


def curve(axes: Axes, rows: Sequence[Row], line: Line, seconds: bool, label: str) -> None:
    """Seeds are averaged as long as none has diverged."""
    points = list(zip(*(row["curve"] for row in rows), strict=False))
    if not points:
        return
    across = [mean([place(point, seconds) for point in together]) for together in points]
    accuracies = [[point["accuracy"] for point in together] for together in points]
    width, style = WIDTHS[line["norm"]]
    colour = COLOURS[line["arm"]]
    axes.plot(across, [mean(each) for each in accuracies], style, color=colour, linewidth=width, label=label)
    if len(rows) > 1:
        axes.fill_between(across, list(map(min, accuracies)), list(map(max, accuracies)), color=colour, alpha=0.15)
    reached = line["seconds_to_target" if seconds else "steps_to_target"]
    marks = [value for value in reached or () if value is not None]
    if marks and len(marks) == len(line["seeds"]):
        accuracy = dict(zip(across, map(mean, accuracies), strict=True))
        at = mean(marks)
        nearest = min(accuracy, key=lambda value: abs(value - at))
        axes.plot([at], [accuracy[nearest]], "D", color=colour, markersize=7, markeredgecolor="white")


def place(point: Point, seconds: bool) -> float:
    return point["seconds"] if seconds else point["step"]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def finish(axes: Axes, name: str) -> None:
    axes.set_xlabel(name)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
