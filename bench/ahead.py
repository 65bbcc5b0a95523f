"""Our kernels compiled before they are launched, by as many processes as there are CPUs, into Triton's cache.

A launch compiles its kernel itself, a third of a second each, one after the other: of what a short run on a GPU has
time for, that is most.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from math import inf
from multiprocessing import get_context

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench.codegen import POINTERS, Launch, recording
from bench.console import console
from bench.problem import EPILOGUES, Problem
from bench.stub import StubDriver
from tritonbn import launch, model, planning, tuning
from tritonbn.activations import IDENTITY, Activation, resolve
from tritonbn.autograd import keeps_bits
from tritonbn.choice import Plan
from tritonbn.choice import Problem as Tuned
from tritonbn.device import Device
from tritonbn.layers import Layer

DTYPES = {pointer: dtype for dtype, pointer in POINTERS.items()}


def of_problem(problem: Problem, device: torch.device) -> Iterator[Launch]:
    """What training on it launches, both ways."""
    epilogue = EPILOGUES[problem.epilogue]
    layer = Layer(problem.layer.shape, problem.torch_dtype, problem.memory_format)
    activation = resolve(epilogue.activation)
    x = layer.empty("meta")
    for operation in tuning.OPERATIONS:
        costly = operation == "backward" and activation.costly and not epilogue.keeps_bits
        plan = launch.running(planning.plan_for(operation, x, costly, device), x, costly, device)
        yield from of_plan(plan, x, activation, epilogue.residual)


def of_tuning(problem: Tuned, layer: Layer, device: Device) -> Iterator[Launch]:
    """What tuning it will launch for certain, and what it will if the model is right."""
    x, activation = layer.empty("meta"), resolve("silu") if problem.costly else IDENTITY
    first = model.first_round(problem, device)
    near = model.neighbours(model.best(problem, device), problem, device)
    for plan in dict.fromkeys([*first, *near]):
        yield from of_plan(plan, x, activation)


def of_plan(plan: Plan, x: Tensor, activation: Activation = IDENTITY, residual: bool = False) -> Iterator[Launch]:
    """The launches of a plan in training, x on "meta", with parameters and statistics in the arithmetic's dtype."""
    kind = launch.arithmetic_dtype(x)
    weight, bias, mean, var = torch.empty((4, x.shape[1]), dtype=kind, device="meta")
    added = x if residual else None
    bits = keeps_bits(added, activation)
    calls: list[tuple[Launch, Plan]] = []
    with recording(calls):
        if plan.operation == "forward":
            launch.forward(x, added, weight, bias, mean, var, None, 0.1, 1e-5, activation, bits, plan)
        else:
            kept = torch.empty(plan.bit_bytes, dtype=torch.uint8, device="meta") if bits else None
            needs_z = activation != IDENTITY and not bits  # as `autograd` keeps what z is computed from
            saved = launch.Saved(x, weight, bias if needs_z else None, added if needs_z else None, kept, mean, var)
            wanted = (True, True, True, residual and activation != IDENTITY)
            launch.backward(x, saved, True, activation, kind, wanted, plan)
    yield from (recorded for recorded, _ in calls)


def compile_ahead(launches: Iterable[Launch], seconds: float = inf, target: GPUTarget | None = None) -> int:
    """Compile them, the first first, and say how many there are; those that `seconds` do not suffice for are left.

    target: by default the current GPU. What cannot be compiled raises where it is launched.
    """
    if launch.INTERPRETED:
        return 0
    begun, wanted = time.monotonic(), [*dict.fromkeys(launches)]
    target = target or triton.runtime.driver.active.get_current_target()
    workers = max(1, min(os.cpu_count() or 1, len(wanted)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), prepare, (target,))
    try:
        done, late = wait([pool.submit(compile_one, each) for each in wanted], None if seconds == inf else seconds)
    finally:
        pool.shutdown(cancel_futures=True)
    took = time.monotonic() - begun
    left = f", {len(late)} left" if late else ""
    console.print(f"{len(done)} kernels compiled ahead in {took:.0f} s by {workers} processes{left}", soft_wrap=True)
    return len(done)


def prepare(target: GPUTarget) -> None:
    """In each process: kernels are for the target, and no GPU is touched."""
    triton.runtime.driver.set_active(StubDriver(target))


def compile_one(recorded: Launch) -> None:
    """As Triton does it before a launch, so that the launch finds it in the cache."""
    kernel, kinds, constants = getattr(launch, recorded.kernel), dict(recorded.signature), dict(recorded.constants)
    args = [argument(kinds[name]) if name in kinds else None for name in positional(kernel.arg_names, constants)]
    given = {name: value for name, value in constants.items() if not name.endswith("_ptr")}
    kernel.warmup(*args, grid=(1,), **given, **dict(recorded.options))


def positional(names: Sequence[str], constants: dict[str, object]) -> list[str]:
    """The arguments that a launch gives by their place: tensors, None among them, sizes and numbers."""
    return [name for name in names if name.endswith("_ptr") or name not in constants]


def argument(kind: str) -> object:
    """One of this type: a dtype stands for a tensor, aligned as those of torch's allocator are."""
    return DTYPES.get(kind) or {"i32": 16, "i64": 1 << 40, "fp64": 1.0}[kind]
