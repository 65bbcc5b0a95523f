"""The forward pass: y = (x - mean) * rstd * weight + bias, with statistics of the batch or given ones."""

import triton
import triton.language as tl

from .statistics import program_statistics, reciprocal_std, store_statistics
from .tiles import channels, filled, load_channels, load_scale, load_tile, spread, store_tile, tile, tile_count, widen


@triton.jit
def load_affine(weight_ptr, bias_ptr, rstd, c, live):
    """(scale, shift) [BLOCK_G]: y = (x - mean) * scale + shift; an absent weight is 1, an absent bias 0."""
    shift = tl.zeros_like(rstd)
    if bias_ptr is not None:
        shift = load_channels(bias_ptr, c, live)
    return load_scale(weight_ptr, rstd, c, live), shift


@triton.jit
def normalize(x, mean, scale, shift):
    """One tile of y; mean is subtracted first, so a large mean costs no digits."""
    return (widen(x) - mean) * scale + shift


@triton.jit
def normalize_tiles(x_ptr, y_ptr, t0, t1, mean, scale, shift, R, C, width, T: tl.constexpr):
    """Tiles t1 - 1 down to t0: those that the statistics read last may still be in L2."""
    mean, scale, shift = spread(mean, T), spread(scale, T), spread(shift, T)
    for i in tl.range(0, t1 - t0):
        at, mask = tile(t1 - 1 - i, R, C, width, T)
        store_tile(y_ptr, at, mask, normalize(load_tile(x_ptr, at, mask), mean, scale, shift))


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def normalize_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    y_ptr,
    R, C, width, tiles,
    T: tl.constexpr,
):
    # fmt: on
    """y = (x - mean[c]) * rstd[c] * weight[c] + bias[c]; the last tiles come first.

    Program (i, j) owns channel group i, tiles [j' * tiles, (j' + 1) * tiles), j' = P - 1 - j.
    x, y: [R, L] any float.  mean, rstd: [C] fp32 (fp64).  weight, bias: [C] any float or None.  Reads x, writes y once.
    """
    c, live = channels(C, width, T)
    rstd = load_channels(rstd_ptr, c, live)
    scale, shift = load_affine(weight_ptr, bias_ptr, rstd, c, live)
    mean = load_channels(mean_ptr, c, live)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    normalize_tiles(x_ptr, y_ptr, t0, t1, mean, scale, shift, R, C, width, T)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def inference_kernel(
    x_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    R, C, width, tiles,
    eps: tl.float64,
    T: tl.constexpr,
):
    # fmt: on
    """y = (x - running_mean[c]) / sqrt(running_var[c] + eps) * weight[c] + bias[c].

    Program (i, j) owns channel group i, tiles [j * tiles, (j + 1) * tiles); those with j = 0 also store the statistics
    that the backward needs.  x, y: [R, L] any float.  running_*, weight, bias: [C] any float (weight, bias or None).
    mean, rstd: [C] fp32 (fp64) or None.  Reads x once, writes y once.
    """
    c, live = channels(C, width, T)
    mean = load_channels(running_mean_ptr, c, live)
    rstd = reciprocal_std(load_channels(running_var_ptr, c, live), eps)
    if mean_ptr is not None and tl.program_id(1) == 0:
        tl.store(mean_ptr + c, mean, mask=live)
        tl.store(rstd_ptr + c, rstd, mask=live)
    scale, shift = load_affine(weight_ptr, bias_ptr, rstd, c, live)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    normalize_tiles(x_ptr, y_ptr, t0, t1, mean, scale, shift, R, C, width, T)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr,
    y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    R, C, width,
    eps: tl.float64, momentum: tl.float64,
    T: tl.constexpr,
):
    # fmt: on
    """Statistics of the batch, then y = (x - mean[c]) * rstd[c] * weight[c] + bias[c], in one launch.

    Program i owns channel group i, all of it.  x, y: [R, L] any float.  mean, rstd: [C] fp32 (fp64).  weight, bias,
    running_*: [C] any float or None.  Reads x twice, but its first tile once (once in all where one tile is enough),
    writes y once.
    """
    c, live = channels(C, width, T)
    total = tile_count(R, width, T)
    k, delta, m2, first = program_statistics(x_ptr, 0, total, R, C, width, T)
    n = filled(total, R, width, T).to(m2.dtype)
    mean, rstd = store_statistics(
        mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, k, delta, m2, c, live, n, eps, momentum
    )
    scale, shift = load_affine(weight_ptr, bias_ptr, rstd, c, live)
    normalize_tiles(x_ptr, y_ptr, 1, total, mean, scale, shift, R, C, width, T)
    at, mask = tile(0, R, C, width, T)
    store_tile(y_ptr, at, mask, normalize(first, spread(mean, T), spread(scale, T), spread(shift, T)))
