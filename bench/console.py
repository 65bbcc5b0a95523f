"""The one console that all benchmarks print to."""

from collections.abc import Collection, Sequence

from rich.console import Console

# What is printed holds paths and messages: nothing of it is markup.
console = Console(markup=False, highlight=False)


def print_columns(lines: Sequence[Sequence[str]], red: Collection[int] = ()) -> None:
    """Cells in columns, one line each whatever the width of the terminal; `red` lines by their index."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, line in enumerate(lines):
        text = "  ".join(map(str.ljust, line, widths)).rstrip()
        console.print(text, style="red" if index in red else None, soft_wrap=True)
