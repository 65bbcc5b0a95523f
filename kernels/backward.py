"""The backward pass: dbias = sum(dy), dweight = rstd * sum(dy * (x - mean)), and from both the gradient of x.

With statistics of the batch, M values per channel (Ioffe and Szegedy 2015, section 3):
dx = weight * rstd * (dy - sum(dy) / M - (x - mean) * rstd^2 * sum(dy * (x - mean)) / M).
With given statistics only the first term is there: dx = weight * rstd * dy.
"""

import triton
import triton.language as tl

from .statistics import ratio
from .tiles import (
    channels,
    filled,
    fold,
    load_channels,
    load_scale,
    load_tile,
    spread,
    store_tile,
    tile,
    tile_count,
    widen,
)


@triton.jit
def input_gradient(dy, x, mean, scale, dy_mean, slope):
    """One tile of dx = scale * (dy - dy_mean - (x - mean) * slope)."""
    return scale * (widen(dy) - dy_mean - (widen(x) - mean) * slope)


@triton.jit
def program_sums(dy_ptr, x_ptr, dx_ptr, t0, t1, mean, scale, R, C, width, T: tl.constexpr):
    """(sum dy, sum dy * (x - mean)) [BLOCK_G] of tiles [t0, t1), and tile t0 of dy and x; reads each tile once.

    With dx_ptr, dx = scale * dy is stored in the same pass.
    """
    mean, scale = spread(mean, T), spread(scale, T)
    at, mask = tile(t0, R, C, width, T)
    dy0 = load_tile(dy_ptr, at, mask)  # [BLOCK_L, BLOCK_R]
    x0 = load_tile(x_ptr, at, mask)
    s1 = widen(dy0)  # [BLOCK_L, BLOCK_R] fp32
    s2 = s1 * tl.where(mask, widen(x0) - mean, 0.0)
    if dx_ptr is not None:
        store_tile(dx_ptr, at, mask, s1 * scale)
    for t in tl.range(t0 + 1, t1):
        at, mask = tile(t, R, C, width, T)
        dy = widen(load_tile(dy_ptr, at, mask))
        s1 += dy
        s2 += dy * tl.where(mask, widen(load_tile(x_ptr, at, mask)) - mean, 0.0)
        if dx_ptr is not None:
            store_tile(dx_ptr, at, mask, dy * scale)
    return fold(s1, T), fold(s2, T), dy0, x0


@triton.jit
def merge_sums(workspace_ptr, c, live, C, T: tl.constexpr, BLOCK_P: tl.constexpr):
    """(sum dy, sum dy * (x - mean)) [BLOCK_G] of all P partials in workspace [P, 2, C], in index order."""
    P = tl.num_programs(1)
    s1 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, workspace_ptr.dtype.element_ty)
    s2 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, workspace_ptr.dtype.element_ty)
    for p0 in tl.range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = live[:, None] & (p < P)[None, :]
        at = workspace_ptr + c[:, None] + (p * 2 * C)[None, :]
        s1 += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        s2 += tl.load(at + C, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(s1, 1), tl.sum(s2, 1)


@triton.jit
def store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live):
    """Store dweight = s2 * rstd and dbias = s1 where they are wanted."""
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, (s2 * rstd).to(dweight_ptr.dtype.element_ty), mask=live)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, s1.to(dbias_ptr.dtype.element_ty), mask=live)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def gradient_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, sums_ptr, workspace_ptr, ticket_ptr,
    R, C, width, tiles,
    T: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """dbias = sum(dy), dweight = rstd * sum(dy * (x - mean)); the last program of a group merges.

    Program (i, j) owns channel group i, tiles [j * tiles, (j + 1) * tiles).  dy, x, dx: [R, L] any float; with dx, the
    gradient for given statistics, dx = weight * rstd * dy, is stored too.  mean, rstd: [C], sums: [2, C], workspace:
    [P, 2, C] fp32 (fp64).  weight, dweight, dbias: [C] any float or None.  ticket: [groups] int32, zero before and
    after.  Reads dy and x once (writes dx once).
    """
    c, live = channels(C, width, T)
    rstd = load_channels(rstd_ptr, c, live)
    mean = load_channels(mean_ptr, c, live)
    scale = load_scale(weight_ptr, rstd, c, live)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    s1, s2, _, _ = program_sums(dy_ptr, x_ptr, dx_ptr, t0, t1, mean, scale, R, C, width, T)
    at = workspace_ptr + tl.program_id(1) * 2 * C + c
    tl.store(at, s1, mask=live)
    tl.store(at + C, s2, mask=live)
    tl.debug_barrier()  # every store of this program comes before the release below
    ticket = ticket_ptr + tl.program_id(0)
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        s1, s2 = merge_sums(workspace_ptr, c, live, C, T, BLOCK_P)
        store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live)
        if sums_ptr is not None:
            tl.store(sums_ptr + c, s1, mask=live)
            tl.store(sums_ptr + C + c, s2, mask=live)
        tl.store(ticket, 0)  # ready for the next launch or graph replay


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def input_gradient_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, sums_ptr,
    dx_ptr,
    R, C, width, tiles,
    T: tl.constexpr,
):
    # fmt: on
    """dx = weight * rstd * (dy - s1 / M - (x - mean) * rstd^2 * s2 / M); the last tiles come first.

    Program (i, j) owns channel group i, tiles [j' * tiles, (j' + 1) * tiles), j' = P - 1 - j.  dy, x, dx: [R, L] any
    float.  mean, rstd: [C], sums (s1, s2): [2, C] fp32 (fp64).  weight: [C] any float or None.  Without sums (given
    statistics) dx = weight * rstd * dy, and x and mean are not read.  Reads dy and x once, writes dx once.
    """
    c, live = channels(C, width, T)
    rstd = load_channels(rstd_ptr, c, live)
    scale = spread(load_scale(weight_ptr, rstd, c, live), T)
    total = tile_count(R, width, T)
    if sums_ptr is not None:
        M = filled(total, R, width, T).to(rstd.dtype)
        mean = spread(load_channels(mean_ptr, c, live), T)
        dy_mean = spread(ratio(load_channels(sums_ptr, c, live), M), T)
        slope = spread(ratio(load_channels(sums_ptr + C, c, live), M) * rstd * rstd, T)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * tiles
    t1 = tl.minimum(t0 + tiles, total)
    for i in tl.range(0, t1 - t0):
        at, mask = tile(t1 - 1 - i, R, C, width, T)
        dy = load_tile(dy_ptr, at, mask)
        if sums_ptr is not None:
            dx = input_gradient(dy, load_tile(x_ptr, at, mask), mean, scale, dy_mean, slope)
        else:
            dx = widen(dy) * scale
        store_tile(dx_ptr, at, mask, dx)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width"])
def backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr,
    dx_ptr, dweight_ptr, dbias_ptr,
    R, C, width,
    T: tl.constexpr,
):
    # fmt: on
    """The sums, then dx = weight * rstd * (dy - s1 / M - (x - mean) * rstd^2 * s2 / M), in one launch.

    Program i owns channel group i, all of it.  dy, x, dx: [R, L] any float.  mean, rstd: [C] fp32 (fp64).  weight,
    dweight, dbias: [C] any float or None.  Reads dy and x twice, but their first tiles once (once in all where one tile
    is enough), writes dx once.
    """
    c, live = channels(C, width, T)
    rstd = load_channels(rstd_ptr, c, live)
    mean = load_channels(mean_ptr, c, live)
    scale = load_scale(weight_ptr, rstd, c, live)
    total = tile_count(R, width, T)
    s1, s2, dy0, x0 = program_sums(dy_ptr, x_ptr, None, 0, total, mean, scale, R, C, width, T)
    store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live)
    M = filled(total, R, width, T).to(rstd.dtype)
    mean, scale = spread(mean, T), spread(scale, T)
    dy_mean = spread(ratio(s1, M), T)
    slope = spread(ratio(s2, M) * rstd * rstd, T)
    for i in tl.range(0, total - 1):
        at, mask = tile(total - 1 - i, R, C, width, T)
        dx = input_gradient(
            load_tile(dy_ptr, at, mask), load_tile(x_ptr, at, mask), mean, scale, dy_mean, slope
        )
        store_tile(dx_ptr, at, mask, dx)
    at, mask = tile(0, R, C, width, T)
    store_tile(dx_ptr, at, mask, input_gradient(dy0, x0, mean, scale, dy_mean, slope))
