"""Batch normalization as a function: the signature, semantics and errors of `torch.nn.functional.batch_norm`."""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from tritonbn import autograd, launch, operators
from tritonbn.plan import fits

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel (Ioffe and Szegedy 2015, algorithm 1).

    Args:
        input: [N, C, ...] of float32, bfloat16, float16 or float64, two dimensions or more. Contiguous, channels_last
            and channels_last_3d tensors are read as they are; other strides are copied once.
        running_mean, running_var: [C], given both or neither; used as mean and var in evaluation, updated in place in
            training: (1 - momentum) * old + momentum * new, with the unbiased variance of the batch.
        weight, bias: [C] or None, in the dtype of `input`, or float32 for 16-bit inputs; statistics likewise.
        training: normalize with the mean and the biased variance of the batch over all dimensions but 1.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance.

    Returns:
        A new tensor of the shape, dtype and memory format of `input`. Differentiable in input, weight and bias, twice
        too; the statistics of the batch are accumulated in float32 (float64 for float64).

    Raises what `torch.nn.functional.batch_norm` raises, in its words, before anything is written.

    CUDA tensors take the Triton kernels (under TRITON_INTERPRET=1, CPU tensors too). All else is torch's own: other
    devices and dtypes, empty tensors, tensor subclasses, torch.func transforms, forward derivatives, export, tracing.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    result: Tensor
    if has_torch_function_variadic(*tensors):
        result = handle_torch_function(batch_norm, tensors, *tensors, training=training, momentum=momentum, eps=eps)
        return result
    if not _takes_kernels(input, running_mean, running_var, weight, bias, training, momentum, eps):
        if training and _on_several_devices(*tensors):  # torch writes the statistics before it refuses
            running_mean, running_var = (s.clone() if isinstance(s, Tensor) else s for s in (running_mean, running_var))
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    momentum, eps = float(momentum), float(eps)
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._len_torch_dispatch_stack() == 0:
        given = autograd.Forward(running_mean, running_var, training, momentum, eps)
        return autograd.batch_norm(input, weight, bias, given)
    result, _, _, new_mean, new_var = operators.batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    for old, new in ((running_mean, new_mean), (running_var, new_var)):
        if training and old is not None:
            if compiling:
                old.copy_(new)
            else:
                autograd.copy_without_version(old, new)
    return result


def _takes_kernels(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """Whether the kernels can do it, and torch would not refuse; what they leave, torch computes or refuses itself."""
    if not (isinstance(x, Tensor) and (x.is_cuda or (launch.INTERPRETED and x.is_cpu))):
        return False
    if torch.compiler.is_exporting():  # the program must run where we are not installed
        return False
    numel = x.numel()
    if x.dtype not in _DTYPES or x.dim() < 2 or numel == 0 or x.layout is not torch.strided:
        return False
    N, C = x.shape[0], x.shape[1]
    if not fits(N, C, numel // (N * C)):
        return False
    if type(training) is not bool or type(momentum) not in (float, int) or type(eps) not in (float, int):
        return False
    if training:
        if numel == C or not eps > 0 or (running_mean is None) != (running_var is None):
            return False
    elif running_mean is None or running_var is None or not eps >= 0:
        return False
    if not _vectors_fit(x, C, running_mean, running_var, weight, bias):
        return False
    statistics = [s for s in (running_mean, running_var) if s is not None]
    if torch.is_grad_enabled() and any(s.requires_grad for s in statistics):
        return False
    if C > 1 and any(s.stride(0) == 0 for s in statistics):  # expanded: updates would meet in one place
        return False
    return torch.compiler.is_compiling() or _is_plain(x, running_mean, running_var, weight, bias)


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
    """Whether nothing must see each operation: no subclass, lazy negation, transform, forward derivative or trace."""
    return (
        all(t is None or (type(t) in (Tensor, Parameter) and not t.is_neg()) for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )
