"""How far the inputs of units drift while a network trains, from their percentiles `[times, units, 3]` at some steps.

The outer percentiles are 15 and 85: between them is the width of a distribution, in the middle its median.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SETTLED = 1000  # steps before which nothing counts: the first ones move everything


class Drift(NamedTuple):
    """Of a layer: the median over its units of each figure."""

    shift: float  # range of the median over time / mean width
    growth: float  # largest width over time / smallest
    width_first: float  # at the first time that counts
    width_last: float


def drift(percentiles: Tensor, steps: Sequence[int]) -> Drift:
    late = settled(percentiles, steps)
    widths = width(late)
    figures = (shift(late), widths.amax(0) / widths.amin(0), widths[0], widths[-1])
    return Drift(*[float(figure.median()) for figure in figures])


def typical_unit(percentiles: Tensor, steps: Sequence[int]) -> int:
    """The unit with the median shift."""
    shifts = shift(settled(percentiles, steps))
    return int(shifts.argsort()[len(shifts) // 2])


def settled(percentiles: Tensor, steps: Sequence[int]) -> Tensor:
    """The times that count; all of a run that ends before."""
    late = [index for index, step in enumerate(steps) if step >= SETTLED]
    return percentiles[late] if late else percentiles


def shift(late: Tensor) -> Tensor:
    """Of each unit."""
    medians = late[..., 1]
    return (medians.amax(0) - medians.amin(0)) / width(late).mean(0)


def width(percentiles: Tensor) -> Tensor:
    return percentiles[..., 2] - percentiles[..., 0]
