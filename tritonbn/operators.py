"""The operation as torch.library operators: what torch.compile and dispatch modes see as one node.

They launch what eager calls launch. The forward declares the running statistics and the counter of batches as changed,
which is why its derivative is registered here, by hand: `torch.library.register_autograd` takes no such operators.
"""

from typing import Any

import torch
from torch import Tensor

from tritonbn import autograd, dispatch, launch, planning, private
from tritonbn.activations import IDENTITY, Activation
from tritonbn.launch import Saved

LIBRARY: Any = torch.library.Library("tritonbn", "DEF")  # type: ignore[no-untyped-call]
_ACTIVATION = "str activation, float a, float b"
LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? counter, bool training, float? momentum, float eps, "
    f"{_ACTIVATION}, bool keep, bool keep_bits) -> (Tensor y, Tensor bits, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? bits, "
    f"Tensor mean, Tensor rstd, bool training, {_ACTIVATION}, float eps, ScalarType parameter_dtype, bool[] wanted) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, given: autograd.Forward
) -> Tensor:
    """y; the running statistics and the counter are updated in place."""
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    running_mean, running_var, counter, *constants, activation = given
    y: Tensor = torch.ops.tritonbn.batch_norm(
        x, weight, bias, residual, running_mean, running_var, counter, *constants, *activation, grad, False
    )[0]
    return y


def _or_empty(t: Tensor | None, x: Tensor) -> Tensor:
    """Operators return tensors only: an absent one is an empty one."""
    return x.new_empty(0) if t is None else t


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    a: float,
    b: float,
    keep: bool,
    keep_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, bits, mean, rstd), see `tritonbn.functional.normalize`; empty are bits, mean and rstd that are not kept."""
    dispatch.check_residual(x, residual)
    call = dispatch.recognize((x, running_mean, running_var, weight, bias, residual, counter), training)
    if call.reason or eps < 0 or (training and eps == 0) or (momentum is None and counter is None):
        raise RuntimeError(f"tritonbn::batch_norm: {call.reason or dispatch.REFUSED}")
    given = running_mean, running_var, counter, training, momentum, eps, Activation(activation, a, b)
    if not call.dense:
        x = x.contiguous(memory_format=call.memory_format)
        residual = None if residual is None else residual.contiguous(memory_format=call.memory_format)
    y, bits, mean, rstd = autograd.forward(x, weight, bias, residual, given, keep, keep_bits, call)
    return y, _or_empty(bits, x), _or_empty(mean, x), _or_empty(rstd, x)


def _fake_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    a: float,
    b: float,
    keep: bool,
    keep_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=planning.memory_format_of(x))
    bits = x.new_empty(0)
    if keep_bits:
        known = all(type(size) is int for size in x.shape)  # else how many bytes there are is not known either
        size = planning.plan_for("forward", x).bit_bytes if known else torch.library.get_ctx().new_dynamic_size()
        bits = x.new_empty(size, dtype=torch.uint8)
    if not (training or keep):
        return y, bits, x.new_empty(0), x.new_empty(0)
    mean, rstd = (x.new_empty(x.shape[1], dtype=launch.arithmetic_dtype(x)) for _ in range(2))
    return y, bits, mean, rstd


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
    """`launch.Gradients`, empty where not wanted; eps is for the second derivative."""
    saved = Saved(x, weight, bias, residual, bits, mean, rstd)
    which = (wanted[0], wanted[1], wanted[2], wanted[3])
    memory_format = planning.memory_format_of(x)
    act = Activation(activation, a, b)
    found = autograd.backward(dy, saved, training, act, parameter_dtype, which, memory_format)
    return _or_empty(found.x, x), _or_empty(found.weight, x), _or_empty(found.bias, x), _or_empty(found.residual, x)


def _fake_batch_norm_backward(
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


class _BatchNorm(torch.autograd.Function):
    """The forward with its derivative, both as operators, so that compilers and modes see these."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, weight, bias, residual, *_, training, _, eps, name, a, b, _, keep_bits = inputs
        activation = Activation(name, a, b)
        asked = keep_bits
        if autograd.keeps_bits(residual, activation):  # of symbolic sizes nobody knows how many: the residual is kept
            keep_bits = asked or all(type(size) is int for size in x.shape)
        with private.below_autograd():
            y, bits, mean, rstd = torch.ops.tritonbn.batch_norm(*inputs[:-1], keep_bits)
        returned = bits if asked else x.new_empty(0)
        ctx.mark_non_differentiable(returned, mean, rstd)
        needs_z = activation != IDENTITY and not keep_bits
        kept = (bias, residual) if needs_z else (None, None)
        ctx.save_for_backward(x, weight, *kept, bits if keep_bits else None, mean, rstd)
        dtype, memory_format = dispatch.parameter_dtype(x, weight, bias), planning.memory_format_of(x)
        ctx.constants = training, activation, eps, dtype, memory_format
        return y, returned, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        training, activation, eps, dtype, memory_format = ctx.constants
        wanted = list(ctx.needs_input_grad[:4])
        passed_on = wanted[3] and activation == IDENTITY  # an operator must not return its argument
        computed = [*wanted[:3], wanted[3] and not passed_on]
        saved = _laid_out(ctx.saved_tensors, memory_format)
        found = torch.ops.tritonbn.batch_norm_backward(dy, *saved, training, *activation, eps, dtype, computed)
        gradients = [g if want else None for g, want in zip(found, computed, strict=True)]
        if passed_on:
            gradients[3] = dy
        return *gradients, *(None,) * 11


class _BatchNormBackward(torch.autograd.Function):
    """The derivative of the derivative, in operations of torch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, training, name, a, b, eps, dtype, wanted = inputs
        with private.below_autograd():
            outputs: tuple[Tensor, ...] = torch.ops.tritonbn.batch_norm_backward(*inputs)
        ctx.constants = training, Activation(name, a, b), eps, dtype, wanted, planning.memory_format_of(tensors[1])
        ctx.save_for_backward(*tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        dy, *tensors = ctx.saved_tensors
        training, activation, eps, dtype, wanted, memory_format = ctx.constants
        saved = _laid_out(tensors, memory_format)
        slope = None
        if activation.two_valued:
            only = [False, False, False, True]
            with torch.no_grad():
                slope = torch.ops.tritonbn.batch_norm_backward(
                    torch.ones_like(dy), *saved, training, *activation, eps, dtype, only
                )[3]
        given = tuple(u if want else None for u, want in zip(upstream, wanted, strict=True))
        needed = ctx.needs_input_grad[:5]
        gradients = autograd.second_backward(dy, saved, training, activation, eps, given, needed, slope)
        return *gradients, *(None,) * 10


def _laid_out(tensors: Any, memory_format: torch.memory_format) -> Saved:
    """What was saved, x laid out as it was then: bits follow its layout, and operators see its strides only."""
    saved = Saved(*tensors)
    return saved._replace(x=saved.x.contiguous(memory_format=memory_format))


def _differentiable(operator: Any, function: type[torch.autograd.Function]) -> Any:
    """The operator where autograd is: recorded by the function if it is to be differentiated."""

    def run(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return function.apply(*inputs)  # type: ignore[no-untyped-call]
        with private.below_autograd():
            return operator(*inputs)

    return run


for _name, _real, _fake, _function in (
    ("batch_norm", batch_norm, _fake_batch_norm, _BatchNorm),
    ("batch_norm_backward", batch_norm_backward, _fake_batch_norm_backward, _BatchNormBackward),
):
    LIBRARY.impl(_name, private.untraced(_real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritonbn::{_name}", _fake, lib=LIBRARY)
    _differentiated = _differentiable(getattr(torch.ops.tritonbn, _name).default, _function)
    LIBRARY.impl(_name, private.untraced(_differentiated), "Autograd")
