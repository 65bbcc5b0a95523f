"""The forward pass: y = activation((x - mean) * rstd * weight + bias + residual), statistics of the batch or given.

Where bits are wanted, they tell the derivative of the activation at each element: see `activations.upper`.
"""

import triton
import triton.language as tl

from .activations import activate, upper
from .statistics import count_batch, program_statistics, reciprocal_std, store_statistics
from .tiles import (
    channels,
    filled,
    load_channels,
    load_scale,
    load_shift,
    load_tile,
    normalize,
    spread,
    store_bits,
    store_tile,
    tile,
    tile_count,
    widen,
)


@triton.jit
def finish(z, residual_ptr, y_ptr, bits_ptr, group, t, R, C, width, T: tl.constexpr, ACT: tl.constexpr):
    """Store tile t of y = activation(z + residual), and its bits."""
    at, mask = tile(group, t, R, C, width, T)
    if residual_ptr is not None:
        z += widen(load_tile(residual_ptr, at, mask))
    if bits_ptr is not None:
        store_bits(bits_ptr, upper(z, ACT), group, t, R, C, width, T)
    store_tile(y_ptr, at, mask, activate(z, ACT, y_ptr.dtype.element_ty), group, t, R, width, T)


@triton.jit
def normalize_tiles(
    x_ptr, residual_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, shift, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Tiles t1 - 1 down to t0: those that the statistics read last may still be in L2."""
    mean, scale, shift = spread(mean, T), spread(scale, T), spread(shift, T)
    for i in tl.range(0, t1 - t0):
        at, mask = tile(group, t1 - 1 - i, R, C, width, T)
        _, z = normalize(load_tile(x_ptr, at, mask, True), mean, scale, shift)
        finish(z, residual_ptr, y_ptr, bits_ptr, group, t1 - 1 - i, R, C, width, T, ACT)


@triton.jit
def normalize_again(
    first, x_ptr, residual_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, shift, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Tiles t1 - 1 down to t0 after their statistics; tile t0 is `first` if the program KEPT it."""
    if not T.ONCE:
        FIRST: tl.constexpr = 1 if KEPT else 0
        normalize_tiles(
            x_ptr, residual_ptr, y_ptr, bits_ptr, group, t0 + FIRST, t1, mean, scale, shift, R, C, width, T, ACT
        )
    if KEPT:
        _, z = normalize(first, spread(mean, T), spread(scale, T), spread(shift, T))
        finish(z, residual_ptr, y_ptr, bits_ptr, group, t0, R, C, width, T, ACT)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def normalize_kernel(
    x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    y_ptr, bits_ptr,
    R, C, width, tiles,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """y = activation((x - mean[c]) * rstd[c] * weight[c] + bias[c] + residual); the last tiles come first.

    Program (i, j) owns channel group i, tiles [j' * tiles, (j' + 1) * tiles), j' = P - 1 - j.  x, residual (None: 0),
    y: [R, L] any float.  bits: a bit per element or None.  mean, rstd: [C] fp32 (fp64).  weight, bias: [C] any float or
    None.  Reads x and residual once, writes y and bits once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    rstd = load_channels(rstd_ptr, c, live)
    scale = load_scale(weight_ptr, rstd, c, live)
    shift = load_shift(bias_ptr, rstd, c, live)
    mean = load_channels(mean_ptr, c, live)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    normalize_tiles(x_ptr, residual_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, shift, R, C, width, T, ACT)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def inference_kernel(
    x_ptr, residual_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr,
    y_ptr, bits_ptr, mean_ptr, rstd_ptr,
    R, C, width, tiles,
    eps: tl.float64,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """y = activation((x - running_mean[c]) / sqrt(running_var[c] + eps) * weight[c] + bias[c] + residual).

    Program (i, j) owns channel group i, tiles [j * tiles, (j + 1) * tiles); those with j = 0 also store the statistics
    that the backward needs.  x, residual (or None), y: [R, L] any float.  bits: a bit per element or None.  running_*,
    weight, bias: [C] any float (weight, bias or None).  mean, rstd: [C] fp32 (fp64) or None.  Reads x and residual
    once, writes y and bits once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean = load_channels(running_mean_ptr, c, live)
    rstd = reciprocal_std(load_channels(running_var_ptr, c, live), eps)
    if mean_ptr is not None and tl.program_id(1) == 0:
        tl.store(mean_ptr + c, mean, mask=live)
        tl.store(rstd_ptr + c, rstd, mask=live)
    scale = load_scale(weight_ptr, rstd, c, live)
    shift = load_shift(bias_ptr, rstd, c, live)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    normalize_tiles(x_ptr, residual_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, shift, R, C, width, T, ACT)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width"])
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,
    y_ptr, bits_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, counter_ptr,
    R, C, width,
    eps: tl.float64, momentum: tl.float64,
    T: tl.constexpr, ACT: tl.constexpr, CUMULATIVE: tl.constexpr,
):
    # fmt: on
    """Statistics, then y = activation((x - mean[c]) * rstd[c] * weight[c] + bias[c] + residual), in one launch.

    Program i owns channel group i, all of it.  x, residual (or None), y: [R, L] any float.  bits: a bit per element or
    None.  mean, rstd: [C] fp32 (fp64).  weight, bias, running_*: [C] any float or None.  counter: [] int64 or None, one
    batch more.  Reads x twice, but its first tile once (once in all where one tile is enough), residual once, writes
    y and bits once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    total = tile_count(R, width, T)
    k, delta, m2, first = program_statistics(x_ptr, group, 0, total, R, C, width, T)
    n = filled(total, group, R, width, T).to(m2.dtype)
    weight = count_batch(counter_ptr, group, tl.num_programs(0), group >= 0, momentum, CUMULATIVE)
    mean, rstd = store_statistics(
        mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, k, delta, m2, c, live, n, eps, weight
    )
    scale = load_scale(weight_ptr, rstd, c, live)
    shift = load_shift(bias_ptr, rstd, c, live)
    normalize_again(
        first, x_ptr, residual_ptr, y_ptr, bits_ptr, group, 0, total, mean, scale, shift, R, C, width, T, ACT, True
    )
