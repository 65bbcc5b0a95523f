"""Batch normalization as a function: `torch.nn.functional.batch_norm` with an activation and a residual."""

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from tritonbn import autograd, calibrating, dispatch, launch, operators, private
from tritonbn.activations import IDENTITY, Activation, ActivationLike, resolve
from tritonbn.dispatch import DTYPES, SYMBOLIC, Call, Tensors, check_residual

__all__ = ["DTYPES", "batch_norm", "check_residual", "normalize"]

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
    elif not (
        type(training) is bool
        and (type(momentum) is float or (momentum is None and counter is not None))
        and type(eps) is float
        and (eps > 0 or (eps == 0 and not training))
    ):
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
