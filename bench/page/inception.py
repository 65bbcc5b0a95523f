"""The Inception study on the page of results."""

from collections.abc import Sequence
from typing import cast

from bench.mnist_tables import counted
from bench.page.folders import Folder
from bench.page.markdown import details, joined, table
from bench.study import inception_tables
from bench.study.inception_summary import Summary


def section(folder: Folder) -> str:
    """Steps and seconds to Inception's own best, and what of the paper's findings holds here."""
    content = folder.files["study-inception"]
    summary, settings = cast(Summary, content), content["settings"]
    statistics = table(inception_tables.INFERENCE, inception_tables.inference_lines(content["runs"]))
    return joined(
        "### The paper's ImageNet study in small",
        f"{inception_tables.heading(content)}. {skipped(content['data'])}"
        f"Target: {inception_tables.target(summary)}. Medians (quartiles) of ms per step; evaluation is in no time.",
        table(one_line(inception_tables.columns(summary)), inception_tables.lines(summary, " ")),
        inception_tables.data_text(settings["same_data"]),
        inception_tables.norms_text(summary),
        table(inception_tables.PAPER, inception_tables.paper_lines(summary), words=3),
        f"![accuracy over steps and over seconds]({folder.prefix}study-inception.png)",
        details("Accuracy with moving averages, with population statistics (algorithm 2), and folded", statistics),
    )


def one_line(titles: Sequence[str]) -> list[str]:
    return [" ".join(title.split()) for title in titles]


def skipped(data: dict[str, list[str]]) -> str:
    count = len(data["skipped"])
    return f"Left out, as it cannot be read: {counted(count, 'file')}. " if count else ""
