"""The operation as torch.library operators: what torch.compile and dispatch modes see as one node.

They are functional: the new running statistics are results, which `functional` copies back. Their memory may belong to
a CUDA graph that torch.compile is about to record, so they keep nothing from call to call.
"""

from typing import Any

import torch
from torch import Tensor

from tritonbn import autograd, launch


def _vector(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=launch.arithmetic_dtype(x))


def _or_empty(t: Tensor | None, x: Tensor) -> Tensor:
    """Operators return tensors only: an absent one is an empty one."""
    return x.new_empty(0) if t is None else t


@torch.library.custom_op("tritonbn::batch_norm", mutates_args=())
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, new running_mean, new running_var); the last two are empty where nothing is to be updated."""
    if training:
        running_mean = None if running_mean is None else running_mean.clone()
        running_var = None if running_var is None else running_var.clone()
    given = autograd.Forward(running_mean, running_var, training, momentum, eps)
    y, mean, rstd = autograd.forward(autograd.dense(x), weight, bias, given, keep=True, pooled=False)
    assert mean is not None
    assert rstd is not None
    updated = (running_mean, running_var) if training else (None, None)
    return y, mean, rstd, _or_empty(updated[0], x), _or_empty(updated[1], x)


@batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=autograd.memory_format_of(x))
    new = [torch.empty_like(s) if training and s is not None else x.new_empty(0) for s in (running_mean, running_var)]
    return y, _vector(x), _vector(x), new[0], new[1]


@torch.library.custom_op("tritonbn::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    parameter_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), empty where not wanted; eps is for the second derivative."""
    which = (wanted[0], wanted[1], wanted[2])
    gradients = autograd.backward(dy, x, weight, mean, rstd, training, parameter_dtype, which, pooled=False)
    return _or_empty(gradients.x, x), _or_empty(gradients.weight, x), _or_empty(gradients.bias, x)


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    parameter_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=autograd.memory_format_of(x)) if wanted[0] else x.new_empty(0)
    vectors = [x.new_empty(x.shape[1], dtype=parameter_dtype) if w else x.new_empty(0) for w in wanted[1:]]
    return dx, vectors[0], vectors[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, ctx.training, _, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, output[1], output[2])
    ctx.parameter_dtype = autograd.parameter_dtype(x, weight, bias)


def _backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    constants = ctx.training, ctx.eps, ctx.parameter_dtype, wanted
    gradients = batch_norm_backward(dy, x, weight, mean, rstd, *constants)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.training, ctx.eps, _, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)


def _second_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, weight, mean, rstd = ctx.saved_tensors
    statistics = None if ctx.training else (mean, rstd)
    given = tuple(u if w else None for u, w in zip(upstream, ctx.wanted, strict=True))
    gradients = autograd.second_backward(dy, x, weight, statistics, ctx.eps, given, ctx.needs_input_grad[:3])
    return *gradients, None, None, None, None, None, None


batch_norm.register_autograd(_backward, setup_context=_setup)
batch_norm_backward.register_autograd(_second_backward, setup_context=_setup_second)
