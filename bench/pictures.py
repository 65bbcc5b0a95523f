"""Results as pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.files import atomic
from bench.mnist_tables import LABELS, counted
from bench.training import ARMS, PERCENTILES, Row

Panel = Callable[[Axes, Sequence[Row]], None]

# Wide and pale below narrow and dark: arms that agree stay visible.
STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "#7f7f7f", "linewidth": 1.6},
    "torch": {"color": "#f2b46d", "linewidth": 5.0},
    "tritonbn": {"color": "#1f4e8c", "linewidth": 1.4, "linestyle": "--"},
}


def mnist_panels(rows: Sequence[Row], data: str, path: Path, panel: Panel | None = None, remark: str = "") -> None:
    """Figure 1 of the paper: test accuracy, and the input of a typical last sigmoid of the first seed, both ways.

    `panel` draws the accuracy, by default a line per seed.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    accuracy, without, with_bn = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    (panel or accuracy_panel)(accuracy, rows)
    first = {row["arm"]: row for row in rows if row["seed"] == rows[0]["seed"]}
    percentile_panel(without, first["none"], "(b) without batch norm")
    percentile_panel(with_bn, first["tritonbn"], "(c) with tritonbn")
    with_bn.sharey(without)
    without.set_ylabel("input of one last-layer sigmoid")
    title = f"{data}; {counted(rows[0]['steps'], 'step')} of 60{remark}"
    figure.suptitle(title, fontsize="small", color="#555555")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)


def accuracy_panel(axes: Axes, rows: Sequence[Row]) -> None:
    """A line per seed, the range of the paper's axis wherever the curves reach it."""
    for arm in ARMS:
        for index, row in enumerate(row for row in rows if row["arm"] == arm):
            steps, accuracies = zip(*row["curve"], strict=True)
            axes.plot(steps, accuracies, label=None if index else LABELS[arm], **STYLES[arm])
    if max(row["test_accuracy"] for row in rows) > 75:
        axes.set_ylim(70, 100)
    axes.set_title("(a) test accuracy, %")
    axes.legend(loc="lower right", frameon=False)
    finish(axes)


def percentile_panel(axes: Axes, row: Row, title: str) -> None:
    steps, low, median, high = zip(*row["percentiles"], strict=True)
    axes.fill_between(steps, low, high, color="#1f4e8c", alpha=0.12, linewidth=0)
    for percent, values in zip(PERCENTILES, (low, median, high), strict=True):
        axes.plot(steps, values, color="#1f4e8c", linewidth=2 if percent == 50 else 1)
        axes.annotate(
            f"{percent}%",
            (steps[-1], values[-1]),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    axes.set_title(f"{title}, unit {row['unit']}")
    finish(axes)


def finish(axes: Axes) -> None:
    axes.set_xlabel("training steps")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
