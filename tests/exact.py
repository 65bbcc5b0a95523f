"""Batch norm in numpy, in float64 or, for float64 inputs, in longdouble: the truth for every dtype."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from tests.closeness import wide


class Exact(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    running_mean: np.ndarray | None
    running_var: np.ndarray | None


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
) -> Exact:
    """Forward, gradients for upstream dy, and the running statistics afterwards; x [N, C, ...]."""
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
        y = normalized * column(w) + column(b)
        dbias = G.sum(axes)
        dweight = (G * normalized).sum(axes)
        dx = G - (column(dbias) + normalized * column(dweight)) / n if training else G
        return Exact(y, dx * column(w * rstd), dweight, dbias, *after)
