"""The Inception study as a table, in the terminal and on the page of results."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.measure import Measurement
from rich.table import Table

from bench.console import console
from bench.mnist_tables import arrivals, counted, spread, uncut
from bench.study.inception_runs import Row
from bench.study.inception_summary import SAME_ANSWERS, Line, Summary
from bench.study.recipe import BASE

COLUMNS = (
    "arm,\nbatch norm", "steps\nto target", "fewer\nsteps", "seconds\nto target", "fewer\nseconds", "ms\nper step",
    "best\naccuracy", "at\nstep",
)  # fmt: skip
TOP5 = "best\ntop 5"
CAPTION = "target: {target}\nms per step: median (quartiles) over blocks; evaluation is in no time"
PAPER = ("arm", "in the paper", "here too")
INFERENCE = ("arm", "seed", "moving averages", "population", "folded", "answers in common")
STATISTICS = (
    "Accuracy after training, in float32, by the statistics that batch norm normalizes with: moving averages, those of"
    f" the population (algorithm 2), the same folded: at least {SAME_ANSWERS:g}% of the answers must be in common."
)


def summary_table(summary: Summary, heading: str) -> Table:
    """As wide as its lines: in a terminal too narrow for it rich would leave columns out."""
    table = Table(
        title=heading,
        caption=CAPTION.format(target=target(summary)),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, title in enumerate(columns(summary)):
        table.add_column(title, justify="right" if index else "left")
    for line in lines(summary, "\n"):
        table.add_row(*line)
    table.width = Measurement.get(console, console.options.update(width=1000), uncut(table, 0)).maximum
    return table


def target(summary: Summary) -> str:
    if summary["target"] is None:
        return "none, as Inception was not run or diverged"
    return f"{summary['target']:.2f}%, Inception's best, mean over seeds (each seed's own for itself)"


def heading(content: Mapping[str, Any]) -> str:
    """What a figure must not be shown without, from what the JSON file says of data, settings and machine."""
    data, settings, device = content["data"], content["settings"], content["machine"]["device"]
    seeds = f"{counted(settings['seeds'], 'seed')}{': mean (range)' * (settings['seeds'] > 1)}"
    text = f"{data['name']}, {data['train']:,} training and {data['val']:,} validation images; "
    text += f"{counted(settings['steps'], 'step')}, {seeds}; {settings['dtype']} on "
    text += "a CPU" if device == "CPU" else device
    return text if settings["width"] == 1 else f"{text}, network of width {settings['width']:g}"


def columns(summary: Summary) -> tuple[str, ...]:
    return (*COLUMNS[:-1], TOP5, COLUMNS[-1]) if has_top5(summary) else COLUMNS


def has_top5(summary: Summary) -> bool:
    return any(value is not None for line in summary["lines"] for value in line["best_top5"])


def lines(summary: Summary, separator: str) -> Iterator[list[str]]:
    """The cells of `columns`; `separator` stands between a mean and its range."""
    for line in summary["lines"]:
        low, median, high = line["ms_per_step"]
        top5 = [present(line["best_top5"], "{:.2f}%", separator)] if has_top5(summary) else []
        yield [
            named(line["arm"], line["norm"], separator),
            steps_cell(line, separator),
            times(line["fewer_steps"]),
            seconds_cell(line, separator),
            times(line["fewer_seconds"]),
            f"{median:.2f}{separator}({low:.2f}-{high:.2f})",
            present(line["best"], "{:.2f}%", separator),
            *top5,
            present(line["best_step"], "{:.0f}", separator),
        ]


def paper_lines(summary: Summary) -> Iterator[list[str]]:
    """The cells of `PAPER`."""
    for line in summary["lines"]:
        # The paper's factor stands beside it: "yes" alone would claim that one.
        factor = "" if line["fewer_steps"] is None or line["arm"] == BASE else f": {times(line['fewer_steps'])}"
        yield [named(line["arm"], line["norm"], " "), line["paper"], (line["agrees"] or "not known") + factor]


def named(arm: str, norm: str | None, separator: str) -> str:
    return f"{arm},{separator}{norm}" if norm else arm


def steps_cell(line: Line, separator: str) -> str:
    diverged = [step for step in line["diverged_at"] if step is not None]
    if len(diverged) == len(line["seeds"]):
        return f"diverged{separator}at {spread(diverged, '{:.0f}', ' ')}"
    steps = line["steps_to_target"]
    return "-" if steps is None else arrivals(steps, separator)


def seconds_cell(line: Line, separator: str) -> str:
    seconds = line["seconds_to_target"]
    if seconds is None or any(value is None for value in seconds):
        return "-"
    return present(seconds, "{:.1f}", separator)


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def present(values: Sequence[float | None], text: str, separator: str) -> str:
    """Of the seeds that have a value."""
    found = [value for value in values if value is not None]
    return spread(found, text, separator) if found else "-"


def inference_lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """The cells of `INFERENCE`: accuracy after training by the statistics that batch norm normalizes with."""
    for row in rows:
        found = row["inference"]
        if found is not None:
            accuracies = (found["moving"], found["population"], found["folded"])
            cells = [f"{accuracy:.2f}%" for accuracy in accuracies]
            yield [named(row["arm"], row["norm"], " "), str(row["seed"]), *cells, f"{found['same_answers']:.2f}%"]


def norms_text(summary: Summary) -> str:
    """Whether torch's and our batch norm take the same number of steps; "" where not both arrive."""
    if not summary["norms_agree"]:
        return ""
    apart = [arm for arm, agree in summary["norms_agree"].items() if not agree]
    if apart:
        found = f"lie apart with torch's and with tritonbn's batch norm in: {', '.join(apart)}."
    else:
        found = "with torch's and with tritonbn's batch norm overlap."
    return f"The seeds' ranges of steps to the target {found} tritonbn's does the nonlinearity as well."


def data_text(same: bool) -> str:
    """What else than batch norm differs between the arms."""
    data = (
        "All arms with one seed saw the same pixels in the same steps."
        if same
        else "The arms did not see the same data: as in the paper, some shuffle more thoroughly and distort colours"
        " less; --same-data takes this difference away."
    )
    return f"{data} Where an arm has local response normalization and dropout, its seconds hold their time."
