"""How a tensor is cut into tiles: the widest aligned access that its shape allows, with the least padding."""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

WARPS = 8
# Bytes of a streamed tile that a thread holds: two 128-bit loads. Accumulators are fp32, so 16-bit inputs make 2 x 16
# registers of sums. Narrow accesses need an address each, exponentials many temporaries: half as much.
BYTES_PER_THREAD = 32
NARROW_BYTES_PER_THREAD = 16
# The widest row of several channels: one tile of 8 warps. Larger odd planes are read one at a time, see ALIGN.
MAX_LANE_BYTES = 8 << 10
# Samples are read side by side if one program may merge all channels: few, or no merge because it has all of a tensor.
MAX_FOLDED_CHANNELS = 64
# What one program owns is one tile up to here, kept in registers: of x, or in the backward of dy and of x. Twice as
# much spills in most kernels.
RESIDENT_BYTES = 32 << 10


class Tile(NamedTuple):
    """The compile-time constants of a kernel's tile, T in `kernels/`; one compilation each."""

    GROUP: int  # channels of a program
    SPAN: int  # neighbouring lanes of one channel (plane: 1, the size is a run-time one)
    FOLD: int  # rows of the tensor that make one outer row
    V: int  # elements of the widest aligned access: divides L, and S in planes
    BLOCK_R: int  # rows of a tile
    BLOCK_L: int  # lanes of a tile
    BLOCK_G: int  # GROUP as a power of two
    BLOCK_F: int  # SPAN * FOLD as a power of two
    ONCE: bool = False  # all that a program reads is one tile
    STAGES: int = 1  # of the loads in a reduction's loop
    ROW_WARPS: int = 1  # warps that have rows of the same lanes
    ALIGN: int = 1  # planes that V is too narrow for are read from the multiple of ALIGN elements before their start

    @property
    def access(self) -> int:
        """Elements of the widest aligned access."""
        return max(self.V, self.ALIGN)


@lru_cache(maxsize=4096)
def geometry(N: int, C: int, S: int, itemsize: int) -> tuple[Tile, int]:
    """The tile (but for its rows) and the width in vectors that give the widest access with the least padding."""
    vector = 16 // itemsize
    in_plane, in_sample = gcd(S, vector), gcd(C * S, vector)
    fold = gcd(N, vector // in_sample)  # so many samples side by side make a row that vectors divide better
    folded = gcd(fold * C * S, vector)
    mergeable = C <= MAX_FOLDED_CHANNELS or N * C * S * itemsize <= RESIDENT_BYTES
    if folded > in_plane and mergeable and fold * C * S * itemsize <= MAX_LANE_BYTES:
        return _tile(C, S, fold, folded, C * S * fold), fold * C * S // folded
    if S == 1 and C > 1:  # narrow blocks give a short batch more programs, wide ones a long batch whole cache lines
        lanes = min(32 if N <= 512 else 64, power_of_two(C))
        return Tile(lanes, 1, 1, in_sample, 1, lanes, lanes, 1), C // in_sample
    group = _channel_group(C, S, vector, MAX_LANE_BYTES // itemsize)
    if group > 1:
        return _tile(group, S, 1, in_sample, group * S), C * S // in_sample
    align = in_sample if in_sample > in_plane and in_plane * itemsize < 8 else 1
    block = _lane_block(S + align - 1, N, itemsize)
    return Tile(1, 1, 1, in_plane, 1, block, 1, 1, ALIGN=align), S // in_plane


def _tile(group: int, span: int, fold: int, vector: int, lanes: int) -> Tile:
    return Tile(group, span, fold, vector, 1, power_of_two(lanes), power_of_two(group), power_of_two(span * fold))


def _channel_group(C: int, S: int, vector: int, most: int) -> int:
    """The fewest channels whose planes together are whole vectors, with little padding; 1 where single planes do."""
    in_sample = gcd(C * S, vector)
    if in_sample == gcd(S, vector) and S >= 128:
        return 1
    step = in_sample // gcd(S, in_sample)
    groups = range(step, min(C + step, most // S + 1), step)
    lanes = {g: -(-C // g) * power_of_two(g * S) for g in groups if g * S >= min(128, C * S)}
    return next((g for g in lanes if lanes[g] <= 1.25 * min(lanes.values())), 1)


def _lane_block(S: int, N: int, itemsize: int) -> int:
    """The widest block of lanes that wastes little of a plane, but no narrower than N rows need to fill 8 warps.

    At least 8 lanes, or the whole plane: a byte of packed bits belongs to one block.
    """
    most = 32 * WARPS * BYTES_PER_THREAD // itemsize
    least = min(power_of_two(S), max(8, most // power_of_two(N)))
    blocks = [1 << bit for bit in range(7, 13) if least <= 1 << bit <= most and 1 << bit < 2 * S] or [least]
    waste = {block: -(-S // block) * block / S for block in blocks}
    return max(block for block in blocks if waste[block] <= max(1.125, min(waste.values())))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
