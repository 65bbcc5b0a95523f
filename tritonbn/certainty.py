"""What is known of a batch norm before it is computed: whether it raises, and whether autograd keeps its input."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tritonbn.dispatch import DTYPES
from tritonbn.modules import TritonBatchNorm


def saves(norm: Any, x: Any) -> bool:
    """Whether autograd saves x for this batch norm: else whoever gave x may write to it before the backward."""
    parameters = norm._parameters.values()
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))


def is_certain(norm: TritonBatchNorm | None, x: Tensor | None) -> bool:
    """Whether computing it will raise no error, which would have come before others. Raises for dimensions."""
    assert norm is not None
    assert x is not None
    norm._check_input_dim(x)  # type: ignore[no-untyped-call]
    channels, dtype, device = x.size(1), x.dtype, x.get_device()
    if channels != norm.num_features or x.numel() <= channels or dtype not in DTYPES:
        return False
    buffers, momentum = norm._buffers, norm.momentum
    if (
        not (type(norm.eps) is float and norm.eps > 0)
        or not (momentum is None or type(momentum) is float)
        or (buffers.get("running_mean") is None) != (buffers.get("running_var") is None)
        or any(b is not None and b.requires_grad for b in buffers.values())
    ):
        return False
    vectors = [v for v in (*norm._parameters.values(), *buffers.values()) if v is not None and v.dim()]
    if any(v.dtype is not vectors[0].dtype for v in vectors):
        return False
    if not is_compiling() and torch.is_grad_enabled() and any(t.is_inference() for t in (x, *vectors)):
        return False
    for vector in (*norm._parameters.values(), *norm._buffers.values()):
        if (
            vector is not None
            and vector.dim()
            and not (
                vector.numel() == channels
                and (vector.dtype is dtype or (vector.dtype is torch.float32 and dtype.itemsize == 2))
                and vector.get_device() == device
            )
        ):
            return False
    return True
