"""What runs for a given problem, and why: layout, path, tile and splits as one frozen value.

Pure Python: no tensors, no CUDA. `print(make_plan("forward", "planes", (256, 64, 3136), 2))` answers on any machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from tritonbn.geometry import (
    BYTES_PER_THREAD,
    NARROW_BYTES_PER_THREAD,
    RESIDENT_BYTES,
    WARPS,
    Tile,
    geometry,
    power_of_two,
)

Operation = Literal["forward", "backward", "inference"]
Layout = Literal["rows", "planes"]
Path = Literal["single", "split"]

# One program reads so much again sooner than a second launch takes (3 us at 20 GB/s); if a quarter of the SMs work.
SMALL_SLICE = 64 << 10
# Up to here the slices of all running programs (two per SM) stay in an L2 of 50 MB, so the second pass finds them.
L2_SLICE = 128 << 10
# Split reductions take 128 registers at most: two programs of 8 warps per SM. More only in 17x17 planes, where a row of
# lanes is a tile: 136 where they store dx, up to 230 with an activation.
# A wave of them should be full.
PROGRAMS_PER_SM = 2
FULL_WAVE = 0.95
# Most tiles of an elementwise program: enough to share the load of the channels' values, few enough to balance.
APPLY_TILES = 4
# The second axis of a CUDA grid.
GRID_LIMIT = 65535


@dataclass(frozen=True)
class Device:
    """What the plan must know of a GPU."""

    name: str = "NVIDIA H200"
    sms: int = 132


@dataclass(frozen=True)
class Plan:
    """One way to run an operation on [N, C, S] (rows: S = 1): the answer of `make_plan`."""

    operation: Operation
    layout: Layout
    path: Path
    shape: tuple[int, int, int]  # N, C, S
    itemsize: int  # bytes of an element
    rows: int  # R, outer rows of the kernels' view [R, L]
    width: int  # S / V in planes of one channel, else L / V
    tile: Tile
    num_warps: int
    groups: int  # channel groups, the first axis of every grid
    tiles: int  # tiles of a channel group
    reduce_tiles: int  # tiles per program of a reduction
    apply_tiles: int  # tiles per program of an elementwise pass
    merge_block: int  # partials that the last program merges at a time

    @property
    def splits(self) -> int:
        """Programs that share the reduction of a channel group."""
        return -(-self.tiles // self.reduce_tiles)

    @property
    def apply_splits(self) -> int:
        """Programs that share the elementwise pass over a channel group."""
        return -(-self.tiles // self.apply_tiles)

    @property
    def geometry(self) -> str:
        """plane, column or folded, as in `kernels/tiles.py`."""
        if self.tile.GROUP == 1:
            return "plane"
        return "column" if self.tile.SPAN * self.tile.FOLD == 1 else "folded"

    @property
    def access_bits(self) -> int:
        """Bits of the tiles' loads and stores, for 16-byte aligned tensors."""
        return min(128, 8 * self.itemsize * self.tile.V)

    @property
    def bit_bytes(self) -> int:
        """Bytes that hold a bit per element, laid out as in `kernels/tiles.py`: the same for all plans of a tensor.

        numel / 8 where the lanes of a channel group are whole bytes; else each group's lanes, or each channel's in
        planes, end with a byte that is not full.
        """
        tile = self.tile
        if tile.GROUP == 1:
            return self.rows * self.groups * -(-self.width * tile.V // 8)
        lanes = tile.GROUP * tile.SPAN * tile.FOLD
        return self.rows * (-(-self.width * tile.V // 8) if lanes % 8 == 0 else self.groups * -(-lanes // 8))

    def __str__(self) -> str:
        N, C, S = self.shape
        shape = f"[{N}, {C}]" if self.layout == "rows" else f"[{N}, {C}, {S}]"
        launches = 1 if self.path == "single" or self.operation == "inference" else 2
        programs = f"{self.groups} x {self.splits if launches == 2 else 1}"
        if self.operation == "inference":
            programs = f"{self.groups} x {self.apply_splits}"
        return (
            f"{self.operation} {self.layout} {shape} x {self.itemsize} bytes: path {self.path}, {launches} launch"
            f"{'es' if launches == 2 else ''}, {programs} programs of {self.num_warps} warps, {self.geometry} tiles "
            f"{self.tile.BLOCK_L} x {self.tile.BLOCK_R} ({self.tile.GROUP} channels), "
            f"{self.access_bits}-bit access"
        )


@dataclass(frozen=True)
class _Forced:
    path: Path | None = None
    splits: int | None = None


_forced = _Forced()


class forced:
    """Context in which every plan takes `path` and its reductions `splits` programs per channel group.

    For tests and measurements; of the whole process, because autograd runs backwards in threads of its own.
    """

    def __init__(self, path: Path | None = None, splits: int | None = None) -> None:
        if path is not None and path not in get_args(Path):
            raise ValueError(f"path must be one of {', '.join(get_args(Path))}, but got {path!r}")
        if splits is not None and not 1 <= splits <= GRID_LIMIT:
            raise ValueError(f"splits must be from 1 to {GRID_LIMIT}, but got {splits}")
        self._new = _Forced(path, splits)

    def __enter__(self) -> None:
        global _forced
        self._old, _forced = _forced, self._new

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._old


def fits(N: int, C: int, S: int) -> bool:
    """Whether 32-bit indices inside a program suffice for [N, C, S]; offsets into the tensor have 64 bits anyway."""
    one_plane = N * S if C == 1 else S
    return C < 1 << 28 and one_plane < 1 << 30 and N * S < (1 << 31) - (1 << 20)


def make_plan(
    operation: Operation,
    layout: Layout,
    shape: tuple[int, int, int],
    itemsize: int,
    device: Device = Device(),
    costly: bool = False,
) -> Plan:
    """The plan for `operation` on `[N, C, S]` with elements of `itemsize` bytes.

    Rows have their channels contiguous (S = 1; N counts all values of a channel), planes their S positions. `costly`
    is a backward that computes exponentials for each element.
    """
    return _make_plan(operation, layout, shape, itemsize, device, costly, _forced.path, _forced.splits)


@lru_cache(maxsize=4096)
def _make_plan(
    operation: Operation,
    layout: Layout,
    shape: tuple[int, int, int],
    itemsize: int,
    device: Device,
    costly: bool,
    path: Path | None,
    splits: int | None,
) -> Plan:
    N, C, S = shape
    if C == 1:  # one channel: all of the tensor is one plane, whatever the layout
        N, S = 1, N * S
    tile, width = geometry(N, C, S, itemsize)
    rows = N // tile.FOLD
    extent = S if tile.GROUP == 1 else tile.GROUP * tile.SPAN * tile.FOLD
    groups = -(-C // tile.GROUP)
    operands = 2 if operation == "backward" else 1
    if path is None:
        path = _path(groups, operands * rows * extent * itemsize, device)
    resident = RESIDENT_BYTES // operands if path == "single" and extent <= tile.BLOCK_L else 0
    block_r, num_warps = _block(rows, tile, itemsize, resident, costly)
    tiles = -(-rows // block_r) * -(-extent // tile.BLOCK_L)
    if splits is None:
        splits = _splits(groups, tiles, PROGRAMS_PER_SM * device.sms)
    return Plan(
        operation,
        layout,
        path,
        shape,
        itemsize,
        rows,
        width,
        tile._replace(BLOCK_R=block_r),
        num_warps,
        groups,
        tiles,
        reduce_tiles=-(-tiles // min(splits, tiles)),
        apply_tiles=max(1, min(APPLY_TILES, tiles * groups // (4 * device.sms)), -(-tiles // GRID_LIMIT)),
        merge_block=max(1, min(16, 1024 // tile.BLOCK_G)),
    )


def _block(rows: int, tile: Tile, itemsize: int, resident: int, costly: bool) -> tuple[int, int]:
    """Rows of a tile and its warps; a slice of so many resident bytes is one tile."""
    per_thread = BYTES_PER_THREAD if tile.V * itemsize >= 8 and not costly else NARROW_BYTES_PER_THREAD
    row_bytes = tile.BLOCK_L * itemsize
    block_r = power_of_two(rows)
    if block_r * row_bytes > resident:
        block_r = max(1, min(block_r, 32 * WARPS * per_thread // row_bytes))
    return block_r, max(1, min(WARPS, block_r * row_bytes // (32 * per_thread)))


def _path(groups: int, slice_bytes: int, device: Device) -> Path:
    """single where one program per group is no loss: little to read, or programs enough and a slice that L2 keeps."""
    for limit, programs in ((RESIDENT_BYTES, 0), (SMALL_SLICE, device.sms // 4), (L2_SLICE, device.sms)):
        if slice_bytes <= limit and groups >= programs:
            return "single"
    return "split"


def _splits(groups: int, tiles: int, wave: int) -> int:
    """The fewest programs per group that fill whole waves: the last one merges what all of them found."""

    def use(splits: int) -> float:
        programs = groups * splits
        return programs / (-(-programs // wave) * wave)

    candidates = range(1, min(tiles, max(4, 4 * wave // groups)) + 1)
    return next((s for s in candidates if use(s) >= FULL_WAVE), max(candidates, key=use))
