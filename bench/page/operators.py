"""The operator benchmark as Markdown: summaries, the rows we lose, every row, eager calls."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from bench.page import plots
from bench.page.folders import Folder
from bench.page.markdown import details, joined, table
from bench.summary import (
    OURS,
    Row,
    geometric_mean_ratio,
    group,
    losses,
    problem,
    ratios,
    weighted_percent,
)  # fmt: skip

Figure = float | None
WHERE = ("shapes of", "layer", "dtype", "layout", "epilogue", "direction")


def operators(folder: Folder) -> str:
    """Everything from ops.json but the targets."""
    content = folder.files["ops"]
    rows = content["rows"]
    absent = [f"{name} ({reason})" for name, reason in content["machine"].get("peers_absent", {}).items()]
    copy = content["machine"].get("copy_gb_per_s")
    return joined(
        "### Operators",
        f"A plain copy moves {copy:,.0f} GB/s, read plus write." if copy else "",
        f"Not compared, because not there: {', '.join(absent)}." if absent else "",
        how(rows),
        summaries(rows),
        lost(rows),
        failed(rows),
        *(f"![{text}]({folder.prefix}{name})" for name, text in plots.drawn(rows).items()),
        details("Every row of ours", every(rows)),
        left_out(content.get("left_out", [])),
    )


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> Iterator[tuple[Any, list[Row]]]:
    """The rows by key; keys in the order in which they first occur."""
    place = {name: index for index, name in enumerate(dict.fromkeys(map(key, rows)))}
    for name, mine in groupby(sorted(rows, key=lambda row: place[key(row)]), key):
        yield name, list(mine)


def how(rows: Sequence[Row]) -> str:
    """How many rows were timed in which way: what graphs leave out, events count."""
    found = [row for row in rows if row["us"] is not None]
    ways = [f"{number} by {way}" for way, number in Counter(row["timed_by"] for row in found).items()]
    warm = sum(row["cold"] is False for row in found)
    told = f" In {warm} rows the cache may hold some of the inputs." if warm else ""
    return f"Rows timed: {', '.join(ways)}.{told}" if ways else ""


def summaries(rows: Sequence[Row]) -> str:
    """A line per network, dtype, layout, epilogue and direction."""
    lines = []
    for names, mine in grouped(rows, group):
        speedups = (geometric_mean_ratio(mine, against) for against in ("eager", "compile", None))
        lines.append((*names, len(timed(mine)), percent(weighted_percent(mine)), *map(ratio, speedups)))
    head = ("shapes of", "dtype", "layout", "epilogue", "direction", "shapes timed", "% of the floor",
            "speed-up over eager", "over torch.compile", "over the best peer")  # fmt: skip
    return table(head, lines, words=5)


def lost(rows: Sequence[Row]) -> str:
    """The problems on which a peer is faster, the worst first."""
    compared, behind = ratios(rows), losses(rows)
    if not compared:
        return "**Rows we lose**: not known, no peer was timed on the same problem."
    if not behind:
        return f"**Rows we lose**: none of {len(compared)}."
    peers = fastest(rows)
    lines = [(*where(row), *against(row, peers)) for row in behind]
    head = (*WHERE, "fastest peer", "its us", "our us", "speed-up")
    return joined(f"**Rows we lose**: {len(behind)} of {len(compared)}.", table(head, lines, words=len(WHERE) + 1))


def fastest(rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
    """The fastest peer's row by problem."""
    found: dict[tuple[object, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["us"] or 0):
        if row["provider"] != OURS and row["us"] is not None:
            found.setdefault(problem(row), row)
    return found


def where(row: Row) -> tuple[str, ...]:
    layer = "x".join(map(str, row["shape"]))
    return row["set"], layer, row["dtype"], row["layout"], row["epilogue"], row["direction"]


def against(row: Row, peers: dict[tuple[object, ...], Row]) -> tuple[str | None, ...]:
    """(fastest peer, its us, our us, speed-up)"""
    peer = peers.get(problem(row))
    if peer is None:
        return None, None, time(row), None
    ours, theirs = row["us"], peer["us"]
    return peer["provider"], time(peer), time(row), ratio(theirs / ours, 3) if ours and theirs else None


def failed(rows: Sequence[Row]) -> str:
    """What has no time, and why."""
    lines = [(*where(row), row["provider"], row["error"]) for row in rows if row["error"] is not None]
    head = (*WHERE, "provider", "why")
    if not lines:
        return ""
    return joined(f"**Rows without a time**: {len(lines)}.", details("Which, and why", table(head, lines, len(head))))


def left_out(problems: Sequence[str]) -> str:
    """What the run had no time for."""
    counted = [f"{what}: {number}" for what, number in Counter(problems).items()]
    return f"Problems not measured, because the time was spent: {'; '.join(counted)}." if counted else ""


def every(rows: Sequence[Row]) -> str:
    """Our rows, each with the fastest peer's time on the same problem, and the plan."""
    peers = fastest(rows)
    lines = [
        (*where(row), row["plan"], *against(row, peers), percent(row["percent_of_floor"]), gb_per_s(row))
        for row in timed(rows)
    ]
    head = (*WHERE, "plan", "fastest peer", "its us", "our us", "speed-up", "% of the floor", "GB/s")
    return table(head, lines, words=len(WHERE) + 2)


def eager(folder: Folder) -> str:
    """Wall time between eager calls: a line per problem, a column per provider."""
    rows = folder.files["ops"]["wall"]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for _, same in grouped(rows, problem):
        times = {row["provider"]: time(row) for row in same}
        lines.append((*where(same[0]), *(times.get(provider) for provider in providers)))
    head = (*WHERE, *(f"{provider}, us" for provider in providers))
    text = "Time between calls from Python, launches included: what small layers cost without CUDA graphs."
    return joined("### Eager calls, wall time", text, table(head, lines, words=len(WHERE))) if lines else ""


def tuned(folder: Folder) -> str:
    """Our rows with tuned plans beside those that were measured before tuning on the same machine."""
    before = {problem(row): row for row in timed(folder.files["ops"]["rows"])}
    again = [row for row in timed(folder.files["tuned/ops"]["rows"]) if problem(row) in before]
    after = [row for row in again if "plan from the model" not in (row["plan"] or "")]  # had tuning no time for it
    means, lines = [], []
    for names, mine in grouped(after, group):
        same = [before[problem(row)] for row in mine]
        means.append((*names, len(mine), percent(weighted_percent(same)), percent(weighted_percent(mine))))
    for row in after:
        old, new = before[problem(row)], row
        lines.append((*where(new), new["plan"], time(old), time(new), ratio((old["us"] or 0) / (new["us"] or 1), 3)))
    head = ("shapes of", "dtype", "layout", "epilogue", "direction", "shapes timed", "% of the floor", "tuned")
    rows = table((*WHERE, "tuned plan", "us before", "us tuned", "speed-up"), lines, words=len(WHERE) + 1)
    return joined("### Tuned plans", table(head, means, words=5), details("Row by row", rows)) if lines else ""


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["provider"] == OURS and row["us"] is not None]


def time(row: Row) -> str | None:
    """The median in microseconds, and its quartiles."""
    if row["us"] is None or row["us_low"] is None or row["us_high"] is None:
        return None
    digits = 1 if row["us"] < 100 else 0
    return f"{row['us']:.{digits}f} ({row['us_low']:.{digits}f}-{row['us_high']:.{digits}f})"


def gb_per_s(row: Row) -> str | None:
    return None if row["gb_per_s"] is None else f"{row['gb_per_s']:,.0f}"


def percent(value: Figure) -> str | None:
    return None if value is None else f"{value:.1f}%"


def ratio(value: Figure, digits: int = 2) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
