"""The studies of the page: each function makes one section from the results of one."""

import itertools
import math
from collections.abc import Iterable

from bench import mnist_tables
from bench.page.folders import Folder
from bench.page.markdown import joined, table
from bench.study import mnist_words
from bench.study.covariate_figures import COLUMNS, Figure
from bench.study.expected import Finding


def mnist(folder: Folder) -> str:
    """Figure 1 over seeds, beside the values expected."""
    content = folder.files["study-mnist"]
    rows = [
        row | {"drift": dict(zip(row["drift"], numbers(row["drift"].values()), strict=True))} for row in content["arms"]
    ]
    expected = content["expected"]
    head = [" ".join(title.split()) for title in mnist_tables.COLUMNS]
    found = [Finding(**{name: finding[name] for name in Finding.__annotations__}) for finding in expected["findings"]]
    outside = sum(not finding.inside for finding in found)
    failed = [finding["what"] for finding in content["check"] if finding["passed"] is False]
    return joined(
        "### The paper's figure 1 over seeds",
        f"{mnist_tables.heading(rows, content['data']['name'])}; step time: median (quartiles) over blocks.",
        table(head, mnist_tables.lines(rows, " ")),
        f"![accuracy over seeds, and what the last hidden layer sees]({folder.prefix}study-mnist.png)",
        table(mnist_words.FINDINGS, mnist_words.finding_lines(found), words=2),
        f"**Outside what was expected: {outside} of {len(found)}.**" if outside else "",
        f"Not compared: {expected['not_applicable']}." if expected["not_applicable"] else "",
        table(mnist_words.DRIFTS, mnist_words.drift_lines(rows)),
        f"**tritonbn does not follow nn.BatchNorm1d: {', '.join(failed)}.**" if failed else "",
        "" if content["kernels_compared"] else f"Mind that {mnist_tables.SWAP_ONLY}.",
        *content["notes"],
    )


def covariate_shift(folder: Folder) -> str:
    """What batch norm does, by both explanations."""
    content = folder.files["study-covariate-shift"]
    found = [
        Figure(f["explanation"], f["name"], f["unit"], numbers(f["without"]), numbers(f["with_bn"]))
        for f in content["figures"]
    ]
    settings = content["settings"]
    runs = f"{mnist_tables.counted(settings['steps'], 'step')}, {mnist_tables.counted(settings['seeds'], 'seed')}"
    parts = []
    for explanation, figures in itertools.groupby(found, lambda figure: figure.explanation):
        lines = (figure.line for figure in figures)
        parts += [f"{explanation[0].upper()}{explanation[1:]}:", table(COLUMNS, lines, words=2)]
    return joined(
        "### What batch norm does: drift and smoothness",
        f"{content['data']['name']}, {runs}: mean (range). How each is measured: `bench/study/covariate_shift.py`.",
        *parts,
        f"![both explanations over the steps of training]({folder.prefix}study-covariate-shift.png)",
        *content["notes"],
    )


def numbers(values: Iterable[float | None]) -> list[float]:
    """JSON has null for NaN."""
    return [math.nan if value is None else value for value in values]
