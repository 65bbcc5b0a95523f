"""Figure 1 of the paper over seeds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from bench.mnist_tables import LABELS, counted
from bench.pictures import STYLES, finish, mnist_panels
from bench.training import ARMS, TARGET, Row


def draw(rows: Sequence[Row], data: str, path: Path) -> None:
    """Test accuracy with its band over seeds, and the input of a typical last sigmoid of the first seed."""
    seeds = counted(len({row["seed"] for row in rows}), "seed")
    mnist_panels(rows, data, path, accuracy_panel, f"; (a) {seeds}, (b, c) the first of them")


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
