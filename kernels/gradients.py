"""The gradient that reaches batch norm, a tile at a time: dz = dy * activation'(z), z what entered the activation.

The derivative is told by the bits that the forward stored, or else z is computed again by the forward's expression.
Where there is no mean, x_ptr is the output y, from which z and (x - mean) * rstd, in the place of x - mean, are
recovered: the activation has an inverse.
"""

import triton
import triton.language as tl

from .activations import gradient, gradient_where, invert
from .statistics import ratio
from .tiles import load_bits, load_channels, load_scale, load_shift, load_tile, normalize, store_tile, tile, widen


@triton.jit
def load_vectors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, live):
    """(center, rstd, scale, shift) [BLOCK_G], as `recover` takes them: center is the mean.

    Without mean, what is recovered is (x - mean) * rstd: center is 1 / weight, and rstd is 1, as it is part of that.
    """
    rstd = load_channels(rstd_ptr, c, live)
    scale = load_scale(weight_ptr, rstd, c, live)
    shift = load_shift(bias_ptr, rstd, c, live)
    if mean_ptr is not None:
        return load_channels(mean_ptr, c, live), rstd, scale, shift
    else:
        one = tl.full(rstd.shape, 1.0, rstd.dtype)
        return ratio(one, load_scale(weight_ptr, one, c, live)), one, scale, shift


@triton.jit
def recover(x, center, scale, shift, ACT: tl.constexpr, INVERT: tl.constexpr):
    """(x - mean, z without residual) of a tile of x; ((x - mean) * rstd, z) of a tile of y where INVERT."""
    if INVERT:
        z = invert(x, ACT)
        return (z - shift) * center, z
    else:
        return normalize(x, center, scale, shift)


@triton.jit
def load_gradient(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, group, t, center, scale, shift, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr, INVERT: tl.constexpr, LAST: tl.constexpr = False,
):  # fmt: skip
    """(dz, x - mean) of tile t in the dtype of the arithmetic, and x as it was read; dz is 0 outside of the tensor.

    Without x_ptr (dz does not need it) x - mean and x are dy, which is not used.
    """
    at, mask = tile(group, t, R, C, width, T)
    dy = load_tile(dy_ptr, at, mask, LAST)
    dz = widen(dy)
    x = dy
    d = dz
    z = dz
    if x_ptr is not None:
        x = load_tile(x_ptr, at, mask, LAST)
        d, z = recover(x, center, scale, shift, ACT, INVERT)
    if bits_ptr is not None:
        dz = gradient_where(dz, load_bits(bits_ptr, group, t, R, C, width, T), ACT)
    elif ACT.name != "identity":
        if residual_ptr is not None:
            z += widen(load_tile(residual_ptr, at, mask, LAST))
        dz = tl.where(mask, gradient(dz, z, ACT), 0.0)
    return dz, d, x


@triton.jit
def store_gradients(dx_ptr, dresidual_ptr, dz, scale, group, t, R, C, width, T: tl.constexpr):
    """Store tile t of dx = scale * dz and of dresidual = dz where they are wanted."""
    at, mask = tile(group, t, R, C, width, T)
    if dx_ptr is not None:
        store_tile(dx_ptr, at, mask, dz * scale)
    if dresidual_ptr is not None:
        store_tile(dresidual_ptr, at, mask, dz)
