"""How a program sees its part of the tensor: tiles of lanes by rows, lanes folded into channels and spread back.

Every kernel reads the tensor as [R, L]: R outer rows of L neighbouring elements, the lanes. A program works on one
channel group at a time, and on a range of that group's tiles. Three geometries, told apart by the constants T
(`tritonbn.geometry.Tile`):

plane   GROUP = 1                a program owns one channel of [N, C, S]; its lanes are the S positions, in blocks
column  SPAN = FOLD = 1          a lane is a channel: [M, C]
folded  otherwise                a lane is (row of FOLD, channel of GROUP, position of SPAN): several channels whose
                                 S positions are neighbours, or several short rows of [M, C], read as one wide row

A tile is [lanes, rows], with what is summed along the last axis: sums are trees there, in Triton's interpreter too.
Where a branch on a constant returns, the other one needs its `else`: Triton compiles what follows a static return.
"""

import triton
import triton.language as tl


def compiles_for_cuda(_semantic=None):
    """Whether what calls it is being compiled for CUDA, not for another GPU or run by the interpreter; a constant."""
    options = getattr(getattr(_semantic, "builder", None), "options", None)
    return tl.constexpr(getattr(options, "backend_name", None) == "cuda")  # a name of Triton's own: without it, False


compiles_for_cuda.__triton_builtin__ = True  # it is given _semantic then, as functions of triton.language are


@triton.jit
def widen(x):
    """x in the dtype of the arithmetic: fp64 stays fp64, all others become fp32."""
    if x.dtype == tl.float64:
        return x
    elif x.dtype == tl.bfloat16 and x.numel > 1 and compiles_for_cuda():  # two instructions for two of them, not three
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def lead(group, width, T: tl.constexpr):
    """Lanes before a plane: it is read from a multiple of ALIGN elements on."""
    return (group.to(tl.int64) * (width * T.V) % T.ALIGN).to(tl.int32)


@triton.jit
def lane_blocks(width, T: tl.constexpr):
    """Blocks of lanes that a plane needs, whatever its lead."""
    return tl.cdiv(width * T.V + (T.ALIGN - 1), T.BLOCK_L)


@triton.jit
def corner(t, width, T: tl.constexpr):
    """(row, lane) where tile t of a plane begins."""
    blocks = lane_blocks(width, T)
    rows = t // blocks
    return rows * T.BLOCK_R, (t - rows * blocks) * T.BLOCK_L


@triton.jit
def load_tile(ptr, at, mask, LAST: tl.constexpr = False):
    """A tile in its own dtype, 0 where the mask is False.

    LAST: nothing reads it again soon, so what is written meanwhile shall displace it in L2, not what is yet to be read.
    """
    if LAST:
        return tl.load(ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def tile(group, t, R, C, width, T: tl.constexpr):
    """Offsets [BLOCK_L, BLOCK_R] int64 and mask of tile t of a channel group; lane blocks are the inner order.

    width is S / V in planes and L / V elsewhere: so the compiler knows that V divides both. With ALIGN the mask is that
    of whole accesses, and the tile has elements of the neighbouring planes, which `within` takes out.
    """
    row = tl.arange(0, T.BLOCK_R)
    lane = tl.arange(0, T.BLOCK_L)
    if T.GROUP == 1:
        S = width * T.V
        first_row, first_lane = corner(t, width, T)
        row += first_row
        lane += first_lane
        start = group.to(tl.int64) * S
        length = S.to(tl.int64) * C
        live = lane < S
        if T.ALIGN > 1:  # which divides the length, and so the compiler knows it
            start = start // T.ALIGN * T.ALIGN
            length = length // T.ALIGN * T.ALIGN
            live = lane < tl.cdiv(lead(group, width, T) + S, T.ALIGN) * T.ALIGN
    else:
        EXTENT: tl.constexpr = T.FOLD * T.GROUP * T.SPAN
        row += t * T.BLOCK_R
        start = group.to(tl.int64) * EXTENT
        length = width.to(tl.int64) * T.V
        live = (lane < EXTENT) & (start + lane < length)
    at = (start + lane)[:, None] + row.to(tl.int64)[None, :] * length
    return at, live[:, None] & (row < R)[None, :]


@triton.jit
def at_edge(group, t, R, width, T: tl.constexpr):
    """Whether tile t may have lanes of other planes or rows beyond the last, and where each row of its lanes starts.

    (edge, lane [BLOCK_L, 1], end [1, BLOCK_R]): the plane's lanes are those from 0 to end - 1.
    """
    S = width * T.V
    row, lane = corner(t, width, T)
    lane -= lead(group, width, T)
    edge = (lane < 0) | (lane + T.BLOCK_L > S) | (row + T.BLOCK_R > R)
    end = tl.where(row + tl.arange(0, T.BLOCK_R) < R, S, 0)
    return edge, (lane + tl.arange(0, T.BLOCK_L))[:, None], end[None, :]


@triton.jit
def between(lane, end):
    """0 <= lane < end, by one comparison."""
    return lane.to(tl.uint32, bitcast=True) < end.to(tl.uint32, bitcast=True)


@triton.jit
def within(v, mask, group, t, R, width, T: tl.constexpr):
    """v [BLOCK_L, BLOCK_R] of tile t, 0 outside of the channel group and of the tensor; mask is that of `tile`."""
    if T.ALIGN == 1:
        return tl.where(mask, v, 0.0)
    else:
        edge, lane, end = at_edge(group, t, R, width, T)
        if edge:
            v = tl.where(between(lane, end), v, 0.0)
        return v


@triton.jit
def store_edge(ptr, at, mask, value):
    """Store a tile of which an access may be half another plane's: an element at a time."""
    tl.store(ptr + at, value, mask=mask)


@triton.jit
def store_tile(ptr, at, mask, value, group, t, R, width, T: tl.constexpr):
    """Store tile t, rounded to the dtype of the tensor; at and mask are those of `tile`."""
    value = value.to(ptr.dtype.element_ty)
    if T.ALIGN == 1:
        tl.store(ptr + at, value, mask=mask)
    else:
        edge, lane, end = at_edge(group, t, R, width, T)
        if edge:
            store_edge(ptr, at, between(lane, end), value)
        else:
            tl.store(ptr + at, value)


@triton.jit
def bits(group, t, R, C, width, T: tl.constexpr, UNIT: tl.constexpr):
    """Offsets [BLOCK_L / UNIT, BLOCK_R] int64, in units of UNIT bits, and mask of a bit for each element of tile t.

    Bit i of a byte is lane 8 * j + i. Each row starts a byte; so does each channel group (in planes, each channel),
    unless a group's lanes are whole bytes anyway. UNIT is 8, or 32 where all that are whole words (WORDS).
    """
    row = tl.arange(0, T.BLOCK_R)
    unit = tl.arange(0, (T.BLOCK_L + UNIT - 1) // UNIT)
    if T.GROUP == 1:
        first_row, first_lane = corner(t, width, T)
        row += first_row
        unit += first_lane // UNIT
        run = tl.cdiv(width * T.V + (T.ALIGN - 1), UNIT)
        length = run.to(tl.int64) * C
        live = unit < run
        start = group.to(tl.int64) * run
    else:
        row += t * T.BLOCK_R
        EXTENT: tl.constexpr = T.FOLD * T.GROUP * T.SPAN
        RUN: tl.constexpr = (EXTENT + UNIT - 1) // UNIT
        start = group.to(tl.int64) * RUN
        length = tl.cdiv(width.to(tl.int64) * T.V, EXTENT) * RUN
        if EXTENT % UNIT == 0:
            length = tl.cdiv(width.to(tl.int64) * T.V, UNIT)
        live = (unit < RUN) & (start + unit < length)
    at = (start + unit)[:, None] + row.to(tl.int64)[None, :] * length
    return at, live[:, None] & (row < R)[None, :]


@triton.jit
def store_bits(ptr, tile, group, t, R, C, width, T: tl.constexpr):
    """Store a tile of booleans, packed: words where threads share a byte, else each its own bytes."""
    UNIT: tl.constexpr = 32 if T.WORDS and T.V < 8 else 8
    PER: tl.constexpr = UNIT if T.BLOCK_L >= UNIT else T.BLOCK_L
    at, mask = bits(group, t, R, C, width, T, UNIT)
    shift = tl.arange(0, PER)[None, :, None]
    packed = tl.sum(tl.reshape(tile.to(tl.int32), [T.BLOCK_L // PER, PER, T.BLOCK_R]) << shift, 1)
    if UNIT == 32:
        tl.store(ptr.to(tl.pointer_type(tl.int32), bitcast=True) + at, packed, mask=mask)
    else:
        tl.store(ptr + at, packed.to(tl.uint8), mask=mask)


@triton.jit
def load_bits(ptr, group, t, R, C, width, T: tl.constexpr):
    """A tile of booleans [BLOCK_L, BLOCK_R] that `store_bits` stored; False outside of the tensor."""
    UNIT: tl.constexpr = 32 if T.WORDS else 8
    PER: tl.constexpr = UNIT if T.BLOCK_L >= UNIT else T.BLOCK_L
    at, mask = bits(group, t, R, C, width, T, UNIT)
    if UNIT == 32:
        ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    packed = tl.load(ptr + at, mask=mask, other=0).to(tl.int32)
    unpacked = (packed[:, None, :] >> tl.arange(0, PER)[None, :, None]) & 1 != 0
    return tl.reshape(unpacked, [T.BLOCK_L, T.BLOCK_R])


@triton.jit
def tile_count(R, width, T: tl.constexpr):
    """Tiles of a channel group."""
    if T.GROUP == 1:
        return tl.cdiv(R, T.BLOCK_R) * lane_blocks(width, T)
    else:
        return tl.cdiv(R, T.BLOCK_R)


@triton.jit
def filled(t, group, R, width, T: tl.constexpr):
    """Values that each channel of a group has in tiles [0, t); int64, t a scalar or a block."""
    if T.GROUP == 1:
        S = width * T.V
        blocks = lane_blocks(width, T)
        rows = tl.minimum(t // blocks * T.BLOCK_R, R)
        lanes = tl.minimum(tl.maximum(t % blocks * T.BLOCK_L - lead(group, width, T), 0), S)
        begun = tl.minimum(R - rows, T.BLOCK_R).to(tl.int64) * lanes
        return rows.to(tl.int64) * S + begun
    else:
        return tl.minimum(t * T.BLOCK_R, R).to(tl.int64) * (T.FOLD * T.SPAN)


@triton.jit
def channels(group, C, width, T: tl.constexpr):
    """The channels [BLOCK_G] int32 of a group, and which of them exist."""
    g = tl.arange(0, T.BLOCK_G)
    c = group * T.GROUP + g
    if T.GROUP == T.BLOCK_L:  # lanes are channels: V divides C, and the compiler must know it
        return c, c < width * T.V
    else:
        return c, (g < T.GROUP) & (c < C)


@triton.jit
def load_channels(ptr, c, live):
    """Per-channel values [BLOCK_G] in the dtype of the arithmetic."""
    return widen(tl.load(ptr + c, mask=live, other=0.0))


@triton.jit
def load_scale(weight_ptr, rstd, c, live):
    """rstd * weight [BLOCK_G]; an absent weight is 1."""
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * load_channels(weight_ptr, c, live)
    return scale


@triton.jit
def load_shift(bias_ptr, rstd, c, live):
    """bias [BLOCK_G]; an absent one is 0."""
    shift = tl.zeros_like(rstd)
    if bias_ptr is not None:
        shift = load_channels(bias_ptr, c, live)
    return shift


@triton.jit
def normalize(x, mean, scale, shift):
    """(x - mean, (x - mean) * scale + shift) of a tile; the mean is subtracted first, so a large one costs no digits.

    Forward and backward share it: where the backward computes it again, each sign comes out as it did.
    """
    d = widen(x) - mean
    return d, d * scale + shift


@triton.jit
def rounded(v):
    """v, rounded. A product that was fused with the first addition of threads would make their sums differ by a bit."""
    return v + 0.0  # which no compiler may leave out: it is not what -0 is


@triton.jit
def fold(v, T: tl.constexpr):
    """Sum a tile [BLOCK_L, BLOCK_R] over rows and lanes to one value per channel [BLOCK_G]."""
    if T.GROUP == 1:
        return tl.sum(tl.ravel(rounded(v)), 0, keep_dims=True)
    else:
        return fold_parts(tl.reshape(v, [1, T.BLOCK_L, T.BLOCK_R]), 1, T)


@triton.jit
def fold_two(v, w, T: tl.constexpr):
    """`fold` of two tiles; of rows with the barriers of one: elsewhere that would take many registers."""
    if T.GROUP == 1 or T.SPAN > 1:
        return fold(v, T), fold(w, T)
    else:
        both = tl.permute(tl.join(v, w), [2, 0, 1])
        return tl.split(tl.trans(tl.reshape(fold_parts(both, 2, T), [2, T.BLOCK_G])))


@triton.jit
def fold_parts(v, N: tl.constexpr, T: tl.constexpr):
    """Sum N tiles [N, BLOCK_L, BLOCK_R] of several channels to [N * BLOCK_G], through shared memory once.

    Rows are summed in a thread, then in a warp. What the ROW_WARPS warps that share lanes have left, neighbouring
    threads read again from neighbouring addresses; Triton's sum across warps would write and read with a stride.
    """
    W: tl.constexpr = T.ROW_WARPS
    ROWS: tl.constexpr = 32 * T.V // T.BLOCK_L if 32 * T.V > T.BLOCK_L else 1  # that a warp reads at a time
    Q: tl.constexpr = ROWS if T.BLOCK_R >= W * ROWS else 1
    v = tl.sum(tl.reshape(rounded(v), [N, T.BLOCK_L, T.BLOCK_R // (W * Q), W, Q]), 2)
    v = tl.sum(v, 3)  # [N, BLOCK_L, W]
    K: tl.constexpr = W * T.FOLD * T.SPAN
    if K == 1:
        return tl.reshape(v, [N * T.BLOCK_L])
    else:
        # k counts what a channel g sums: neighbours of a warp's threads are k where those are neighbouring lanes,
        # else g; the shape is [N, A, B, B, G, K], of which all but the last two are registers of a thread.
        BLOCK_K: tl.constexpr = W * T.BLOCK_F
        LK: tl.constexpr = (32 if BLOCK_K >= 32 else BLOCK_K) if T.SPAN > 1 else 1
        LG: tl.constexpr = (8 if T.BLOCK_G >= 8 else T.BLOCK_G) if T.SPAN > 1 else T.BLOCK_G
        i = tl.arange(0, N * T.BLOCK_G * BLOCK_K)
        k = i % LK + i // (LK * LG) % (BLOCK_K // LK) * LK
        g = i // LK % LG + i // (LG * BLOCK_K) % (T.BLOCK_G // LG) * LG
        live = (g < T.GROUP) & (k < K)
        f = k // T.SPAN
        at = f // T.FOLD * T.BLOCK_L + f % T.FOLD * (T.GROUP * T.SPAN) + g * T.SPAN + k % T.SPAN
        at += i // (T.BLOCK_G * BLOCK_K) * (W * T.BLOCK_L)
        v = tl.gather(tl.reshape(tl.permute(v, [0, 2, 1]), [N * W * T.BLOCK_L]), tl.where(live, at, 0), 0)
        B: tl.constexpr = 8 if BLOCK_K // LK >= 8 else BLOCK_K // LK
        v = tl.reshape(tl.where(live, v, 0.0), [N, T.BLOCK_G // LG, BLOCK_K // (LK * B), B, LG, LK])
        v = tl.sum(tl.sum(v, 2), 2)
        if LK > 1:
            v = tl.sum(v, 3)
        return tl.reshape(v, [N * T.BLOCK_G])


@triton.jit
def sum_two_partials(v, w):
    """Sum two [BLOCK_G, BLOCK_P] over the partials, as `fold_parts` does."""
    G: tl.constexpr = v.shape[0]
    P: tl.constexpr = v.shape[1]
    both = tl.permute(tl.join(v, w), [2, 1, 0])
    if G > 1:
        both = tl.gather(tl.reshape(both, [2 * P * G]), tl.arange(0, 2 * P * G), 0)
    return tl.split(tl.trans(tl.sum(tl.reshape(both, [2, P, G]), 1)))


@triton.jit
def spread(v, T: tl.constexpr):
    """Values per channel [BLOCK_G] as a column that broadcasts over a tile: [BLOCK_L, 1], or [1, 1] in planes."""
    if T.GROUP == 1 or T.SPAN * T.FOLD == 1:
        return v[:, None]
    else:
        channel = tl.arange(0, T.BLOCK_L) // T.SPAN % T.GROUP
        if T.SPAN == 1 and T.BLOCK_G > T.V:  # neighbouring threads read channels V apart: at neighbouring addresses
            v = tl.reshape(tl.trans(tl.reshape(v, [T.BLOCK_G // T.V, T.V])), [T.BLOCK_G])
            channel = channel % T.V * (T.BLOCK_G // T.V) + channel // T.V
        return tl.gather(v, channel, 0)[:, None]
