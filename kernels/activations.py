"""The activations, each in one place: value, derivative and, where there is one, inverse.

ACT is a constant with fields name, a, b (`tritonbn.activations.Activation`). NaN, infinities and derivatives at jumps
are those of torch. Nothing here calls a library that Triton's interpreter or a GPU may lack, and no exponential
overflows: all are of numbers below zero, and all denominators are between 1 and 5.
"""

import triton
import triton.language as tl

from .statistics import ratio


@triton.jit
def expm1(u):
    """exp(u) - 1 for u <= 0; the Taylor series near 0, where the difference would cancel."""
    TERMS: tl.constexpr = 15 if u.dtype == tl.float64 else 8
    p = tl.full(u.shape, 1.0, u.dtype)
    for k in tl.static_range(TERMS, 1, -1):
        p = 1.0 + p * u * (1.0 / k)
    return tl.where(u > -0.35, u * p, tl.exp(u) - 1.0)


@triton.jit
def log1p(v):
    """log(1 + v) for -1 <= v <= 1; what 1 + v rounds off is added again (exactly enough where it matters: near 0)."""
    u = 1.0 + v
    return tl.log(u) + (v - (u - 1.0))


@triton.jit
def sigmoid(z):
    """(sigmoid(z), 1 - sigmoid(z)), both without cancellation."""
    e = tl.exp(-tl.abs(z))
    larger = ratio(tl.full(z.shape, 1.0, z.dtype), 1.0 + e)
    smaller = ratio(e, 1.0 + e)
    return tl.where(z >= 0.0, larger, smaller), tl.where(z >= 0.0, smaller, larger)


@triton.jit
def tanh(z):
    """(tanh(z), its derivative) = ((1 - e) / (1 + e) with the sign of z, 4 * e / (1 + e)^2) for e = exp(-2|z|)."""
    u = -2.0 * tl.abs(z)
    e, m = tl.exp(u), expm1(u)
    r = ratio(tl.full(z.shape, 1.0, z.dtype), 1.0 + e)
    return tl.where(z < 0.0, m * r, -m * r), 4.0 * e * r * r


@triton.jit
def tanh_softplus(z):
    """(n, d, g): tanh(log(1 + exp(z))) = n / d, its derivative g / d^2; in powers of exp(-|z|)."""
    e = tl.exp(-tl.abs(z))
    square = e * e
    n = tl.where(z >= 0.0, 1.0, square) + 2.0 * e
    g = tl.where(z >= 0.0, square, e) * (1.0 + e) * 4.0
    return n, n + tl.where(z >= 0.0, 2.0 * square, 2.0), g


@triton.jit
def gelu_tanh_slope(z):
    """(2u, d(2u)/dz) for u = sqrt(2 / pi) * (z + 0.044715 * z^3): gelu_tanh(z) = z * sigmoid(2u)."""
    square = z * z
    return 1.5957691216057308 * z * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def normal_cdf(z):
    """Probability that a standard normal variable is below z."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """activation(z), elementwise; z fp32 (fp64)."""
    if ACT.name == "identity":
        return z
    elif ACT.name == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # keeps NaN
    elif ACT.name == "relu6":
        return tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif ACT.name == "leaky_relu":
        return tl.where(z > 0.0, z, z * ACT.a)
    elif ACT.name == "elu":
        return tl.where(z > 0.0, z, expm1(z) * ACT.a)
    elif ACT.name == "silu":
        return z * sigmoid(z)[0]
    elif ACT.name == "gelu":
        return z * normal_cdf(z)
    elif ACT.name == "gelu_tanh":
        return z * sigmoid(gelu_tanh_slope(z)[0])[0]
    elif ACT.name == "sigmoid":
        return sigmoid(z)[0]
    elif ACT.name == "tanh":
        return tanh(z)[0]
    elif ACT.name == "hardswish":
        return z * tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 6.0, z + 3.0)) * (1.0 / 6.0)
    elif ACT.name == "hardsigmoid":
        return tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, (z + 3.0) * (1.0 / 6.0)))
    elif ACT.name == "mish":
        n, d, _ = tanh_softplus(z)
        return z * ratio(n, d)
    else:
        tl.static_assert(ACT.name == "softplus")
        u = z * ACT.a
        return tl.where(u > ACT.b, z, (tl.maximum(u, 0.0) + log1p(tl.exp(-tl.abs(u)))) * (1.0 / ACT.a))


@triton.jit
def upper(z, ACT: tl.constexpr):
    """Which of the two values the derivative of relu, relu6, leaky_relu or hardsigmoid has at z: True the larger."""
    if ACT.name == "relu":
        return (z <= 0.0) == 0
    elif ACT.name == "relu6":
        return ((z <= 0.0) | (z >= 6.0)) == 0
    elif ACT.name == "leaky_relu":
        return z > 0.0
    else:
        tl.static_assert(ACT.name == "hardsigmoid")
        return (z > -3.0) & (z < 3.0)


@triton.jit
def gradient_where(dy, up, ACT: tl.constexpr):
    """dy times the derivative whose value `up` tells; 0 whatever dy is where the derivative is 0, as in torch."""
    if ACT.name == "leaky_relu":
        return tl.where(up, dy, dy * ACT.a)
    elif ACT.name == "hardsigmoid":
        return tl.where(up, dy * (1.0 / 6.0), 0.0)
    else:
        return tl.where(up, dy, 0.0)


@triton.jit
def gradient(dy, z, ACT: tl.constexpr):
    """dy * activation'(z), elementwise; dy, z fp32 (fp64)."""
    if ACT.name == "identity":
        return dy
    elif ACT.name == "elu":
        return tl.where(z <= 0.0, dy * tl.exp(z) * ACT.a, dy)
    elif ACT.name == "silu":
        s, rest = sigmoid(z)
        return dy * (s * (1.0 + z * rest))
    elif ACT.name == "gelu":
        return dy * (normal_cdf(z) + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327))
    elif ACT.name == "gelu_tanh":
        u, slope = gelu_tanh_slope(z)
        s, rest = sigmoid(u)
        return dy * (s + z * (s * rest) * slope)
    elif ACT.name == "sigmoid":
        s, rest = sigmoid(z)
        return dy * (s * rest)
    elif ACT.name == "tanh":
        return dy * tanh(z)[1]
    elif ACT.name == "hardswish":
        return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, dy * (z * (1.0 / 3.0) + 0.5), dy))
    elif ACT.name == "mish":
        n, d, g = tanh_softplus(z)
        r = ratio(tl.full(z.shape, 1.0, z.dtype), d)
        return dy * (r * (n + z * (g * r)))
    elif ACT.name == "softplus":
        u = z * ACT.a
        return tl.where(u > ACT.b, dy, dy * sigmoid(u)[0])
    else:
        return gradient_where(dy, upper(z, ACT), ACT)
