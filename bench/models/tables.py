"""The networks' benchmark in the terminal, a line each that no terminal shortens."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from bench.console import console, print_columns
from bench.models import tax
from bench.models.profiles import KINDS
from bench.models.rows import Row, failed
from bench.models.tax import Line

TIMES = (
    "provider", "ms per step", "images/s", "x torch", "forward", "backward", "optimizer", "peak GB", "off fp32",
    "first step, s",
)  # fmt: skip
CAUSES = ("provider", "norms", "swapped", "fused", "folded", "left", "kernels", *KINDS)


SWAP_ONLY = (
    "On a CPU tritonbn calls torch's own kernels: this checks the swap and shows what torch's batch norm costs there; "
    "how tritonbn and torch compare in speed is noise, and says nothing about a GPU."
)

INTERPRETED = "Our kernels run in Triton's interpreter on the CPU: their times say nothing."


def title(row: Row) -> str:
    size = "" if row["image"] is None else f" of {row['image']}x{row['image']}"
    processes = f", {row['processes']} processes" if row["processes"] > 1 else ""
    batch = f"batch {row['batch']}{size}{processes}"
    return f"{row['model']}, {row['direction']}, {batch}, {row['layout']}, {row['dtype']}, {row['mode']}"


def print_rows(rows: Sequence[Row]) -> None:
    """The arms of one setting."""
    console.print(f"\n{title(rows[0])}", soft_wrap=True)
    if len({row["error"] for row in rows}) == 1 and rows[0]["error"]:
        console.print(f"  {rows[0]['error']}", soft_wrap=True)
        return
    measured = [row for row in rows if row["ms"] is not None]
    print_columns([TIMES, *map(times, measured)])
    print_columns([CAUSES, *map(causes, measured)])
    for row in rows:
        told = [row["error"]] if row["error"] else [*remarks(row), *row["notes"]]
        if told:
            console.print(f"  {row['provider']}: {', '.join(told)}", soft_wrap=True)


def remarks(row: Row) -> Iterator[str]:
    if row["finite"] is False:
        yield "the result was not finite at the end"
    if row["stable"] is False:
        yield f"times still changed after {row['warm_up_steps']} steps of warm-up"
    if row["agrees"] is False:
        yield f"differs by {row['difference']:.1e} from torch, more than rounding explains"


def times(row: Row) -> list[str]:
    """Of `TIMES`."""
    parts = (number(row[part], digits(row[part])) for part in ("forward_ms", "backward_ms", "optimizer_ms"))
    return [
        row["provider"],
        spread(row["ms"], row["ms_low"], row["ms_high"], digits(row["ms"])),
        number(row["images_per_second"], ",.0f" if row["images_per_second"] > 100 else ".1f"),
        spread(row["speedup"], row["speedup_low"], row["speedup_high"], ".3f"),
        *parts,
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        number(row["deviation"], ".1e"),
        number(row["first_step_s"], ".2f"),
    ]


def causes(row: Row) -> list[str]:
    """Of `CAUSES`."""
    shares = row["shares"] or {}
    return [
        row["provider"],
        *(number(row[what], "d") for what in ("norms", "swapped", "fused", "folded", "left")),
        number(row["kernels"], ".0f"),
        *("-" if kind not in shares else f"{100 * shares[kind]:.1f}%" for kind in KINDS),
    ]


def digits(value: float | None) -> str:
    return ".1f" if value is None or value >= 100 else ".2f" if value >= 1 else ".3f"


def spread(middle: float | None, low: float | None, high: float | None, form: str) -> str:
    if middle is None or low is None or high is None:
        return "-"
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_with_data(rows: Sequence[Row]) -> None:
    """With a loader of real images."""
    if not rows:
        return
    console.print(f"With the images of {rows[0]['data']}, {rows[0]['workers']} workers; waiting: the host, for a batch")
    if rows[0]["error"]:
        console.print(f"  {rows[0]['error']}", soft_wrap=True)
        return
    lines = [["provider", "images/s", "waiting", "unreadable so far"]]
    for row in rows:
        middle, low, high = (row[f"images_per_second{which}"] for which in ("", "_low", "_high"))
        per_second = spread(middle, low, high, ".1f")
        lines.append([row["provider"], per_second, f"{100 * row['waiting']:.1f}%", str(row["skipped"])])
    print_columns(lines)


def print_tax(found: Sequence[Line], bytes_per_second: float | None) -> None:
    """A table per group: a line per batch size and provider, then what the fits say."""
    for names, group in groupby(found, key=lambda line: tuple(line[key] for key in tax.KEYS)):
        mine = list(group)
        console.print(f"\nThe BN tax: {', '.join(str(name) for name in names[:-1] if name is not None)}")
        lines = [["provider", "batch", "ms per step", "x no BN", "extra us per image"]]
        for line in mine:
            for p in line["points"]:
                ms, ratio = f"{p['ms']:.2f}", number(p["ratio"], ".3f")
                lines.append([line["provider"], str(p["batch"]), ms, ratio, number(p["extra_us"], ".1f")])
        print_columns(lines)
        for line in mine:
            if line["fixed_ms"] is not None:
                fitted = f"{line['fixed_ms']:.2f} ms {line['per_example_us']:+.1f} us per image"
                console.print(f"{line['provider']}: a step takes {fitted}", soft_wrap=True)
        if floor := tax.floor_us(mine[0], bytes_per_second):
            console.print(f"{tax.PASSES} passes over what batch norm sees, as fast as a copy: {floor:.1f} us per image")


def print_failures(rows: Sequence[Row]) -> None:
    for row in failed(rows):
        why = row["error"] or f"differs from torch by {row['difference']:.1e}"
        console.print(f"FAILED: {row['provider']}, {title(row)}: {why}", soft_wrap=True)
