"""The one console that all benchmarks print to."""

from rich.console import Console

# What is printed holds paths and messages: nothing of it is markup.
console = Console(markup=False, highlight=False)
