"""The sum of two batch norms in one pass: y = activation(BN(x) + BN(other)), of two tensors that are laid out alike.

At the end of a residual block whose shortcut has a batch norm of its own, the shortcut's normalized tensor is neither
written nor read. dz = dy * activation'(z), z what entered the activation, reaches both batch norms alike: their sums
are read off together, sum(dz) is the gradient of both biases, and one more pass writes both gradients.
"""

import triton
import triton.language as tl

from .activations import gradient, gradient_where
from .backward import store_parameter_gradients
from .gradients import load_vectors, store_gradients
from .normalize import finish
from .statistics import (
    count_batch,
    program_statistics,
    ratio,
    reciprocal_std,
    store_partial,
    store_statistics,
)
from .tiles import (
    channels,
    filled,
    fold,
    fold_two,
    load_bits,
    load_channels,
    load_scale,
    load_shift,
    load_tile,
    normalize,
    spread,
    sum_two_partials,
    tile,
    tile_count,
    widen,
    within,
)


@triton.jit
def add_normalized(x, other, mean, scale, other_mean, other_scale, shift):
    """(x - mean, other - other_mean, (x - mean) * scale + shift + (other - other_mean) * other_scale) of a tile.

    Forward and backward share it.
    """
    d, z = normalize(x, mean, scale, shift)
    e = widen(other) - other_mean
    return d, e, z + e * other_scale


@triton.jit
def load_both_vectors(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr, c, live
):  # fmt: skip
    """(mean, rstd, scale, the same of the other, the sum of both biases) [BLOCK_G]."""
    mean, rstd, scale, shift = load_vectors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, live)
    other_mean, other_rstd, other_scale, other_shift = load_vectors(
        other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr, c, live
    )
    return mean, rstd, scale, other_mean, other_rstd, other_scale, shift + other_shift


@triton.jit
def add_tiles(
    x_ptr, other_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, other_mean, other_scale, shift, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Tiles t1 - 1 down to t0 of y: those that the statistics read last may still be in L2."""
    mean, scale = spread(mean, T), spread(scale, T)
    other_mean, other_scale, shift = spread(other_mean, T), spread(other_scale, T), spread(shift, T)
    for i in tl.range(0, t1 - t0):
        at, mask = tile(group, t1 - 1 - i, R, C, width, T)
        x, other = load_tile(x_ptr, at, mask, True), load_tile(other_ptr, at, mask, True)
        _, _, z = add_normalized(x, other, mean, scale, other_mean, other_scale, shift)
        finish(z, None, y_ptr, bits_ptr, group, t1 - 1 - i, R, C, width, T, ACT)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def pair_normalize_kernel(
    x_ptr, other_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr,
    y_ptr, bits_ptr,
    R, C, width, tiles,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """y = activation(BN(x) + BN(other)), BN(x) = (x - mean[c]) * rstd[c] * weight[c] + bias[c]; last tiles first.

    Program (i, j) owns channel group i, tiles [j' * tiles, (j' + 1) * tiles), j' = P - 1 - j.  x, other, y: [R, L] any
    float.  bits: a bit per element or None.  Means and rstds: [C] fp32 (fp64).  Weights and biases: [C] any float or
    None.  Reads x and other once, writes y and bits once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, _, scale, other_mean, _, other_scale, shift = load_both_vectors(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr,
        c, live,
    )  # fmt: skip
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    add_tiles(
        x_ptr, other_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, other_mean, other_scale, shift, R, C, width,
        T, ACT,
    )  # fmt: skip


@triton.jit
def load_given(running_mean_ptr, running_var_ptr, mean_ptr, rstd_ptr, c, live, eps):
    """(mean, rstd) [BLOCK_G] of given statistics; the first program of a group stores them for a backward."""
    mean = load_channels(running_mean_ptr, c, live)
    rstd = reciprocal_std(load_channels(running_var_ptr, c, live), eps)
    if mean_ptr is not None and tl.program_id(1) == 0:
        tl.store(mean_ptr + c, mean, mask=live)
        tl.store(rstd_ptr + c, rstd, mask=live)
    return mean, rstd


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def pair_inference_kernel(
    x_ptr, other_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr,
    other_running_mean_ptr, other_running_var_ptr, other_weight_ptr, other_bias_ptr,
    y_ptr, bits_ptr, mean_ptr, rstd_ptr, other_mean_ptr, other_rstd_ptr,
    R, C, width, tiles,
    eps: tl.float64, other_eps: tl.float64,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """y = activation(BN(x) + BN(other)), BN(x) = (x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c], both given.

    Program (i, j) owns channel group i, tiles [j * tiles, (j + 1) * tiles); those with j = 0 also store the statistics
    that the backward needs.  x, other, y: [R, L] any float.  bits: a bit per element or None.  Running statistics,
    weights and biases: [C] any float (weights, biases or None).  Means and rstds: [C] fp32 (fp64) or None.  Reads x and
    other once, writes y and bits once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, rstd = load_given(running_mean_ptr, running_var_ptr, mean_ptr, rstd_ptr, c, live, eps)
    other_mean, other_rstd = load_given(
        other_running_mean_ptr, other_running_var_ptr, other_mean_ptr, other_rstd_ptr, c, live, other_eps
    )
    scale = load_scale(weight_ptr, rstd, c, live)
    other_scale = load_scale(other_weight_ptr, other_rstd, c, live)
    shift = load_shift(bias_ptr, rstd, c, live) + load_shift(other_bias_ptr, rstd, c, live)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    add_tiles(
        x_ptr, other_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, other_mean, other_scale, shift, R, C, width,
        T, ACT,
    )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width"])
def pair_forward_kernel(
    x_ptr, other_ptr, weight_ptr, bias_ptr, other_weight_ptr, other_bias_ptr,
    y_ptr, bits_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, counter_ptr,
    other_mean_ptr, other_rstd_ptr, other_running_mean_ptr, other_running_var_ptr, other_counter_ptr,
    R, C, width,
    eps: tl.float64, momentum: tl.float64, other_eps: tl.float64, other_momentum: tl.float64,
    T: tl.constexpr, ACT: tl.constexpr, CUMULATIVE: tl.constexpr, OTHER_CUMULATIVE: tl.constexpr,
):
    # fmt: on
    """Statistics of both, then y = activation(BN(x) + BN(other)), of channel groups that one tile holds.

    Program i owns channel group i, all of it, one tile.  x, other, y: [R, L] any float.  bits: a bit per element or
    None.  Means and rstds: [C] fp32 (fp64).  Weights, biases, running statistics: [C] any float or None.  Counters: []
    int64 or None, one batch more.  Reads x and other once, writes y and bits once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    total = tile_count(R, width, T)
    k, delta, m2, x = program_statistics(x_ptr, group, 0, total, R, C, width, T)
    n = filled(total, group, R, width, T).to(m2.dtype)
    weight = count_batch(counter_ptr, group, tl.num_programs(0), group >= 0, momentum, CUMULATIVE)
    mean, rstd = store_statistics(
        mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, k, delta, m2, c, live, n, eps, weight
    )
    k, delta, m2, other = program_statistics(other_ptr, group, 0, total, R, C, width, T)
    weight = count_batch(other_counter_ptr, group, tl.num_programs(0), group >= 0, other_momentum, OTHER_CUMULATIVE)
    other_mean, other_rstd = store_statistics(
        other_mean_ptr, other_rstd_ptr, other_running_mean_ptr, other_running_var_ptr, k, delta, m2, c, live, n,
        other_eps, weight,
    )  # fmt: skip
    scale = load_scale(weight_ptr, rstd, c, live)
    other_scale = load_scale(other_weight_ptr, other_rstd, c, live)
    shift = load_shift(bias_ptr, rstd, c, live) + load_shift(other_bias_ptr, rstd, c, live)
    _, _, z = add_normalized(
        x, other, spread(mean, T), spread(scale, T), spread(other_mean, T), spread(other_scale, T), spread(shift, T)
    )
    finish(z, None, y_ptr, bits_ptr, group, 0, R, C, width, T, ACT)


@triton.jit
def load_both_gradients(
    dy_ptr, x_ptr, other_ptr, bits_ptr, group, t, mean, scale, other_mean, other_scale, shift, R, C, width,
    T: tl.constexpr, ACT: tl.constexpr, LAST: tl.constexpr = False,
):  # fmt: skip
    """(dz, x - mean, other - other_mean) of tile t in the dtype of the arithmetic; dz is 0 outside of the tensor.

    Without x_ptr (dz needs neither x nor other) the differences are dy, which is not used.
    """
    at, mask = tile(group, t, R, C, width, T)
    dz = widen(load_tile(dy_ptr, at, mask, LAST))
    d = dz
    e = dz
    z = dz
    if x_ptr is not None:
        x, other = load_tile(x_ptr, at, mask, LAST), load_tile(other_ptr, at, mask, LAST)
        d, e, z = add_normalized(x, other, mean, scale, other_mean, other_scale, shift)
    if bits_ptr is not None:
        dz = gradient_where(dz, load_bits(bits_ptr, group, t, R, C, width, T), ACT)
    elif ACT.name != "identity":
        dz = gradient(dz, z, ACT, dy_ptr.dtype.element_ty)
    if T.ALIGN > 1:  # there are values of other planes
        dz = within(dz, mask, group, t, R, width, T)
        d = within(d, mask, group, t, R, width, T)
        e = within(e, mask, group, t, R, width, T)
    return dz, d, e


@triton.jit
def merge_three(workspace_ptr, c, live, C, T: tl.constexpr, BLOCK_P: tl.constexpr):
    """(sum dz, sum dz * (x - mean), sum dz * (other - other_mean)) [BLOCK_G] of workspace [P, 3, C], in index order."""
    P = tl.num_programs(1)
    s1 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, workspace_ptr.dtype.element_ty)
    s2 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, workspace_ptr.dtype.element_ty)
    s3 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, workspace_ptr.dtype.element_ty)
    for p0 in tl.range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = live[:, None] & (p < P)[None, :]
        at = workspace_ptr + c[:, None] + (p * 3 * C)[None, :]
        s1 += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        s2 += tl.load(at + C, mask=mask, other=0.0, cache_modifier=".cg")
        s3 += tl.load(at + 2 * C, mask=mask, other=0.0, cache_modifier=".cg")
    s2, s3 = sum_two_partials(s2, s3)
    return tl.sum(s1, 1), s2, s3


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def pair_sums_kernel(
    dy_ptr, x_ptr, other_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr,
    dx_ptr, dother_ptr, dweight_ptr, dbias_ptr, other_dweight_ptr, other_dbias_ptr, s1_ptr, s2_ptr, s3_ptr,
    workspace_ptr, ticket_ptr,
    R, C, width, tiles,
    T: tl.constexpr, ACT: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """dbias = sum(dz) of both, dweight = rstd * sum(dz * (x - mean)) of each; the last program of a group merges.

    Program (i, j) owns channel group i, tiles [j * tiles, (j + 1) * tiles).  dy, x, other, dx, dother: [R, L] any
    float; dx = weight * rstd * dz and dother likewise, for given statistics, are stored if wanted.  bits: a bit per
    element or None.  Means and rstds: [C], workspace: [P, 3, C] fp32 (fp64).  Weights, biases and their gradients: [C]
    any float or None.  s1 = dbias, s2 = dweight, s3 = other_dweight: [C] fp32 (fp64), None where those hold them.
    ticket: [groups] int32, zero before and after.  Reads dy, x, other and bits once, writes dx and dother once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, rstd, scale, other_mean, other_rstd, other_scale, shift = load_both_vectors(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr,
        c, live,
    )  # fmt: skip
    mean, scale = spread(mean, T), spread(scale, T)
    other_mean, other_scale, shift = spread(other_mean, T), spread(other_scale, T), spread(shift, T)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, tile_count(R, width, T))
    s1 = tl.full([T.BLOCK_L, T.BLOCK_R], 0.0, rstd.dtype)
    s2 = tl.full([T.BLOCK_L, T.BLOCK_R], 0.0, rstd.dtype)
    s3 = tl.full([T.BLOCK_L, T.BLOCK_R], 0.0, rstd.dtype)
    for t in tl.range(t0, t1, num_stages=T.STAGES):
        dz, d, e = load_both_gradients(
            dy_ptr, x_ptr, other_ptr, bits_ptr, group, t, mean, scale, other_mean, other_scale, shift, R, C, width,
            T, ACT,
        )  # fmt: skip
        store_gradients(dx_ptr, None, dz, scale, group, t, R, C, width, T)
        store_gradients(dother_ptr, None, dz, other_scale, group, t, R, C, width, T)
        s1 += dz
        s2 += dz * d
        s3 += dz * e
    s2, s3 = fold_two(s2, s3, T)
    store_partial(workspace_ptr, fold(s1, T), s2, s3, c, live, C)
    tl.debug_barrier()  # every store of this program comes before the release below
    ticket = ticket_ptr + group
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        a1, a2, a3 = merge_three(workspace_ptr, c, live, C, T, BLOCK_P)
        store_parameter_gradients(dweight_ptr, dbias_ptr, a1, a2, rstd, c, live)
        store_parameter_gradients(other_dweight_ptr, other_dbias_ptr, a1, a3, other_rstd, c, live)
        store_parameter_gradients(s2_ptr, s1_ptr, a1, a2, rstd, c, live)
        store_parameter_gradients(s3_ptr, None, a1, a3, other_rstd, c, live)
        tl.store(ticket, 0)  # ready for the next launch or graph replay


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def pair_gradient_kernel(
    dy_ptr, x_ptr, other_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr, s1_ptr, s2_ptr, s3_ptr,
    dx_ptr, dother_ptr,
    R, C, width, tiles,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """dx = weight * rstd * (dz - s1 / M - (x - mean) * rstd * s2 / M), dother likewise with s3; last tiles first.

    Program (i, j) owns channel group i, tiles [j' * tiles, (j' + 1) * tiles), j' = P - 1 - j.  dy, x and other (None
    where not needed), dx, dother (None where not wanted): [R, L] any float.  bits: a bit per element or None.  Means,
    rstds, s1 = dbias, s2 = dweight, s3 = other_dweight: [C] fp32 (fp64).  Weights, biases: [C] any float or None.
    Without s1, s2 and s3 (given statistics) dx = weight * rstd * dz.  Reads dy, x, other and bits once, writes dx and
    dother once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, rstd, scale, other_mean, other_rstd, other_scale, shift = load_both_vectors(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr,
        c, live,
    )  # fmt: skip
    total = tile_count(R, width, T)
    if s1_ptr is not None:
        M = filled(total, group, R, width, T).to(rstd.dtype)
        dz_mean = spread(ratio(load_channels(s1_ptr, c, live), M), T)
        slope = spread(ratio(load_channels(s2_ptr, c, live), M) * rstd, T)
        other_slope = spread(ratio(load_channels(s3_ptr, c, live), M) * other_rstd, T)
    mean, scale = spread(mean, T), spread(scale, T)
    other_mean, other_scale, shift = spread(other_mean, T), spread(other_scale, T), spread(shift, T)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * tiles
    t1 = tl.minimum(t0 + tiles, total)
    for i in tl.range(0, t1 - t0):
        t = t1 - 1 - i
        dz, d, e = load_both_gradients(
            dy_ptr, x_ptr, other_ptr, bits_ptr, group, t, mean, scale, other_mean, other_scale, shift, R, C, width,
            T, ACT, True,
        )  # fmt: skip
        if s1_ptr is not None:
            store_gradients(dx_ptr, None, dz - dz_mean - d * slope, scale, group, t, R, C, width, T)
            store_gradients(dother_ptr, None, dz - dz_mean - e * other_slope, other_scale, group, t, R, C, width, T)
        else:
            store_gradients(dx_ptr, None, dz, scale, group, t, R, C, width, T)
            store_gradients(dother_ptr, None, dz, other_scale, group, t, R, C, width, T)


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width"])
def pair_backward_kernel(
    dy_ptr, x_ptr, other_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr,
    dx_ptr, dother_ptr, dweight_ptr, dbias_ptr, other_dweight_ptr, other_dbias_ptr,
    R, C, width,
    T: tl.constexpr, ACT: tl.constexpr,
):
    # fmt: on
    """The sums, then dx = weight * rstd * (dz - s1 / M - (x - mean) * rstd^2 * s2 / M) and dother, in one launch.

    Program i owns channel group i, all of it, one tile.  dy, x, other, dx, dother (None where not wanted): [R, L] any
    float.  bits: a bit per element or None.  Means and rstds: [C] fp32 (fp64).  Weights, biases and their gradients:
    [C] any float or None.  Reads dy, x, other and bits once, writes dx and dother once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    mean, rstd, scale, other_mean, other_rstd, other_scale, shift = load_both_vectors(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, other_mean_ptr, other_rstd_ptr, other_weight_ptr, other_bias_ptr,
        c, live,
    )  # fmt: skip
    at, mask = tile(group, 0, R, C, width, T)
    dy, x, other = load_tile(dy_ptr, at, mask), load_tile(x_ptr, at, mask), load_tile(other_ptr, at, mask)
    mean, other_mean = spread(mean, T), spread(other_mean, T)
    spread_scale, spread_other_scale = spread(scale, T), spread(other_scale, T)
    dz = widen(dy)
    if bits_ptr is not None:
        dz = gradient_where(dz, load_bits(bits_ptr, group, 0, R, C, width, T), ACT)
    elif ACT.name != "identity":
        _, _, z = add_normalized(x, other, mean, spread_scale, other_mean, spread_other_scale, spread(shift, T))
        dz = gradient(dz, z, ACT, dy_ptr.dtype.element_ty)
    d = widen(x) - mean
    e = widen(other) - other_mean
    if T.ALIGN > 1:  # there are values of other planes
        dz = within(dz, mask, group, 0, R, width, T)
        d = within(d, mask, group, 0, R, width, T)
        e = within(e, mask, group, 0, R, width, T)
    s1 = fold(dz, T)
    s2, s3 = fold_two(dz * d, dz * e, T)
    dz = dz.to(dy_ptr.dtype.element_ty)
    store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live)
    store_parameter_gradients(other_dweight_ptr, other_dbias_ptr, s1, s3, other_rstd, c, live)
    M = filled(tile_count(R, width, T), group, R, width, T).to(rstd.dtype)
    dz_mean = spread(ratio(s1, M), T)
    slope, other_slope = spread(ratio(s2 * rstd, M) * rstd, T), spread(ratio(s3 * other_rstd, M) * other_rstd, T)
    dz = widen(dz) - dz_mean
    store_gradients(dx_ptr, None, dz - (widen(x) - mean) * slope, spread_scale, group, 0, R, C, width, T)
    store_gradients(
        dother_ptr, None, dz - (widen(other) - other_mean) * other_slope, spread_other_scale, group, 0, R, C, width, T
    )
