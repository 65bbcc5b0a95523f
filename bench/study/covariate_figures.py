"""The two explanations in figures, one number per run each, and who has the smaller one."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from bench.drift import SETTLED
from bench.mnist_tables import counted, spread

Row = dict[str, Any]  # of `bench.study.watched`
COLUMNS = ("smaller is steadier", "unit", "no batch norm", "batch norm", "with batch norm")
LAYERS = ("first", "second", "last")
DRIFT = "drift of the hidden distributions (Ioffe & Szegedy 2015)"
SMOOTHNESS = "smoothness of the loss (Santurkar et al. 2018)"


class Figure(NamedTuple):
    """Smaller is steadier, or smoother."""

    explanation: str
    name: str
    unit: str
    without: list[float]  # one per seed
    with_bn: list[float]

    @property
    def factor(self) -> float:
        """How many times smaller with batch norm, by the means."""
        return ratio(sum(self.without), sum(self.with_bn)) * len(self.with_bn) / len(self.without)

    @property
    def verdict(self) -> str:
        """In words; only where all seeds with batch norm are on one side of all seeds without."""
        if not all(map(math.isfinite, (*self.without, *self.with_bn))):
            return "not finite"
        if max(self.with_bn) < min(self.without):
            return f"{self.factor:.3g} times less"
        if min(self.with_bn) > max(self.without):
            return f"{ratio(1, self.factor):.3g} times more"
        return "seeds overlap"

    @property
    def line(self) -> list[str]:
        """The cells of `COLUMNS`."""
        values = (spread(seeds, "{:.3g}", " ") for seeds in (self.without, self.with_bn))
        return [self.name, self.unit, *values, self.verdict]


def ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def figures(rows: Sequence[Row]) -> list[Figure]:
    without, with_bn = ([row for row in rows if (row["arm"] == "none") is none] for none in (True, False))
    return [
        Figure(explanation, name, unit, [of(row) for row in without], [of(row) for row in with_bn])
        for explanation, name, unit, of in measures(rows[0]["moments"])
    ]


def measures(moments: Sequence[int]) -> Iterator[tuple[str, str, str, Callable[[Row], float]]]:
    """Explanation, name, unit, and the number of a run. The unit of a length is that of the parameters."""
    every = counted(moments[1] - moments[0], "step")
    windows = periods(moments)
    last = list(windows.values())[-1]
    for index, layer in enumerate(LAYERS):
        yield DRIFT, f"shift, {layer} hidden layer", "widths", partial(drifted, "shift", index)
        yield DRIFT, f"growth, {layer} hidden layer", "", partial(drifted, "growth", index)
        yield (
            DRIFT,
            f"change in {every}, {layer} hidden layer",
            "widths",
            partial(typical, last, partial(change, index)),
        )
    for period, window in windows.items():
        for name, unit, of in SERIES:
            yield f"{SMOOTHNESS}{period}", name, unit, partial(typical, window, of)


def periods(moments: Sequence[int]) -> dict[str, slice]:
    """Which moments are looked at together, by name: before and after things have settled; all of a shorter run."""
    first = sum(moment < SETTLED for moment in moments)
    if first == len(moments):
        return {"": slice(None)}
    return {f", first {SETTLED:,} steps": slice(first), f", from step {SETTLED:,} on": slice(first, None)}


def drifted(name: str, layer: int, row: Row) -> float:
    return float(row["layers"][layer]["drift"][name])


def change(layer: int, row: Row) -> list[float | None]:
    found: list[float | None] = row["layers"][layer]["change"]
    return found


def variation(row: Row) -> list[float]:
    found = row["landscape"]
    return [high - low for low, high in zip(found["loss_low"], found["loss_high"], strict=True)]


def relative_change(row: Row) -> list[float]:
    found = row["landscape"]
    return list(map(ratio, found["change_high"], found["gradient"]))


def of_landscape(name: str, row: Row) -> list[float]:
    found: list[float] = row["landscape"][name]
    return found


def over_layers(name: str, row: Row) -> list[float]:
    """The mean over the layers that have some, at each moment."""
    return [sum(layers) / len(layers) for layers in row["internal_shift"][name]]


def turn(row: Row) -> list[float]:
    return [1 - cosine for cosine in over_layers("cosine", row)]


def typical(window: slice, of: Callable[[Row], Sequence[float | None]], row: Row) -> float:
    """The median over these moments."""
    return median([value for value in of(row)[window] if value is not None])


SERIES: tuple[tuple[str, str, Callable[[Row], Sequence[float]]], ...] = (
    ("variation of the loss along the gradient", "nats", variation),
    ("largest change of the gradient along it", "nats/unit", partial(of_landscape, "change_high")),
    ("the same / length of the gradient", "", relative_change),
    ("effective beta-smoothness", "nats/unit^2", partial(of_landscape, "beta")),
    ("length of the gradient itself", "nats/unit", partial(of_landscape, "gradient")),
    ("internal covariate shift (definition 2.1)", "nats/unit", partial(over_layers, "distance")),
    ("the same as an angle: 1 - cosine", "", turn),
)
