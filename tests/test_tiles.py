"""Offsets beyond 2**31: computed by the kernels' own functions, for tensors that nobody has to allocate."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tritonbn.geometry import Tile
from tritonbn.kernels.tiles import filled, tile

# GROUP, SPAN, FOLD, V, BLOCK_R, BLOCK_L, BLOCK_G, BLOCK_F
PLANE = Tile(1, 1, 1, 8, 2, 4, 1, 1)
COLUMN = Tile(4, 1, 1, 4, 2, 4, 4, 1)
FOLDED = Tile(2, 3, 1, 2, 2, 8, 2, 4)


@triton.jit(do_not_specialize=["t", "R", "C", "width"])  # type: ignore[untyped-decorator]
def offsets_kernel(offsets_ptr, live_ptr, filled_ptr, t, R, C, width, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """What program i thinks of tile t: offsets and mask [BLOCK_L, BLOCK_R], and the values before it."""
    at, mask = tile(tl.program_id(0), t, R, C, width, T)
    here = tl.program_id(0) * T.BLOCK_L * T.BLOCK_R
    here += tl.arange(0, T.BLOCK_L)[:, None] * T.BLOCK_R + tl.arange(0, T.BLOCK_R)[None, :]
    tl.store(offsets_ptr + here, at)
    tl.store(live_ptr + here, mask.to(tl.int8))
    tl.store(filled_ptr + tl.program_id(0), filled(t, tl.program_id(0), R, width, T))


@pytest.mark.parametrize(
    ("T", "t", "R", "C", "width", "row", "lane", "row_length", "start", "before"),
    [
        # Samples of 6 x 2**28 values; the fourth block of lanes of rows 4 and 5.
        pytest.param(PLANE, 2 * 2**26 + 3, 8, 6, 2**25, 4, 12, 6 * 2**28, 2**28, 4 * 2**28 + 24, id="plane"),
        pytest.param(COLUMN, 2**28 - 1, 2**29, 12, 3, 2**29 - 2, 0, 12, 4, 2**29 - 2, id="column"),
        pytest.param(FOLDED, 2**27, 2**29, 2**10, 3 * 2**9, 2**28, 0, 3 * 2**10, 6, 3 * 2**28, id="folded"),
    ],
)
def test_offsets_beyond_32_bits(
    T: Any, t: int, R: int, C: int, width: int, row: int, lane: int, row_length: int, start: int, before: int,
    device: torch.device,
) -> None:  # fmt: skip
    programs = 3
    shape = (programs, T.BLOCK_L, T.BLOCK_R)
    offsets = torch.zeros(shape, dtype=torch.int64, device=device)
    live = torch.zeros(shape, dtype=torch.int8, device=device)
    counts = torch.zeros(programs, dtype=torch.int64, device=device)
    offsets_kernel[(programs,)](offsets, live, counts, t, R, C, width, T=T)
    groups = torch.arange(programs, device=device).view(-1, 1, 1) * start
    lanes = torch.arange(T.BLOCK_L, device=device).view(1, -1, 1) + lane
    rows = torch.arange(T.BLOCK_R, device=device).view(1, 1, -1) + row
    assert torch.equal(offsets, groups + lanes + rows * row_length)
    assert int(offsets.max()) > 2**31
    used = torch.arange(T.BLOCK_L, device=device) < (T.BLOCK_L if T is not FOLDED else 6)
    assert torch.equal(live.bool(), used.view(1, -1, 1).expand(shape))
    assert counts.tolist() == [before] * programs
