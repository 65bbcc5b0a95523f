"""What the backward needs and what it returns: the eager operation, differentiable to any order."""

from typing import Any

import torch
from torch import Tensor

from tritonbn import launch, private, reference
from tritonbn.activations import IDENTITY, Activation
from tritonbn.dispatch import Call
from tritonbn.launch import Gradients, Saved, Wanted

# running_mean, running_var, counter, training, momentum (None: 1 / counter), eps, activation: what the forward takes
# beside what has gradients.
Forward = tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None, float, Activation]


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, given: Forward, call: Call
) -> Tensor:
    """y of x and residual [N, C, ...], weight and bias [C]; running statistics and counter are updated in place.

    call: the record of these tensors.
    """
    if not call.dense:
        x = x.contiguous(memory_format=call.memory_format)
        if residual is not None:
            residual = residual.contiguous(memory_format=call.memory_format)
    if call.records:
        y: Tensor = _record(x, weight, bias, residual, given, call)
        return y
    return forward(x, weight, bias, residual, given, False, False, call)[0]


def keeps_bits(residual: Tensor | None, activation: Activation) -> bool:
    """Whether a bit per element tells the backward what it would need the residual for."""
    return residual is not None and activation.two_valued


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: Forward,
    keep: bool,
    keep_bits: bool,
    call: Call,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, bits, mean, rstd) of dense x and residual; in evaluation mean and rstd only if `keep`."""
    running_mean, running_var, counter, training, momentum, eps, activation = given
    mean, var = running_mean, running_var
    if not call.dense:
        weight, bias, mean, var = _contiguous(weight), _contiguous(bias), _contiguous(mean), _contiguous(var)
    if training:
        results = launch.forward(
            x, residual, weight, bias, mean, var, counter, momentum, eps, activation, keep_bits, call.plan("forward", x)
        )
        if not call.dense:
            _bring_back(running_mean, mean)
            _bring_back(running_var, var)
        return results
    assert mean is not None
    assert var is not None
    plan = call.plan("inference", x)
    return launch.inference(x, residual, weight, bias, mean, var, eps, activation, keep_bits, keep, plan)


def _contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else _whole(v)


def _bring_back(statistics: Tensor | None, updated: Tensor | None) -> None:
    """Copy updated statistics to the strided tensor they were copied from."""
    if statistics is not None and updated is not None and statistics is not updated:
        private.copy_without_version(statistics, updated)


def backward(
    dy: Tensor,
    saved: Saved,
    training: bool,
    activation: Activation,
    parameter_dtype: torch.dtype,
    wanted: Wanted,
    memory_format: torch.memory_format,
    call: Call | None = None,
) -> Gradients:
    """Gradients of (x, weight, bias, residual); dy and saved tensors of any strides, x was dense in `memory_format`.

    call: the record of the forward.
    """
    dy, saved = dense_saved(dy, saved, parameter_dtype, memory_format, None if call is None else call.saved)
    planned = None if call is None else call.plan("backward", saved.x, launch.costs(activation, saved.bits))
    if wanted[3] and activation == IDENTITY:  # nothing to compute
        only = *wanted[:3], False
        return launch.backward(dy, saved, training, activation, parameter_dtype, only, planned)._replace(residual=dy)
    return launch.backward(dy, saved, training, activation, parameter_dtype, wanted, planned)


def dense_saved(
    dy: Tensor,
    saved: Saved,
    parameter_dtype: torch.dtype,
    memory_format: torch.memory_format,
    recognized: dict[int, Any] | None = None,
) -> tuple[Tensor, Saved]:
    """dy and what was saved as the kernels read them: without gaps, those of the size of x laid out as it was.

    Hooks of saved tensors may have moved, repacked or replaced them; bits follow the layout of x. recognized: by the
    number of tensors, what tells that there is nothing to do. Raises RuntimeError for what is no longer what was saved.
    """
    tensors = [t for t in (dy, *saved) if t is not None]
    if recognized is not None and (guards := recognized.get(len(tensors))) is not None and guards.check(*tensors):
        return dy, saved
    x, weight, bias, residual, bits, mean, rstd = saved
    vector, kind = dy.shape[1:2], launch.arithmetic_dtype(dy)
    for name, t, shape, dtype in (
        ("x", x, dy.shape, dy.dtype), ("weight", weight, vector, parameter_dtype),
        ("bias", bias, vector, parameter_dtype), ("residual", residual, dy.shape, dy.dtype),
        ("bits", bits, None, torch.uint8), ("mean", mean, vector, kind), ("rstd", rstd, vector, kind),
    ):  # fmt: skip
        if t is not None and ((shape or t.shape, dtype, dy.device) != (t.shape, t.dtype, t.device)):
            raise RuntimeError(
                f"what a hook of saved tensors returned for {name} is not what was saved: expected "
                f"{list(shape or t.shape)} of {dtype} on {dy.device}, got {list(t.shape)} of {t.dtype} on {t.device}"
            )
    made = Saved(
        _whole(x, memory_format), _contiguous(weight), _contiguous(bias),
        None if residual is None else _whole(residual, memory_format),
        _contiguous(bits), _whole(mean), _whole(rstd),
    )  # fmt: skip
    dense = _whole(dy, memory_format)
    if recognized is not None and dense is dy and all(a is b for a, b in zip(made, saved, strict=True)):
        recognized[len(tensors)] = private.guards(tensors)
    return dense, made


def _whole(t: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """t without gaps or lazy negation: itself, or a copy."""
    return t.resolve_neg().contiguous(memory_format=memory_format)


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
    statistics = None if training else (saved.mean, saved.rstd)

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
        call: Call,
    ) -> Tensor:
        running_mean, running_var, counter, training, momentum, eps, activation = given
        keep_bits = residual is not None and activation.two_valued
        results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
        if training and call.dense:  # as `forward` would, with a call less
            results = launch.forward(
                x, residual, weight, bias, running_mean, running_var, counter, momentum, eps, activation, keep_bits,
                call.plan("forward", x),
            )  # fmt: skip
        else:
            results = forward(x, weight, bias, residual, given, True, keep_bits, call)
        y, bits, mean, rstd = results
        needs_z = not keep_bits and activation != IDENTITY
        # Those that were given are not needed, but torch refuses a backward after a user changed them in place.
        fixed = (None, None) if training else (running_mean, running_var)
        ctx.save_for_backward(
            x, weight, bias if needs_z else None, residual if needs_z else None, bits, mean, rstd, *fixed
        )
        ctx.constants = training, activation, eps, call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        training, activation, eps, call = ctx.constants
        saved = Saved(*ctx.saved_tensors[:7])
        constants = training, activation, call.parameter_dtype, ctx.needs_input_grad[:4], call.memory_format
        if not torch.is_grad_enabled():
            return *backward(dy, saved, *constants, call), None, None
        gradients = BatchNormBackward.apply(dy, *saved, eps, constants)  # type: ignore[no-untyped-call]
        return *gradients, None, None


_record: Any = private.apply_of(BatchNorm)


class BatchNormBackward(torch.autograd.Function):
    """`Gradients` as functions of dy, x, weight, bias and residual."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, ctx.eps, constants = arguments
        saved = Saved(*tensors)
        ctx.save_for_backward(dy, *saved)
        ctx.constants = constants
        return tuple(backward(dy, saved, *constants))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *tensors = ctx.saved_tensors
        training, activation, dtype, _, memory_format = ctx.constants
        saved = Saved(*tensors)
        slope = None
        if activation.two_valued:
            with torch.no_grad():
                only = False, False, False, True
                ones = torch.ones_like(dy)
                slope = backward(ones, saved, training, activation, dtype, only, memory_format).residual
        needed = ctx.needs_input_grad[:5]
        gradients = second_backward(dy, saved, training, activation, ctx.eps, upstream, needed, slope)
        return *gradients, None, None, None, None, None
