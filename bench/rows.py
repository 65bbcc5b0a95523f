"""One provider on one problem: checked, then timed in each direction; what fails becomes a row that says why."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.measure import stamp, synchronize
from bench.problem import EPILOGUES, Direction, Inputs, Problem, make_inputs
from bench.providers import Operation, Provider
from bench.summary import OURS, Row
from bench.timing import peak_bytes
from bench.verify import WrongResult, verify
from tritonbn import launch, plan, planning
from tritonbn.activations import resolve
from tritonbn.timing import COLD, SAMPLES, Call, measure, slots_for

LAUNCH_SECONDS = 2e-6  # no kernel takes less


class Bench(NamedTuple):
    """Where and how all rows of a run are measured."""

    device: torch.device
    facts: dict[str, Any]  # of `bench.measure.machine`
    bandwidth: float  # bytes per second of a copy, read and written
    l2_bytes: int
    samples: int = SAMPLES
    path: plan.Path | None = None  # of our kernels, instead of the plan's choice


def rows_of(
    problem: Problem, providers: Sequence[Provider], directions: Sequence[Direction], bench: Bench
) -> Iterator[list[Row]]:
    """The rows of each provider, all on the same inputs; within `tritonbn.timing.measuring`."""
    slots = slots_for(problem.tensor_bytes, bench.l2_bytes)
    try:
        inputs = make_inputs(problem, slots, bench.device)
    except torch.OutOfMemoryError as error:
        text = explain(error)
        for provider in providers:
            yield [blank(problem, d, provider.name, bench) | {"error": text} for d in directions]
        return
    for provider in providers:
        yield measured(problem, provider, inputs, directions, bench)


def measured(
    problem: Problem, provider: Provider, inputs: Inputs, directions: Sequence[Direction], bench: Bench
) -> list[Row]:
    """A row for each direction."""
    rows = [blank(problem, direction, provider.name, bench) for direction in directions]
    with everything(provider, bench):
        try:
            operation = provider.build(EPILOGUES[problem.epilogue], inputs.state)
            verify(operation, problem, inputs)
        except Exception as error:  # whatever a peer raises
            for row in rows:
                row["error"] = survived(error, bench.device)
            return rows
        for row, direction in zip(rows, directions, strict=True):
            try:
                fill(row, operation, problem, inputs, direction, bench)
            except Exception as error:
                row["error"] = survived(error, bench.device)
    return rows


@contextmanager
def everything(provider: Provider, bench: Bench) -> Iterator[None]:
    """The provider's scope, and for ours the forced path."""
    with ExitStack() as stack:
        stack.enter_context(provider.scope())
        if bench.path is not None and provider.name == OURS:
            stack.enter_context(plan.forced(bench.path))
        yield


def fill(row: Row, operation: Operation, problem: Problem, inputs: Inputs, direction: Direction, bench: Bench) -> None:
    """Time one direction, and write what follows from it into the row."""
    if row["provider"] == OURS:
        row["plan"], row["path"] = plans(problem, direction, inputs.slots[0].x)
    call = call_for(direction, operation, inputs)
    call(0)  # compiles
    row["peak_bytes"] = peak_bytes(lambda: call(0), bench.device)
    slots, floor_seconds = len(inputs.slots), row["floor_bytes"] / bench.bandwidth
    found = measure(call, slots, bench.device, max(floor_seconds, LAUNCH_SECONDS), bench.samples)
    row["us"], row["us_low"], row["us_high"], row["timed_by"] = found
    row["slots"] = slots
    if bench.l2_bytes:
        row["cold"] = slots * problem.tensor_bytes >= COLD * bench.l2_bytes
    row["gb_per_s"] = row["floor_bytes"] / found.us / 1e3
    row["percent_of_floor"] = 100 * floor_seconds / (found.us * 1e-6)


def call_for(direction: Direction, operation: Operation, inputs: Inputs) -> Call:
    """What is timed, of the inputs' slot with a given number.

    forward saves what the backward needs; backward runs on graphs that are kept, so that nothing is computed twice.
    """

    def forward(slot: int) -> Tensor:
        x, residual, _ = inputs.slots[slot]
        return operation(x, residual)

    def gradients(y: Tensor, slot: int, keep: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs.leaves(slot), inputs.slots[slot].dy, retain_graph=keep)

    def both(slot: int) -> object:
        y = forward(slot)
        return y, gradients(y, slot, False)

    if direction == "forward":
        return forward
    if direction == "both":
        return both
    outputs = [forward(slot) for slot in range(len(inputs.slots))]
    return lambda slot: gradients(outputs[slot], slot, True)


def plans(problem: Problem, direction: Direction, x: Tensor) -> tuple[str, str]:
    """What our kernels run, in words, and their path: single/split where forward and backward differ."""
    epilogue = EPILOGUES[problem.epilogue]
    costly = resolve(epilogue.activation).costly and not epilogue.keeps_bits
    found = []
    if direction != "backward":
        found.append(launch.running(planning.plan_for("forward", x), x))
    if direction != "forward":
        found.append(launch.running(planning.plan_for("backward", x, costly), x, costly))
    return "; ".join(map(str, found)), "/".join(dict.fromkeys(p.path for p in found))


def blank(problem: Problem, direction: Direction, provider: str, bench: Bench) -> Row:
    """A row before anything was measured."""
    return {
        "set": problem.set, "shape": list(problem.layer.shape), "count": problem.layer.count, "layout": problem.layout,
        "dtype": problem.dtype, "epilogue": problem.epilogue, "direction": direction, "provider": provider,
        "us": None, "us_low": None, "us_high": None, "timed_by": None, "slots": None, "cold": None,
        "floor_bytes": problem.floor_bytes(direction), "gb_per_s": None, "percent_of_floor": None,
        "ratio_to_best_peer": None, "peak_bytes": None, "plan": None, "path": None, "error": None,
        **stamp(bench.facts),  # type: ignore[typeddict-item]
    }  # fmt: skip


def survived(error: Exception, device: torch.device) -> str:
    """The error in a line; raises BenchError if the device does not work any more, and no other row would."""
    text = explain(error)
    try:
        synchronize(device)
    except RuntimeError:
        raise BenchError(f"the GPU does not answer after: {text}; the rows before it are written") from error
    return text


def explain(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"wrong result: {first}" if isinstance(error, WrongResult) else f"{type(error).__name__}: {first}"
    return text[:200]
