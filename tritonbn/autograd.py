"""What the backward needs and what it returns: the eager operation, differentiable to any order."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonbn import launch, reference


class Forward(NamedTuple):
    """Everything that the forward takes beside x, weight and bias."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format of the result for x [N, C, ...], as torch chooses it: channels_last(_3d) is kept, also when gapped."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return last
    return torch._prims_common.suggest_memory_format(x)


def _in_place(statistics: Tensor | None, dense: Tensor | None) -> None:
    """Bring updated statistics back to the strided tensor they were copied from; torch's update is no new version."""
    if statistics is not None and dense is not None and statistics is not dense:
        with torch.no_grad(), torch.autograd.grad_mode._unsafe_preserve_version_counter(statistics):
            statistics.copy_(dense)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Forward, keep: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(y, mean, rstd, x as it was read); x of any strides is copied once unless it is dense in its memory format."""
    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    weight, bias, mean, var = (
        None if v is None else v.contiguous() for v in (weight, bias, given.running_mean, given.running_var)
    )
    if given.training:
        results = launch.forward(x, weight, bias, mean, var, given.momentum, given.eps, memory_format)
        _in_place(given.running_mean, mean)
        _in_place(given.running_var, var)
        return *results, x
    assert mean is not None
    assert var is not None
    return *launch.inference(x, weight, bias, mean, var, given.eps, memory_format, keep), x


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    parameter_dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> launch.Gradients:
    """Gradients of (x, weight, bias), x as the forward read it; dy of any strides is copied unless dense as x."""
    memory_format = memory_format_of(x)
    dy = dy.contiguous(memory_format=memory_format)
    weight = None if weight is None else weight.contiguous()
    run = launch.backward if training else launch.frozen_backward
    return run(dy, x, weight, mean, rstd, parameter_dtype, wanted, memory_format)


class BatchNorm(torch.autograd.Function):
    """y of x [N, C, ...], weight and bias [C], with statistics of the batch or given ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Forward) -> Tensor:
        y, mean, rstd, x = forward(x, weight, bias, given, keep=True)
        # The running statistics are not needed, but torch refuses a backward after a user changed them in place.
        ctx.save_for_backward(x, weight, mean, rstd, given.running_mean, given.running_var)
        ctx.training, ctx.eps = given.training, given.eps
        ctx.parameter_dtype = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, _, _ = ctx.saved_tensors
        constants = ctx.training, ctx.parameter_dtype, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            gradients = BatchNormBackward.apply(dy, x, weight, mean, rstd, ctx.eps, constants)  # type: ignore[no-untyped-call]
            return *gradients, None
        return *backward(dy, x, weight, mean, rstd, *constants), None


class BatchNormBackward(torch.autograd.Function):
    """(dx, dweight, dbias) of dy, x and weight; its own derivative is that of the formula in `reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        constants: tuple[bool, torch.dtype, tuple[bool, bool, bool]],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(dy, x, weight, mean, rstd)
        ctx.training, ctx.eps = constants[0], eps
        return tuple(backward(dy, x, weight, mean, rstd, *constants))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, rstd = ctx.saved_tensors
        if ctx.training:
            mean = rstd = None
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Fresh views: dy is itself a function of x, and that path is not ours to follow.
            views = dy.view_as(dy), x.view_as(x), None if weight is None else weight.view_as(weight)
            outputs = reference.gradients(*views, mean, rstd, ctx.eps)
        pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
        wanted = [v for v, needed in zip(views, ctx.needs_input_grad, strict=False) if v is not None and needed]
        o, u = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(o, wanted, u, create_graph=create_graph, allow_unused=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None
