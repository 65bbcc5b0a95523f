"""Batch normalization as a function: `torch.nn.functional.batch_norm` with an activation and a residual."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from tritonbn import autograd, launch, operators
from tritonbn.activations import IDENTITY, Activation, ActivationLike, resolve
from tritonbn.plan import fits

Save = Literal["input", "output"]

_SAVES = get_args(Save)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = (float, int)
_TYPES = frozenset((Tensor, Parameter, type(None)))
# Verdicts of `_fit`; all are forgotten when there are too many, of shapes that never repeat.
_verdicts: dict[tuple[Any, ...], bool] = {}
_MOST_VERDICTS = 4096


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
    save: Save = "input",
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
        momentum: weight of the new value in the running statistics.
        eps: added to the variance.
        activation: a name ("relu", "relu6", "leaky_relu(0.01)", "elu(1.0)", "silu", "gelu", "gelu_tanh", "sigmoid",
            "tanh", "hardswish", "hardsigmoid", "mish", "softplus(1.0, 20.0)", "identity"), or the torch module or
            function that computes it. Computed in float32 (float64): nothing is rounded before it.
        residual: of the shape of `input`, added before the activation; copied once unless it is laid out as `input`.
        save: what is kept for the backward. "input": x and vectors of size C; the backward computes what entered the
            activation again. With a residual, one bit per element too if that tells the derivative (relu, relu6,
            leaky_relu, hardsigmoid), no bit for identity, and for all others a reference to the residual, from which
            the backward computes it again. "output": y and vectors of size C only, so that x can be freed
            (Rota Bulo et al. 2018); for identity, leaky_relu and elu with a positive parameter and without residual.
            The backward then recovers x from y: in 16 bits, and for weights much smaller than their bias, with the few
            digits of x that y still holds. Where they are too few (a weight of 0, or far below its bias; a channel
            where elu has no slope left; looking waits for the GPU), under CUDA graph capture and in compiled code, x is
            kept all the same. First derivatives only.

    Returns:
        A new tensor of the shape, dtype and memory format of `input`. Differentiable in input, weight, bias and
        residual, twice too; the statistics of the batch are accumulated in float32 (float64 for float64).

    Raises what `torch.nn.functional.batch_norm` raises, in its words, before anything is written; ValueError for an
    activation that cannot be fused, a residual of another shape, and save="output" where y does not determine x.

    CUDA tensors take the Triton kernels (under TRITON_INTERPRET=1, CPU tensors too). All else is torch's own: other
    devices and dtypes, empty tensors, tensor subclasses, torch.func transforms, forward derivatives, export, tracing.
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
    if not _takes_kernels(input, running_mean, running_var, weight, bias, residual, training, momentum, eps):
        if training and _on_several_devices(*tensors):  # torch writes the statistics before it refuses
            running_mean, running_var = (s.clone() if isinstance(s, Tensor) else s for s in (running_mean, running_var))
        y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return act.apply(y if residual is None else y + residual)
    given = autograd.Forward(running_mean, running_var, training, float(momentum), float(eps), act)
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._len_torch_dispatch_stack() == 0:
        return autograd.batch_norm(input, weight, bias, residual, given, save == "output")
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


def _takes_kernels(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """Whether the kernels can do it, and torch would not refuse; what they leave, torch computes or refuses itself."""
    if not (isinstance(x, Tensor) and (x.is_cuda or (launch.INTERPRETED and x.is_cpu))):
        return False
    if torch.compiler.is_exporting():  # the program must run where we are not installed
        return False
    if type(training) is not bool or type(momentum) not in _NUMBERS or type(eps) not in _NUMBERS:
        return False
    if not (eps > 0 or (eps == 0 and not training)):
        return False
    if torch.compiler.is_compiling():
        fit = _fit(x, running_mean, running_var, weight, bias, residual, training)
    else:
        tensors = x, running_mean, running_var, weight, bias, residual
        fit = _is_plain(*tensors) and _fit_as_before(*tensors, training)
    if not fit or not torch.is_grad_enabled():
        return fit
    return not (
        (running_mean is not None and running_mean.requires_grad)
        or (running_var is not None and running_var.requires_grad)
    )


def _fit_as_before(x: Tensor, *others: Any) -> bool:
    """`_fit`, found out once for tensors of these shapes, strides, dtypes and devices."""
    key: list[Any] = []
    try:
        for t in (x, *others[:-1]):
            if t is None:
                key.append(None)
            else:
                key += t.shape, t.stride(), t.dtype, t.device
    except RuntimeError:  # no strides, or no shape: sparse, nested
        return False
    known = (*key, others[-1])
    fit = _verdicts.get(known)
    if fit is None:
        if len(_verdicts) >= _MOST_VERDICTS:
            _verdicts.clear()
        fit = _verdicts[known] = _fit(x, *others)
    return fit


def _fit(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
) -> bool:
    """Whether shapes, strides, dtypes and devices are those that the kernels take."""
    numel = x.numel()
    if x.dtype not in _DTYPES or x.dim() < 2 or numel == 0 or x.layout is not torch.strided:
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


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing must see each operation: no subclass, lazy negation, transform, forward derivative or trace.

    Nor what a transform left behind, nor tensors of inference mode that autograd would have to save: torch refuses
    those before it writes anything.
    """
    if not _TYPES.issuperset(map(type, tensors)):
        return False
    given = [t for t in tensors if t is not None]
    return not (
        True in map(Tensor.is_neg, given)
        or True in map(torch._C._functorch.is_functorch_wrapped_tensor, given)
        or (torch.is_grad_enabled() and True in map(Tensor.is_inference, given))
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
