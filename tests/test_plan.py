"""Plans by value: what runs, decided without a GPU."""

from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sound import assert_sound
from tritonbn.plan import Device, fits, forced, make_plan

H200 = Device("NVIDIA H200", 132)


@pytest.mark.parametrize(
    ("layout", "shape", "itemsize", "expected"),
    [
        pytest.param("rows", (60, 100, 1), 4, ("single", "column", 128), id="mnist"),
        pytest.param("rows", (60, 100, 1), 2, ("single", "folded", 128), id="mnist-two-rows-make-whole-vectors"),
        pytest.param("rows", (61, 100, 1), 2, ("single", "column", 64), id="odd-batch-cannot-pair-rows"),
        pytest.param("rows", (100_000, 100, 1), 2, ("split", "column", 64), id="many-channels-are-merged-in-groups"),
        pytest.param("rows", (802_816, 64, 1), 2, ("split", "column", 128), id="channels-last-56x56"),
        pytest.param("rows", (140_000, 1, 1), 4, ("split", "plane", 128), id="one-channel-is-a-plane"),
        pytest.param("planes", (256, 64, 12544), 2, ("split", "plane", 128), id="resnet-112x112"),
        pytest.param("planes", (256, 256, 196), 2, ("split", "folded", 128), id="resnet-14x14"),
        pytest.param("planes", (256, 512, 49), 2, ("split", "folded", 128), id="resnet-7x7"),
        pytest.param("planes", (32, 2048, 49), 2, ("single", "folded", 128), id="many-groups-small-slices"),
        pytest.param("planes", (4096, 2, 49), 2, ("split", "folded", 128), id="two-channels-four-samples-a-row"),
        pytest.param("planes", (8, 192, 1225), 2, ("single", "plane", 128), id="odd-plane-too-long-to-group"),
        pytest.param("planes", (8, 191, 1225), 2, ("single", "plane", 16), id="samples-that-are-no-whole-vectors"),
    ],
)
def test_choice(layout: Any, shape: tuple[int, int, int], itemsize: int, expected: tuple[str, str, int]) -> None:
    plan = make_plan("forward", layout, shape, itemsize, H200)
    assert (plan.path, plan.geometry, plan.access_bits) == expected


def test_few_channels_still_fill_the_gpu() -> None:
    """One program per channel would leave most of it idle."""
    for layout, shape in (("planes", (256, 64, 3136)), ("rows", (802_816, 64, 1)), ("planes", (32, 2, 65536))):
        plan = make_plan("forward", layout, shape, 2, H200)  # type: ignore[arg-type]
        assert plan.groups * plan.splits >= H200.sms


def test_more_sms_more_splits() -> None:
    small, large = (make_plan("forward", "rows", (802_816, 64, 1), 2, Device("x", sms)) for sms in (20, 160))
    assert 36 <= small.splits <= 40
    assert 290 <= large.splits <= 320


def test_forced_path_and_splits() -> None:
    with forced("split", splits=3):
        plan = make_plan("backward", "rows", (6000, 100, 1), 4, H200)
        assert (plan.path, plan.splits) == ("split", 3)
        with forced("single"):
            assert make_plan("backward", "rows", (6000, 100, 1), 4, H200).path == "single"
        assert make_plan("backward", "rows", (6000, 100, 1), 4, H200).path == "split"
    assert make_plan("backward", "rows", (60, 100, 1), 4, H200).path == "single"


def test_forced_rejects_what_is_not_a_plan() -> None:
    with pytest.raises(ValueError, match="path must be one of single, cooperative, stream, split, but got 'fast'"):
        forced("fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="splits must be from 1 to 65535, but got 0"):
        forced(splits=0)


def test_print_says_what_runs() -> None:
    text = str(make_plan("forward", "planes", (256, 512, 49), 2, H200))
    assert text.startswith("forward planes [256, 512, 49] x 2 bytes: path split, 2 launches, 64 x 4 programs")
    assert "folded tiles 512 x 8 (8 channels), 128-bit access" in text


@settings(max_examples=500, deadline=None)
@given(
    rows=st.booleans(),
    shape=st.tuples(st.integers(1, 3000), st.integers(1, 700), st.integers(1, 5000)),
    itemsize=st.sampled_from([2, 4, 8]),
    operation=st.sampled_from(["forward", "backward", "inference"]),
    sms=st.integers(1, 200),
    cooperative=st.booleans(),
)
def test_every_plan_is_sound(
    rows: bool, shape: tuple[int, int, int], itemsize: int, operation: Any, sms: int, cooperative: bool
) -> None:
    N, C, S = shape
    if rows:
        shape, S = (N * S, C, 1), 1
    device = Device("x", sms, cooperative=cooperative)
    assert_sound(make_plan(operation, "rows" if rows else "planes", shape, itemsize, device), device)


@pytest.mark.parametrize("operation", ["forward", "backward", "inference"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [("rows", (1 << 29, 3, 1)), ("rows", (70_000_000, 32, 1)), ("rows", (2, 1 << 29, 1)), ("planes", (1, 1, 10**9)),
     ("planes", (70, 32, 1_000_000)), ("planes", (1 << 20, 2, 1000))],
)  # fmt: skip
def test_huge_shapes_keep_the_grid_legal(layout: Any, shape: tuple[int, int, int], operation: Any) -> None:
    assert prod(shape) > 2**29
    plan = make_plan(operation, layout, shape, 2, H200)
    assert max(plan.splits, plan.apply_splits) <= 65535
    assert plan.groups < 2**31


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((70, 32, 1_000_000), True), ((1 << 20, 1 << 14, 1), True), ((1, 1, 1 << 30), False), ((1 << 30, 1, 1), False),
     ((2, 3, 1 << 30), False), ((1 << 31, 2, 1), False), ((2, 1 << 28, 1), False)],
)  # fmt: skip
def test_what_32_bit_indices_reach(shape: tuple[int, int, int], expected: bool) -> None:
    assert fits(*shape) == expected


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_no_program_does_much_more_than_its_share(operation: Any, itemsize: int) -> None:
    """Large tensors of all kinds: the GPU is full, waves are full, and the merge at the end is short."""
    shapes = [("rows", (n, c, 1)) for n in (1024, 4096, 100_000) for c in (32, 100, 320, 640, 1020, 2044)]
    shapes += [
        ("planes", (n, c, s)) for n in (8, 64, 256) for c in (48, 64, 96, 192, 320) for s in (49, 196, 784, 3136)
    ]
    for layout, shape in shapes:
        if prod(shape) * itemsize < 8 << 20:
            continue
        with forced("split"):
            plan = make_plan(operation, layout, shape, itemsize, H200)  # type: ignore[arg-type]
        programs = plan.groups * plan.splits
        waves = -(-programs // 264)
        assert programs >= 0.6 * waves * 264, (plan, "a wave of programs is half empty")
        assert plan.splits * plan.tile.GROUP * 12 <= 256 << 10, (plan, "one program merges that many bytes")
        assert plan.splits / plan.merge_block <= 33, (plan, "one after another")
