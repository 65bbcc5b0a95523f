"""The operator benchmark as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.files import atomic
from bench.summary import OURS, Row, ratios, tensor_bytes

DIRECTIONS = ("forward", "backward")
LAYOUTS = {"nchw": "o", "channels_last": "^", "nc": "s"}
# Ours dark and last, so that it lies on top; each of torch's own two families in one colour.
COLOURS = {
    "eager": "#e08a1e", "eager-no-cudnn": "#f2c48d", "compile": "#2e8b57", "compile-max-autotune": "#9fd3b4",
    OURS: "#1f4e8c",
}  # fmt: skip
OTHERS = ("#8e6bb0", "#a0522d", "#7f7f7f", "#c2185b")
EPILOGUES = ("bn", "bn+relu", "bn+add+relu")  # a column each
EPILOGUE_STYLES = {"bn": ("#1f4e8c", "o"), "bn+relu": ("#2e8b57", "^"), "bn+add+relu": ("#e08a1e", "s"),
                   "bn+silu": ("#8e6bb0", "D"), "bn+sigmoid": ("#7f7f7f", "v")}  # fmt: skip
COARSE = tuple(2.0**power for power in range(-6, 7))  # speed-ups that an axis names
FINE = (0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 3)
SIZES = tuple(digit * 10.0**power for power in range(-5, 6) for digit in (1, 3))  # MB
ROOFLINE, RATIO = "ops-roofline.png", "ops-ratio.png"


def drawn(rows: Sequence[Row]) -> dict[str, str]:
    """The pictures that these rows give, and what each shows."""
    pictures = {}
    if shown(rows):
        pictures[ROOFLINE] = "percent of the floor over the size of the tensor"
    if compared(rows):
        pictures[RATIO] = "speed-up over the fastest peer, layer by layer"
    return pictures


def draw(rows: Sequence[Row], title: str, folder: Path) -> list[Path]:
    """Write the pictures of `drawn`; the same rows give the same bytes."""
    makers = {ROOFLINE: roofline, RATIO: ratio}
    for name in drawn(rows):
        with atomic(folder / name) as temporary:
            makers[name](rows, title).savefig(temporary, dpi=130, metadata={"Software": None})
    return [folder / name for name in drawn(rows)]


def principal(names: Sequence[str], first: str) -> str | None:
    """What one picture is about: `first` if it was measured, else the first that was."""
    return first if first in names else next(iter(names), None)


def shown(rows: Sequence[Row]) -> list[Row]:
    """The rows of the roofline: timed, in one dtype, one way."""
    timed = [r for r in rows if r["percent_of_floor"] and r["direction"] in DIRECTIONS and r["epilogue"] in EPILOGUES]
    dtype = principal([row["dtype"] for row in timed], "bf16")
    return [row for row in timed if row["dtype"] == dtype]


def compared(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """The rows of the ratios: the layers of one network in one dtype, one way, with a peer."""
    found = [(speedup, row) for speedup, row in ratios(rows) if row["direction"] in DIRECTIONS]
    network = principal([row["set"] for _, row in found], "resnet50-256")
    dtype = principal([row["dtype"] for _, row in found if row["set"] == network], "bf16")
    return [(speedup, row) for speedup, row in found if (row["set"], row["dtype"]) == (network, dtype)]


def present(order: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that occur, the known ones first in their order."""
    return [name for name in order if name in names] + sorted(set(names) - set(order))


def roofline(rows: Sequence[Row], title: str) -> Figure:
    """Percent of the floor over the size of x: a column per epilogue, a row per direction, a colour per provider."""
    rows = shown(rows)
    epilogues = present(EPILOGUES, [row["epilogue"] for row in rows])
    directions = present(DIRECTIONS, [row["direction"] for row in rows])
    names = [row["provider"] for row in rows]
    providers = [name for name in present(tuple(COLOURS), names) if name != OURS] + [OURS] * (OURS in names)
    others = [name for name in providers if name not in COLOURS]
    colours = COLOURS | {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(others)}
    figure = Figure(figsize=(3 + 3.4 * len(epilogues), 1 + 3 * len(directions)), layout="constrained")
    panels = figure.subplots(len(directions), len(epilogues), sharex=True, sharey=True, squeeze=False)
    for across, direction in zip(panels, directions, strict=True):
        for axes, epilogue in zip(across, epilogues, strict=True):
            axes.axhline(100, color="#555555", linewidth=1, linestyle=":")
            for layer, provider in enumerate(providers):
                for layout, marker in LAYOUTS.items():
                    here = (epilogue, direction, provider, layout)
                    points = [r for r in rows if (r["epilogue"], r["direction"], r["provider"], r["layout"]) == here]
                    axes.plot(
                        [tensor_bytes(row) / 1e6 for row in points], [row["percent_of_floor"] for row in points],
                        marker, color=colours[provider], markersize=6, alpha=0.9, zorder=3 + layer,
                        markeredgecolor="white", markeredgewidth=0.5,
                    )  # fmt: skip
            axes.set_title(f"{epilogue}, {direction}", fontsize="medium")
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            finish(axes)
        across[0].set_ylabel("% of the floor")
    for axes in panels[-1]:
        axes.set_xlabel("size of x, MB")
    label(panels[0][0].xaxis, SIZES)
    layouts = [layout for layout in LAYOUTS if any(row["layout"] == layout for row in rows)]
    figure.legend(
        handles=[dot(name, colours[name], "o") for name in reversed(providers)]
        + [dot(layout, "#bbbbbb", LAYOUTS[layout]) for layout in layouts],
        loc="outside right upper", frameon=False,
    )  # fmt: skip
    figure.suptitle(f"{title}, {rows[0]['dtype']}; 100% is the speed of a plain copy", fontsize="medium")
    return figure


def ratio(rows: Sequence[Row], title: str) -> Figure:
    """Speed-up over the fastest peer by layer: a column per direction, a row per layout, a colour per epilogue."""
    found = compared(rows)
    layers = list(dict.fromkeys(tuple(row["shape"]) for _, row in found))
    names = ["x".join(map(str, layer[1:])) for layer in layers]
    directions = present(DIRECTIONS, [row["direction"] for _, row in found])
    layouts = present(tuple(LAYOUTS), [row["layout"] for _, row in found])
    epilogues = present(tuple(EPILOGUE_STYLES), [row["epilogue"] for _, row in found])
    figure = Figure(figsize=(2 + 5 * len(directions), 1.4 + 2.6 * len(layouts)), layout="constrained")
    panels = figure.subplots(len(layouts), len(directions), sharex=True, sharey=True, squeeze=False)
    for across, layout in zip(panels, layouts, strict=True):
        for axes, direction in zip(across, directions, strict=True):
            axes.axhline(1, color="#c62828", linewidth=1.5)
            for place, epilogue in enumerate(epilogues):
                colour, marker = EPILOGUE_STYLES[epilogue]
                here = (layout, direction, epilogue)
                points = [(s, r) for s, r in found if (r["layout"], r["direction"], r["epilogue"]) == here]
                shift = 0.15 * (place - (len(epilogues) - 1) / 2)
                across_layers = [layers.index(tuple(row["shape"])) + shift for _, row in points]
                axes.plot(across_layers, [speedup for speedup, _ in points], marker, color=colour, markersize=6)
            axes.set_title(f"{layout}, {direction}", fontsize="medium")
            axes.set_xticks(range(len(layers)), names, rotation=40, ha="right", rotation_mode="anchor")
            finish(axes)
        across[0].set_ylabel("speed-up")
    scale(panels[0][0], [speedup for speedup, _ in found])
    handles = [dot(epilogue, *EPILOGUE_STYLES[epilogue]) for epilogue in epilogues]
    handles.append(Line2D([], [], color="#c62828", label="as fast as the\nfastest peer"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    first = found[0][1]
    text = f"{title}, {first['set']}, {first['dtype']}: time of the fastest peer over ours; below the line we lose"
    figure.suptitle(text, fontsize="medium")
    return figure


def scale(axes: Axes, speedups: Sequence[float]) -> None:
    """Logarithmic: twice as slow is as far from the line as twice as fast."""
    low, high = min(*speedups, 1) / 1.15, max(*speedups, 1) * 1.15
    axes.set_yscale("log", base=2)
    axes.set_ylim(low, high)
    label(axes.yaxis, (*COARSE, *FINE) if high / low < 4 else COARSE)


def label(axis: Axis, values: Sequence[float]) -> None:
    """Ticks at these values only, as plain numbers."""
    low, high = axis.get_view_interval()
    inside = [value for value in values if low <= value <= high]
    axis.set_ticks(inside, [f"{value:g}" for value in inside])
    axis.set_ticks([], minor=True)


def dot(label: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=label)


def finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
