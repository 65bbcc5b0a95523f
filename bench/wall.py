"""Eager calls of modules, one after the other: what is waited for where launches take longer than kernels."""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import tritonbn
from bench.measure import synchronize
from bench.problem import EPILOGUES, Direction, Problem, make_inputs
from bench.rows import Bench, blank, survived
from bench.summary import Row
from tritonbn.timing import quartiles

PROVIDERS = ("tritonbn", "eager", "compile")
DIRECTIONS: tuple[Direction, ...] = ("forward", "both")
CALLS = 200  # of one sample, on a GPU
FEW_CALLS = 2
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def wall_rows(problem: Problem, providers: Sequence[str], bench: Bench) -> list[Row]:
    """A row per provider and direction, all taking turns: microseconds from one call to the next."""
    calls = CALLS if bench.device.type == "cuda" else FEW_CALLS
    torch.compiler.reset()  # once: what is compiled below must stay
    rows, runs = [], []
    for name in providers:
        module = module_for(name, problem).to(bench.device).train()
        for direction in DIRECTIONS:
            row = blank(problem, direction, name, bench)
            rows.append(row)
            run = repeated(module, problem, direction, bench.device)
            try:
                run(3)
                runs.append((row, run, list[float]()))
            except Exception as error:  # whatever a peer raises
                row["error"] = survived(error, bench.device)
    for _ in range(bench.samples):
        for _, run, seconds in runs:
            synchronize(bench.device)
            start = time.perf_counter()
            run(calls)
            synchronize(bench.device)
            seconds.append((time.perf_counter() - start) / calls)
    for row, _, seconds in runs:
        row["us_low"], row["us"], row["us_high"] = quartiles([1e6 * value for value in seconds])
        row["timed_by"] = "wall"
    return rows


def module_for(provider: str, problem: Problem) -> nn.Module:
    """What one would write: our module with its activation, or torch's batch norm and its activation."""
    shape, activation = problem.layer.shape, EPILOGUES[problem.epilogue].activation
    of = {4: "2d", 5: "3d"}.get(len(shape), "1d")
    if provider == "tritonbn":
        if activation == "identity":
            return built(getattr(tritonbn, f"BatchNorm{of}"), shape[1])
        return built(getattr(tritonbn, f"BatchNormAct{of}"), shape[1], activation=activation)
    module = built(getattr(nn, f"BatchNorm{of}"), shape[1])
    if activation != "identity":
        module = Both(module, ACTIVATIONS[activation]())
    if provider == "compile":
        module = cast(nn.Module, torch.compile(module, fullgraph=True, dynamic=False))
    return module


class Both(nn.Module):
    """Batch norm, then an activation, as the forward of a network calls them: with no container between."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(x))
        return y


def built(make: Any, channels: int, **options: Any) -> nn.Module:
    module: nn.Module = make(channels, **options)
    return module


def repeated(module: nn.Module, problem: Problem, direction: Direction, device: torch.device) -> Callable[[int], None]:
    """A function that makes so many calls, one after the other, each with the gradients if both."""
    x, _, dy = make_inputs(problem, 1, device).slots[0]
    leaves = [x, *module.parameters()]

    def run(calls: int) -> None:
        for _ in range(calls):
            y = module(x)
            if direction == "both":
                torch.autograd.grad(y, leaves, dy)

    return run
