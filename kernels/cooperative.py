"""One launch for statistics and what follows them, by programs that wait for each other at a barrier of their group.

All programs must be on the GPU at a time: launched as a cooperative grid. Programs (i, 0) ... (i, P - 1) share channel
groups i, i + slots, i + 2 * slots ...; of each, program (i, j) owns tiles [j * tiles, (j + 1) * tiles). Where its
share is one tile, it keeps that; else so few groups are worked on at a time that L2 still has them at the second pass.
"""

import triton
import triton.language as tl

from .backward import input_gradients_again, merge_sums, program_sums, store_parameter_gradients, store_partial_sums
from .gradients import load_vectors
from .normalize import normalize_again
from .statistics import count_batch, merge_statistics, program_statistics, ratio, store_partial, store_statistics
from .tiles import channels, filled, load_scale, load_shift, tile_count


@triton.jit
def slot_barrier(semaphore_ptr):
    """Return once all programs of this one's slot arrived, with what they stored before; see CUDA's cooperative groups.

    What they add in a round is 2^30 together: it toggles bit 30 and leaves those below it zero, as they were at first,
    so the semaphore needs no reset.
    """
    HALF: tl.constexpr = 1 << 30
    step = tl.where(tl.program_id(1) == 0, HALF + 1 - tl.num_programs(1), 1)
    semaphore = semaphore_ptr + tl.program_id(0)
    tl.debug_barrier()  # every store of this program comes before the release below
    before = tl.atomic_add(semaphore, step, sem="acq_rel", scope="gpu")
    now = before
    while ((before ^ now) & HALF) == 0:
        now = tl.atomic_add(semaphore, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles", "groups"])
def cooperative_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,
    y_ptr, bits_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, counter_ptr, workspace_ptr, semaphore_ptr,
    R, C, width, tiles, groups,
    eps: tl.float64, momentum: tl.float64,
    T: tl.constexpr, ACT: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """Statistics, then y = activation((x - mean[c]) * rstd[c] * weight[c] + bias[c] + residual), in one launch.

    Program (i, j) owns range j of the tiles of groups i, i + slots, ...  x, residual (or None), y: [R, L] any float.
    bits: a bit per element or None.  mean, rstd: [C], workspace: [P, 3, C] fp32 (fp64).  weight, bias, running_*: [C]
    any float or None.  counter: [] int64 or None, one batch more.  semaphore: [slots] int32.  Reads x once from
    memory and, unless one tile is enough, again from L2, residual once, writes y and bits once.
    """
    total = tile_count(R, width, T)
    n = filled(total, tl.program_id(0), R, width, T).to(mean_ptr.dtype.element_ty)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, total)
    slot, slots = tl.program_id(0), tl.num_programs(0)
    weight = count_batch(counter_ptr, slot, slots, tl.program_id(1) == 0, momentum, CUMULATIVE)
    for i in tl.range(0, tl.cdiv(groups - slot, slots)):
        group = slot + i * slots
        c, live = channels(group, C, width, T)
        k, delta, m2, first = program_statistics(x_ptr, group, t0, t1, R, C, width, T)
        store_partial(workspace_ptr, k, delta, m2, c, live, C)
        slot_barrier(semaphore_ptr)
        k, delta, m2 = merge_statistics(workspace_ptr, group, c, live, R, C, width, tiles, T, BLOCK_P)
        mean, rstd = store_statistics(
            mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, k, delta, m2, c, live & (tl.program_id(1) == 0),
            n, eps, weight,
        )  # fmt: skip
        scale = load_scale(weight_ptr, rstd, c, live)
        shift = load_shift(bias_ptr, rstd, c, live)
        normalize_again(
            first, x_ptr, residual_ptr, y_ptr, bits_ptr, group, t0, t1, mean, scale, shift, R, C, width,
            T, ACT, T.ONCE,
        )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=["R", "C", "width", "tiles", "groups"])
def cooperative_backward_kernel(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, workspace_ptr, semaphore_ptr,
    R, C, width, tiles, groups,
    T: tl.constexpr, ACT: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # fmt: on
    """The sums, then dx = weight * rstd * (dz - s1 / M - (x - mean) * rstd^2 * s2 / M), in one launch.

    Program (i, j) owns range j of the tiles of groups i, i + slots, ...  dy, x, residual (or None),
    dx, dresidual (or None): [R, L] any float.  bits: a bit per element or None.  mean, rstd: [C], workspace: [P, 2, C]
    fp32 (fp64).  weight, bias, dweight, dbias: [C] any float or None.  semaphore: [slots] int32.  Reads dy and x (and
    residual or bits) once from memory and, unless one tile is enough, again from L2, writes dx once; dresidual is
    written first and read in place of dy, residual and bits.
    """
    total = tile_count(R, width, T)
    M = filled(total, tl.program_id(0), R, width, T).to(rstd_ptr.dtype.element_ty)
    t0 = tl.program_id(1) * tiles
    t1 = tl.minimum(t0 + tiles, total)
    for i in tl.range(0, tl.cdiv(groups - tl.program_id(0), tl.num_programs(0))):
        group = tl.program_id(0) + i * tl.num_programs(0)
        c, live = channels(group, C, width, T)
        mean, rstd, scale, shift = load_vectors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, live)
        s1, s2, dz0, x0 = program_sums(
            dy_ptr, x_ptr, residual_ptr, bits_ptr, None, dresidual_ptr, group, t0, t1, mean, scale, shift,
            R, C, width, T, ACT,
        )  # fmt: skip
        store_partial_sums(workspace_ptr, s1, s2, c, live, C)
        slot_barrier(semaphore_ptr)
        s1, s2 = merge_sums(workspace_ptr, c, live, C, T, BLOCK_P)
        store_parameter_gradients(dweight_ptr, dbias_ptr, s1, s2, rstd, c, live & (tl.program_id(1) == 0))
        input_gradients_again(
            dz0, x0, dy_ptr, x_ptr, residual_ptr, bits_ptr, dx_ptr, dresidual_ptr, group, t0, t1,
            mean, scale, shift, ratio(s1, M), ratio(s2 * rstd, M) * rstd, R, C, width,
            T, ACT, T.ONCE,
        )  # fmt: skip
