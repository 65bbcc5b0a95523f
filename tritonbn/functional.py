"""Batch normalization as a function: `torch.nn.functional.batch_norm` with an activation and a residual."""

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from tritonbn import autograd, dispatch, launch, operators, private
from tritonbn.activations import IDENTITY, Activation, ActivationLike, resolve
from tritonbn.dispatch import DTYPES, SYMBOLIC, Call, Tensors

__all__ = ["DTYPES", "batch_norm", "check_residual"]

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
    act = IDENTITY if activation is None else resolve(activation)
    return _normalize(input, running_mean, running_var, weight, bias, training, momentum, eps, act, residual, None)


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
    """`batch_norm` that also adds 1 to the counter [] int64 of batches, in the same kernel; counted even if it raises.

    With momentum None the weight of the batch is 1 / counter: the running statistics become the mean over all batches,
    as in torch's module. Without counter it is 0 then.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, counter)
    if not has_torch_function_variadic(*tensors):
        if residual is not None:
            check_residual(input, residual)
        average = momentum is None and counter is not None
        call = _record(tensors, training, 0.0 if momentum is None else momentum, eps)

    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    result: Tensor
    if has_torch_function_variadic(*tensors):
        result = handle_torch_function(
            batch_norm, tensors, *tensors[:5], training=training, momentum=momentum, eps=eps,
            activation=activation, residual=residual, save=save,
        )  # fmt: skip
        return result
    act = IDENTITY if activation is None else resolve(activation)
    if residual is not None or save != "input":
        check_epilogue(input, residual, act, save)
    found = _signature(tensors, training, momentum, eps)
    if not found.fits:
        if training and _on_several_devices(*tensors):  # torch writes the statistics before it refuses
            running_mean, running_var = (s.clone() if isinstance(s, Tensor) else s for s in (running_mean, running_var))
        y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return act.apply(y if residual is None else y + residual)
    given = running_mean, running_var, training, float(momentum), float(eps), act
    compiling = found is SYMBOLIC
    if not compiling and torch._C._len_torch_dispatch_stack() == 0:
        save_output = save == "output" and found.records and recoverable(input, weight, bias, act)
        return autograd.batch_norm(input, weight, bias, residual, given, save_output, found)
    result, new_mean, new_var = operators.apply(input, weight, bias, residual, given)
    for old, new in ((running_mean, new_mean), (running_var, new_var)):
        if training and old is not None:
            if compiling:
                old.copy_(new.detach())  # not differentiable, but AOTAutograd may forget it
            else:
                autograd.copy_without_version(old, new)
    return result


def check_epilogue(input: Tensor | None, residual: Tensor | None, activation: Activation, save: Save) -> None:
    """Raise what `batch_norm` raises for arguments that torch's function does not have."""
    if save not in _SAVES:
        raise ValueError(f"save must be one of {', '.join(_SAVES)}, but got {save!r}")
    if save == "output" and not activation.invertible:
        raise ValueError(
            "save='output' needs an activation that can be inverted (identity, leaky_relu or elu with a positive "
            f"parameter), but got {activation}"
        )
    if residual is None:
        return
    if save == "output":
        raise ValueError("save='output' takes no residual: the input could not be recovered from the output")
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a Tensor or None, but got {type(residual).__name__}")
    if isinstance(input, Tensor) and residual.shape != input.shape:
        raise ValueError(f"residual should have the shape of the input, {input.shape}, but got {residual.shape}")


def _signature(tensors: tuple[Any, ...], training: bool, momentum: float, eps: float) -> Signature:
    """What the kernels would take, if they can do it; what they leave, torch computes or refuses itself."""
    x = tensors[0]
    if not (
        isinstance(x, Tensor)
        and (x.is_cuda or (launch.INTERPRETED and x.is_cpu))
        and type(training) is bool
        and type(momentum) in _NUMBERS
        and type(eps) in _NUMBERS
        and (eps > 0 or (eps == 0 and not training))
    ):
        return NONE
    if torch.compiler.is_compiling():  # an exported program must run where we are not installed
        return SYMBOLIC if not exporting() and _fit(tensors, training) else NONE
    return known(tensors, training, _look) if torch.autograd.forward_ad._current_level < 0 else NONE


def exporting() -> bool:
    """Whether torch.export follows what is called: torch.compiler.is_exporting(), True in all compiled code on 2.11."""
    return torch.compiler._is_exporting_flag


def _look(tensors: tuple[Any, ...], training: bool) -> Signature:
    """The `Signature` of the tensors."""
    x, _, _, weight, bias, residual = tensors
    if not _is_plain([t for t in tensors if t is not None]) or not _fit(tensors, training):
        return NONE
    memory_format = memory_format_of(x)
    return Signature(
        True,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)),
        all(t is None or t.is_contiguous(memory_format=memory_format) for t in (x, residual))
        and all(v is None or v.is_contiguous() for v in tensors[1:5]),
        memory_format,
        parameter_dtype(x, weight, bias),
        {},
        {},
    )


def _is_plain(given: list[Any]) -> bool:
    """Whether nothing must see each operation: no subclass, lazy negation, transform (nor what one left) or trace.

    Nor tensors of inference mode that autograd would have to save: torch refuses those before it writes anything.
    """
    return (
        all(type(t) in (Tensor, Parameter) and not t.is_neg() for t in given)
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, given))
        and not (torch.is_grad_enabled() and any(t.is_inference() for t in given))
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def _fit(tensors: tuple[Any, ...], training: bool) -> bool:
    """Whether shapes, strides, dtypes and devices are those that the kernels take."""
    x, running_mean, running_var, weight, bias, residual = tensors
    numel = x.numel()
    if x.dtype not in DTYPES or x.dim() < 2 or numel == 0 or x.layout is not torch.strided:
        return False
    N, C = x.shape[0], x.shape[1]
    if not fits(N, C, numel // (N * C)):
        return False
    if training:
        if numel == C or (running_mean is None) != (running_var is None):
            return False
    elif running_mean is None or running_var is None:
        return False
    if not _vectors_fit(x, C, running_mean, running_var, weight, bias) or not _residual_fits(x, residual):
        return False
    statistics = [s for s in (running_mean, running_var) if s is not None]
    if torch.is_grad_enabled() and any(s.requires_grad for s in statistics):
        return False
    return C == 1 or all(s.stride(0) != 0 for s in statistics)  # expanded: updates would meet in one place


def _residual_fits(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the residual, whose shape was checked, is of the dtype, device and kind of x."""
    return residual is None or (
        residual.dtype == x.dtype and residual.device == x.device and residual.layout is torch.strided
    )


def _vectors_fit(x: Tensor, C: int, *vectors: Tensor | None) -> bool:
    """Whether weights and statistics are [C] on the device of x, all in its dtype or all in float32 for 16-bit x."""
    given = [v for v in vectors if v is not None]
    allowed = (x.dtype, torch.float32) if x.itemsize == 2 else (x.dtype,)
    return all(
        isinstance(v, Tensor)
        and v.shape == (C,)
        and v.dtype in allowed
        and v.dtype == given[0].dtype
        and v.device == x.device
        for v in given
    )


def _on_several_devices(*tensors: Tensor | None) -> bool:
    return len({t.device for t in tensors if isinstance(t, Tensor)}) > 1


def recoverable(x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: Activation) -> bool:
    """Whether y holds at least half of the digits of normalized x in every channel; waits for the GPU to know.

    Not where weight is 0 or so small that bias, or the smallest numbers of the dtype, hide what it multiplies, nor
    where nearly all of a channel is so far below zero that elu has no slope left.
    """
    if weight is None and bias is None:
        return True
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    info = torch.finfo(x.dtype)
    with torch.no_grad():
        size = x.new_ones(x.shape[1]) if weight is None else weight.abs()
        center = x.new_zeros(x.shape[1]) if bias is None else bias
        # 1 / weight is computed from an approximation in float32.
        hidden = (size < max(info.tiny / info.eps, 1e-30)) | (size > 1e30) | (size < info.eps**0.5 * center.abs())
        if activation.name == "elu":
            hidden |= center + 3 * size < math.log(info.eps) / 2
        return not bool(hidden.any())
