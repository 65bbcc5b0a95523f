"""Does the tritonbn arm follow the nn.BatchNorm1d arm of the same seed?

A batch norm that differs from torch's by rounding only (float64 inside) gave, with 4 seeds of 10,000 steps on
a CPU, losses 2.3e-7 apart, equal accuracies and steps to 90%. The tolerances leave room for other devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.training import FIRST_LOSSES, Row

LOSS_TOLERANCE = 1e-4  # relative
ACCURACY_TOLERANCE = 0.5  # points
ARRIVAL_TOLERANCE = 1  # evaluation: one image can decide which of two it is


@dataclass(frozen=True)
class Finding:
    what: str
    unit: str
    allowed: float
    seen: list[float | None]  # one per seed; None where neither arm got so far

    @property
    def worst(self) -> float | None:
        known = [value for value in self.seen if value is not None]
        return largest(known) if known else None

    @property
    def passed(self) -> bool | None:
        """None without anything to compare."""
        return None if self.worst is None else self.worst <= self.allowed  # which a NaN is not


def check(rows: Sequence[Row]) -> list[Finding]:
    theirs, ours = ([row for row in rows if row["arm"] == arm] for arm in ("torch", "tritonbn"))
    pairs = list(zip(theirs, ours, strict=True))
    count = min(FIRST_LOSSES, rows[0]["steps"])
    first = "first step" if count == 1 else f"first {count} steps"
    return [
        Finding(
            f"relative loss difference, {first}",
            "",
            LOSS_TOLERANCE,
            [loss_difference(a["first_losses"], b["first_losses"]) for a, b in pairs],
        ),
        Finding(
            "difference in final test accuracy",
            "points",
            ACCURACY_TOLERANCE,
            [abs(a["test_accuracy"] - b["test_accuracy"]) for a, b in pairs],
        ),
        Finding(
            "difference in arrival at 90%",
            "evaluation",
            ARRIVAL_TOLERANCE,
            [arrival_difference(a, b) for a, b in pairs],
        ),
    ]


def loss_difference(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return largest([abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True)])


def largest(values: Sequence[float]) -> float:
    """The maximum, where a NaN counts as the largest: `max` may lose it."""
    return max(values, key=lambda value: (value != value, value))


def arrival_difference(theirs: Row, ours: Row) -> float | None:
    never = theirs["steps_to_90"] is None and ours["steps_to_90"] is None
    return None if never else abs(arrival(theirs) - arrival(ours))


def arrival(row: Row) -> int:
    """The first evaluation with 90%; a run that ended before could have had it at the next one."""
    reached = (index for index, (step, _) in enumerate(row["curve"]) if step == row["steps_to_90"])
    return next(reached, len(row["curve"]))
