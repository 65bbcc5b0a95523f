"""Mean and variance of each channel: partial results of a program, their merge, and what is stored of them.

Each program shifts its data by the mean k of its first tile and sums d = x - k and d * d, so that nothing cancels
however large the mean is. A partial is (k, delta, m2): mean = k + delta, m2 the sum of squares about it. The merge
(Chan, Golub, LeVeque 1983) keeps shift and delta apart and rounds mean = k + delta once, at the end.
"""

import triton
import triton.language as tl

from .tiles import channels, filled, fold, fold_two, load_tile, spread, tile, tile_count, widen, within


@triton.jit
def ratio(a, n):
    """a / n for a count n. In fp64 by Newton's iteration: a division would be a call, which spills registers."""
    if a.dtype == tl.float64:
        r = (1.0 / n.to(tl.float32)).to(tl.float64)  # 7 digits, then 14, then all
        r = r * (2.0 - n * r)
        return a * (r * (2.0 - n * r))
    else:
        return a / n


@triton.jit
def reciprocal_std(var, eps):
    """(var + eps)^(-1/2); the approximation and a Newton step, without a call. NaN where var + eps < 0, as in torch."""
    v = (var + eps).to(var.dtype)
    r = tl.rsqrt(v)
    better = r + 0.5 * r * (1.0 - v * r * r)
    return tl.where((r > 0.0) & (r < float("inf")), better, r)


@triton.jit
def program_statistics(x_ptr, group, t0, t1, R, C, width, T: tl.constexpr):
    """(k, delta, m2) [BLOCK_G] of a group's tiles [t0, t1), and tile t0 as it was read; reads each tile once."""
    at, mask = tile(group, t0, R, C, width, T)
    first = load_tile(x_ptr, at, mask)  # [BLOCK_L, BLOCK_R]
    x = widen(first)
    before = filled(t0, group, R, width, T)
    inside = x if T.ALIGN == 1 else within(x, mask, group, t0, R, width, T)
    k = ratio(fold(inside, T), (filled(t0 + 1, group, R, width, T) - before).to(x.dtype))
    k = widen(k.to(first.dtype))  # as short as x, so that x - k is exact for 16-bit x
    k = tl.where(tl.abs(k) < float("inf"), k, 0.0)  # an infinite mean must come out as inf, not as inf - inf
    shift = spread(k, T)
    s = within(x - shift, mask, group, t0, R, width, T)  # [BLOCK_L, BLOCK_R] fp32
    q = s * s
    if not T.ONCE:
        UNROLL: tl.constexpr = 2 if T.STAGES == 1 else 1  # four loads in flight, or through shared memory more
        for t in tl.range(t0 + 1, t1, num_stages=T.STAGES, loop_unroll_factor=UNROLL):
            at, mask = tile(group, t, R, C, width, T)
            d = within(widen(load_tile(x_ptr, at, mask)) - shift, mask, group, t, R, width, T)
            s += d
            q += d * d
    s, q = fold_two(s, q, T)
    delta = ratio(s, tl.maximum(filled(t1, group, R, width, T) - before, 1).to(x.dtype))  # the last block may be empty
    return k, delta, q - s * delta, first


@triton.jit
def store_partial(workspace_ptr, k, delta, m2, c, live, C):
    """Store this program's partial (k, delta, m2) [BLOCK_G] in workspace [P, 3, C]."""
    at = workspace_ptr + tl.program_id(1) * 3 * C + c
    tl.store(at, k, mask=live)
    tl.store(at + C, delta, mask=live)
    tl.store(at + 2 * C, m2, mask=live)


@triton.jit
def merge_statistics(workspace_ptr, group, c, live, R, C, width, tiles, T: tl.constexpr, BLOCK_P: tl.constexpr):
    """(k, delta, m2) [BLOCK_G] of all P partials in workspace [P, 3, C]; in index order, whoever does it.

    delta is a weighted sum (an infinite mean stays infinite), m2 goes by Chan's update.
    """
    P = tl.num_programs(1)
    total = tile_count(R, width, T)
    k0 = tl.load(workspace_ptr + c, mask=live, other=0.0, cache_modifier=".cg")  # [BLOCK_G]
    n = tl.full([1, BLOCK_P], 0.0, k0.dtype)
    mean = tl.full([T.BLOCK_G, BLOCK_P], 0.0, k0.dtype)  # less k0; column i merges the partials i, i + BLOCK_P, ...
    m2 = tl.full([T.BLOCK_G, BLOCK_P], 0.0, k0.dtype)
    weighted = tl.full([T.BLOCK_G, BLOCK_P], 0.0, k0.dtype)
    for p0 in tl.range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        there = (p < P)[None, :]
        end = tl.minimum(p * tiles + tiles, total)
        values = filled(end, group, R, width, T) - filled(p * tiles, group, R, width, T)
        n_p = tl.where(there, values[None, :], 0).to(k0.dtype)  # [1, BLOCK_P]
        mask = live[:, None] & there
        at = workspace_ptr + c[:, None] + (p * 3 * C)[None, :]
        k = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        mean_p = k - k0[:, None] + tl.load(at + C, mask=mask, other=0.0, cache_modifier=".cg")
        m2_p = tl.load(at + 2 * C, mask=mask, other=0.0, cache_modifier=".cg")
        weighted += tl.where(mask, mean_p * n_p, 0.0)
        share = ratio(n_p, tl.maximum(n + n_p, 1.0))
        step = mean_p - mean
        m2 += tl.where(mask, m2_p + step * step * n * share, 0.0)
        mean += tl.where(mask, step * share, 0.0)
        n += n_p
    delta = ratio(tl.sum(weighted, 1), filled(total, group, R, width, T).to(k0.dtype))
    apart = mean - delta[:, None]
    return k0, delta, tl.sum(tl.where(n > 0, m2 + n * apart * apart, 0.0), 1)


@triton.jit
def count_batch(counter_ptr, i, n, mine, momentum, CUMULATIVE: tl.constexpr):
    """Add 1 to the counter [] int64; return the weight of this batch in the running statistics, fp64.

    Called once for each i from 0 to n - 1, by programs that own it (mine). The weight is momentum, or 1 / counter where
    CUMULATIVE, so that the running statistics are the mean over all batches. All n must find the same counter, though
    some look before and some after it was changed. So each adds a high digit of 2^35, and 0 takes all of them away
    again: what the low digits were follows from what any of them finds.
    """
    if CUMULATIVE:
        DIGIT: tl.constexpr = 1 << 35
        step = tl.where(i == 0, 1 - (n - 1).to(tl.int64) * DIGIT, DIGIT)
        before = tl.atomic_add(counter_ptr, tl.where(mine, step, 0), sem="relaxed")
        batches = (before & (DIGIT - 1)) + tl.where(before < 0, 0, 1)  # below 0: 0 has counted
        return ratio(tl.full([], 1.0, tl.float64), batches)
    else:
        if counter_ptr is not None:
            tl.atomic_add(counter_ptr, 1, mask=(i == 0) & mine, sem="relaxed")
        return tl.full([], 0.0, tl.float64) + momentum


@triton.jit
def store_statistics(
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, k, delta, m2, c, mine, n, eps, weight
):  # fmt: skip
    """Store mean and rstd, update the running statistics (unbiased variance) where mine; return (mean, rstd).

    weight: of this batch in the running statistics, fp64.
    """
    mean = k + delta
    rstd = reciprocal_std(ratio(m2, n), eps)
    weight = weight.to(mean.dtype)
    tl.store(mean_ptr + c, mean, mask=mine)
    tl.store(rstd_ptr + c, rstd, mask=mine)
    if running_mean_ptr is not None:
        old = widen(tl.load(running_mean_ptr + c, mask=mine, other=0.0))
        new = old * (1.0 - weight) + mean * weight
        tl.store(running_mean_ptr + c, new.to(running_mean_ptr.dtype.element_ty), mask=mine)
    if running_var_ptr is not None:
        old = widen(tl.load(running_var_ptr + c, mask=mine, other=0.0))
        new = old * (1.0 - weight) + ratio(m2, n - 1.0) * weight
        tl.store(running_var_ptr + c, new.to(running_var_ptr.dtype.element_ty), mask=mine)
    return mean, rstd


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles"])
def statistics_kernel(
    x_ptr,
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, counter_ptr, workspace_ptr, ticket_ptr,
    R, C, width, tiles,
    eps: tl.float64, momentum: tl.float64,
    T: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """mean = E[x], rstd = (E[(x - mean)^2] + eps)^(-1/2), running statistics; the last program of a group merges.

    Program (i, j) owns channel group i, tiles [j * tiles, (j + 1) * tiles).  x: [R, L] any float.  mean, rstd: [C],
    workspace: [P, 3, C] fp32 (fp64).  running_*: [C] any float or None.  counter: [] int64 or None, one batch more.
    ticket: [groups] int32, zero before and after.  Reads x once.
    """
    group = tl.program_id(0)
    c, live = channels(group, C, width, T)
    total = tile_count(R, width, T)
    t0 = tl.program_id(1) * tiles
    k, delta, m2, _ = program_statistics(x_ptr, group, t0, tl.minimum(t0 + tiles, total), R, C, width, T)
    store_partial(workspace_ptr, k, delta, m2, c, live, C)
    tl.debug_barrier()  # every store of this program comes before the release below
    ticket = ticket_ptr + group
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    if last:
        k, delta, m2 = merge_statistics(workspace_ptr, group, c, live, R, C, width, tiles, T, BLOCK_P)
        n = filled(total, group, R, width, T).to(m2.dtype)
        weight = count_batch(counter_ptr, group, tl.num_programs(0), last, momentum, CUMULATIVE)
        store_statistics(
            mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, k, delta, m2, c, live, n, eps, weight
        )
        tl.store(ticket, 0)  # ready for the next launch or graph replay
