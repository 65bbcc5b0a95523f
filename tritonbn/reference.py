"""Batch norm in plain torch operations: differentiable to any order, any floating dtype, any device.

For readers, tests (in float64) and the second derivative; nothing here is tuned.
"""

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias (Ioffe and Szegedy 2015, algorithm 1); x [N, C, ...].

    mean and the biased var are those of the batch in training, else the running ones, which are not updated here.
    """
    if training:
        mean, var = batch_statistics(x)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    y = (x - _per_channel(mean, x)) * _per_channel(torch.rsqrt(var + eps), x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of x [N, C, ...]."""
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims)
    return mean, (x - _per_channel(mean, x)).square().mean(dims)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of `batch_norm` as differentiable functions of dy, x and weight; shapes as x, [C], [C].

    Without mean and rstd [C] the statistics are those of the batch, and functions of x. Computed in float32 at least;
    returned in the dtypes of x, weight and weight.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if dtype != x.dtype:
        w, m, r = (t if t is None else t.to(dtype) for t in (weight, mean, rstd))
        dx, dweight, dbias = gradients(dy.to(dtype), x.to(dtype), w, m, r, eps)
        parameter_dtype = x.dtype if weight is None else weight.dtype
        return dx.to(x.dtype), dweight.to(parameter_dtype), dbias.to(parameter_dtype)
    dims = [d for d in range(x.dim()) if d != 1]
    training = mean is None or rstd is None
    if mean is None or rstd is None:
        mean, var = batch_statistics(x)
        rstd = torch.rsqrt(var + eps)
    normalized = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    dbias = dy.sum(dims)
    dweight = (dy * normalized).sum(dims)
    scale = rstd if weight is None else rstd * weight
    if training:
        n = x.numel() // x.shape[1]
        dy = dy - _per_channel(dbias / n, x) - normalized * _per_channel(dweight / n, x)
    return dy * _per_channel(scale, x), dweight, dbias


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v [C] shaped to broadcast over x [N, C, ...]."""
    return v.reshape(1, -1, *[1] * (x.dim() - 2))
