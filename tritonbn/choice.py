"""A problem, what there is to choose, and the plan that follows: pure Python, no tensors, no CUDA."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from tritonbn.geometry import Tile, geometry, power_of_two

Operation = Literal["forward", "backward", "inference"]
Layout = Literal["rows", "planes"]
Path = Literal["single", "cooperative", "stream", "split"]

LARGEST_TILE = 64 << 10  # bytes that the registers of one program can hold, whatever else they have to
GRID_LIMIT = 65535  # the second axis of a CUDA grid


class Problem(NamedTuple):
    """An operation on [N, C, S] (rows: S = 1, and N counts all values of a channel)."""

    operation: Operation
    layout: Layout
    shape: tuple[int, int, int]
    itemsize: int  # bytes of an element
    costly: bool = False  # a backward that computes exponentials for each element

    @property
    def data(self) -> int:
        """Bytes of a tensor."""
        N, C, S = self.shape
        return N * C * S * self.itemsize

    @property
    def operands(self) -> int:
        """Tensors that the reduction reads: x, or dy and x."""
        return 2 if self.operation == "backward" else 1

    @property
    def view(self) -> tuple[int, int, int]:
        """(N, C, S); one channel is one plane, whatever the layout."""
        N, C, S = self.shape
        return (1, 1, N * S) if C == 1 else (N, C, S)

    @property
    def geometry(self) -> tuple[Tile, int]:
        """Tile (but for its rows) and width, see `geometry`."""
        return geometry(*self.view, self.itemsize)

    @property
    def rows(self) -> int:
        """R, outer rows of the kernels' view [R, L]."""
        return self.view[0] // self.geometry[0].FOLD


class Choice(NamedTuple):
    """What a plan is free to choose, and a table of measured plans holds."""

    path: Path
    block_r: int  # rows of a tile
    block_l: int  # lanes of a tile
    num_warps: int
    splits: int = 1  # programs that share the reduction of a channel group
    apply_tiles: int = 1  # tiles per program of an elementwise pass
    slots: int = 0  # channel groups that are worked on at a time; 0: all
    stages: int = 1  # of the loads in a reduction's loop

    def check(self) -> None:
        """Raise ValueError for what is no choice: it may come from a file that anyone has written to."""
        if self.path not in get_args(Path):
            raise ValueError(f"path must be one of {', '.join(get_args(Path))}, but got {self.path!r}")
        for name, most, powers in _RANGES:
            value = getattr(self, name)
            least = 0 if name == "slots" else 1
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be an integer from {least} to {most}, but got {value!r}")
            if powers and value & (value - 1):
                raise ValueError(f"{name} must be a power of two, but got {value}")


# Of the integers of a choice: the most, and whether they are powers of two.
_RANGES = (
    ("block_r", 1 << 20, True), ("block_l", 1 << 20, True), ("num_warps", 16, True), ("splits", GRID_LIMIT, False),
    ("apply_tiles", GRID_LIMIT, False), ("slots", GRID_LIMIT, False), ("stages", 8, False),
)  # fmt: skip


class Estimate(NamedTuple):
    """What a plan of batch norm alone, forward or backward, should cost."""

    device: str
    moved: int  # bytes that the kernels read and write
    floor: int  # bytes that must be read and written
    bandwidth: float  # of memory, bytes per second
    seconds: float  # that the plan should take
    bound: str  # what most of them go to: memory, L2, latency, issue (of instructions) or launch
    source: str  # where the plan is from
    constants: str  # of the model: assumed, or calibrated on this very GPU

    def __str__(self) -> str:
        floor = 1e6 * self.floor / self.bandwidth
        return (
            f"moves {self.moved:,} bytes; floor {self.floor:,} bytes = {floor:.1f} us at {self.bandwidth / 1e12:.1f} "
            f"TB/s of {self.device}; predicted {1e6 * self.seconds:.1f} us by {self.constants} constants, "
            f"bound by {self.bound}; plan from {self.source}"
        )


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
    groups: int  # channel groups
    tiles: int  # tiles of a channel group
    reduce_tiles: int  # tiles per program of a reduction
    splits: int  # programs that share the reduction of a channel group
    apply_tiles: int  # tiles per program of an elementwise pass
    apply_splits: int  # programs that share the elementwise pass over a channel group
    merge_block: int  # partials that are merged at a time
    slots: int  # channel groups that are worked on at a time: the first axis of a cooperative grid
    choice: Choice = field(compare=False, repr=False)
    estimator: Callable[["Plan"], Estimate] | None = field(default=None, compare=False, repr=False)
    kept: dict[Any, Any] | None = field(default=None, compare=False, repr=False)  # see `handles.py`

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """(R, C, width) of the kernels' view."""
        return self.rows, self.shape[1], self.width

    @cached_property
    def estimate(self) -> Estimate | None:
        """What it should cost, of a plan that `make_plan` made."""
        return None if self.estimator is None else self.estimator(self)

    @cached_property
    def launches(self) -> int:
        """Kernels that run, one after the other."""
        return 2 if self.path == "split" and self.operation != "inference" else 1

    @cached_property
    def cooperative(self) -> bool:
        """Whether programs wait for each other, so that all must be on the GPU at a time."""
        return self.path in ("cooperative", "stream")

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Programs of the reduction, or of the only launch."""
        if self.operation == "inference":
            return self.groups, self.apply_splits
        return (self.slots if self.cooperative else self.groups), self.splits

    @cached_property
    def geometry(self) -> str:
        """plane, column or folded, as in `kernels/tiles.py`."""
        if self.tile.GROUP == 1:
            return "plane"
        return "column" if self.tile.SPAN * self.tile.FOLD == 1 else "folded"

    @property
    def access_bits(self) -> int:
        """Bits of the tiles' loads and stores, for 16-byte aligned tensors."""
        return min(128, 8 * self.itemsize * self.tile.access)

    @cached_property
    def bit_bytes(self) -> int:
        """Bytes that hold a bit per element, laid out as in `kernels/tiles.py`: the same for all plans of a tensor.

        numel / 8 where the lanes of a channel group are whole bytes; else each group's lanes, or each channel's in
        planes, end with a byte that is not full.
        """
        tile = self.tile
        if tile.GROUP == 1:
            return self.rows * self.groups * -(-(self.width * tile.V + tile.ALIGN - 1) // 8)
        lanes = tile.GROUP * tile.SPAN * tile.FOLD
        return self.rows * (-(-self.width * tile.V // 8) if lanes % 8 == 0 else self.groups * -(-lanes // 8))

    def __str__(self) -> str:
        N, C, S = self.shape
        shape = f"[{N}, {C}]" if self.layout == "rows" else f"[{N}, {C}, {S}]"
        return (
            f"{self.operation} {self.layout} {shape} x {self.itemsize} bytes: path {self.path}, {self.launches} launch"
            f"{'es' if self.launches == 2 else ''}, {self.grid[0]} x {self.grid[1]} programs of {self.num_warps} warps"
            f", {self.geometry} tiles {self.tile.BLOCK_L} x {self.tile.BLOCK_R} ({self.tile.GROUP} channels), "
            f"{self.access_bits}-bit access" + (f"; {self.estimate}" if self.estimate else "")
        )


class Cut(NamedTuple):
    """A problem in tiles."""

    tile: Tile
    width: int
    rows: int
    groups: int  # of channels
    tiles: int  # of a group


def cut(problem: Problem, block_r: int, block_l: int) -> Cut:
    """The problem in tiles with these blocks, cut to its size.

    Raises ValueError where blocks of lanes would share a byte of packed bits.
    """
    N, C, positions = problem.view
    tile, width = geometry(N, C, positions, problem.itemsize)
    rows = N // tile.FOLD
    block_r = min(block_r, power_of_two(rows))
    positions += tile.ALIGN - 1
    lanes = power_of_two(positions if tile.GROUP == 1 else C)
    group, block_g = tile.GROUP, tile.BLOCK_G
    if group > 1 and tile.SPAN * tile.FOLD > 1:
        block_l = tile.BLOCK_L
    elif block_l < min(8, lanes):  # forward and backward may have different plans, but the bits between them are alike
        raise ValueError(f"a byte of packed bits belongs to one block of lanes, but got {block_l} of {lanes} lanes")
    elif group == 1:
        block_l = min(block_l, max(8, lanes))
    else:  # lanes are channels
        group = block_g = block_l = min(block_l, lanes)
    extent = positions if group == 1 else group * tile.SPAN * tile.FOLD
    tiles = -(-rows // block_r) * -(-extent // block_l)
    runs = extent if group > 1 else 0, width * tile.V + tile.ALIGN - 1, block_l
    words = all(lanes % 32 == 0 for lanes in runs)
    tile = tile._replace(GROUP=group, BLOCK_R=block_r, BLOCK_L=block_l, BLOCK_G=block_g, WORDS=words)
    return Cut(tile, width, rows, -(-C // group), tiles)


def build(problem: Problem, choice: Choice) -> Plan:
    """The plan for `problem` by `choice`; blocks and splits are cut to its size.

    Raises ValueError where the choice cannot run it, such as a slice that its tile does not hold.
    """
    tile, width, rows, groups, tiles = cut(problem, choice.block_r, choice.block_l)
    most = min(
        tiles, GRID_LIMIT, (1 << 31) // (3 * problem.shape[1])
    )  # the workspace [splits, 3, C] has 32-bit indices
    splits = 1 if choice.path == "single" else min(choice.splits, most)
    reduce_tiles = -(-tiles // splits)
    resident = choice.path != "split" and reduce_tiles == 1
    if not resident and choice.path == "cooperative":
        raise ValueError(f"path cooperative needs one tile for a program's share, but got {reduce_tiles}")
    if tile.BLOCK_R * tile.BLOCK_L * problem.itemsize > LARGEST_TILE:
        raise ValueError(f"a tile of {tile.BLOCK_L} x {tile.BLOCK_R} elements of {problem.itemsize} bytes is too large")
    apply_tiles = max(1, min(choice.apply_tiles, tiles), -(-tiles // GRID_LIMIT))
    return Plan(
        *problem[:2],
        choice.path,
        *problem[2:4],
        rows,
        width,
        tile._replace(ONCE=resident, STAGES=choice.stages, ROW_WARPS=_row_warps(tile, choice.num_warps)),
        choice.num_warps,
        groups,
        tiles,
        reduce_tiles,
        -(-tiles // reduce_tiles),
        apply_tiles,
        -(-tiles // apply_tiles),
        merge_block=max(1, min(16, 1024 // tile.BLOCK_G)),
        slots=min(choice.slots or groups, groups),
        choice=choice,
    )


def _row_warps(tile: Tile, num_warps: int) -> int:
    """Warps that have rows of the same lanes: Triton gives threads, then warps, to lanes first, a vector to each."""
    threads = max(1, tile.BLOCK_L // tile.access)
    return max(1, min(num_warps // max(1, threads // 32), tile.BLOCK_R // max(1, 32 // threads)))
