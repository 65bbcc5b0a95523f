"""The BN tax: the time that batch norm adds to a training step, by batch size. Reads rows, measures nothing."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

from bench.models.arms import AGAIN, itemsize
from bench.models.rows import Row

WITHOUT = "none"
PASSES = 8  # over a batch norm's tensor: 3 forward, 5 backward, with statistics of the batch
KEYS = ("model", "image", "layout", "dtype", "mode", "direction", "processes")


class Point(TypedDict):
    """One batch size. What is added is null where there is no step without batch norm to compare with."""

    batch: int
    ms: float
    ratio: float | None  # to the step without batch norm
    extra_us: float | None  # per example


# One provider over all batch sizes: `KEYS` and the provider; "points" by batch; t = a + b * batch as "fixed_ms" and
# "per_example_us", null with fewer than two batch sizes; "pass_bytes" of one pass over what batch norm sees, for one
# example.
Line = dict[str, Any]


class Fit(NamedTuple):
    fixed: float
    slope: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Least squares of y = fixed + slope * x; None unless there are two different x."""
    if len(set(x)) < 2:
        return None
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    moment = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = moment / sum((a - mean_x) ** 2 for a in x)
    return Fit(mean_y - slope * mean_x, slope)


def lines(rows: Iterable[Row]) -> list[Line]:
    """A line for each provider that was timed in training, the same setting but for the batch."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["ms"] is not None and row["direction"] == "training" and row["provider"] != AGAIN:
            groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return [line for group in groups.values() for line in of_group(group)]


def of_group(rows: Sequence[Row]) -> Iterator[Line]:
    without = {row["batch"]: row["ms"] for row in rows if row["provider"] == WITHOUT}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = sorted((row for row in rows if row["provider"] == provider), key=lambda row: int(row["batch"]))
        points = [point(row, without.get(row["batch"])) for row in mine]
        found = fit([p["batch"] for p in points], [p["ms"] for p in points])
        yield {key: mine[0][key] for key in KEYS} | {
            "provider": provider,
            "points": points,
            "fixed_ms": found and found.fixed,
            "per_example_us": found and 1e3 * found.slope,
            "pass_bytes": mine[0]["bn_elements"] * itemsize(mine[0]["dtype"]),
        }


def point(row: Row, without: float | None) -> Point:
    batch, ms = row["batch"], row["ms"]
    if without is None:
        return Point(batch=batch, ms=ms, ratio=None, extra_us=None)
    return Point(batch=batch, ms=ms, ratio=ms / without, extra_us=1e3 * (ms - without) / batch)


def floor_us(line: Line, bytes_per_second: float | None) -> float | None:
    """What `PASSES` over what batch norm sees take per example, at the speed of a copy."""
    return None if not bytes_per_second else 1e6 * PASSES * line["pass_bytes"] / bytes_per_second


def share_of_torchs(lines: Sequence[Line], provider: str, mode: str, batch: int) -> float | None:
    """What a provider adds to a step over what torch adds, both in one mode; None if not measured."""
    extra = {
        line["provider"]: p["extra_us"] for line in lines for p in line["points"]
        if line["mode"] == mode and p["batch"] == batch
    }  # fmt: skip
    ours, torchs = extra.get(provider), extra.get("torch")
    return None if ours is None or torchs is None or torchs <= 0 else ours / torchs
