"""What was measured about plans themselves: what bounds all of them, and how long each path took."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, get_args

from bench.page.folders import Folder
from bench.page.markdown import details, joined, table
from tritonbn.plan import Path

Row = dict[str, Any]
PATHS = get_args(Path)


def bandwidth(folder: Folder) -> str:
    """The constants of the model beside what was measured, then every row."""
    content = folder.files["bandwidth"]
    constants = [
        (name, number(found["assumed"]), number(found["measured"])) for name, found in content["constants"].items()
    ]
    rows = [(row["what"], f"{row['bytes']:,}", row["error"] or spread(row), row["timed_by"]) for row in content["rows"]]
    return joined(
        "### What bounds every plan",
        "The model that picks a plan predicts times from these constants. A second pass finds what a first one read a "
        "moment ago, as far as L2 still has it; in reverse order it begins with what was read last.",
        table(("constant of the model", "assumed", "measured"), constants),
        details("Every row", table(("what", "bytes of a tensor", "us", "timed by"), rows)),
    )


def paths(folder: Folder) -> str:
    """The fastest plan of each path for every problem, beside the prediction; which the model took, which won."""
    rows = [row for row in folder.files["tune"]["rows"] if row["us"] is not None]
    lines = []
    for name, same in groupby(rows, key=lambda row: (row["operation"], row["layout"], row["shape"], row["itemsize"])):
        mine = list(same)
        best = {row["path"]: row for row in sorted(mine, key=lambda row: row["us"], reverse=True)}
        cells = (predicted(best.get(path)) for path in PATHS)
        lines.append((*words(name), *cells, of(mine, "before"), of(mine, "after")))
    head = ("operation", "layout", "shape", *(f"{path}, us" for path in PATHS), "plan of the model", "fastest")
    text = "Microseconds of the fastest plan of each path that was tried, with what the model predicts for it."
    return joined("### Paths", text, table(head, lines, words=3)) if lines else ""


def words(name: Sequence[Any]) -> tuple[str, str, str]:
    operation, layout, shape, itemsize = name
    return operation, layout, f"{'x'.join(map(str, shape))}, {8 * itemsize} bits"


def predicted(row: Row | None) -> str | None:
    return None if row is None else f"{row['us']:.1f} ({row['predicted_us']:.1f})"


def of(rows: Sequence[Row], which: str) -> str | None:
    """The plan before or after tuning, by its path and time."""
    return next((f"{row['path']} {row['us']:.1f}" for row in rows if row[which]), None)


def number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def spread(row: Row) -> str:
    return f"{row['us']:.2f} ({row['us_low']:.2f}-{row['us_high']:.2f})"
