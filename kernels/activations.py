"""The activations, each in one place: value, derivative and, where that has two values, which of them.

ACT is a constant with fields name, a, b (`tritonbn.activations.Activation`), OUT the dtype that results are rounded to.
NaN, infinities and derivatives at jumps are those of torch. Nothing here calls a library that Triton's interpreter or a
GPU may lack.

Results of 16 bits are computed by functions named `..._short`, to what their rounding leaves of them, so that memory
stays the limit: one exponential and at most one reciprocal for an element. Exponentials may overflow there, as
1 / (1 + inf) is the 0 that it stands for. `tests/test_activations.py` compares the results for all inputs.
1.4426950408889634 is log2(e); as a global constant it would make Triton's cache depend on what was compiled before.
In 32 and 64 bits all digits count; exponentials are of numbers below zero there, and denominators between 1 and 5.
"""

import triton
import triton.language as tl

from .statistics import ratio
from .tiles import compiles_for_cuda


@triton.jit
def reciprocal(v):
    """1 / v to an ulp, fp32, for v of 0.5 to inf; 0 where it is below 2^-126.

    One instruction on CUDA, where a division takes six to scale its operands first.
    """
    if compiles_for_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / v


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
    square = tl.minimum(z * z, 1e30)  # infinite, it would make 0 * inf of derivatives
    return 1.5957691216057308 * z * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def normal_tail(a):
    """exp(a^2 / 2) times the probability that a standard normal variable is beyond a >= 0, fp32.

    A polynomial in t = 1 / (1 + 0.35 * a), as in Abramowitz and Stegun 26.2.17; coefficients by least squares on
    0 <= a <= 15, reweighted until the largest relative error was least: 3e-8, 3e-7 in fp32 arithmetic.
    """
    t = reciprocal(1.0 + 0.35 * a)
    p = 0.144065108 - 0.0291649263 * t
    p = -0.0232682104 + t * (0.1594005 + t * (-0.25590962 + t * p))
    return t * (0.139621257 + t * (0.139864366 + t * (0.1198152 + t * (0.105576308 + t * p))))


@triton.jit
def normal(z):
    """(Phi(z), phi(z)): probability that a standard normal variable is below z, and its density."""
    if z.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)), tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:  # erf is twice as long: it selects coefficients, so all of them must be in registers
        e = tl.exp2(z * z * (-0.5 * 1.4426950408889634))
        tail = e * normal_tail(tl.abs(z))
        return tl.where(z < 0.0, tail, 1.0 - tail), e * 0.3989422804014327


@triton.jit
def sigmoid_short(u):
    """1 / (1 + 2^u), that is sigmoid(z) for u = -z * log2(e); 0 where it is below 2^-126."""
    return reciprocal(1.0 + tl.exp2(u))


@triton.jit
def gelu_short(z):
    """z * sigmoid(z * P(z^2)); P fits logit(Phi(z)) / z.

    P by a linear program: least largest error of gelu on |z| <= 5.5, relative where |gelu| > 0.01; the last coefficient
    at least so large that z * P(z^2) rises everywhere. Error 1e-4, relative 6e-4; at z = -4 relative 2 %, at -6 14 %.
    """
    w = z * z
    return z * sigmoid_short(z * (-2.2991659 - w * (0.10831959 - w * (1.27191e-3 - w * 8.6562e-6))))


@triton.jit
def gelu_slope_short(z, ACT: tl.constexpr, OUT: tl.constexpr):
    """The derivative of gelu or gelu_tanh: s + z * v * Q(v) for s = sigmoid(z * P(z^2)) and v = s * (1 - s).

    P and Q by reweighted least squares: least largest error on |z| <= 6, relative where the derivative is above 0.1, in
    fp16 above 0.005 and 0.02. It is 1.6e-4 of gelu and 3.2e-5 of gelu_tanh, in fp16 1.6e-5 and 8e-6.
    """
    w = z * z
    if ACT.name == "gelu" and OUT.is_bf16():
        s = sigmoid_short(z * (-2.03885 - w * 0.08828292))
        v = s - s * s
        q = 1.778972
    elif ACT.name == "gelu":
        s = sigmoid_short(z * (-1.89225 - w * (0.108313 - w * (1.1882e-3 - w * 7.67401e-6))))
        v = s - s * s
        q = 1.62073 + v * (0.761506 + v * 1.09585)
    elif OUT.is_bf16():
        s = sigmoid_short(z * (-2.041274 - w * (0.08208515 + w * 8.037383e-4)))
        v = s - s * s
        q = 1.776164
    else:
        s = sigmoid_short(z * (-1.79262 - w * 0.103705))
        v = s - s * s
        q = 1.45437 + v * (1.74718 + v * (0.263371 + v * 2.65724))
    return s + z * v * q


@triton.jit
def mish_short(z):
    """(n, p, r): tanh(log(1 + exp(z))) = n * r and its derivative p * r^2, in powers of exp(z).

    Larger z count as 43: nothing overflows there, n * r is 1 and r^2 underflows to 0, so infinity gives torch's NaN.
    """
    e = tl.exp2(tl.minimum(z, 43.0) * 1.4426950408889634)
    n = e * (0.5 * e + 1.0)
    return n, e * e + e, reciprocal(n + 1.0)


@triton.jit
def log1p_short(e):
    """log(1 + e) for 0 <= e <= 1; coefficients by a linear program: least largest relative error, 5.7e-5."""
    return e * (0.99994327 - e * (0.49697772 - e * (0.30630036 - e * (0.15742621 - e * 0.04134679))))


@triton.jit
def activate_short(z, ACT: tl.constexpr):
    """activation(z) for results of 16 bits; only the activations with exponentials."""
    if ACT.name == "elu":
        n = tl.minimum(z, 0.0)
        near = n * (n * (0.5 * ACT.a) + (ACT.a - 1.0)) + z  # Taylor's series: the difference below would cancel
        return tl.where(z < -0.02, tl.exp2(n * 1.4426950408889634) * ACT.a - ACT.a, near)
    elif ACT.name == "silu":
        return z * sigmoid_short(z * -1.4426950408889634)
    elif ACT.name == "gelu":
        return gelu_short(z)
    elif ACT.name == "gelu_tanh":
        return z * sigmoid_short(z * (-2.302208198 - z * z * 0.1029432397))
    elif ACT.name == "sigmoid":
        return sigmoid_short(z * -1.4426950408889634)
    elif ACT.name == "tanh":
        return tl.where(tl.abs(z) < 0.02, z, 2.0 * sigmoid_short(z * (-2.0 * 1.4426950408889634)) - 1.0)
    elif ACT.name == "mish":
        n, _, r = mish_short(z)
        return z * (n * r)
    else:
        tl.static_assert(ACT.name == "softplus")
        u = z * ACT.a
        e = tl.exp2(tl.abs(u) * -1.4426950408889634)
        y = (log1p_short(e) + tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)) * (1.0 / ACT.a)
        if ACT.b >= 10.0:  # beyond it z and y are the same number: log(1 + exp(-10)) < 5e-5
            return y
        else:
            return tl.where(u > ACT.b, z, y)


@triton.jit
def gradient_short(dy, z, ACT: tl.constexpr, OUT: tl.constexpr):
    """dy * activation'(z) for results of 16 bits; only the activations with exponentials."""
    if ACT.name == "elu":
        e = tl.exp2(tl.minimum(z, 0.0) * 1.4426950408889634)
        return dy * e if ACT.a == 1.0 else dy * tl.where(z <= 0.0, e * ACT.a, 1.0)
    elif ACT.name == "silu":
        s = sigmoid_short(z * -1.4426950408889634)
        return dy * (s + z * (s - s * s))
    elif ACT.name == "gelu" or ACT.name == "gelu_tanh":
        return dy * gelu_slope_short(z, ACT, OUT)
    elif ACT.name == "sigmoid":
        s = sigmoid_short(z * -1.4426950408889634)
        return dy * (s - s * s)
    elif ACT.name == "tanh":
        s = reciprocal(0.5 + tl.exp2(z * (-2.0 * 1.4426950408889634) - 1.0))  # 1 + tanh(z)
        return dy * (s * (2.0 - s))
    elif ACT.name == "mish":
        n, p, r = mish_short(z)
        return dy * (n * r + z * (p * (r * r)))
    else:
        tl.static_assert(ACT.name == "softplus")
        u = z * ACT.a
        g = dy * sigmoid_short(u * -1.4426950408889634)
        return g if ACT.b >= 10.0 else tl.where(u > ACT.b, dy, g)


@triton.jit
def activate(z, ACT: tl.constexpr, OUT: tl.constexpr):
    """activation(z), elementwise, to be rounded to OUT; z fp32 (fp64)."""
    if ACT.name == "identity":
        return z
    elif ACT.costly and OUT.primitive_bitwidth == 16 and z.dtype == tl.float32:
        return activate_short(z, ACT)
    elif ACT.name == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT.name == "relu6":
        return tl.clamp(z, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT.name == "leaky_relu":
        return tl.where(z > 0.0, z, z * ACT.a)
    elif ACT.name == "elu":
        return tl.where(z > 0.0, z, expm1(z) * ACT.a)
    elif ACT.name == "silu":
        return z * sigmoid(z)[0]
    elif ACT.name == "gelu":
        return z * normal(z)[0]
    elif ACT.name == "gelu_tanh":
        return z * sigmoid(gelu_tanh_slope(z)[0])[0]
    elif ACT.name == "sigmoid":
        return sigmoid(z)[0]
    elif ACT.name == "tanh":
        return tanh(z)[0]
    elif ACT.name == "hardswish":
        return z * (tl.clamp(z + 3.0, 0.0, 6.0) * (1.0 / 6.0))
    elif ACT.name == "hardsigmoid":
        return tl.clamp((z + 3.0) * (1.0 / 6.0), 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
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
def gradient(dy, z, ACT: tl.constexpr, OUT: tl.constexpr):
    """dy * activation'(z), elementwise, to be rounded to OUT; dy, z fp32 (fp64). dy = 0 gives 0 where z is finite."""
    if ACT.name == "identity":
        return dy
    elif ACT.costly and OUT.primitive_bitwidth == 16 and z.dtype == tl.float32:
        return gradient_short(dy, z, ACT, OUT)
    elif ACT.name == "elu":
        return tl.where(z <= 0.0, dy * tl.exp(z) * ACT.a, dy)
    elif ACT.name == "silu":
        s, rest = sigmoid(z)
        return dy * (s * (1.0 + z * rest))
    elif ACT.name == "gelu":
        cdf, density = normal(z)
        return dy * (cdf + z * density)
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
