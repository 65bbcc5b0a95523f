"""Figure 1 of the paper over seeds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.files import atomic
from bench.mnist_tables import LABELS, counted
from bench.pictures import STYLES, finish, percentile_panel
from bench.training import ARMS, TARGET, Row


def draw(rows: Sequence[Row], data: str, path: Path) -> None:
    """Test accuracy with its band over seeds, and the input of a typical last sigmoid of the first seed."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    accuracy, without, with_bn = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    accuracy_panel(accuracy, rows)
    first = {row["arm"]: row for row in rows if row["seed"] == rows[0]["seed"]}
    percentile_panel(without, first["none"], "(b) without batch norm")
    percentile_panel(with_bn, first["tritonbn"], "(c) with tritonbn")
    with_bn.sharey(without)
    without.set_ylabel("input of one last-layer sigmoid")
    seeds = counted(len({row["seed"] for row in rows}), "seed")
    text = f"{data}; {counted(rows[0]['steps'], 'step')} of 60; (a) {seeds}, (b, c) the first of them"
    figure.suptitle(text, fontsize="small", color="#555555")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)


def accuracy_panel(axes: Axes, rows: Sequence[Row]) -> None:
    """The mean of each arm, its range as a band, and every seed as a pale line."""
    axes.axhline(TARGET, color="#bbbbbb", linewidth=1, linestyle=":", zorder=0)
    for arm in ARMS:
        curves = [row["curve"] for row in rows if row["arm"] == arm]
        steps = [step for step, _ in curves[0]]
        seeds = [[percent for _, percent in curve] for curve in curves]
        times = list(zip(*seeds, strict=True))
        color = STYLES[arm]["color"]
        axes.fill_between(steps, [min(t) for t in times], [max(t) for t in times], color=color, alpha=0.2, linewidth=0)
        for seed in seeds:
            axes.plot(steps, seed, color=color, alpha=0.3, linewidth=0.6)
        axes.plot(steps, [sum(t) / len(t) for t in times], label=LABELS[arm], **STYLES[arm])
    if max(row["test_accuracy"] for row in rows) > 75:
        axes.set_ylim(70, 100)
    axes.set_title("(a) test accuracy, %: mean and range over seeds")
    axes.legend(loc="lower right", frameon=False)
    finish(axes)
