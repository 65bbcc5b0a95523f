"""One function per operation: look the plan up, allocate, launch, return. No mathematics, no second dispatch.

All functions take x dense in `memory_format` (contiguous, channels_last or channels_last_3d) and return tensors in it.
`pooled` is whether tickets may be kept from call to call, see `_tickets`.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tritonbn.kernels.backward import backward_kernel, gradient_sums_kernel, input_gradient_kernel
from tritonbn.kernels.normalize import forward_kernel, inference_kernel, normalize_kernel
from tritonbn.kernels.statistics import statistics_kernel
from tritonbn.plan import Device, Layout, Operation, Plan, make_plan

# The kernels run on CPU tensors too: TRITON_INTERPRET was set when they were defined.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


# Products and sums are fused in all kernels alike. NVIDIA's assembler would rather spill a few values than exceed a
# register count of its own choosing; of all that there are, split reductions that store no tile still take 128 at most.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True} | ({} if torch.version.hip else {"maxnreg": 255})


class Gradients(NamedTuple):
    """Of x (dense as x), weight and bias; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    memory_format: torch.memory_format,
    pooled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) with statistics of the batch; the running ones are updated in place."""
    plan = plan_for("forward", x, memory_format)
    y = torch.empty_like(x, memory_format=memory_format)
    mean, rstd = _vector(x, plan.shape[1]), _vector(x, plan.shape[1])
    if plan.path == "single":
        _launch(
            forward_kernel, (plan.groups,), plan,
            x, weight, bias, y, mean, rstd, running_mean, running_var, *_sizes(plan), eps, momentum,
        )  # fmt: skip
        return y, mean, rstd
    _launch(
        statistics_kernel, (plan.groups, plan.splits), plan,
        x, mean, rstd, running_mean, running_var, _workspace(x, plan, 3), _tickets(x, plan.groups, pooled),
        *_sizes(plan), plan.reduce_tiles, eps, momentum, BLOCK_P=plan.merge_block,
    )  # fmt: skip
    _launch(
        normalize_kernel, (plan.groups, plan.apply_splits), plan,
        x, mean, rstd, weight, bias, y, *_sizes(plan), plan.apply_tiles,
    )  # fmt: skip
    return y, mean, rstd


def inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    memory_format: torch.memory_format,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, rstd) with given statistics; mean and rstd as the backward needs them if `keep`, else None."""
    plan = plan_for("inference", x, memory_format)
    y = torch.empty_like(x, memory_format=memory_format)
    mean, rstd = (_vector(x, plan.shape[1]), _vector(x, plan.shape[1])) if keep else (None, None)
    _launch(
        inference_kernel, (plan.groups, plan.apply_splits), plan,
        x, running_mean, running_var, weight, bias, y, mean, rstd, *_sizes(plan), plan.apply_tiles, eps,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameter_dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    memory_format: torch.memory_format,
    pooled: bool = True,
) -> Gradients:
    """Gradients of (x, weight, bias) where statistics were those of the batch; `wanted` says which."""
    plan = plan_for("backward", x, memory_format)
    dx, dweight, dbias = _gradients(x, plan, parameter_dtype, wanted, memory_format)
    if plan.path == "single" and dx is not None:
        _launch(
            backward_kernel, (plan.groups,), plan,
            dy, x, mean, rstd, weight, dx, dweight, dbias, *_sizes(plan),
        )  # fmt: skip
        return Gradients(dx, dweight, dbias)
    sums = None if dx is None else torch.empty((2, plan.shape[1]), dtype=mean.dtype, device=x.device)
    _reduce(plan, pooled, dy, x, mean, rstd, weight, None, dweight, dbias, sums)
    if dx is not None:
        _launch(
            input_gradient_kernel, (plan.groups, plan.apply_splits), plan,
            dy, x, mean, rstd, weight, sums, dx, *_sizes(plan), plan.apply_tiles,
        )  # fmt: skip
    return Gradients(dx, dweight, dbias)


def frozen_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameter_dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    memory_format: torch.memory_format,
    pooled: bool = True,
) -> Gradients:
    """Gradients of (x, weight, bias) where statistics were given: one launch, whatever is wanted."""
    plan = plan_for("backward", x, memory_format)
    dx, dweight, dbias = _gradients(x, plan, parameter_dtype, wanted, memory_format)
    if dweight is not None or dbias is not None:
        _reduce(plan, pooled, dy, x, mean, rstd, weight, dx, dweight, dbias, None)
    elif dx is not None:
        _launch(
            input_gradient_kernel, (plan.groups, plan.apply_splits), plan,
            dy, None, None, rstd, weight, None, dx, *_sizes(plan), plan.apply_tiles,
        )  # fmt: skip
    return Gradients(dx, dweight, dbias)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in, and the dtype of saved statistics: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def plan_for(operation: Operation, x: Tensor, memory_format: torch.memory_format) -> Plan:
    """The plan of `operation` for x, dense in `memory_format`."""
    N, C = x.shape[0], x.shape[1]
    S = x.numel() // (N * C)
    layout: Layout = "planes"
    if S == 1 or memory_format is not torch.contiguous_format:
        layout, N, S = "rows", N * S, 1
    return make_plan(operation, layout, (N, C, S), x.element_size(), _device(x.device))


def _reduce(plan: Plan, pooled: bool, dy: Tensor, x: Tensor, *vectors: Tensor | None) -> None:
    _launch(
        gradient_sums_kernel, (plan.groups, plan.splits), plan,
        dy, x, *vectors, _workspace(x, plan, 2), _tickets(x, plan.groups, pooled),
        *_sizes(plan), plan.reduce_tiles, BLOCK_P=plan.merge_block,
    )  # fmt: skip


def _launch(kernel: Any, grid: tuple[int, ...], plan: Plan, *args: Any, **constants: int) -> None:
    """The one place where a kernel starts: on the device of its first argument."""
    x = args[0]
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        kernel[grid](*args, T=plan.tile, **constants, num_warps=plan.num_warps, **OPTIONS)


def _sizes(plan: Plan) -> tuple[int, int, int]:
    """(R, C, width) of the kernels' view; one channel is one plane, see `make_plan`."""
    return plan.rows, plan.shape[1], plan.width


def _vector(x: Tensor, C: int) -> Tensor:
    """[C] in the dtype of the arithmetic on x."""
    return torch.empty(C, dtype=arithmetic_dtype(x), device=x.device)


def _gradients(
    x: Tensor,
    plan: Plan,
    parameter_dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    memory_format: torch.memory_format,
) -> Gradients:
    dx = torch.empty_like(x, memory_format=memory_format) if wanted[0] else None
    C = plan.shape[1]
    dweight = torch.empty(C, dtype=parameter_dtype, device=x.device) if wanted[1] else None
    dbias = torch.empty(C, dtype=parameter_dtype, device=x.device) if wanted[2] else None
    return Gradients(dx, dweight, dbias)


def _workspace(x: Tensor, plan: Plan, values: int) -> Tensor:
    """Partial results [P, values, C]; from the caching allocator, which keeps streams apart."""
    return torch.empty((plan.splits, values, plan.shape[1]), dtype=arithmetic_dtype(x), device=x.device)


_ticket_pool: dict[tuple[torch.device, int], Tensor] = {}


def _tickets(x: Tensor, groups: int, pooled: bool) -> Tensor:
    """Zeroed counters, one per channel group, of this device and stream; kernels leave them zero.

    Not pooled, or under graph capture, they are the call's own: its memory may belong to a graph, which is replayed on
    any stream, beside eager work on this one, and overwrites what it does not know to be alive.
    """
    if not pooled or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(groups, dtype=torch.int32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    key = (x.device, stream)
    tickets = _ticket_pool.get(key)
    if tickets is None or tickets.numel() < groups:
        tickets = _ticket_pool[key] = torch.zeros(max(groups, 4096), dtype=torch.int32, device=x.device)
    return tickets


@lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device()
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.name, properties.multi_processor_count)
