"""The MNIST experiment as tables."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table

from bench.agreement import Finding
from bench.training import ARMS, Row
from tritonbn.timing import quartiles

LABELS = {"none": "no batch norm", "torch": "nn.BatchNorm1d", "tritonbn": "tritonbn"}
RESULTS = {True: "pass", False: "FAIL", None: "neither arrived"}
SWAP_ONLY = (
    "both arms run torch's own kernels here: this checks the swap, not our kernels; their difference in speed is noise"
)


COLUMNS = ("arm", "steps/s", "images/s", "step time\n/ no BN", "test\naccuracy", "steps\nto 90%")


def summary(rows: Sequence[Row], data: str) -> Table:
    """One line per arm; with several seeds the mean and the range over them."""
    several = len({row["seed"] for row in rows}) > 1
    table = Table(
        title=heading(rows, data),
        caption="step time: median (quartiles) over blocks; evaluation not counted",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for title in COLUMNS:
        table.add_column(title, justify="left" if title == "arm" else "right")
    for line in lines(rows, "\n" if several else " "):  # two lines keep the ranges within 80 columns
        table.add_row(*line)
    return uncut(table, 0)


def heading(rows: Sequence[Row], data: str) -> str:
    seeds = len({row["seed"] for row in rows})
    return f"{data}, {counted(rows[0]['steps'], 'step')}, {counted(seeds, 'seed')}" + ": mean (range)" * (seeds > 1)


def lines(rows: Sequence[Row], separator: str) -> Iterator[list[str]]:
    """The cells of `COLUMNS`, a line per arm; `separator` stands between a mean and its range."""
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        ratio = quartiles([value for row in mine for value in row["step_time_to_none"]])
        images_per_second = sum(row["images_per_second"] for row in mine) / len(mine)
        yield [
            LABELS[arm],
            spread([row["steps_per_second"] for row in mine], "{:.0f}", separator),
            f"{images_per_second:,.0f}",
            "1" if arm == "none" else f"{ratio.median:.2f}{separator}({ratio.low:.2f}-{ratio.high:.2f})",
            spread([row["test_accuracy"] for row in mine], "{:.2f}%", separator),
            arrivals([row["steps_to_90"] for row in mine], separator),
        ]


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def uncut(table: Table, first: int) -> Table:
    """Columns from `first` on keep the width of their longest line: a narrow terminal shortens no number."""
    for column in table.columns[first:]:
        lines = "\n".join(map(str, (column.header, *column.cells))).split("\n")
        column.no_wrap, column.min_width = True, max(map(cell_len, lines))
    return table


def spread(values: Sequence[float], text: str, separator: str) -> str:
    mean = text.format(sum(values) / len(values))
    if len(values) == 1:
        return mean
    low, high = (text.rstrip("%").format(value) for value in (min(values), max(values)))
    return f"{mean}{separator}({low}-{high})"


def arrivals(steps: Sequence[int | None], separator: str) -> str:
    arrived = [step for step in steps if step is not None]
    if len(arrived) == len(steps):
        return spread(arrived, "{:.0f}", separator)
    return "never" if not arrived else f"never in{separator}{len(steps) - len(arrived)} of {len(steps)}"


def agreement(findings: Sequence[Finding], kernels_compared: bool) -> Table:
    table = Table(
        title="does tritonbn follow nn.BatchNorm1d with the same seed?",
        caption="evaluated each 100 steps up to 2,000, then each 500" + f"\n{SWAP_ONLY}" * (not kernels_compared),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("compared", min_width=len("difference,"))
    table.add_column("allowed", justify="right")
    table.add_column("largest\nseen", justify="right")
    table.add_column("result")
    for finding in findings:
        table.add_row(
            finding.what,
            f"{finding.allowed:g} {finding.unit}",
            "-" if finding.worst is None else f"{finding.worst:.2g}",
            RESULTS[finding.passed],
        )
    return uncut(table, 1)
