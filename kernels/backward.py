"""The backward pass, from dz = dy * activation'(z), z = (x - mean) * rstd * weight + bias + residual.

dbias = sum(dz), dweight = rstd * sum(dz * (x - mean)), dresidual = dz, and with statistics of the batch, M values per
channel (Ioffe and Szegedy 2015, section 3):
dx = weight * rstd * (dz - sum(dz) / M - (x - mean) * rstd^2 * sum(dz * (x - mean)) / M).
With given statistics only the first term is there: dx = weight * rstd * dz. How dz is found: `gradients.py`.
"""

import triton
import triton.language as tl

from .gradients import load_gradient, load_vectors, store_gradients
from .statistics import ratio
from .tiles import (
    channels,
    filled,
    fold_two,
    load_channels,
    load_tile,
    normalize,
    spread,
    sum_two_partials,
    tile,
    tile_count,
    widen,
)


@triton.jit
def program_sums(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, dx_ptr, dresidual_ptr, group, t0, t1, mean, scale, shift, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """(sum dz, sum dz * (x - mean)) [BLOCK_G] of a group's tiles [t0, t1), and dz and x of tile t0; reads each once.

    With dx_ptr, dx = scale * dz is stored in the same pass, with dresidual_ptr dz.
    """
    mean, scale, shift = spread(mean, T), spread(scale, T), spread(shift, T)
    s1, d, x0 = load_gradient(
        dy_ptr, x_ptr, residual_ptr, bits_ptr, group, t0, mean, scale, shift, R, C, width, T, ACT
    )  # [BLOCK_L, BLOCK_R] fp32
    dz0 = s1.to(dy_ptr.dtype.element_ty)
    store_gradients(dx_ptr, dresidual_ptr, s1, scale, group, t0, R, C, width, T)
    s2 = s1 * d
    if not T.ONCE:
        for t in tl.range(t0 + 1, t1, num_stages=T.STAGES):
            dz, d, _ = load_gradient(
                dy_ptr, x_ptr, residual_ptr, bits_ptr, group, t, mean, scale, shift, R, C, width, T, ACT
            )
            store_gradients(dx_ptr, dresidual_ptr, dz, scale, group, t, R, C, width, T)
            s1 += dz
            s2 += dz * d
    s1, s2 = fold_two(s1, s2, T)
    return s1, s2, dz0, x0


@triton.jit
def store_partial_sums(workspace_ptr, s1, s2, c, live, C):
    """Store this program's (sum dz, sum dz * (x - mean)) [BLOCK_G] in workspace [P, 2, C]."""
    at = workspace_ptr + tl.program_id(1) * 2 * C + c
    tl.store(at, s1, mask=live)
    tl.store(at + C, s2, mask=live)


@triton.jit
def merge_sums(workspace_ptr, c, live, C, T: tl.constexpr, BLOCK_P: tl.constexpr):
    """(sum dz, sum dz * (x - mean)) [BLOCK_G] of all P partials in workspace [P, 2, C], in index order."""
    P = tl.num_programs(1)
    s1 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, workspace_ptr.dtype.element_ty)
    s2 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, workspace_ptr.dtype.element_ty)
    for p0 in tl.range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = live[:, None] & (p < P)[None, :]
        at = workspace_ptr + c[:, None] + (p * 2 * C)[None, :]
        s1 += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        s2 += tl.load(at + C, mask=mask, other=0.0, cache_modifier=".cg")
    return sum_two_partials(s1, s2)


@triton.jit
def store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live):
    """Store dweight = s2 * rstd and dbias = s1 where they are wanted."""
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, (s2 * rstd).to(dweight_ptr.dtype.element_ty), mask=live)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, s1.to(dbias_ptr.dtype.element_ty), mask=live)


@triton.jit
def input_gradients_again(
    dz0, x0, dy_ptr, x_ptr, residual_ptr, bits_ptr, dx_ptr, dresidual_ptr, group, t0, t1,
    mean, scale, shift, dz_mean, slope, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """dx of a group's tiles t1 - 1 down to t0 after their sums; dz0 and x0 are of tile t0 if the program KEPT them.

    dresidual, if wanted, was written with the sums and is read in place of dy, residual and bits, but where ALIGN > 1.
    """
    mean, scale, shift = spread(mean, T), spread(scale, T), spread(shift, T)
    dz_mean, slope = spread(dz_mean, T), spread(slope, T)
    if not T.ONCE:
        AGAIN: tl.constexpr = dresidual_ptr is not None and T.ALIGN == 1  # whole accesses would read what others write
        if AGAIN:
            tl.debug_barrier()  # what the program's other threads wrote is read below
        FIRST: tl.constexpr = 1 if KEPT else 0
        for i in tl.range(0, t1 - t0 - FIRST):
            t = t1 - 1 - i
            if AGAIN:
                at, mask = tile(group, t, R, C, width, T)
                dz = widen(load_tile(dresidual_ptr, at, mask))
                d = normalize(load_tile(x_ptr, at, mask, True), mean, scale, shift)[0]
            else:
                dz, d, _ = load_gradient(
                    dy_ptr, x_ptr, residual_ptr, bits_ptr, group, t, mean, scale, shift, R, C, width,
                    T, ACT, True,
                )  # fmt: skip
            store_gradients(dx_ptr, None, dz - dz_mean - d * slope, scale, group, t, R, C, width, T)
    if KEPT:
        d = normalize(x0, mean, scale, shift)[0]
        store_gradients(dx_ptr, None, widen(dz0) - dz_mean - d * slope, scale, group, t0, R, C, width, T)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def gradient_sums_kernel(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, s1_ptr, s2_ptr, workspace_ptr, ticket_ptr,
    R, C, width, tiles,
    T: tl.constexpr, ACT: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """dbias = sum(dz), dweight = rstd * sum(dz * (x - mean)); the last program of a group merges.

    Program (i, j) owns channel group i, tiles [j * tiles, (j + 1) * tiles).  dy, x, residual, dx, dresidual: [R, L] any
    float; residual (or bits) where z needs it; dx = weight * rstd * dz, for given statistics, and dresidual = dz are
    stored if wanted.  mean, rstd: [C], workspace: [P, 2, C] fp32 (fp64).  weight, bias, dweight, dbias: [C] any float
    or None.  s1 = dbias, s2 = dweight: [C] fp32 (fp64), None where those hold them.  ticket: [groups] int32, zero
    before and after.  Reads dy and x (and residual or bits) once, writes dx and dresidual once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, rstd, scale, shift = load_vectors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, live)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    s1, s2, _, _ = program_sums(
        dy_ptr, x_ptr, residual_ptr, bits_ptr, dx_ptr, dresidual_ptr, group, t0, t1, mean, scale, shift, R, C, width,
        T, ACT,
    )  # fmt: skip
    store_partial_sums(workspace_ptr, s1, s2, c, live, C)
    tl.debug_barrier()  # every store of this program comes before the release below
    ticket = ticket_ptr + group
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        s1, s2 = merge_sums(workspace_ptr, c, live, C, T, BLOCK_P)
        store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live)
        store_parameter_gradients(s2_ptr, s1_ptr, s1, s2, rstd, c, live)
        tl.store(ticket, 0)  # ready for the next launch or graph replay


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def input_gradient_kernel(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, s1_ptr, s2_ptr,
    dx_ptr, dresidual_ptr,
    R, C, width, tiles,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """dx = weight * rstd * (dz - s1 / M - (x - mean) * rstd * s2 / M), s1 = dbias, s2 = dweight; last tiles first.

    Program (i, j) owns channel group i, tiles [j' * tiles, (j' + 1) * tiles), j' = P - 1 - j.  dy, x (None where not
    needed), residual (likewise), dx, dresidual (None where not wanted): [R, L] any float.  bits: a bit per element or
    None.  mean, rstd, s1, s2: [C] fp32 (fp64).  weight, bias: [C] any float or None.  Without s1 and s2 (given
    statistics) dx = weight * rstd * dz, and dresidual = dz.  Reads dy, x, residual and bits once, writes dx and
    dresidual once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, rstd, scale, shift = load_vectors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, live)
    total = tile_count(R, width, T)
    if s1_ptr is not None:
        M = filled(total, group, R, width, T).to(rstd.dtype)
        dz_mean = spread(ratio(load_channels(s1_ptr, c, live), M), T)
        slope = spread(ratio(load_channels(s2_ptr, c, live), M) * rstd, T)
    mean, scale, shift = spread(mean, T), spread(scale, T), spread(shift, T)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * tiles
    t1 = tl.minimum(t0 + tiles, total)
    for i in tl.range(0, t1 - t0):
        t = t1 - 1 - i
        dz, d, _ = load_gradient(
            dy_ptr, x_ptr, residual_ptr, bits_ptr, group, t, mean, scale, shift, R, C, width,
            T, ACT, True,
        )  # fmt: skip
        if s1_ptr is not None:
            store_gradients(dx_ptr, None, dz - dz_mean - d * slope, scale, group, t, R, C, width, T)
        else:
            store_gradients(dx_ptr, dresidual_ptr, dz, scale, group, t, R, C, width, T)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width"])
def backward_kernel(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    R, C, width,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """The sums, then dx = weight * rstd * (dz - s1 / M - (x - mean) * rstd^2 * s2 / M), in one launch.

    Program i owns channel group i, all of it.  dy, x, residual (or None), dx, dresidual (or None): [R, L] any float.
    bits: a bit per element or None.  mean, rstd: [C] fp32 (fp64).  weight, bias, dweight, dbias: [C] any float or None.
    Reads dy and x (and residual or bits) twice, but their first tiles once (once in all where one tile is enough),
    writes dx once; dresidual is written first and read in place of dy, residual and bits.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, rstd, scale, shift = load_vectors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, live)
    total = tile_count(R, width, T)
    s1, s2, dz0, x0 = program_sums(
        dy_ptr, x_ptr, residual_ptr, bits_ptr, None, dresidual_ptr, group, 0, total, mean, scale, shift, R, C, width,
        T, ACT,
    )  # fmt: skip
    store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live)
    M = filled(total, group, R, width, T).to(rstd.dtype)
    input_gradients_again(
        dz0, x0, dy_ptr, x_ptr, residual_ptr, bits_ptr, dx_ptr, dresidual_ptr, group, 0, total,
        mean, scale, shift, ratio(s1, M), ratio(s2 * rstd, M) * rstd, R, C, width, T, ACT, True,
    )  # fmt: skip
