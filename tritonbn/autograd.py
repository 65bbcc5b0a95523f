"""What the backward needs and what it returns: the eager operation, differentiable to any order."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tritonbn import launch, reference
from tritonbn.activations import IDENTITY, Activation
from tritonbn.launch import Gradients, Saved, Wanted
from tritonbn.planning import memory_format_of
from tritonbn.signature import Signature

# running_mean, running_var, training, momentum, eps, activation: what the forward takes beside what has gradients.
Forward = tuple[Tensor | None, Tensor | None, bool, float, float, Activation]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: Forward,
    save_output: bool,
    found: Signature,
) -> Tensor:
    """y of x and residual [N, C, ...], weight and bias [C]; the running statistics are updated in place in training.

    found: what the tensors are.
    """
    if not found.dense:
        x = x.contiguous(memory_format=found.memory_format)
        if residual is not None:
            residual = residual.contiguous(memory_format=found.memory_format)
    if found.records:
        y: Tensor = _record(x, weight, bias, residual, given, save_output, found)
        return y
    return forward(x, weight, bias, residual, given, found=found)[0]


def dense(x: Tensor) -> Tensor:
    """x without gaps in its memory format: itself, or one copy, which autograd knows of."""
    return x.contiguous(memory_format=memory_format_of(x))


def keeps_bits(residual: Tensor | None, activation: Activation) -> bool:
    """Whether a bit per element tells the backward what it would need the residual for."""
    return residual is not None and activation.two_valued


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: Forward,
    keep: bool = False,
    keep_bits: bool = False,
    pooled: bool = True,
    found: Signature | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, bits, mean, rstd) of dense x and residual; in evaluation mean and rstd only if `keep`.

    found: what x and the vectors are, where that is known.
    """
    running_mean, running_var, training, momentum, eps, activation = given
    mean, var = running_mean, running_var
    dense = found is not None and found.dense
    if not dense:
        weight, bias, mean, var = _contiguous(weight), _contiguous(bias), _contiguous(mean), _contiguous(var)
    plan = None if found is None else found.plan("forward" if training else "inference", x)
    if training:
        results = launch.forward(
            x, residual, weight, bias, mean, var, momentum, eps, activation, keep_bits, pooled, plan
        )  # fmt: skip
        if not dense:
            _bring_back(running_mean, mean)
            _bring_back(running_var, var)
        return results
    assert mean is not None
    assert var is not None
    return launch.inference(x, residual, weight, bias, mean, var, eps, activation, keep_bits, keep, plan)


def _contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _bring_back(statistics: Tensor | None, updated: Tensor | None) -> None:
    """Copy updated statistics to the strided tensor they were copied from."""
    if statistics is not None and updated is not None and statistics is not updated:
        copy_without_version(statistics, updated)


def copy_without_version(to: Tensor, source: Tensor) -> None:
    """to.copy_(source), which autograd does not count as a change: torch's update of running statistics is none."""
    with torch.no_grad():
        if to.is_inference():  # has no version
            to.copy_(source)
        else:
            with torch.autograd.grad_mode._unsafe_preserve_version_counter(to):
                to.copy_(source)


def backward(
    dy: Tensor,
    saved: Saved,
    training: bool,
    activation: Activation,
    parameter_dtype: torch.dtype,
    wanted: Wanted,
    pooled: bool = True,
    found: Signature | None = None,
) -> Gradients:
    """Gradients of (x, weight, bias, residual); dy of any strides is copied unless it is dense as x."""
    memory_format = memory_format_of(saved.x)
    x = saved.x.contiguous(memory_format=memory_format)
    dy = dy.resolve_neg().contiguous(memory_format=memory_format)
    residual = None if saved.residual is None else saved.residual.contiguous(memory_format=memory_format)
    saved = Saved(x, _contiguous(saved.weight), _contiguous(saved.bias), residual, *saved[4:])
    plan = None if found is None else found.plan("backward", x, launch.costs(activation, saved.bits))
    if wanted[3] and activation == IDENTITY:  # nothing to compute
        only = *wanted[:3], False
        return launch.backward(dy, saved, training, activation, parameter_dtype, only, pooled, plan)._replace(
            residual=dy
        )
    return launch.backward(dy, saved, training, activation, parameter_dtype, wanted, pooled, plan)


def second_backward(
    dy: Tensor,
    saved: Saved,
    training: bool,
    activation: Activation,
    eps: float,
    upstream: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    slope: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (dy, x, weight, bias, residual) where `upstream` are those of the first derivatives `Gradients`.

    They are the formula's, by autograd. In training mean and rstd are functions of x. slope is the derivative of a
    two-valued activation: it does not change, and torch does not differentiate all of them twice.
    """
    create_graph = torch.is_grad_enabled()
    statistics = None
    if not training:
        assert saved.mean is not None
        statistics = saved.mean, saved.rstd

    with torch.enable_grad():
        # Fresh views: dy is itself a function of x, and that path is not ours to follow.
        dy, x = dy.view_as(dy), saved.x.view_as(saved.x)
        weight, bias, residual = (None if t is None else t.view_as(t) for t in saved[1:4])
        views = dy, x, weight, bias, residual
        if slope is not None:
            dy, activation = dy * slope, IDENTITY
        outputs = reference.gradients(dy, x, weight, bias, residual, statistics, eps, activation)
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
    wanted = [v for v, need in zip(views, needed, strict=True) if v is not None and need]
    if not pairs or not wanted:
        return (None,) * len(needed)
    o, u = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(o, wanted, u, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if need and v is not None else None for v, need in zip(views, needed, strict=True))


def unpacked(tensors: Iterable[Any], memory_format: torch.memory_format) -> Saved:
    """What was saved, x laid out as it was then: a hook may have repacked it, and bits follow the layout."""
    saved = Saved(*tensors)
    return saved._replace(x=saved.x.contiguous(memory_format=memory_format))


class BatchNorm(torch.autograd.Function):
    """y of dense x and residual, weight and bias, with statistics of the batch or given ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        given: Forward,
        save_output: bool,
        found: Signature,
    ) -> Tensor:
        running_mean, running_var, training, momentum, eps, activation = given
        keep_bits = residual is not None and activation.two_valued
        results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
        if training and found.dense:  # as `forward` would, with a call less
            results = launch.forward(
                x, residual, weight, bias, running_mean, running_var, momentum, eps, activation, keep_bits,
                plan=found.plan("forward", x),
            )  # fmt: skip
        else:
            results = forward(x, weight, bias, residual, given, True, keep_bits, True, found)
        y, bits, mean, rstd = results
        needs_z = not keep_bits and activation != IDENTITY
        # The running statistics are not needed, but torch refuses a backward after a user changed them in place.
        ctx.save_for_backward(
            y if save_output else x, weight, bias if needs_z or save_output else None, residual if needs_z else None,
            bits, None if save_output else mean, rstd, running_mean, running_var,
        )  # fmt: skip
        ctx.constants = training, activation, eps, found
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        training, activation, eps, found = ctx.constants
        saved = unpacked(ctx.saved_tensors[:7], found.memory_format)
        constants = training, activation, found.parameter_dtype, ctx.needs_input_grad[:4]
        if not torch.is_grad_enabled():
            return *backward(dy, saved, *constants, found=found), None, None, None
        if saved.mean is None:
            raise RuntimeError("save='output' supports first derivatives only, but got create_graph=True")
        gradients = BatchNormBackward.apply(dy, *saved, eps, constants)  # type: ignore[no-untyped-call]
        return *gradients, None, None, None


# `BatchNorm.apply` without what it does for torch.func, whose tensors `functional` does not let in.
_record: Any = super(torch.autograd.Function, BatchNorm).apply


class BatchNormBackward(torch.autograd.Function):
    """`Gradients` as functions of dy, x, weight, bias and residual."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, ctx.eps, constants = arguments
        saved = Saved(*tensors)
        ctx.save_for_backward(dy, *saved)
        ctx.constants, ctx.memory_format = constants[:3], memory_format_of(saved.x)
        return tuple(backward(dy, saved, *constants))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *tensors = ctx.saved_tensors
        saved = unpacked(tensors, ctx.memory_format)
        training, activation, dtype = ctx.constants
        slope = None
        if activation.two_valued:
            with torch.no_grad():
                only = False, False, False, True
                slope = backward(torch.ones_like(dy), saved, training, activation, dtype, only).residual
        needed = ctx.needs_input_grad[:5]
        gradients = second_backward(dy, saved, training, activation, ctx.eps, upstream, needed, slope)
        return *gradients, None, None, None, None, None
