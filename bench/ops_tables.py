"""The operator benchmark in the terminal: what each measurement gave, what all say together, and where we lose."""

from collections.abc import Sequence

from bench.console import console, print_columns
from bench.summary import (
    HEAD,
    OURS,
    Against,
    Row,
    failures,
    geometric_mean_ratio,
    group,
    losses,
    problem,
    ratios,
    targets,
    weighted_percent,
)

COMPARED: tuple[Against, ...] = ("eager", "compile")


def print_rows(rows: Sequence[Row]) -> None:
    """One line for all directions of a provider on a problem."""
    cells = []
    for row in rows:
        if row["us"] is None:
            cells.append(f"{row['direction']}: {row['error']}")
            continue
        percent = row["percent_of_floor"]
        share = "" if percent is None else f" ({percent:.0f}%)"
        by = " by events" if row["timed_by"] == "events" else ""
        cached = " in cache" if row["cold"] is False else ""
        cells.append(f"{row['direction']} {row['us']:.1f} us{share}{cached}{by}")
    if len({row["error"] for row in rows}) == 1 and rows[0]["error"]:
        cells = [rows[0]["error"]]
    console.print(f"{name(rows[0])}  {rows[0]['provider']}: {', '.join(cells)}", soft_wrap=True)


def name(row: Row) -> str:
    return f"{row['set']} {'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']} {row['epilogue']}"


def print_summary(rows: Sequence[Row], wall: Sequence[Row]) -> None:
    """Means by group, rows we lose, rows of ours that failed, eager calls, and the lines to cross."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    heads = ["set", "dtype", "layout", "epilogue", "direction", "% of floor", "x eager", "x compile"]
    means = [heads]
    for key, mine in groups.items():
        percent = number(weighted_percent(mine), ".0f")
        means.append([*key, percent, *(number(geometric_mean_ratio(mine, to), ".2f") for to in COMPARED)])
    title = (
        "\nWeighted means of ours: share of the floor; times as fast as the best of torch eager, and of torch.compile"
    )
    console.print(title, soft_wrap=True)
    print_columns(means)
    print_lost(rows)
    if wall:
        print_wall(wall)
    console.print()
    print_columns([HEAD, *(found.cells for found in targets(rows, wall))])


def print_lost(rows: Sequence[Row]) -> None:
    lost, failed = losses(rows), failures(rows)
    compared = len(ratios(rows))
    console.print(
        f"\n{len(lost)} of {compared} rows lost to the best peer, {len(failed)} of ours failed", soft_wrap=True
    )
    first: dict[tuple[object, ...], Row] = {}
    for row in sorted((r for r in rows if r["us"] is not None and r["provider"] != OURS), key=lambda r: r["us"] or 0.0):
        first.setdefault(problem(row), row)
    for row in lost:
        peer = first[problem(row)]
        console.print(
            f"  {name(row)} {row['direction']}: {row['ratio_to_best_peer']:.2f}x, {row['us']:.1f} us, "
            f"{peer['provider']} {peer['us']:.1f} us, path {row['path']}",
            soft_wrap=True,
        )
    for row in failed:
        console.print(f"  {name(row)} {row['direction']}: {row['error']}", soft_wrap=True)


def print_wall(wall: Sequence[Row]) -> None:
    console.print("\nEager calls of modules, one after the other: microseconds per call (quartiles)")
    lines = [["set", "shape", "dtype", "epilogue", "direction", "provider", "us per call"]]
    for row in wall:
        time = row["error"] or f"{row['us']:.1f} ({row['us_low']:.1f}-{row['us_high']:.1f})"
        shape = "x".join(map(str, row["shape"]))
        lines.append([row["set"], shape, row["dtype"], row["epilogue"], row["direction"], row["provider"], time])
    print_columns(lines)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
