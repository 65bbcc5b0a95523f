"""Batch norm in numpy, in float64 or, for float64 inputs, in longdouble: the truth for every dtype."""

from math import pi
from typing import NamedTuple

import mpmath  # type: ignore[import-untyped]  # torch brings it
import numpy as np
from torch import Tensor

from tests.closeness import wide
from tritonbn.activations import IDENTITY, Activation


class Exact(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    running_mean: np.ndarray | None
    running_var: np.ndarray | None
    dresidual: np.ndarray
    z: np.ndarray  # what enters the activation


def batch_norm(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation = IDENTITY,
    residual: Tensor | None = None,
) -> Exact:
    """Forward, gradients for upstream dy, and the running statistics afterwards; x, residual [N, C, ...]."""
    X, G = wide(x), wide(dy)
    axes = tuple(a for a in range(X.ndim) if a != 1)
    n = X.size // X.shape[1]

    def column(v: np.ndarray) -> np.ndarray:
        return v.reshape(1, -1, *[1] * (X.ndim - 2))

    rm, rv = (None if s is None else wide(s) for s in (running_mean, running_var))
    with np.errstate(invalid="ignore", over="ignore"):
        if training:
            mean = X.mean(axes)
            var = ((X - column(mean)) ** 2).mean(axes)
            after = (
                None if rm is None else (1 - momentum) * rm + momentum * mean,
                None if rv is None else (1 - momentum) * rv + momentum * var * n / (n - 1),
            )
        else:
            assert rm is not None
            assert rv is not None
            mean, var = rm, rv
            after = rm, rv
        rstd = 1 / np.sqrt(var + eps)
        w = np.ones_like(mean) if weight is None else wide(weight)
        b = np.zeros_like(mean) if bias is None else wide(bias)
        normalized = (X - column(mean)) * column(rstd)
        z = normalized * column(w) + column(b)
        if residual is not None:
            z = z + wide(residual)
        y, slope = activate(z, activation)
        dz = G * slope
        dbias = dz.sum(axes)
        dweight = (dz * normalized).sum(axes)
        dx = dz - (column(dbias) + normalized * column(dweight)) / n if training else dz
        return Exact(y, dx * column(w * rstd), dweight, dbias, *after, dz, z)


def jumps(activation: Activation) -> list[float]:
    """Where the derivative jumps."""
    if activation.name == "softplus":
        return [activation.b / activation.a]
    if activation.name == "elu":
        return [0.0] if activation.a != 1 else []
    return {"relu": [0.0], "relu6": [0.0, 6.0], "leaky_relu": [0.0], "hardswish": [-3.0, 3.0],
            "hardsigmoid": [-3.0, 3.0]}.get(activation.name, [])  # fmt: skip


def activate(z: np.ndarray, activation: Activation) -> tuple[np.ndarray, np.ndarray]:
    """(activation(z), its derivative), by the textbook's formulas."""
    name, a, b = activation
    one = np.ones_like(z)
    sigmoid = 1 / (1 + np.exp(-z))
    if name == "identity":
        return z, one
    if name == "relu":
        return np.maximum(z, 0), one * (z > 0)
    if name == "relu6":
        return np.clip(z, 0, 6), one * ((z > 0) & (z < 6))
    if name == "leaky_relu":
        return np.where(z > 0, z, a * z), np.where(z > 0, 1, a * one)
    if name == "elu":
        return np.where(z > 0, z, a * np.expm1(z)), np.where(z > 0, 1, a * np.exp(z))
    if name == "silu":
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    if name == "gelu":
        cdf = np.frompyfunc(lambda v: np.longdouble(mpmath.nstr(mpmath.ncdf(mpmath.mpf(str(v))), 25)), 1, 1)(z)
        cdf = cdf.astype(z.dtype)
        return z * cdf, cdf + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi * one)
    if name == "gelu_tanh":
        slope = np.sqrt(2 / (pi * one))
        t = np.tanh(slope * (z + 0.044715 * z**3))
        return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) / 2 * slope * (1 + 3 * 0.044715 * z * z)
    if name == "sigmoid":
        return sigmoid, sigmoid * (1 - sigmoid)
    if name == "tanh":
        return np.tanh(z), 1 - np.tanh(z) ** 2
    if name == "hardswish":
        inside = (z > -3) & (z < 3)
        return z * np.clip(z + 3, 0, 6) / 6, np.where(inside, z / 3 + one / 2, one * (z >= 3))
    if name == "hardsigmoid":
        return np.clip(z + 3, 0, 6) / 6, one * ((z > -3) & (z < 3)) / 6
    if name == "mish":
        t = np.tanh(np.log1p(np.exp(z)))
        return z * t, t + z * (1 - t * t) * sigmoid
    assert name == "softplus"
    linear = z * a > b
    return np.where(linear, z, np.log1p(np.exp(a * z)) / a), np.where(linear, 1, 1 / (1 + np.exp(-a * z)))
