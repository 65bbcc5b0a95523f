"""Pieces of a page in Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table; the first `words` columns are words (left), the others numbers (right). "" without rows."""
    body = [line([cell(value) for value in row]) for row in rows]
    rule = ["---"] * words + ["--:"] * (len(head) - words)
    return "\n".join([line(head), line(rule), *body]) if body else ""


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(value: object) -> str:
    """One line, in which no character is taken for the table's own."""
    return "-" if value is None else " ".join(str(value).replace("|", "\\|").split())


def details(summary: str, text: str) -> str:
    """Folded until somebody looks; "" where there is nothing in it."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>" if text else ""


def joined(*parts: str) -> str:
    """The parts that are not empty, a blank line between them."""
    return "\n\n".join(part for part in parts if part)
