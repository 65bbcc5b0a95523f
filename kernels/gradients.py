"""The gradient that reaches batch norm, a tile at a time: dz = dy * activation'(z), z what entered the activation.

The derivative is told by the bits that the forward stored, or else z is computed again by the forward's expression.
"""

import triton
import triton.language as tl

from .activations import gradient, gradient_where
from .tiles import (
    load_bits,
    load_channels,
    load_scale,
    load_shift,
    load_tile,
    normalize,
    store_tile,
    tile,
    widen,
    within,
)


@triton.jit
def load_vectors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, live):
    """(mean, rstd, rstd * weight, bias) [BLOCK_G]."""
    rstd = load_channels(rstd_ptr, c, live)
    scale = load_scale(weight_ptr, rstd, c, live)
    return load_channels(mean_ptr, c, live), rstd, scale, load_shift(bias_ptr, rstd, c, live)


@triton.jit
def load_gradient(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, group, t, mean, scale, shift, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr, LAST: tl.constexpr = False,
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
        d, z = normalize(x, mean, scale, shift)
    if bits_ptr is not None:
        dz = gradient_where(dz, load_bits(bits_ptr, group, t, R, C, width, T), ACT)
    elif ACT.name != "identity":
        if residual_ptr is not None:
            z += widen(load_tile(residual_ptr, at, mask, LAST))
        dz = gradient(dz, z, ACT, dy_ptr.dtype.element_ty)
    if T.ALIGN > 1:  # there are values of other planes
        dz = within(dz, mask, group, t, R, width, T)
        d = within(d, mask, group, t, R, width, T)
    return dz, d, x


@triton.jit
def store_gradients(dx_ptr, dresidual_ptr, dz, scale, group, t, R, C, width, T: tl.constexpr):
    """Store tile t of dx = scale * dz and of dresidual = dz where they are wanted."""
    at, mask = tile(group, t, R, C, width, T)
    if dx_ptr is not None:
        store_tile(dx_ptr, at, mask, dz * scale, group, t, R, width, T)
    if dresidual_ptr is not None:
        store_tile(dresidual_ptr, at, mask, dz, group, t, R, width, T)
