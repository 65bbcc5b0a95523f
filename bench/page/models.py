"""The benchmark of whole networks as Markdown: every setting, the BN tax."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from bench.models import pictures, tables, tax
from bench.models.rows import Row
from bench.models.tables import number
from bench.page.folders import Folder
from bench.page.markdown import details, joined, table

OPEN = 4  # settings that a reader sees at once


# Each has a file of its own: options of one command are for all of its networks.
FILES = {"models": "### Whole networks", "mnist/models": "### The network of the MNIST experiment, step by step"}


def draw(folder: Folder) -> list[Path]:
    """Write the pictures of each file beside it."""
    found = ((name, content) for name, content in folder.files.items() if name in FILES)
    return [path for name, content in found for path in pictures.draw(content, (folder.path / name).parent)]


def networks(folder: Folder, name: str = "models") -> str:
    """Everything from one of the `FILES` but the targets."""
    content = folder.files[name]
    chosen, gpu = content["settings"], folder.gpu(name)
    settings = [list(rows) for _, rows in groupby(content["rows"], key=tables.title)]
    drawn = pictures.drawn(content["rows"], content["tax"])
    return joined(
        FILES[name],
        ""
        if gpu
        else f"**Measured on a CPU.** {tables.INTERPRETED if chosen['kernels_compared'] else tables.SWAP_ONLY}",
        f"Input: {chosen['input']}. {chosen['optimizer']}. {'; '.join(chosen['precision'].values())}. Milliseconds per "
        "step: median (quartiles). x torch: times as fast as torch in the same turns; torch-again is torch once more, "
        "and its x the noise. off fp32: how far the losses of the first steps, or the outputs, are from those in fp32, "
        "of the largest. Shares are of the time of all "
        f"{'GPU kernels' if gpu else 'CPU operators'}.",
        f"Plans: {chosen['plans']}." if gpu and "plans" in chosen else "",
        *(f"![{text}]({folder.prefix}{name.removesuffix('models')}{picture})" for picture, text in drawn.items()),
        *(setting(rows) for rows in settings[:OPEN]),
        details("More settings", joined(*(setting(rows) for rows in settings[OPEN:]))),
        *taxes(content["tax"], content["machine"].get("copy_gb_per_s")),
        with_data(content["with_data"]),
        f"Not measured, because the time was spent: {'; '.join(content['left_out'])}." if content["left_out"] else "",
    )


def setting(rows: Sequence[Row]) -> str:
    """The arms of one setting; what has no time, and why."""
    timed = [row for row in rows if row["ms"] is not None]
    if not timed:
        return f"**{tables.title(rows[0])}**: {'; '.join(dict.fromkeys(row['error'] or '' for row in rows))}."
    remarks = [
        f"{row['provider']}: {', '.join([row['error']] if row['error'] else [*tables.remarks(row), *row['notes']])}"
        for row in rows
        if row["error"] or row["notes"] or [*tables.remarks(row)]
    ]
    return joined(
        f"**{tables.title(rows[0])}**",
        table(tables.TIMES, map(tables.times, timed)),
        details("Layers, kernels and where the time goes", table(tables.CAUSES, map(tables.causes, timed))),
        "; ".join(remarks),
    )


def taxes(lines: Sequence[tax.Line], copy_gb_per_s: float | None) -> list[str]:
    """The BN tax wherever several batch sizes were measured: a line per provider and mode."""
    several = [line for line in lines if len(line["points"]) > 1]
    if not several:
        return []
    found = []
    for line in several:
        ratios = ", ".join(f"{p['batch']}: {number(p['ratio'], '.3f')}" for p in line["points"])
        extra = ", ".join(f"{p['batch']}: {number(p['extra_us'], '.1f')}" for p in line["points"])
        floor = tax.floor_us(line, copy_gb_per_s and 1e9 * copy_gb_per_s)
        names = (line["model"], line["dtype"], line["layout"], line["mode"], line["provider"], ratios, extra)
        figures = (number(line["fixed_ms"], ".2f"), number(line["per_example_us"], ".1f"), number(floor, ".1f"))
        found.append((*names, *figures))
    head = (
        "network",
        "dtype",
        "layout",
        "mode",
        "provider",
        "batch: step time over that without batch norm",
        "batch: us more per image",
        "fit: ms",
        "fit: us per image",
        f"{tax.PASSES} passes: us per image",
    )
    text = (
        "**The BN tax**: what batch norm adds to a training step. The fit is of the whole step, t = a + b * batch; the "
        "last column what reading and writing its tensors takes at the speed of a copy."
    )
    return [text, table(head, found, words=7)]


def with_data(rows: Sequence[Row]) -> str:
    """Images per second with a loader."""
    lines = [
        (tables.title(row), row["provider"], row["data"], row["workers"], number(row["images_per_second"], ".1f"),
         None if row["waiting"] is None else f"{100 * row['waiting']:.1f}%", row["error"])
        for row in rows
    ]  # fmt: skip
    head = ("with real images", "provider", "folder", "workers", "images/s", "waiting for a batch", "error")
    return table(head, lines, words=3)
