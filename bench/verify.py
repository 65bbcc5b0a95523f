"""Whether a provider computes batch norm: its first call against float64, before any is timed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.problem import EPILOGUES, Inputs, Problem
from bench.providers import ACTIVATIONS, EPS, MOMENTUM, Operation

# Norm of the error over norm of the exact result. Gradients allow for ReLUs that rounding switches: a part p of them
# changes a gradient by sqrt(p). Statistics are float32 for all.
OUTPUT = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}
GRADIENTS = {"bf16": 8e-2, "fp16": 4e-2, "fp32": 4e-3}
STATISTICS = 1e-3
GRADIENT_NAMES = "dx", "dweight", "dbias", "dresidual"
COMPARED = 1 << 16  # elements, or more


class WrongResult(Exception):
    """A provider's result is not that of batch norm."""


def verify(operation: Operation, problem: Problem, inputs: Inputs) -> None:
    """Raise WrongResult unless output, gradients and running statistics on the first slot are near the exact ones."""
    x, residual, dy = inputs.slots[0]
    state = inputs.state
    state.running_mean.zero_()
    state.running_var.zero_()
    y = operation(x, residual)
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        raise WrongResult(f"y: expected {tuple(x.shape)} of {x.dtype}, got {tuple(y.shape)} of {y.dtype}")
    # Kept, so that a compiled backward learns with its first call that it may not reuse what was saved.
    gradients = torch.autograd.grad(y, inputs.leaves(0), dy, retain_graph=True)
    found = {"y": y, **dict(zip(GRADIENT_NAMES, gradients, strict=False))}
    found |= {"running_mean": state.running_mean, "running_var": state.running_var}
    channels = chosen_channels(x)
    one_switched = 2 / math.sqrt(len(channels) * x.numel() / x.shape[1])
    for name, expected in exact(problem, inputs, channels).items():
        part = found[name].detach().index_select(1 if expected.dim() > 1 else 0, channels).double()
        error = float(torch.linalg.vector_norm(part - expected) / torch.linalg.vector_norm(expected))
        if name.startswith("running"):
            tolerance = STATISTICS
        else:
            tolerance = OUTPUT[problem.dtype] if name == "y" else GRADIENTS[problem.dtype] + one_switched
        if not error <= tolerance:  # NaN is wrong too
            raise WrongResult(f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}")


def chosen_channels(x: Tensor) -> Tensor:
    """Indices of the first, the last and some between: channels do not depend on each other."""
    C = x.shape[1]
    count = min(C, max(2, -(-COMPARED * C // x.numel())))
    return torch.linspace(0, C - 1, count, device=x.device).round().long()


def exact(problem: Problem, inputs: Inputs, channels: Tensor) -> dict[str, Tensor]:
    """What `verify` compares, of some channels, by torch in float64."""
    full: list[Tensor | None] = [*inputs.slots[0]]
    x, residual, dy = (None if t is None else t.detach().index_select(1, channels).double() for t in full)
    assert x is not None
    assert dy is not None
    weight, bias = (p.detach()[channels].double().requires_grad_() for p in inputs.state[:2])
    mean, var = torch.zeros(2, len(channels), dtype=torch.float64, device=x.device)
    leaves = [x.requires_grad_(), weight, bias] + ([] if residual is None else [residual.requires_grad_()])
    y = F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)
    activate: Callable[[Tensor], Tensor] = ACTIVATIONS[EPILOGUES[problem.epilogue].activation]
    y = activate(y if residual is None else y + residual)
    gradients = dict(zip(GRADIENT_NAMES, torch.autograd.grad(y, leaves, dy), strict=False))
    return {"y": y.detach(), "running_mean": mean, "running_var": var, **gradients}
