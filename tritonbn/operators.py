"""The operation as torch.library operators: what torch.compile and dispatch modes see as one node.

They are functional: the new running statistics are results, which `functional` copies back. Their memory may belong to
a CUDA graph that torch.compile is about to record, so they keep nothing from call to call.
"""

from typing import Any

import torch
from torch import Tensor

from tritonbn import autograd, launch, planning
from tritonbn.activations import IDENTITY, Activation
from tritonbn.launch import Saved
from tritonbn.signature import parameter_dtype


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: autograd.Forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, new running_mean, new running_var); the last two are empty where nothing is to be updated."""
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    running_mean, running_var, *constants, activation = given
    keep_bits = grad and autograd.keeps_bits(residual, activation)
    y, _, _, _, new_mean, new_var = batch_norm(
        x, weight, bias, residual, running_mean, running_var, *constants, *activation, keep_bits
    )
    return y, new_mean, new_var


def _or_empty(t: Tensor | None, x: Tensor) -> Tensor:
    """Operators return tensors only: an absent one is an empty one."""
    return x.new_empty(0) if t is None else t


@torch.library.custom_op("tritonbn::batch_norm", mutates_args=())
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    a: float,
    b: float,
    keep_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, bits, mean, rstd, new running_mean, new running_var); empty: bits not kept, statistics not updated."""
    if training:
        running_mean = None if running_mean is None else running_mean.clone()
        running_var = None if running_var is None else running_var.clone()
    given = running_mean, running_var, training, momentum, eps, Activation(activation, a, b)
    x = autograd.dense(x)
    if residual is not None:
        residual = residual.contiguous(memory_format=planning.memory_format_of(x))
    y, bits, mean, rstd = autograd.forward(
        x, weight, bias, residual, given, keep=True, keep_bits=keep_bits, pooled=False
    )
    assert mean is not None
    assert rstd is not None
    updated = (running_mean, running_var) if training else (None, None)
    return y, _or_empty(bits, x), mean, rstd, _or_empty(updated[0], x), _or_empty(updated[1], x)


@batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    a: float,
    b: float,
    keep_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=planning.memory_format_of(x))
    bits = x.new_empty(0)
    if keep_bits:
        known = all(type(size) is int for size in x.shape)  # else how many bytes there are is not known either
        size = planning.plan_for("forward", x).bit_bytes if known else torch.library.get_ctx().new_dynamic_size()
        bits = x.new_empty(size, dtype=torch.uint8)
    mean, rstd = (x.new_empty(x.shape[1], dtype=launch.arithmetic_dtype(x)) for _ in range(2))
    new = [torch.empty_like(s) if training and s is not None else x.new_empty(0) for s in (running_mean, running_var)]
    return y, bits, mean, rstd, new[0], new[1]


@torch.library.custom_op("tritonbn::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    activation: str,
    a: float,
    b: float,
    eps: float,
    parameter_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Gradients`, empty where not wanted; eps is for the second derivative."""
    saved = Saved(x, weight, bias, residual, bits, mean, rstd)
    which = (wanted[0], wanted[1], wanted[2], wanted[3])
    found = autograd.backward(dy, saved, training, Activation(activation, a, b), parameter_dtype, which, pooled=False)
    return _or_empty(found.x, x), _or_empty(found.weight, x), _or_empty(found.bias, x), _or_empty(found.residual, x)


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    activation: str,
    a: float,
    b: float,
    eps: float,
    parameter_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like_x(want: bool) -> Tensor:
        return torch.empty_like(x, memory_format=planning.memory_format_of(x)) if want else x.new_empty(0)

    dweight, dbias = (
        x.new_empty(x.shape[1], dtype=parameter_dtype) if want else x.new_empty(0) for want in wanted[1:3]
    )
    return like_x(wanted[0]), dweight, dbias, like_x(wanted[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, _, ctx.training, _, ctx.eps, *activation, keep_bits = inputs
    _, bits, mean, rstd, _, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.activation = Activation(*activation)
    needs_z = ctx.activation != IDENTITY and not keep_bits
    kept = (bias, residual) if needs_z else (None, None)
    ctx.save_for_backward(x, weight, *kept, bits if keep_bits else None, mean, rstd)
    ctx.parameter_dtype = parameter_dtype(x, weight, bias)
    ctx.memory_format = planning.memory_format_of(x)


def _backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    passed_on = wanted[3] and ctx.activation == IDENTITY  # an operator must not return its argument
    computed = [*wanted[:3], wanted[3] and not passed_on]
    constants = ctx.training, *ctx.activation, ctx.eps, ctx.parameter_dtype, computed
    found = batch_norm_backward(dy, *autograd.unpacked(ctx.saved_tensors, ctx.memory_format), *constants)
    gradients = [g if want else None for g, want in zip(found, computed, strict=True)]
    if passed_on:
        gradients[3] = dy
    return *gradients, *(None,) * 9


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.training, name, a, b, ctx.eps, ctx.parameter_dtype, ctx.wanted = inputs
    ctx.activation = Activation(name, a, b)
    ctx.memory_format = planning.memory_format_of(tensors[1])
    ctx.save_for_backward(*tensors)


def _second_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    dy, *tensors = ctx.saved_tensors
    saved = autograd.unpacked(tensors, ctx.memory_format)
    slope = None
    if ctx.activation.two_valued:
        only = [False, False, False, True]
        constants = ctx.training, *ctx.activation, ctx.eps, ctx.parameter_dtype, only
        with torch.no_grad():
            slope = batch_norm_backward(torch.ones_like(dy), *saved, *constants)[3]
    given = tuple(u if want else None for u, want in zip(upstream, ctx.wanted, strict=True))
    needed = ctx.needs_input_grad[:5]
    gradients = autograd.second_backward(dy, saved, ctx.training, ctx.activation, ctx.eps, given, needed, slope)
    return *gradients, *(None,) * 10


batch_norm.register_autograd(_backward, setup_context=_setup)
batch_norm_backward.register_autograd(_second_backward, setup_context=_setup_second)
