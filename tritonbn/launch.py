"""One function per operation: look the plan up, allocate, launch, return. No mathematics, no second dispatch.

All functions take x dense in its memory format, see `memory_format_of`, and return tensors in that format; residual and
dy are laid out as x. `pooled`: scratch memory may be kept from call to call, see `tickets.py`. `plan`: if it is known.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tritonbn import handles
from tritonbn.activations import IDENTITY, Activation
from tritonbn.kernels.backward import backward_kernel, gradient_sums_kernel, input_gradient_kernel
from tritonbn.kernels.cooperative import cooperative_backward_kernel, cooperative_forward_kernel
from tritonbn.kernels.normalize import forward_kernel, inference_kernel, normalize_kernel
from tritonbn.kernels.statistics import statistics_kernel
from tritonbn.plan import Plan, independent
from tritonbn.planning import device_of, memory_format_of, plan_for, problem_of
from tritonbn.tickets import Purpose, scratch

# The kernels run on CPU tensors too: TRITON_INTERPRET was set when they were defined.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
# The one place where a kernel starts.
_launch = handles.start
# What runs in the place of plans whose programs do not fit the GPU at a time.
_instead: dict[Plan, Plan] = {}


class Saved(NamedTuple):
    """What the backward needs beside dy; without mean, x is the forward's output."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None  # if the derivative of the activation is to be computed from it
    bits: Tensor | None  # if they tell the derivative of the activation
    mean: Tensor | None
    rstd: Tensor


class Gradients(NamedTuple):
    """Of x and residual (dense as x), weight and bias; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


Wanted = tuple[bool, bool, bool, bool]


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: Activation = IDENTITY,
    keep_bits: bool = False,
    pooled: bool = True,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, bits, mean, rstd) with statistics of the batch; the running ones are updated in place."""
    plan = plan or plan_for("forward", x)
    if plan.cooperative:  # asking takes microseconds
        plan = running(plan)
    y, bits = _output(x, plan, keep_bits)
    mean, rstd = _vectors(x, running_mean)
    operands = x, residual, weight, bias, y, bits, mean, rstd, running_mean, running_var
    if plan.cooperative:
        if _launch_together(
            cooperative_forward_kernel, plan,
            *operands, *_scratch(x, plan, 3, "semaphores", pooled), *plan.sizes, plan.reduce_tiles,
            plan.groups, eps, momentum, ACT=activation, BLOCK_P=plan.merge_block,
        ):  # fmt: skip
            return y, bits, mean, rstd
        plan = _instead[plan] = independent(problem_of("forward", x), device_of(x.device))
    if plan.launches == 1:
        _launch(forward_kernel, (plan.groups,), plan, *operands, *plan.sizes, eps, momentum, ACT=activation)
        return y, bits, mean, rstd
    _launch(
        statistics_kernel, (plan.groups, plan.splits), plan,
        x, mean, rstd, running_mean, running_var, *_scratch(x, plan, 3, "tickets", pooled),
        *plan.sizes, plan.reduce_tiles, eps, momentum, BLOCK_P=plan.merge_block,
    )  # fmt: skip
    _launch(
        normalize_kernel, (plan.groups, plan.apply_splits), plan,
        x, residual, mean, rstd, weight, bias, y, bits, *plan.sizes, plan.apply_tiles, ACT=activation,
    )  # fmt: skip
    return y, bits, mean, rstd


def inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: Activation = IDENTITY,
    keep_bits: bool = False,
    keep: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, bits, mean, rstd) with given statistics; mean and rstd as the backward needs them if `keep`, else None."""
    plan = plan or plan_for("inference", x)
    y, bits = _output(x, plan, keep_bits)
    mean, rstd = _vectors(x, running_mean) if keep else (None, None)
    _launch(
        inference_kernel, (plan.groups, plan.apply_splits), plan,
        x, residual, running_mean, running_var, weight, bias, y, bits, mean, rstd, *plan.sizes, plan.apply_tiles,
        eps, ACT=activation,
    )  # fmt: skip
    return y, bits, mean, rstd


def backward(
    dy: Tensor,
    saved: Saved,
    training: bool,
    activation: Activation,
    parameter_dtype: torch.dtype,
    wanted: Wanted,
    pooled: bool = True,
    plan: Plan | None = None,
) -> Gradients:
    """The gradients that are wanted: two launches at most, one where statistics were given (not `training`)."""
    x, weight, bias, residual, bits, mean, rstd = saved
    plan = plan or plan_for("backward", x, costs(activation, bits))
    if plan.cooperative:  # asking takes microseconds
        plan = running(plan)
    gradients = dx, dweight, dbias, dresidual = _gradients(x, parameter_dtype, wanted)
    vectors = mean, rstd, weight, bias
    outputs = dx, dresidual, dweight, dbias
    operands = dy, x, residual, bits, *vectors
    both_passes = training and dx is not None
    if plan.cooperative and both_passes and _launch_together(
        cooperative_backward_kernel, plan,
        *operands, *outputs, *_scratch(x, plan, 2, "semaphores", pooled), *plan.sizes,
        plan.reduce_tiles, plan.groups, ACT=activation, BLOCK_P=plan.merge_block,
    ):  # fmt: skip
        return gradients
    if plan.cooperative:
        other = independent(problem_of("backward", x, costs(activation, bits)), device_of(x.device))
        if both_passes:
            _instead[plan] = other
        plan = other
    if plan.launches == 1 and both_passes:
        _launch(backward_kernel, (plan.groups,), plan, *operands, *outputs, *plan.sizes, ACT=activation)
        return gradients
    sums = torch.empty((2, x.shape[1]), dtype=rstd.dtype, device=x.device) if both_passes else None
    if not (dweight is None and dbias is None and sums is None):
        _launch(
            gradient_sums_kernel, (plan.groups, plan.splits), plan,
            dy, x, residual, bits, *vectors, None if training else dx, dresidual, dweight, dbias, sums,
            *_scratch(x, plan, 2, "tickets", pooled), *plan.sizes, plan.reduce_tiles,
            ACT=activation, BLOCK_P=plan.merge_block,
        )  # fmt: skip
        if sums is None:
            return gradients
        if dresidual is not None:  # it is dz: nothing but it and x is read again
            dy, residual, bits, dresidual, activation = dresidual, None, None, None, IDENTITY
    elif dx is None and dresidual is None:
        return gradients
    needs_x = sums is not None or (bits is None and activation != IDENTITY)
    _launch(
        input_gradient_kernel, (plan.groups, plan.apply_splits), plan,
        dy, x if needs_x else None, residual, bits, *vectors, sums, dx, dresidual, *plan.sizes, plan.apply_tiles,
        ACT=activation,
    )  # fmt: skip
    return gradients


def costs(activation: Activation, bits: Tensor | None) -> bool:
    """Whether the backward computes exponentials for each element."""
    return bits is None and activation.costly


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in, and the dtype of saved statistics: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def running(plan: Plan) -> Plan:
    """The plan that runs instead of one whose programs were found not to fit the GPU at a time; else itself."""
    return _instead.get(plan, plan)


def _launch_together(kernel: Any, plan: Plan, *args: Any, **constants: Any) -> bool:
    """Launch programs that wait for each other; False, and nothing happens, if the GPU cannot hold all at a time."""
    try:
        _launch(kernel, plan.grid, plan, *args, **constants)
    except handles.TooManyPrograms:
        return False
    return True


def _output(x: Tensor, plan: Plan, keep_bits: bool) -> tuple[Tensor, Tensor | None]:
    """y, laid out as x is, and, if they are to be kept, the bits."""
    return torch.empty_like(x), torch.empty(plan.bit_bytes, dtype=torch.uint8, device=x.device) if keep_bits else None


def _vectors(x: Tensor, like: Tensor | None) -> tuple[Tensor, Tensor]:
    """mean and rstd [C] in the dtype of the arithmetic on x."""
    if like is None or like.dtype is not arithmetic_dtype(x):
        like = torch.empty(x.shape[1], dtype=arithmetic_dtype(x), device=x.device)
    return torch.empty_like(like), torch.empty_like(like)


def _gradients(x: Tensor, parameter_dtype: torch.dtype, wanted: Wanted) -> Gradients:
    memory_format = memory_format_of(x)
    dx, dresidual = (
        torch.empty_like(x, memory_format=memory_format) if want else None for want in (wanted[0], wanted[3])
    )
    dweight, dbias = (
        torch.empty(x.shape[1], dtype=parameter_dtype, device=x.device) if want else None for want in wanted[1:3]
    )
    return Gradients(dx, dweight, dbias, dresidual)


def _scratch(x: Tensor, plan: Plan, values: int, purpose: Purpose, pooled: bool) -> tuple[Tensor, Tensor]:
    """Room for partial results [P, values, C] in the dtype of the arithmetic on x, and counters of the groups."""
    counters = plan.slots if purpose == "semaphores" else plan.groups
    return scratch(x, plan.splits * values * x.shape[1], arithmetic_dtype(x), purpose, counters, pooled)
