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
    return tl.constexpr(_semantic is not None and _semantic.builder.options.backend_name == "cuda")


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
def load_tile(ptr, at, mask, LAST: tl.constexpr = False):
    """A tile in its own dtype, 0 where the mask is False.

    LAST: nothing reads it again soon, so what is written meanwhile shall displace it in L2, not what is yet to be read.
    """
    if LAST:
        return tl.load(ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, at, mask, value):
    """Store a tile, rounded to the dtype of the tensor."""
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile(group, t, R, C, width, T: tl.constexpr):
    """Offsets [BLOCK_L, BLOCK_R] int64 and mask of tile t of a channel group; lane blocks are the inner order.

    width is S / V in planes and L / V elsewhere: so the compiler knows that V divides both.
    """
    row = tl.arange(0, T.BLOCK_R)
    lane = tl.arange(0, T.BLOCK_L)
    if T.GROUP == 1:
        S = width * T.V
        blocks = tl.cdiv(S, T.BLOCK_L)
        row += t // blocks * T.BLOCK_R
        lane += t % blocks * T.BLOCK_L
        start = group.to(tl.int64) * S
        length = S.to(tl.int64) * C
        live = lane < S
    else:
        EXTENT: tl.constexpr = T.FOLD * T.GROUP * T.SPAN
        row += t * T.BLOCK_R
        start = group.to(tl.int64) * EXTENT
        length = width.to(tl.int64) * T.V
        live = (lane < EXTENT) & (start + lane < length)
    at = (start + lane)[:, None] + row.to(tl.int64)[None, :] * length
    return at, live[:, None] & (row < R)[None, :]


@triton.jit
def bits(group, t, R, C, width, T: tl.constexpr):
    """Offsets [BLOCK_L / 8, BLOCK_R] int64 and mask of the bytes that hold a bit for each element of tile t.

    Bit i of a byte is lane 8 * j + i. Each row starts a byte; so does each channel group (in planes, each channel),
    unless a group's lanes are whole bytes anyway.
    """
    row = tl.arange(0, T.BLOCK_R)
    byte = tl.arange(0, (T.BLOCK_L + 7) // 8)
    if T.GROUP == 1:
        blocks = tl.cdiv(width * T.V, T.BLOCK_L)
        row += t // blocks * T.BLOCK_R
        byte += t % blocks * (T.BLOCK_L // 8)  # one block where lanes are fewer than 8
        run = tl.cdiv(width * T.V, 8)
        length = run.to(tl.int64) * C
        live = byte < run
        start = group.to(tl.int64) * run
    else:
        row += t * T.BLOCK_R
        EXTENT: tl.constexpr = T.FOLD * T.GROUP * T.SPAN
        RUN: tl.constexpr = (EXTENT + 7) // 8
        start = group.to(tl.int64) * RUN
        length = tl.cdiv(width.to(tl.int64) * T.V, EXTENT) * RUN
        if EXTENT % 8 == 0:
            length = tl.cdiv(width.to(tl.int64) * T.V, 8)
        live = (byte < RUN) & (start + byte < length)
    at = (start + byte)[:, None] + row.to(tl.int64)[None, :] * length
    return at, live[:, None] & (row < R)[None, :]


@triton.jit
def store_bits(ptr, tile, group, t, R, C, width, T: tl.constexpr):
    """Store a tile of booleans, packed."""
    PER: tl.constexpr = 8 if T.BLOCK_L >= 8 else T.BLOCK_L
    at, mask = bits(group, t, R, C, width, T)
    shift = tl.arange(0, PER)[None, :, None]
    packed = tl.reshape(tile.to(tl.int32), [T.BLOCK_L // PER, PER, T.BLOCK_R]) << shift
    tl.store(ptr + at, tl.sum(packed, 1).to(tl.uint8), mask=mask)


@triton.jit
def load_bits(ptr, group, t, R, C, width, T: tl.constexpr):
    """A tile of booleans [BLOCK_L, BLOCK_R] that `store_bits` stored; False outside of the tensor."""
    PER: tl.constexpr = 8 if T.BLOCK_L >= 8 else T.BLOCK_L
    at, mask = bits(group, t, R, C, width, T)
    packed = tl.load(ptr + at, mask=mask, other=0).to(tl.int32)
    unpacked = (packed[:, None, :] >> tl.arange(0, PER)[None, :, None]) & 1 != 0
    return tl.reshape(unpacked, [T.BLOCK_L, T.BLOCK_R])


@triton.jit
def tile_count(R, width, T: tl.constexpr):
    """Tiles of a channel group."""
    if T.GROUP == 1:
        return tl.cdiv(R, T.BLOCK_R) * tl.cdiv(width * T.V, T.BLOCK_L)
    else:
        return tl.cdiv(R, T.BLOCK_R)


@triton.jit
def filled(t, R, width, T: tl.constexpr):
    """Values that each channel has in tiles [0, t); int64, t a scalar or a block."""
    if T.GROUP == 1:
        S = width * T.V
        blocks = tl.cdiv(S, T.BLOCK_L)
        rows = tl.minimum(t // blocks * T.BLOCK_R, R)
        begun = tl.minimum(R - rows, T.BLOCK_R).to(tl.int64) * tl.minimum(t % blocks * T.BLOCK_L, S)
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
def fold(v, T: tl.constexpr):
    """Sum a tile [BLOCK_L, BLOCK_R] over rows and lanes to one value per channel [BLOCK_G]."""
    v = tl.sum(v, 1)  # [BLOCK_L]
    if T.GROUP == 1:
        return tl.sum(v, 0, keep_dims=True)
    elif T.SPAN * T.FOLD == 1:
        return v
    else:
        g = tl.arange(0, T.BLOCK_G)[:, None]
        f = tl.arange(0, T.BLOCK_F)[None, :]
        live = (g < T.GROUP) & (f < T.SPAN * T.FOLD)
        lane = f // T.SPAN * (T.GROUP * T.SPAN) + g * T.SPAN + f % T.SPAN
        lane = tl.reshape(tl.where(live, lane, 0), [T.BLOCK_G * T.BLOCK_F])
        picked = tl.reshape(tl.gather(v, lane, 0), [T.BLOCK_G, T.BLOCK_F])
        return tl.sum(tl.where(live, picked, 0.0), 1)


@triton.jit
def spread(v, T: tl.constexpr):
    """Values per channel [BLOCK_G] as a column that broadcasts over a tile: [BLOCK_L, 1], or [1, 1] in planes."""
    if T.GROUP == 1 or T.SPAN * T.FOLD == 1:
        return v[:, None]
    else:
        channel = tl.arange(0, T.BLOCK_L) // T.SPAN % T.GROUP
        return tl.gather(v, channel, 0)[:, None]
