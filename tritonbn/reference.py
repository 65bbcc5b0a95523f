"""Batch norm in plain torch operations: differentiable to any order, any floating dtype, any device.

For readers, tests (in float64) and the second derivative; nothing here is tuned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonbn.activations import IDENTITY, Activation


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    activation: Activation = IDENTITY,
    residual: Tensor | None = None,
) -> Tensor:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual); x, residual [N, C, ...].

    (Ioffe and Szegedy 2015, algorithm 1.)  mean and the biased var are those of the batch in training, else the running
    ones, which are not updated here.
    """
    if training:
        mean, var = batch_statistics(x)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    normalized = (x - _per_channel(mean, x)) * _per_channel(torch.rsqrt(var + eps), x)
    return activation.apply(_before_activation(normalized, weight, bias, residual))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of x [N, C, ...]."""
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims)
    return mean, (x - _per_channel(mean, x)).square().mean(dims)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual) of `batch_norm` as differentiable functions of all tensors; shapes as theirs.

    Without statistics (mean, rstd), each [C], they are those of the batch, and functions of x. Computed in float32 at
    least; returned in the dtypes of x, weight, weight and x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if dtype != x.dtype:
        w, b, r = (t if t is None else t.to(dtype) for t in (weight, bias, residual))
        found = gradients(dy.to(dtype), x.to(dtype), w, b, r, statistics, eps, activation)
        parameter_dtype = x.dtype if weight is None else weight.dtype
        dx, dweight, dbias, dresidual = found
        return dx.to(x.dtype), dweight.to(parameter_dtype), dbias.to(parameter_dtype), dresidual.to(x.dtype)
    dims = [d for d in range(x.dim()) if d != 1]
    if statistics is None:
        mean, var = batch_statistics(x)
        rstd = torch.rsqrt(var + eps)
    else:
        mean, rstd = statistics
    normalized = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    dz = dy
    if activation != IDENTITY:
        z = _before_activation(normalized, weight, bias, residual)
        z = z if z.requires_grad else z.detach().requires_grad_()
        (dz,) = torch.autograd.grad(activation.apply(z), z, dy, create_graph=True)
    dbias = dz.sum(dims)
    dweight = (dz * normalized).sum(dims)
    scale = rstd if weight is None else rstd * weight
    dx = dz
    if statistics is None:
        n = x.numel() // x.shape[1]
        dx = dz - _per_channel(dbias / n, x) - normalized * _per_channel(dweight / n, x)
    return dx * _per_channel(scale, x), dweight, dbias, dz


def pair_gradients(
    dy: Tensor,
    one: Sequence[Tensor | None],
    other: Sequence[Tensor | None],
    statistics: tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None],
    eps: tuple[float, float],
    activation: Activation,
) -> tuple[Tensor, ...]:
    """Gradients of (x, weight, bias) of both batch norms of activation(BN(one) + BN(other)); as `gradients`."""
    dtype = torch.promote_types(dy.dtype, torch.float32)
    (x, w, b), (z, v, a) = ([t if t is None else t.to(dtype) for t in norm] for norm in (one, other))
    assert x is not None
    assert z is not None
    residual = _before_activation(_normalized(z, statistics[1], eps[1]), v, a, None)
    dx, dw, db, dz = gradients(dy.to(dtype), x, w, b, residual, statistics[0], eps[0], activation)
    found = (dx, dw, db), gradients(dz, z, v, a, None, statistics[1], eps[1], IDENTITY)[:3]
    rounded: list[Tensor] = []
    for (_, weight, bias), (gx, gw, gb) in zip((one, other), found, strict=True):
        parameter = next((t.dtype for t in (weight, bias) if t is not None), dy.dtype)
        rounded += [gx.to(dy.dtype), gw.to(parameter), gb.to(parameter)]
    return tuple(rounded)


def _normalized(x: Tensor, statistics: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """(x - mean) * rstd with the statistics (mean, rstd), or those of the batch."""
    if statistics is None:
        mean, var = batch_statistics(x)
        statistics = mean, torch.rsqrt(var + eps)
    mean, rstd = statistics
    return (x - _per_channel(mean, x)) * _per_channel(rstd, x)


def _before_activation(
    normalized: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """normalized * weight + bias + residual, of those that there are; normalized, residual [N, C, ...]."""
    z = normalized
    if weight is not None:
        z = z * _per_channel(weight, z)
    if bias is not None:
        z = z + _per_channel(bias, z)
    return z if residual is None else z + residual


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v [C] shaped to broadcast over x [N, C, ...]."""
    return v.reshape(1, -1, *[1] * (x.dim() - 2))
