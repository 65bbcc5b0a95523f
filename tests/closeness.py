"""Closeness is measured, not guessed: our error against the exact result, beside torch's own error."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Distance(NamedTuple):
    """Largest errors against the exact result, and one ulp of its largest value."""

    ours: float
    torchs: float
    ulp: float

    def worst(self, other: "Distance") -> "Distance":
        return Distance(*map(max, self, other))

    def is_fine(self, slack: float = 2.0) -> bool:
        """Whether ours is at most `slack` times torch's, plus one ulp."""
        return self.ours <= slack * self.torchs + self.ulp


def distance(ours: Tensor, theirs: Tensor, exact: np.ndarray, what: str = "") -> Distance:
    """`exact` is at least float64 (longdouble for float64 results); where it is not finite, ours must be the same."""
    assert ours.dtype == theirs.dtype, f"{what}: expected {theirs.dtype}, got {ours.dtype}"
    assert ours.shape == theirs.shape, f"{what}: expected {theirs.shape}, got {ours.shape}"
    finite = np.isfinite(exact)
    mine, torchs = wide(ours), wide(theirs)
    np.testing.assert_array_equal(mine[~finite], exact[~finite].astype(mine.dtype), err_msg=f"{what}: NaN or infinity")
    if not finite.any():
        return Distance(0.0, 0.0, 0.0)
    assert np.isfinite(mine[finite]).all(), f"{what}: NaN or infinity where the exact result is finite"
    error, allowed = (float(np.abs(t - exact)[finite].max()) for t in (mine, torchs))
    return Distance(error, allowed, torch.finfo(ours.dtype).eps * float(np.abs(exact[finite]).max()))


def assert_as_good_as_torch(distances: Callable[[int], Iterable[tuple[str, Distance]]]) -> None:
    """`distances(seed)`, by name, are fine on one draw of the data; where chance decides, the worst of four are."""
    worst: dict[str, Distance] = {}
    for seeds in ((0,), (1, 2, 3)):
        for seed in seeds:
            for name, found in distances(seed):
                worst[name] = found.worst(worst.get(name, found))
        if all(found.is_fine() for found in worst.values()):
            return
    raise AssertionError(f"errors (ours, torch's, one ulp): {worst}")


def wide(t: Tensor) -> np.ndarray:
    """The values of t in a dtype that holds far more digits: float64, or longdouble for float64."""
    values = t.detach().double().cpu().numpy()
    return values.astype(np.longdouble) if t.dtype == torch.float64 else values
