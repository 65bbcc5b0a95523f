"""The layers that the operator benchmark measures, and what it says of them together."""

import argparse
import math
from typing import Any

import pytest

from bench import shapes, summary
from bench.problem import Problem, layouts_of
from bench.shapes import SETS, Layer
from bench.summary import Row


@pytest.mark.parametrize(
    ("name", "layers", "distinct", "elements"),
    [
        ("resnet50-256", 53, 12, 2_845_179_904),
        ("mnist", 3, 1, 18_000),
        ("bninception-32", 69, 21, 119_569_408),
        ("mobilenet", 52, 19, 1_709_596_672),
        ("densenet", 121, 65, 1_002_717_184),
    ],
)
def test_layers_are_those_of_the_networks(name: str, layers: int, distinct: int, elements: int) -> None:
    """Counts of the census in the networks' papers and implementations."""
    found = SETS[name]()
    assert sum(layer.count for layer in found) == layers
    assert len({layer.shape for layer in found}) == len(found) == distinct
    assert sum(layer.numel * layer.count for layer in found) == elements


def test_resnet50_counts_each_grid() -> None:
    counts = {layer.shape[1:]: layer.count for layer in SETS["resnet50-256"]()}
    assert counts == {
        (64, 112, 112): 1, (64, 56, 56): 6, (128, 56, 56): 1, (256, 56, 56): 4, (128, 28, 28): 7, (256, 28, 28): 1,
        (512, 28, 28): 5, (256, 14, 14): 11, (512, 14, 14): 1, (1024, 14, 14): 7, (512, 7, 7): 5, (2048, 7, 7): 4,
    }  # fmt: skip


def test_awkward_shapes_need_64_bit_offsets_and_odd_planes() -> None:
    found = shapes.shapes_of("awkward")
    assert max(math.prod(s) for s in found) > 2**31
    assert {(60, 100), (140_000, 1), (4096, 2, 49), (8, 192, 17, 17)} <= set(found)


def test_a_shape_is_read_from_the_command_line() -> None:
    assert shapes.shape("64,256,14,14") == (64, 256, 14, 14)
    for wrong in ("64", "64,x", "0,3,2", "1,8,1,1", "1,2,3,4,5,6", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected N,C"):
            shapes.shape(wrong)


@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        ((60, 100), ("nc",)),
        ((4, 3, 7), ("nchw",)),
        ((4, 3, 7, 7), ("nchw", "channels_last")),
        ((4, 1, 7, 7), ("nchw",)),
        ((4, 3, 2, 7, 7), ("nchw", "channels_last")),
    ],
)
def test_layouts_of_a_shape(shape: tuple[int, ...], layouts: tuple[str, ...]) -> None:
    assert layouts_of(shape) == layouts


@pytest.mark.parametrize(
    ("epilogue", "dtype", "forward", "backward"),
    [
        ("bn", "bf16", 2 * 2, 3 * 2),
        ("bn", "fp32", 2 * 4, 3 * 4),
        ("bn+relu", "bf16", 2 * 2, 3 * 2),
        ("bn+silu", "fp16", 2 * 2, 3 * 2),
        ("bn+add+relu", "bf16", 3 * 2 + 1 / 8, 4 * 2 + 1 / 8),
        ("bn+sigmoid", "fp32", 2 * 4, 3 * 4),
    ],
)
def test_the_floor_is_that_of_the_design(epilogue: str, dtype: str, forward: float, backward: float) -> None:
    found = Problem("custom", Layer((16, 32, 8, 8)), "nchw", dtype, epilogue)
    elements = 16 * 32 * 8 * 8
    assert found.floor_bytes("forward") == forward * elements
    assert found.floor_bytes("backward") == backward * elements
    assert found.floor_bytes("both") == (forward + backward) * elements


def test_bits_of_the_floor_are_whole_bytes() -> None:
    assert Problem("custom", Layer((3, 3)), "nc", "bf16", "bn+add+relu").floor_bytes("forward") == 3 * 9 * 2 + 2


def row(**values: Any) -> Row:
    """Ours on a layer of ResNet-50 in 10 us at half of the floor, but for what is given."""
    default: Row = {
        "set": "resnet50-256", "shape": [256, 64, 56, 56], "count": 1, "layout": "nchw", "dtype": "bf16",
        "epilogue": "bn", "direction": "forward", "provider": "tritonbn", "us": 10.0, "us_low": 9.0, "us_high": 11.0,
        "timed_by": "graph", "slots": 3, "cold": True, "floor_bytes": 100, "gb_per_s": 10.0, "percent_of_floor": 50.0,
        "ratio_to_best_peer": None, "peak_bytes": 7, "plan": None, "path": "split", "error": None, "gpu": "G",
        "torch": "2", "triton": "3", "commit": "c",
    }  # fmt: skip
    default.update(values)  # type: ignore[typeddict-item]
    return default


def test_percents_are_weighted_by_traffic() -> None:
    small, large = row(percent_of_floor=40.0), row(percent_of_floor=80.0, count=3, floor_bytes=200)
    failed, peer = row(us=None, percent_of_floor=None, error="no"), row(provider="eager", percent_of_floor=1.0)
    assert summary.weighted_percent([small, large, failed, peer]) == pytest.approx(7 / (1 / 40 + 6 / 80))
    assert summary.weighted_percent([small, peer], provider="eager") == 1.0
    assert summary.weighted_percent([peer]) is None


def test_ratios_are_to_the_best_peer_and_weighted() -> None:
    other = {"shape": [256, 64, 7, 7], "count": 3}
    rows = [
        row(), row(provider="eager", us=40.0), row(provider="eager-no-cudnn", us=20.0),
        row(provider="compile", us=5.0), row(provider="attorch", us=4.0),
        row(**other), row(**other, provider="eager", us=160.0), row(**other, provider="compile", us=None, error="no"),
    ]  # fmt: skip
    assert summary.geometric_mean_ratio(rows, "eager") == pytest.approx((2.0 * 16.0**3) ** (1 / 4))
    assert summary.geometric_mean_ratio(rows, "compile") == pytest.approx(0.5)
    assert summary.geometric_mean_ratio(rows, None) == pytest.approx((0.4 * 16.0**3) ** (1 / 4))
    assert summary.geometric_mean_ratio([row()], "eager") is None
    summary.fill_ratios(rows)
    assert [r["ratio_to_best_peer"] for r in rows if r["provider"] == "tritonbn"] == pytest.approx([0.4, 16.0])
    assert all(r["ratio_to_best_peer"] is None for r in rows if r["provider"] != "tritonbn")


def test_rows_of_other_problems_are_not_compared() -> None:
    for differs in ({"layout": "channels_last"}, {"dtype": "fp32"}, {"epilogue": "bn+relu"}, {"direction": "backward"},
                    {"shape": [1, 2]}, {"set": "densenet"}):  # fmt: skip
        assert summary.ratios([row(), row(provider="eager", **differs)]) == []


def test_losses_are_in_order_and_failures_apart() -> None:
    bad, worse = row(us=20.0), row(us=30.0, direction="backward")
    won, failed = row(direction="both"), row(us=None, error="out of memory", layout="nc")
    peers = [row(provider="eager", us=15.0, direction=d) for d in ("forward", "backward", "both")]
    rows = [bad, worse, won, failed, *peers]
    assert summary.losses(rows) == [worse, bad]
    assert summary.failures(rows) == [failed]


def test_targets_without_rows_are_not_measured() -> None:
    found = summary.targets([])
    assert all(target.value is None and target.reached is None for target in found)
    assert [target.line for target in found] == [90, 90, 90, 90, 75, 1.5, 2.0, 0.95, 1.15, 1.0]


def test_targets_are_reached_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "resnet50-256", lambda: [Layer((256, 64, 56, 56))])
    rows: list[Row] = []
    for layout in ("nchw", "channels_last"):
        for direction in ("forward", "backward"):
            for epilogue, eager in (("bn", 16.0), ("bn+add+relu", 19.0)):
                which = {"layout": layout, "direction": direction, "epilogue": epilogue}
                percent = 95.0 if layout == "nchw" else 85.0
                rows += [row(**which, percent_of_floor=percent), row(**which, provider="eager", us=eager),
                         row(**which, provider="compile", us=12.0)]  # fmt: skip
    small = row(shape=[256, 512, 7, 7], percent_of_floor=10.0, floor_bytes=0)  # 12.8 MB, and next to no weight
    both, half = row(direction="both", percent_of_floor=1.0), row(dtype="fp16", percent_of_floor=1.0)
    wall = [row(set="mnist", epilogue="bn+sigmoid", direction=d, shape=[60, 100]) for d in ("forward", "both")]
    wall += [row(set="mnist", epilogue="bn+sigmoid", direction=d, shape=[60, 100], provider="eager", us=us)
             for d, us in (("forward", 30.0), ("both", 9.0))]  # fmt: skip
    found = [(target.value, target.reached) for target in summary.targets([*rows, small, both, half], wall)]
    assert found == [
        (pytest.approx(95), True), (pytest.approx(95), True), (pytest.approx(85), False), (pytest.approx(85), False),
        (85.0, True), (pytest.approx(1.6), True), (pytest.approx(1.9), False), (pytest.approx(1.2), True),
        (pytest.approx(1.2), True), (pytest.approx(0.9), False),
    ]  # fmt: skip


def test_what_was_not_measured_in_full_is_not_reached() -> None:
    """A row that failed, or a layer that the budget left out, might be the one that misses the line."""
    layers = [row(shape=list(layer.shape), percent_of_floor=95.0) for layer in SETS["resnet50-256"]()]
    failed = row(us=None, percent_of_floor=None, error="out of memory", epilogue="bn+relu")
    for rows, reached in ((layers, True), (layers[1:], None), ([*layers, failed], None)):
        first = summary.targets(rows)[0]
        assert first.value == pytest.approx(95.0)
        assert first.reached is reached
