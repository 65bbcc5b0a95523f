"""The page of results: every JSON file under bench/results as README.md beside them, with plots."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.console import console
from bench.errors import BenchError
from bench.files import atomic, writable_folder
from bench.page import models, operators, plots, sections, targets
from bench.page.folders import RESULTS, Folder, read
from bench.page.markdown import joined

PAGE = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, metavar="DIR", default=RESULTS,
        help="a folder with one folder of results per machine, or one of these (default: bench/results)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page is not up to date")


def run(args: argparse.Namespace) -> int:
    """Write the page and its plots; with --check compare the page only: plots differ between versions of matplotlib."""
    folders = read(args.results)
    if not folders:
        raise BenchError(f"{args.results}: expected folders with JSON files, got none")
    page, text = args.results / PAGE, render(folders)
    if args.check:
        current = page.is_file() and page.read_text() == text
        console.print(
            f"{page}: {'up to date' if current else 'not up to date: python -m bench report'}", soft_wrap=True
        )
        return 0 if current else 1
    writable_folder(args.results)
    written = [path for folder in folders for path in draw(folder)]
    with atomic(page) as temporary:
        temporary.write_text(text)
    console.print(f"Written: {', '.join(map(str, [page, *written]))}", soft_wrap=True)
    return 0


def draw(folder: Folder) -> list[Path]:
    gpu = folder.gpu("ops")
    drawn = plots.draw(folder.files["ops"]["rows"], gpu, folder.path) if gpu else []
    return drawn + models.draw(folder)


def render(folders: Sequence[Folder]) -> str:
    """The page, a function of the JSON files alone."""
    return (
        joined(
            "# Results",
            "Made from the JSON files beside it by `python -m bench report`: edit those who write them, not this page.",
            targets.section(folders),
            *map(of_machine, folders),
            sections.machines(folders),
            sections.repeat(folders),
        )
        + "\n"
    )


def of_machine(folder: Folder) -> str:
    """All sections of one machine, those that it has results for."""
    found = [make(folder) for stem, make in sections.SECTIONS.items() if stem in folder.files]
    if folder.gpu("ops"):
        found += [operators.operators(folder), operators.eager(folder)]
        if folder.gpu("tuned/ops"):
            found.append(operators.tuned(folder))
    return joined(f"## {folder.name}", *found) if any(found) else ""
