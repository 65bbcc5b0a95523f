"""What the rows of the operator benchmark say together: means, losses, and the lines to cross. Reads no files."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypedDict

from bench.shapes import SETS

OURS = "tritonbn"
# Compared with torch's own: eager, and what its compiler makes of it. Other peers count for the best peer alone.
PEERS = {"eager": ("eager", "eager-no-cudnn"), "compile": ("compile", "compile-max-autotune")}
Against = Literal["eager", "compile"]
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
RESNET50 = "resnet50-256"
LARGE = 16_000_000  # bytes of a tensor above which launches no longer count


class Row(TypedDict):
    """One provider on one layer, as in `ops.json`. Times are microseconds per call, with quartiles; null if failed."""

    set: str
    shape: list[int]  # [N, C, ...]
    count: int  # how often the layer occurs in its network
    layout: str  # nchw (contiguous), channels_last, or nc (fully connected)
    dtype: str  # bf16, fp16, fp32
    epilogue: str  # bn, bn+relu, bn+add+relu, bn+silu, bn+sigmoid
    direction: str  # forward, backward, both
    provider: str
    us: float | None
    us_low: float | None
    us_high: float | None
    timed_by: str | None  # graph, events or wall
    slots: int | None  # inputs in rotation
    cold: bool | None  # whether together they exceed the L2 cache fourfold
    floor_bytes: int
    gb_per_s: float | None  # of floor_bytes
    percent_of_floor: float | None
    ratio_to_best_peer: float | None  # ours only: the best peer's time over ours
    peak_bytes: int | None  # allocated by one call, above what was there before
    plan: str | None
    path: str | None
    error: str | None
    gpu: str
    torch: str
    triton: str | None
    commit: str | None


class Target(NamedTuple):
    """A line to cross; value is None where nothing was measured, reached also where not all was."""

    text: str
    line: float
    value: float | None
    reached: bool | None
    at_most: bool = False  # the line; else it is the least

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Those of `HEAD`."""
        line = f"at {'most' if self.at_most else 'least'} {self.line:g}"
        if self.value is None:
            return self.text, line, "not measured", "-"
        return self.text, line, f"{self.value:.4g}", {True: "yes", False: "no", None: "incomplete"}[self.reached]


HEAD = ("line to cross, set for an H200", "line", "measured", "reached")


def problem(row: Row) -> tuple[object, ...]:
    """What the rows of all providers have in common."""
    return (row["set"], *row["shape"], row["layout"], row["dtype"], row["epilogue"], row["direction"])


def group(row: Row) -> tuple[str, str, str, str, str]:
    """The rows that one line of the summary holds."""
    return row["set"], row["dtype"], row["layout"], row["epilogue"], row["direction"]


def weight(row: Row) -> int:
    """A layer's share of a network's traffic."""
    return row["count"] * row["floor_bytes"]


def weighted_percent(rows: Iterable[Row], provider: str = OURS) -> float | None:
    """Percent of the floor of a provider's timed rows together: all floors over all times; None without any.

    It is the harmonic mean of the rows, by their share of traffic.
    """
    found = [(r["percent_of_floor"], weight(r)) for r in rows if r["provider"] == provider]
    known = [(percent, share) for percent, share in found if percent is not None]
    return sum(share for _, share in known) / sum(share / p for p, share in known) if known else None


def best(rows: Iterable[Row], providers: Sequence[str] | None = None) -> dict[tuple[object, ...], float]:
    """By problem, the time of the fastest of these peers (None: all of them)."""
    times: dict[tuple[object, ...], float] = {}
    for row in rows:
        us = row["us"]
        if us is not None and row["provider"] != OURS and (providers is None or row["provider"] in providers):
            times[problem(row)] = min(us, times.get(problem(row), us))
    return times


def ratios(rows: Sequence[Row], against: Against | None = None) -> list[tuple[float, Row]]:
    """(best peer's time over ours, our row) for every problem on which ours and such a peer were timed."""
    peers = best(rows, None if against is None else PEERS[against])
    ours = [(row, row["us"]) for row in rows if row["provider"] == OURS and problem(row) in peers]
    return [(peers[problem(row)] / us, row) for row, us in ours if us is not None]


def geometric_mean_ratio(rows: Sequence[Row], against: Against | None = "eager") -> float | None:
    """Weighted geometric mean of the best peer's time over ours, above 1 where we win; None if nothing compares."""
    found = ratios(rows, against)
    total = sum(weight(row) for _, row in found)
    return math.exp(sum(math.log(ratio) * weight(row) for ratio, row in found) / total) if found else None


def losses(rows: Sequence[Row]) -> list[Row]:
    """Our rows that are slower than the best peer, the worst first."""
    return [row for ratio, row in sorted(ratios(rows), key=lambda pair: pair[0]) if ratio < 1]


def failures(rows: Iterable[Row]) -> list[Row]:
    """Our rows without a time."""
    return [row for row in rows if row["provider"] == OURS and row["error"] is not None]


def fill_ratios(rows: Sequence[Row]) -> None:
    """Write into each of our rows how it compares with the best peer so far."""
    for ratio, row in ratios(rows):
        row["ratio_to_best_peer"] = ratio


def targets(rows: Sequence[Row], wall: Sequence[Row] = ()) -> list[Target]:
    """The lines to cross on an H200, and where we stand."""
    resnet = [r for r in rows if r["set"] == RESNET50 and r["dtype"] == "bf16" and r["direction"] != "both"]
    found = []
    for layout in ("nchw", "channels_last"):
        for direction in ("forward", "backward"):
            mine = [r for r in resnet if r["layout"] == layout and r["direction"] == direction]
            text = f"ResNet-50, bf16, {layout}, {direction}: percent of the floor, weighted mean"
            found.append(target(text, 90, weighted_percent(mine), mine))
    large = [r["percent_of_floor"] for r in resnet if r["provider"] == OURS and tensor_bytes(r) > LARGE]
    text = "ResNet-50, bf16: percent of the floor, worst layer above 16 MB"
    found.append(target(text, 75, min((p for p in large if p is not None), default=None), resnet))
    for epilogue, line in (("bn", 1.5), ("bn+add+relu", 2.0)):
        mine = [r for r in resnet if r["epilogue"] == epilogue]
        text = f"ResNet-50, bf16, {epilogue}: speed-up over the best of torch eager, weighted mean"
        found.append(target(text, line, geometric_mean_ratio(mine, "eager"), mine))
    compared = [ratio for ratio, _ in ratios(rows, "compile")]
    found.append(target("all rows: speed-up over torch.compile, worst row", 0.95, min(compared, default=None), rows))
    mean = geometric_mean_ratio(rows, "compile")
    found.append(target("all rows: speed-up over torch.compile, weighted mean", 1.15, mean, rows))
    mnist = [r for r in wall if r["set"] == "mnist" and r["epilogue"] == "bn+sigmoid"]
    slowest = min((ratio for ratio, _ in ratios(mnist, "eager")), default=None)
    found.append(
        target("MNIST layers, eager calls: speed-up of BN + sigmoid over torch's two, worst", 1.0, slowest, mnist)
    )
    return found


def target(text: str, line: float, value: float | None, rows: Sequence[Row]) -> Target:
    """Reached or not; None where rows of ours, or layers of ResNet-50, have no time yet."""
    ours = [row for row in rows if row["provider"] == OURS]
    timed = [row for row in ours if row["us"] is not None]
    layers = {tuple(row["shape"]) for row in timed if row["set"] == RESNET50}
    complete = len(timed) == len(ours) and (not layers or layers >= {layer.shape for layer in SETS[RESNET50]()})
    return Target(text, line, value, None if value is None or not complete else value >= line)


def tensor_bytes(row: Row) -> int:
    return math.prod(row["shape"]) * ITEMSIZE[row["dtype"]]
