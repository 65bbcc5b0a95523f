"""Batch normalization as a function: `torch.nn.functional.batch_norm` with an activation and a residual."""

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from tritonbn import autograd, calibrating, dispatch, launch, operators, pair, private
from tritonbn.activations import IDENTITY, Activation, ActivationLike, resolve
from tritonbn.dispatch import DTYPES, SYMBOLIC, Call, Tensors, check_residual
from tritonbn.pair_launch import Norm

__all__ = ["DTYPES", "batch_norm", "batch_norm_add", "check_residual", "normalize", "normalize_add"]

# Reasons for which nobody needs to be told that torch computes.
_ON_A_GPU = "the kernels are for CUDA tensors"
_QUIET = (_ON_A_GPU, dispatch.REFUSED, dispatch.EMPTY)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and var per channel.

    Ioffe and Szegedy 2015, algorithm 1; without activation and residual it is `torch.nn.functional.batch_norm`.

    Args:
        input: [N, C, ...] of float32, bfloat16, float16 or float64, two dimensions or more. Contiguous, channels_last
            and channels_last_3d tensors are read as they are; other strides are copied once.
        running_mean, running_var: [C], given both or neither; used as mean and var in evaluation, updated in place in
            training: (1 - momentum) * old + momentum * new, with the unbiased variance of the batch.
        weight, bias: [C] or None, in the dtype of `input`, or float32 for 16-bit inputs; statistics likewise.
        training: normalize with the mean and the biased variance of the batch over all dimensions but 1.
        momentum: weight of the new value in the running statistics. Like eps a real number, numpy's too, or a 0-d
            tensor, which is read by the host.
        eps: added to the variance.
        activation: a name ("relu", "relu6", "leaky_relu(0.01)", "elu(1.0)", "silu", "gelu", "gelu_tanh", "sigmoid",
            "tanh", "hardswish", "hardsigmoid", "mish", "softplus(1.0, 20.0)", "identity"), or the torch module or
            function that computes it. Computed in float32 (float64): nothing is rounded before it.
        residual: of the shape, dtype and device of `input`, added before the activation; copied once unless it is laid
            out as `input`.

    Returns:
        A new tensor of the shape, dtype and memory format of `input`. Differentiable in input, weight, bias and
        residual, twice too; the statistics of the batch are accumulated in float32 (float64 for float64). The backward
        keeps the input and vectors of size C, and computes what entered the activation again. With a residual it keeps
        one bit per element too if that tells the derivative (relu, relu6, leaky_relu, hardsigmoid), no bit for
        identity, and for all others a reference to the residual, from which it computes that again.

    Raises what `torch.nn.functional.batch_norm` raises, in its words, before anything is written; ValueError for an
    activation that cannot be fused and a residual of another shape, dtype or device.

    CUDA tensors take the Triton kernels (under TRITON_INTERPRET=1, CPU tensors too). All else is torch's own: other
    devices and dtypes, empty tensors, tensor subclasses, torch.func transforms, forward derivatives, export, tracing.
    Where that is unexpected, as with a CUDA tensor, one warning says why.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, None)
    if has_torch_function_variadic(*tensors):
        result: Tensor = handle_torch_function(
            batch_norm, tensors, *tensors[:5], training=training, momentum=momentum, eps=eps,
            activation=activation, residual=residual,
        )  # fmt: skip
        return result
    return _compute(tensors, training, momentum, eps, IDENTITY if activation is None else resolve(activation))


def batch_norm_add(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    other: Tensor,
    other_running_mean: Tensor | None,
    other_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    other_weight: Tensor | None = None,
    other_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    other_momentum: float | None = None,
    other_eps: float | None = None,
    activation: ActivationLike | None = None,
) -> Tensor:
    """y = activation(BN(input) + BN(other)), the batch norms of two tensors in one pass: a ResNet's downsampling block.

    BN(x) = (x - mean) / sqrt(var + eps) * weight + bias, mean and var per channel; as `batch_norm` of `other`, without
    activation, given to `batch_norm` of `input` as its residual, whose tensor is neither written nor read.

    Args:
        input, other: [N, C, ...] of one shape, dtype and device, as `batch_norm` takes them.
        running_mean, running_var, weight, bias, and the same of the other: as `batch_norm` takes them, each batch norm
            with or without.
        training: normalize both with the statistics of the batch.
        momentum, eps: of the batch norm of input, and, unless they are given, of the other's.
        activation: as `batch_norm` takes it.

    Returns:
        A new tensor of the shape, dtype and memory format of `input`. Differentiable in both tensors, weights and
        biases, twice too. The backward keeps both tensors and vectors of size C, and one bit per element if that tells
        the derivative of the activation; else it computes what entered that again. With s bytes per element, forward 5s
        (2s less than two operations) and 1/8 for the bits, backward 8s (3s less) and 2/8; 3s + 1/8 and 5s + 1/8 where
        one tile of each tensor is a program's share.

    Raises what `batch_norm` raises of either batch norm before anything is written of any; ValueError for an activation
    that cannot be fused and an `other` of another shape, dtype or device.

    Two operations compute it in compiled code and under dispatch modes, for tensors of two memory formats, for batch
    norms that share their statistics, where they move less (one tile of each tensor would be a program's share, but not
    of all tensors together), and wherever torch computes `batch_norm`.
    """
    one = input, running_mean, running_var, weight, bias, None, None
    two = other, other_running_mean, other_running_var, other_weight, other_bias, None, None
    if has_torch_function_variadic(*one, *two):
        result: Tensor = handle_torch_function(
            batch_norm_add, (*one, *two), *one[:3], *two[:3], *one[3:5], *two[3:5], training=training,
            momentum=momentum, eps=eps, other_momentum=other_momentum, other_eps=other_eps, activation=activation,
        )  # fmt: skip
        return result
    return _add(
        one, two, training, (momentum, momentum if other_momentum is None else other_momentum),
        (eps, eps if other_eps is None else other_eps), IDENTITY if activation is None else resolve(activation),
    )  # fmt: skip


def normalize_add(
    one: Tensors,
    other: Tensors,
    training: bool,
    momenta: tuple[float | None, float | None],
    epses: tuple[float, float],
    activation: Activation,
) -> Tensor:
    """`batch_norm_add` that also counts batches and takes momentum None, as `normalize` does.

    one, other: (input, running_mean, running_var, weight, bias, None, counter).
    """
    first, second = (
        0.0 if momentum is None and tensors[6] is None else momentum
        for momentum, tensors in zip(momenta, (one, other), strict=True)
    )
    if has_torch_function_variadic(*one, *other):
        given = *one, *other, training, first, second, *epses, activation
        result: Tensor = handle_torch_function(normalize_two, (*one, *other), *given)
        return result
    return _add(one, other, training, (first, second), epses, activation)


def normalize_two(*given: Any) -> Tensor:
    """`normalize_add` with its arguments one after the other, as who overrides torch's functions looks at them."""
    return normalize_add(given[:7], given[7:14], given[14], given[15:17], given[17:19], given[19])


def normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: Activation,
    residual: Tensor | None,
    counter: Tensor | None,
) -> Tensor:
    """`batch_norm` that also adds 1 to the counter [] int64 of batches, in the same kernel, also if torch raises.

    With momentum None the weight of the batch is 1 / counter: the running statistics become the mean over all batches,
    as in torch's module. Without counter it is 0 then.
    """
    if momentum is None and counter is None:
        momentum = 0.0
    tensors = (input, running_mean, running_var, weight, bias, residual, counter)
    if has_torch_function_variadic(*tensors):
        given = (*tensors[:5], training, momentum, eps, activation, residual, counter)
        result: Tensor = handle_torch_function(normalize, tensors, *given)
        return result
    return _compute(tensors, training, momentum, eps, activation)


def _compute(tensors: Tensors, training: bool, momentum: Any, eps: Any, activation: Activation) -> Tensor:
    """`normalize` of tensors without __torch_function__."""
    if type(eps) is not float:
        eps = _real(eps)
    if type(momentum) is not float:
        momentum = _real(momentum)
    input, running_mean, running_var, weight, bias, residual, counter = tensors
    if residual is not None:
        check_residual(input, residual)
    if not (isinstance(input, Tensor) and (input.is_cuda or (launch.INTERPRETED and input.is_cpu))):
        call = _ELSEWHERE
    elif not _fit(training, tensors, momentum, eps):
        call = _REFUSED
    elif torch.compiler.is_compiling():
        call = _of_symbols(tensors, training)
    elif private.forward_derivatives():
        call = _FORWARD
    else:
        call = dispatch.recognize(tensors, training)
    if call.reason:
        return _by_torch(tensors, training, momentum, eps, activation, call.reason)
    statistics = running_mean, running_var, counter, training, momentum, eps, activation
    if call is SYMBOLIC or private.dispatch_modes():
        return operators.apply(input, weight, bias, residual, statistics)
    if training and input.device not in calibrating.settled:
        calibrating.on_first_call(input.device)
    return autograd.batch_norm(input, weight, bias, residual, statistics, call)


def _add(
    one: Tensors, other: Tensors, training: bool, momenta: tuple[Any, Any], epses: tuple[Any, Any], act: Activation
) -> Tensor:
    """`normalize_add` of tensors without __torch_function__."""
    check_residual(one[0], other[0], "other")
    momenta, epses = (_real(momenta[0]), _real(momenta[1])), (_real(epses[0]), _real(epses[1]))
    x, shared, together = one[0], _share(one, other), None
    if (
        isinstance(x, Tensor)
        and (x.is_cuda or (launch.INTERPRETED and x.is_cpu))
        and not shared
        and all(_fit(training, *given) for given in zip((one, other), momenta, epses, strict=True))
        and not (torch.compiler.is_compiling() or private.forward_derivatives() or private.dispatch_modes())
    ):
        calls = dispatch.recognize(one, training), dispatch.recognize(other, training)
        if calls[0].records == calls[1].records:  # else one is saved that torch does not save: it may be written to
            together = pair.recognize(*calls)
    if together is None or not together.pays(x, training):
        return _apart(one, other, training, momenta, epses, act, shared)
    if training and x.device not in calibrating.settled:
        calibrating.on_first_call(x.device)
    first, second = (
        Norm(t[0], t[3], t[4], t[1], t[2], t[6], momentum, eps)
        for t, momentum, eps in zip((one, other), momenta, epses, strict=True)
    )
    return pair.add(first, second, training, act, together)


def _apart(
    one: Tensors,
    other: Tensors,
    training: bool,
    momenta: tuple[Any, Any],
    epses: tuple[Any, Any],
    act: Activation,
    shared: bool,
) -> Tensor:
    """`_add` as two operations; the later one is tried first where it might raise: nothing is written before."""
    calls = [(one, momenta[0], epses[0]), (other, momenta[1], epses[1])]
    if not shared:  # the result is laid out as the input
        calls.reverse()
    first, (last, momentum, eps) = calls
    certain = _fit(training, *calls[1]) and isinstance(last[0], Tensor)
    certain = certain and all(t is None or isinstance(t, Tensor) for t in last)
    if not torch.compiler.is_compiling() and not (certain and not dispatch.why_torch(last, training)):
        mean, var = (s.clone() if isinstance(s, Tensor) else s for s in last[1:3])
        weight = 0.0 if momentum is None and last[6] is not None else momentum
        torch.nn.functional.batch_norm(last[0], mean, var, last[3], last[4], training, weight, eps)
    residual = _compute(first[0], training, first[1], first[2], IDENTITY)
    return _compute((*last[:5], residual, last[6]), training, momentum, eps, act)


def _fit(training: Any, tensors: Tensors, momentum: Any, eps: Any) -> bool:
    """Whether the kernels take these numbers."""
    return (
        type(training) is bool
        and (type(momentum) is float or (momentum is None and tensors[6] is not None))
        and type(eps) is float
        and (eps > 0 or (eps == 0 and not training))
    )


def _share(one: Tensors, other: Tensors) -> bool:
    """Whether both have statistics, or a counter, in one place: one tensor, or views that overlap."""
    mine, theirs = ([t for t in (*tensors[1:3], tensors[6]) if isinstance(t, Tensor)] for tensors in (one, other))
    if any(a is b for a in mine for b in theirs):
        return True
    if torch.compiler.is_compiling() or private.transforms_active() or private.dispatch_modes():
        return False  # there are no addresses
    try:
        spans = [[_span(t) for t in tensors] for tensors in (mine, theirs)]
    except (NotImplementedError, RuntimeError):
        return False
    return any(start < stop and first < end for start, end in spans[0] for first, stop in spans[1])


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses from its first to behind its last element; none on "meta"."""
    start = t.data_ptr()
    elements = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return start, start + elements * t.element_size() * (start != 0)


def _of_symbols(tensors: Tensors, training: bool) -> Call:
    """The record of a call in compiled code. What is exported must run where we are not installed."""
    if (
        private.is_exporting()
        or private.below_autograd is None
        or private.transforms_active()
        or private.forward_derivatives()
        or dispatch.misfit(tensors, training)
    ):
        return _COMPILED
    return SYMBOLIC


def _real(value: Any) -> Any:
    """The number that torch's parser of arguments reads off it; what it refuses is returned as it is."""
    if isinstance(value, float | int):
        return float(value)
    if isinstance(value, Tensor):
        is_number = value.dim() == 0 and not value.requires_grad and not value.is_complex()
        return float(value) if is_number else value
    return float(value) if isinstance(value, numbers.Real) and hasattr(value, "dtype") else value  # numpy's


_ELSEWHERE = dispatch.torchs(_ON_A_GPU)
_REFUSED = dispatch.torchs(dispatch.REFUSED)
_COMPILED = dispatch.torchs("a transform or export sees each operation, or the kernels do not take it")
_FORWARD = dispatch.torchs("it is differentiated in forward mode")


def _by_torch(tensors: Tensors, training: bool, momentum: Any, eps: Any, activation: Activation, reason: str) -> Tensor:
    """What torch's own functions compute, with a remark where that is unexpected."""
    input, running_mean, running_var, weight, bias, residual, counter = tensors
    momentum = _count(counter, momentum)
    if training and _on_several_devices(*tensors[:5]):  # torch writes the statistics before it refuses
        running_mean, running_var = (s.clone() if isinstance(s, Tensor) else s for s in (running_mean, running_var))
    y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = activation.apply(y if residual is None else y + residual)
    if reason not in _QUIET and not torch.compiler.is_compiling():
        private.tell(f"torch computes batch norm: {reason}")
    return y


def _count(counter: Tensor | None, momentum: Any) -> Any:
    """Count a batch as torch's module does; the weight of this batch in the running statistics."""
    if counter is not None:
        counter.add_(1)
        if momentum is None:
            return 1.0 / float(counter)
    return momentum


def _on_several_devices(*tensors: Tensor | None) -> bool:
    return len({t.device for t in tensors if isinstance(t, Tensor)}) > 1
