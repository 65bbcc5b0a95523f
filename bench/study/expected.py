"""What to expect of the paper's MNIST experiment at full length on MNIST, and whether a run lies inside.

Bands are for one run: the range of six to eight seeds with torch's batch norm on a CPU, widened by about its own width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.training import ARMS, Row

STEPS = 50_000
DATA = "MNIST"
GAIN_SEEDS = 3

Band = tuple[float, float]
# By step or by percent: without batch norm, with it.
ACCURACY: dict[int, tuple[Band, Band]] = {
    1_000: ((35, 68), (89.5, 92)),
    5_000: ((89.5, 92), (93.3, 95.2)),
    10_000: ((93.4, 95.3), (95.3, 96.7)),
    50_000: ((96.6, 97.2), (97.05, 97.8)),
}
ARRIVAL: dict[int, tuple[Band, Band]] = {90: ((4_000, 6_000), (500, 1_000)), 95: ((10_000, 14_000), (5_000, 8_000))}
GAIN: Band = (0.3, 0.7)  # points at the end, same seed, mean of three seeds or more


@dataclass(frozen=True)
class Finding:
    what: str
    unit: str  # "%", "step" or "points"
    arm: str
    seen: list[float | None]  # one per seed, all of which must lie inside; None: never
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return all(value is not None and self.low <= value <= self.high for value in self.seen)

    @property
    def content(self) -> dict[str, Any]:
        return asdict(self) | {"inside": self.inside}


def inapplicable(rows: Sequence[Row], data: str) -> str:
    """Why nothing is to be expected of these rows; "" if something is."""
    if data != DATA:
        return f"the values expected are for {DATA}, not for {data}"
    steps = rows[0]["steps"]
    return "" if steps == STEPS else f"the values expected are for {STEPS:,} steps, not for {steps:,}"


def check(rows: Sequence[Row]) -> list[Finding]:
    """Of rows for which something is to be expected."""
    found = []
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        for step, bands in ACCURACY.items():
            found.append(
                Finding(f"accuracy at {step:,}", "%", arm, [at(row, step) for row in mine], *bands[arm != "none"])
            )
        for percent, bands in ARRIVAL.items():
            seen: list[float | None] = [first(row, percent) for row in mine]
            found.append(Finding(f"first with {percent}%", "step", arm, seen, *bands[arm != "none"]))
    for arm, gains in all_gains(rows).items():
        if len(gains) >= GAIN_SEEDS:
            mean = sum(gains) / len(gains)
            found.append(Finding(f"gain at {STEPS:,}, mean of {len(gains)} seeds", "points", arm, [mean], *GAIN))
    return found


def at(row: Row, step: int) -> float | None:
    return next((percent for seen, percent in row["curve"] if seen == step), None)


def first(row: Row, percent: float) -> int | None:
    """The first evaluation with so much."""
    return next((int(step) for step, seen in row["curve"] if seen >= percent), None)


def all_gains(rows: Sequence[Row]) -> dict[str, list[float]]:
    """For each arm with batch norm the points of accuracy that it ends above the one without, seed by seed."""
    none = {row["seed"]: row["test_accuracy"] for row in rows if row["arm"] == "none"}
    arms = [arm for arm in ARMS if arm != "none"]
    return {arm: [row["test_accuracy"] - none[row["seed"]] for row in rows if row["arm"] == arm] for arm in arms}
