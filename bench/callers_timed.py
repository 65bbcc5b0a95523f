"""The cases of `bench/callers.py` timed, what they start counted, and their rows and tables."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table

from bench.callers import (
    CASES,
    COUNTED,
    SHAPES,
    Made,
    Prepare,
    Setting,
    forget_handles,
    kept_handles,
)
from bench.counted import other_launches
from bench.errors import BenchError
from bench.measure import machine, stamp, synchronize
from bench.mnist_tables import uncut
from bench.stub import StubDriver
from tritonbn.plan import forced
from tritonbn.timing import Quartiles, quartiles


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, Python does not look for cycles: there are more objects than callers have."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(made: Made, device: torch.device, blocks: int, calls: int) -> dict[str, list[float]]:
    """Microseconds per call of ours, torch's and what they are compared with: of each block, all in turn."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    todo: dict[str, Prepare | None] = {"ours": made.ours, "torch": made.torchs, "wrapper": made.wrapper}
    todo |= {f"steady {index}": prepare for index, prepare in enumerate(made.steady)}
    todo |= {"torch's steady": made.beyond, "planning": made.planning}
    seen: dict[str, list[float]] = {name: [] for name, prepare in todo.items() if prepare is not None}
    for block in range(-2, blocks):  # two to warm up and to compile
        for name, prepare in todo.items():
            if prepare is None:
                continue
            recorded = made.grad or name.startswith("steady")
            with torch.set_grad_enabled(recorded), uncollected():
                works = prepare(calls)
                synchronize(device)
                start = clock()
                for work in works:
                    work()
                spent = clock() - start
            if block >= 0:
                seen[name].append(1e6 * spent / len(works))
    return seen


def figures(seen: dict[str, list[float]]) -> dict[str, Any]:
    """The figures of a case in its row."""
    steady = [values for name, values in seen.items() if name.startswith("steady")]
    mean = [sum(values) / len(values) for values in zip(*steady, strict=True)]
    ours, theirs, ratio = seen["ours"], seen["torch"], None
    wrapper = _median(seen.get("wrapper"))
    if "torch's steady" in seen:
        ours = [first - again for first, again in zip(ours, mean, strict=True)]
        theirs = [first - again for first, again in zip(theirs, seen["torch's steady"], strict=True)]
    else:
        ratio = (quartiles(ours).median - (wrapper or 0)) / quartiles(mean).median
    return {
        **_spread("microseconds", quartiles(ours)), **_spread("torch_microseconds", quartiles(theirs)),
        "steady_microseconds": _median(mean), "wrapper_microseconds": wrapper, "ratio": ratio,
        "planning_microseconds": _median(seen.get("planning")),
    }  # fmt: skip


def _median(values: list[float] | None) -> float | None:
    return quartiles(values).median if values else None


def _spread(name: str, found: Quartiles) -> dict[str, float]:
    return {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}


def counts(made: Made, stub: StubDriver | None) -> dict[str, Any]:
    """What ours starts, and what it keeps: the most of two calls, which may take turns."""
    launches, operations = [], []
    with torch.set_grad_enabled(made.grad):
        forget_handles()
        works = made.ours(2 * COUNTED)
        half = len(works) // 2
        for work in works[:half]:
            work()
        warm = kept_handles()
        for work in works[half:]:
            work()
        kept = kept_handles()
        for work in made.ours(2):
            before = stub.count if stub else 0
            operations.append(other_launches(work))
            launches.append(stub.count - before if stub else None)
    most = max(operations, key=len)
    return {
        "library_launches": max(count for count in launches if count is not None) if stub else None,
        "other_launches": len(most), "other_operations": most, "handles": kept, "handles_grown": kept - warm,
    }  # fmt: skip


def rows(device: torch.device, stub: StubDriver | None, blocks: int, calls: int) -> list[dict[str, Any]]:
    """All cases, each of them a row of the tables and of the JSON. Raises BenchError where ours starts no kernel."""
    about = machine(device)
    found, facts = [], stamp(about) | {"cpu": about["cpu"]}
    for shape, path in SHAPES:
        for direction in ("forward", "forward+backward"):
            setting = Setting(shape, device, direction != "forward")
            for name, make in CASES.items():
                with forced(None if name == "new-shape" else path):
                    made = make(setting)
                    made = made if made.steady else made._replace(steady=(CASES["steady"](setting).ours,))
                    seen, counted = measure(made, device, blocks, calls), counts(made, stub)
                if counted["library_launches"] == 0:
                    raise BenchError(f"{name} {direction} {list(shape)}: expected launches, got none")
                which = {"name": name, "direction": direction, "shape": list(shape)}
                case = f"{name} {direction} {list(shape)}"
                found.append({"case": case, **which, **figures(seen), **counted, **facts})
    return found


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One of each shape and direction."""
    found: dict[str, Table] = {}
    for row in rows:
        title = f"{row['direction']} {row['shape']}: us per call, median (quartiles)"
        if title not in found:
            found[title] = Table("case", "ours", "torch", box=None, title=title, padding=(0, 1, 0, 0))
            for column in ("ratio", "wrapper", "launches", "other", "handles", "grown"):
                found[title].add_column(column, justify="right")
        cells = [_cell(row, "microseconds"), _cell(row, "torch_microseconds")]
        cells += ["-" if row[name] is None else f"{row[name]:.{digits}f}" for name, digits in NUMBERS.items()]
        found[title].add_row(row["name"], *cells)
        if row["planning_microseconds"] is not None:
            found[title].add_row("  planning alone", _us(row["planning_microseconds"]))
    return [uncut(table, 0) for table in found.values()]


# Columns of numbers, and their digits.
NUMBERS = {
    "ratio": 2, "wrapper_microseconds": 1, "library_launches": 0, "other_launches": 0, "handles": 0, "handles_grown": 0,
}  # fmt: skip


def _cell(row: dict[str, Any], name: str) -> str:
    return f"{_us(row[name])} ({_us(row[f'{name}_low'])}-{_us(row[f'{name}_high'])})"


def _us(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
