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


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Forward) -> Tensor:
    """y of x [N, C, ...], weight and bias [C]; the running statistics are updated in place in training."""
    x = dense(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = BatchNorm.apply(x, weight, bias, given)  # type: ignore[no-untyped-call]
        return y
    return forward(x, weight, bias, given)[0]


def dense(x: Tensor) -> Tensor:
    """x without gaps in its memory format: itself, or one copy, which autograd knows of."""
    return x.contiguous(memory_format=memory_format_of(x))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format of the result for x [N, C, ...], as torch chooses it: channels_last(_3d) is kept, also when gapped."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return last
    return torch._prims_common.suggest_memory_format(x)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Forward, keep: bool = False, pooled: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, rstd) of dense x; in evaluation mean and rstd only if `keep`."""
    memory_format = memory_format_of(x)
    weight, bias, mean, var = (
        None if v is None else v.contiguous() for v in (weight, bias, given.running_mean, given.running_var)
    )
    if given.training:
        results = launch.forward(x, weight, bias, mean, var, given.momentum, given.eps, memory_format, pooled)
        _bring_back(given.running_mean, mean)
        _bring_back(given.running_var, var)
        return results
    assert mean is not None
    assert var is not None
    return launch.inference(x, weight, bias, mean, var, given.eps, memory_format, keep)


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
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    parameter_dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    pooled: bool = True,
) -> launch.Gradients:
    """Gradients of (x, weight, bias); dy of any strides is copied unless it is dense as x."""
    x = dense(x)  # as the forward saved it, unless a hook has repacked it
    memory_format = memory_format_of(x)
    dy = dy.resolve_neg().contiguous(memory_format=memory_format)
    weight = None if weight is None else weight.contiguous()
    run = launch.backward if training else launch.frozen_backward
    return run(dy, x, weight, mean, rstd, parameter_dtype, wanted, memory_format, pooled)


def second_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    upstream: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of (dy, x, weight) where `upstream` are those of (dx, dweight, dbias): the formula's, by autograd.

    Without statistics (mean, rstd) they are functions of x.
    """
    create_graph = torch.is_grad_enabled()
    mean, rstd = statistics or (None, None)
    with torch.enable_grad():
        # Fresh views: dy is itself a function of x, and that path is not ours to follow.
        views = dy.view_as(dy), x.view_as(x), None if weight is None else weight.view_as(weight)
        outputs = reference.gradients(*views, mean, rstd, eps)
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
    wanted = [v for v, need in zip(views, needed, strict=True) if v is not None and need]
    if not pairs or not wanted:
        return None, None, None
    o, u = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(o, wanted, u, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def parameter_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The dtype of the parameters' gradients."""
    return next((p.dtype for p in parameters if p is not None), x.dtype)


class BatchNorm(torch.autograd.Function):
    """y of dense x, weight and bias, with statistics of the batch or given ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Forward) -> Tensor:
        y, mean, rstd = forward(x, weight, bias, given, keep=True)
        # The running statistics are not needed, but torch refuses a backward after a user changed them in place.
        ctx.save_for_backward(x, weight, mean, rstd, given.running_mean, given.running_var)
        ctx.eps = given.eps
        ctx.constants = given.training, parameter_dtype(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, _, _ = ctx.saved_tensors
        constants = *ctx.constants, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            gradients = BatchNormBackward.apply(dy, x, weight, mean, rstd, ctx.eps, constants)  # type: ignore[no-untyped-call]
            return *gradients, None
        return *backward(dy, x, weight, mean, rstd, *constants), None


class BatchNormBackward(torch.autograd.Function):
    """(dx, dweight, dbias) of dy, x and weight."""

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
        statistics = None if ctx.training else (mean, rstd)
        gradients = second_backward(dy, x, weight, statistics, ctx.eps, upstream, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None
