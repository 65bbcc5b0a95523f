"""The networks' benchmark as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.files import atomic
from bench.models import tax
from bench.models.rows import Row
from bench.models.tax import Line

COLOURS = {
    "none": "#7f7f7f", "torch": "#e08a1e", "torch-again": "#f2c48d", "tritonbn": "#6f93c9", "fused": "#1f4e8c",
    "torch-folded": "#b5651d", "tritonbn-folded": "#2e8b57",
}  # fmt: skip
STYLES = {"eager": "-", "compile": "--", "graph": "-.", "compile-graph": ":"}
TAX, STEPS = "models-tax.png", "models.png"


def drawn(rows: Sequence[Row], lines: Sequence[Line]) -> dict[str, str]:
    """The pictures that these rows give, and what each shows."""
    found = {}
    if any(row["ms"] is not None for row in rows):
        found[STEPS] = "time of a training step, by provider and mode"
    if any(len(line["points"]) > 1 for line in lines):
        found[TAX] = "what batch norm adds to a training step, by batch size"
    return found


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures of `drawn`, of what models.json holds; the same rows give the same bytes."""
    rows, lines, facts = content["rows"], content["tax"], content["machine"]
    on_cpu = f"CPU ({facts.get('cpu')}; tritonbn runs torch's own kernels there)"
    title = on_cpu if facts["device"] == "CPU" else facts["device"]
    bytes_per_second = 1e9 * facts["copy_gb_per_s"]
    for name in drawn(rows, lines):
        figure = steps(rows, title) if name == STEPS else over_batches(lines, title, bytes_per_second)
        with atomic(folder / name) as temporary:
            figure.savefig(temporary, dpi=130, metadata={"Software": None})
    return [folder / name for name in drawn(rows, lines)]


def steps(rows: Sequence[Row], title: str) -> Figure:
    """Milliseconds of the first network's step at the largest batch: a panel per direction, bars by mode."""
    timed = [row for row in rows if row["ms"] is not None]
    model = timed[0]["model"]
    batch = max(row["batch"] for row in timed if row["model"] == model)
    like = {key: timed[0][key] for key in ("layout", "dtype")} | {"model": model, "batch": batch}
    timed = [row for row in timed if all(row[key] == value for key, value in like.items())]
    directions = list(dict.fromkeys(row["direction"] for row in timed))
    figure = Figure(figsize=(6 + 5 * len(directions), 4.2), layout="constrained")
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        bars(axes, [row for row in timed if row["direction"] == direction])
        axes.set_title(direction, fontsize="medium")
    size = "" if timed[0]["image"] is None else f" of {timed[0]['image']}x{timed[0]['image']}"
    names = [name for name in COLOURS if any(row["provider"] == name for row in timed)]
    handles = [Patch(color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    text = f"{title}: {model}, batch {batch}{size}, {timed[0]['layout']}, {timed[0]['dtype']}"
    figure.suptitle(text, fontsize="medium")
    return figure


def bars(axes: Axes, rows: Sequence[Row]) -> None:
    modes = [mode for mode in STYLES if any(row["mode"] == mode for row in rows)]
    providers = [name for name in COLOURS if any(row["provider"] == name for row in rows)]
    width = 0.8 / len(providers)
    for place, provider in enumerate(providers):
        mine = [row for row in rows if row["provider"] == provider]
        at = [modes.index(row["mode"]) + width * (place - (len(providers) - 1) / 2) for row in mine]
        errors = [[row["ms"] - row["ms_low"] for row in mine], [row["ms_high"] - row["ms"] for row in mine]]
        axes.bar(at, [row["ms"] for row in mine], width, yerr=errors, color=COLOURS[provider])
    axes.set_xticks(range(len(modes)), modes)
    axes.set_ylabel("ms per step: median, quartiles")
    finish(axes)


def over_batches(lines: Sequence[Line], title: str, bytes_per_second: float | None) -> Figure:
    """The first network's lines: ratio to the step without batch norm, and microseconds more per image."""
    lines = [line for line in lines if all(line[key] == lines[0][key] for key in tax.KEYS if key != "mode")]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    ratios, extras = figure.subplots(1, 2)
    for axes, without in ((ratios, 1), (extras, 0)):
        axes.axhline(without, color="#555555", linewidth=1, linestyle=":", label="without batch norm" * without)
    for line in lines:
        points = [p for p in line["points"] if p["ratio"] is not None and p["extra_us"] is not None]
        if line["provider"] == tax.WITHOUT or not points:
            continue
        batches = [p["batch"] for p in points]
        looks = {"color": COLOURS[line["provider"]], "linestyle": STYLES[line["mode"]], "marker": "o", "markersize": 4}
        ratios.plot(batches, [p["ratio"] for p in points], label=f"{line['provider']}, {line['mode']}", **looks)
        extras.plot(batches, [p["extra_us"] for p in points], **looks)
    if floor := tax.floor_us(lines[0], bytes_per_second):
        extras.axhline(floor, color="#c62828", linewidth=1, label=f"{tax.PASSES} passes\nas fast as a copy")
    ratios.set_ylabel("step time / step time without batch norm")
    extras.set_ylabel("us more per image")
    figure.legend(loc="outside right upper", frameon=False)
    batches = sorted({p["batch"] for line in lines for p in line["points"]})
    for axes in (ratios, extras):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [f"{batch}" for batch in batches])
        axes.set_xlabel("batch")
        finish(axes)
    figure.suptitle(f"{title}: {lines[0]['model']}, {lines[0]['layout']}, {lines[0]['dtype']}", fontsize="medium")
    return figure


def finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
