"""Which kernels ran: without it, a test could compare torch with torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tritonbn import launch


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the kernels started within, in order."""
    names: list[str] = []
    real = launch._launch

    def note(kernel: Any, *args: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        real(kernel, *args, **constants)

    launch._launch = note
    try:
        yield names
    finally:
        launch._launch = real
