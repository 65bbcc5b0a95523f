"""What holds for every plan that may run, whoever chose it."""

from tritonbn.device import Device
from tritonbn.geometry import RESIDENT_BYTES, power_of_two
from tritonbn.plan import Plan


def covered(plan: Plan) -> tuple[int, int]:
    """Elements that the tiles of all programs reach, counted as the kernels do, and those that there are."""
    tile, (N, C, S) = plan.tile, plan.shape
    if C == 1:
        N, S = 1, N * S
    if tile.GROUP == 1:
        row_length, extent = C * plan.width * tile.V, plan.width * tile.V
    else:
        row_length, extent = plan.width * tile.V, tile.FOLD * tile.GROUP * tile.SPAN
    lanes = min(extent, -(-extent // tile.BLOCK_L) * tile.BLOCK_L) * plan.groups
    return plan.rows * min(lanes, row_length), N * C * S


def assert_sound(plan: Plan, device: Device, largest: int = RESIDENT_BYTES) -> None:
    """Each element is reached once, all limits of the hardware are kept; a tile has at most `largest` bytes."""
    tile, (N, C, _) = plan.tile, plan.shape
    for block in (tile.BLOCK_R, tile.BLOCK_L, tile.BLOCK_G, tile.BLOCK_F, plan.merge_block, plan.num_warps):
        assert block & (block - 1) == 0, "blocks are powers of two"
    reached, there = covered(plan)
    assert reached == there, "each element belongs to one program"
    assert plan.rows * tile.FOLD == (1 if C == 1 else N)
    assert (tile.GROUP == 1) == (C == 1 or plan.geometry == "plane"), "the kernels take a group of one for a plane"
    assert tile.BLOCK_G >= tile.GROUP
    assert (1 if tile.GROUP == 1 else tile.SPAN * tile.FOLD) <= tile.BLOCK_F
    assert tile.GROUP == 1 or tile.GROUP * tile.SPAN * tile.FOLD <= tile.BLOCK_L
    assert plan.splits * plan.reduce_tiles >= plan.tiles > (plan.splits - 1) * plan.reduce_tiles
    assert plan.apply_splits * plan.apply_tiles >= plan.tiles
    assert max(plan.splits, plan.apply_splits) <= 65535, "the second axis of a grid"
    assert plan.splits * 3 * C <= 1 << 31, "offsets into the workspace have 32 bits"
    assert tile.access * plan.itemsize <= 16
    assert tile.ALIGN == 1 or C * plan.width * tile.V % tile.ALIGN == 0, "samples are whole accesses"
    assert tile.BLOCK_R * tile.BLOCK_L * plan.itemsize <= largest
    lanes = plan.width * tile.V if tile.GROUP == 1 else C * tile.SPAN * tile.FOLD
    assert min(8, power_of_two(lanes)) <= tile.BLOCK_L, "a byte of packed bits belongs to one block"
    if plan.cooperative:
        assert device.cooperative
        most = device.sms * max(1, 16 // plan.num_warps)
        assert plan.grid[0] * plan.grid[1] <= most, "programs that wait for each other are on the GPU at a time"
    if plan.path == "cooperative":
        assert plan.reduce_tiles == 1, "each program keeps its share in registers"
    if plan.operation == "inference":
        assert plan.path == "split"
        assert plan.launches == 1
