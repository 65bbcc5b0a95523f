"""Plans by measurement, on request: what the model of `cost.py` can only estimate.

Tunes the layers that a model has, on a GPU that is otherwise idle, and keeps what it found in the user's table. Nothing
here runs by itself: where no measurement is at hand, training goes on with the plan of the model.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tritonbn import model, plan_timing, planning, store, tables, timing
from tritonbn.choice import Operation, Plan, Problem
from tritonbn.device import Device
from tritonbn.layers import Layer, layers_of
from tritonbn.plan import make_plan
from tritonbn.plan_timing import Measure
from tritonbn.tables import Entry

# A challenger must be faster by so much than what there is: less is noise.
MARGIN = 1.03

OPERATIONS: tuple[Operation, ...] = ("forward", "backward")

Progress = Callable[[int, int, str], None]


class Tuned(NamedTuple):
    """What was found for a problem."""

    problem: Problem
    before: Plan
    after: Plan
    before_us: float
    after_us: float
    tried: int  # plans that were timed
    dropped: int  # plans that spill or do not fit the GPU
    times: tuple[tuple[Plan, float], ...] = ()  # microseconds of each plan; infinite for those that were dropped

    def __str__(self) -> str:
        p, old, new = self.problem, self.before.path, self.after.path
        kept = "kept" if self.after == self.before else f"another {new}" if new == old else f"{new}, was {old}"
        return (
            f"{p.operation} {p.layout} {list(p.shape)} x {p.itemsize} bytes: {self.before_us:.1f} -> "
            f"{self.after_us:.1f} us ({kept}; {self.tried} timed, {self.dropped} dropped)"
        )


def tune(
    model_or_shapes: nn.Module | Iterable[Sequence[int]],
    *inputs: Any,
    dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: torch.device | str | None = None,
    again: bool = False,
    save: bool = True,
    budget: float | None = None,
    progress: Progress | bool = True,
) -> list[Tuned]:
    """Measure plans for batch norm layers, forward and backward, and keep the fastest in the user's table.

    Args:
        model_or_shapes: a model with tritonbn modules, which then runs once on `inputs` (in evaluation, without
            gradients: nothing in it changes) for its layers; under autocast if it is trained so. Or shapes [N, C, ...].
        inputs: of the model, on the GPU.
        dtype, memory_format: of the layers whose shapes are given; a model's own are its layers'.
        device: the GPU, by default that of the model's layers, or the current one.
        again: tune what the tables already know too.
        save: write the user's table; else what was found holds for this process.
        budget: seconds after which no further problem is begun; the heaviest layers come first.
        progress: a line on stderr, or a function that is called with (problems done, all, a text), or False.

    Returns:
        What was found for each problem that was measured. A plan is replaced only by one that is faster by 3%; those
        that spill registers are not tried. Plans hold for near sizes too: another batch size need not be tuned.

    Raises RuntimeError without a GPU or under CUDA graph capture, ValueError for a model without tritonbn modules and
    for shapes and dtypes that the kernels do not take. Tensors of the model are not touched: random ones are timed.
    """
    timing.gpu("tune", device)  # before the model runs
    if isinstance(model_or_shapes, nn.Module):
        layers = [layer for called in layers_of(model_or_shapes, inputs, {}).values() for layer in called]
    else:
        layers = [Layer(tuple(shape), dtype, memory_format) for shape in model_or_shapes]
    if device is None:
        device = next((layer.device for layer in layers if layer.device and layer.device.type == "cuda"), None)
    folder = store.user_folder() if save else None
    shown = _line if progress is True else progress or None
    return tune_layers(layers, device, again=again, folder=folder, budget=budget, progress=shown)


def tune_layers(
    layers: Iterable[Layer],
    device: torch.device | str | None,
    *,
    again: bool,
    folder: Path | None,
    budget: float | None,
    progress: Progress | None,
    keep: Callable[[Tuned], None] | None = None,
) -> list[Tuned]:
    """`tune` for layers, with the folder that the table is in, or None; keep: called with each result at once."""
    where = timing.gpu("tune", device)
    gpu = planning.device_of(where)
    with torch.cuda.device(where), timing.measuring(where):
        return tune_problems(problems(layers, gpu, again), gpu, _timer(where), folder, budget, progress, keep)


def problems(layers: Iterable[Layer], device: Device, again: bool) -> dict[Problem, Layer]:
    """What there is to tune, the heaviest first; near sizes are tuned once."""
    found: dict[str, tuple[Problem, Layer]] = {}
    for layer in layers:
        if layer.why:
            continue
        layer.check()
        x = layer.empty("meta")
        for operation in OPERATIONS:
            problem = planning.problem_of(operation, x)
            if again or not tables.find(problem, device):
                found.setdefault(tables.key(problem), (problem, layer))
    return dict(sorted(found.values(), key=lambda pair: -pair[0].operands * pair[0].data))


def tune_problems(
    work: dict[Problem, Layer],
    device: Device,
    timer: Callable[[Problem, Layer], Measure],
    folder: Path | None,
    budget: float | None,
    progress: Progress | None,
    keep: Callable[[Tuned], None] | None = None,
) -> list[Tuned]:
    """Tune each of them; what was found is kept at once, so that an interruption loses one problem."""
    begun, results, done = time.monotonic(), [], 0
    for problem, layer in work.items():
        if budget is not None and time.monotonic() - begun >= budget:
            break
        if progress is not None:
            progress(done, len(work), f"{problem.operation} {list(layer.shape)}")
        done += 1
        try:
            result = tune_problem(problem, device, timer(problem, layer))
        except torch.OutOfMemoryError:
            warnings.warn(f"{problem.operation} {list(layer.shape)} is not tuned: out of memory", stacklevel=2)
            continue
        if result is None:
            continue
        results.append(result)
        if keep is not None:
            keep(result)
        entries = {tables.key(problem): Entry(result.after.choice, result.after_us, result.before_us)}
        tables.remember(device, entries)
        if folder is not None and tables.save(device, entries, folder) is None:
            folder = None  # a warning said why
    if progress is not None:
        progress(done, len(work), f"{len(results)} problems tuned")
    return results


def tune_problem(problem: Problem, device: Device, measure: Measure) -> Tuned | None:
    """The best plan of each path, then what is near the fastest of them; None if the present plan cannot be timed."""
    before = make_plan(*problem[:4], device, problem.costly)
    before_us = measure(before)
    if before_us is None:
        return None
    times = {before: before_us}  # infinite for those that cannot be timed

    def compare(plans: Iterable[Plan]) -> None:
        for plan in plans:
            if plan not in times:
                times[plan] = measure(plan) or inf

    compare(model.first_round(problem, device))
    compare(model.neighbours(min(times, key=times.__getitem__), problem, device))
    after = min(times, key=times.__getitem__)
    after = before if before_us < MARGIN * times[after] else after
    dropped = sum(us == inf for us in times.values())
    return Tuned(problem, before, after, before_us, times[after], len(times) - dropped, dropped, (*times.items(),))


def _timer(device: torch.device) -> Callable[[Problem, Layer], Measure]:
    gpu = planning.device_of(device)

    def prepare(problem: Problem, layer: Layer) -> Measure:
        return plan_timing.measure_of(problem, lambda: layer.empty(device), device, gpu)

    return prepare


def _line(done: int, total: int, text: str) -> None:
    print(f"tritonbn.tune {done}/{total} {text}", file=sys.stderr, flush=True)
