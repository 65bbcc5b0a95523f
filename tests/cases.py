"""Inputs, each named after what it breaks."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

Fill = Callable[[tuple[int, ...], torch.Generator], Tensor]


def gaussian(mean: float = 0.0, std: float = 1.0) -> Fill:
    return lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64) * std + mean


def constant(value: float) -> Fill:
    return lambda shape, g: torch.full(shape, value, dtype=torch.float64)


def outlier_first(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """The first value of each channel is far off: a shift by one sample would cancel everything else."""
    x = gaussian(10.0)(shape, g)
    x[0].view(shape[1], -1)[:, 0] = 1e4
    return x


def half_shifted(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """The second half of the batch has another mean: a shift by the first tile's is far off for it."""
    x = gaussian(1e4, 1e-2)(shape, g)
    x[shape[0] // 2 :] += 50
    return x


@dataclass(frozen=True)
class Layout:
    """A shape and its memory format; the smallest that has the property it is named after."""

    shape: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format

    def arrange(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.memory_format)


_LAYOUTS = {
    "rows": Layout((24, 32)),
    "rows-ragged-tail": Layout((37, 100)),
    "rows-folded": Layout((40, 7)),
    "rows-prime": Layout((53, 3)),
    "rows-one-channel": Layout((33, 1)),
    "rows-two-groups": Layout((6, 72)),
    "rows-nc1": Layout((9, 5, 1)),
    "planes-ncl": Layout((4, 3, 256)),
    "planes-blocks": Layout((3, 2, 20, 33)),
    "planes-prime": Layout((3, 2, 131)),
    "planes-odd": Layout((2, 8, 23, 23)),
    "planes-7x7-groups": Layout((3, 10, 7, 7)),
    "planes-14x14-groups": Layout((3, 4, 14, 14)),
    "planes-folded": Layout((8, 3, 13)),
    "planes-one-channel": Layout((3, 1, 5, 5)),
    "planes-3d": Layout((2, 4, 3, 4, 5)),
    "channels-last": Layout((2, 16, 5, 5), torch.channels_last),
    "channels-last-odd": Layout((2, 7, 3, 5), torch.channels_last),
    "channels-last-3d": Layout((2, 8, 2, 3, 3), torch.channels_last_3d),
}
_LARGE = {
    "rows-long": Layout((100_003, 32)),
    "rows-wide": Layout((260, 4099)),
    "planes-resnet-56": Layout((16, 64, 56, 56)),
    "planes-resnet-14": Layout((33, 1024, 14, 14)),
    "planes-resnet-7": Layout((64, 2048, 7, 7)),
    "planes-long": Layout((2, 3, 100_001)),
    "planes-flaggems": Layout((4096, 2, 49)),
    "planes-many-channels": Layout((2, 70_000, 3)),
    "channels-last-resnet-28": Layout((16, 512, 28, 28), torch.channels_last),
}


def _named(table: dict[str, Layout]) -> list[object]:
    return [pytest.param(value, id=name) for name, value in table.items()]


LAYOUTS = _named(_LAYOUTS)
LARGE_LAYOUTS = _named(_LARGE)  # for a GPU: sizes at which plans split by themselves
FEW_LAYOUTS = _named(
    {k: _LAYOUTS[k] for k in ("rows", "rows-folded", "planes-blocks", "planes-7x7-groups", "channels-last")}
)

FILLS = [
    pytest.param(gaussian(), id="gaussian"),
    pytest.param(gaussian(5.0, 0.1), id="mean-50-std"),
    pytest.param(gaussian(1e4, 1e-2), id="mean-1e6-std"),
    pytest.param(gaussian(0.0, 1e-4), id="variance-below-eps"),
    pytest.param(constant(100.0), id="constant"),
    pytest.param(constant(0.1), id="constant-inexact"),
    pytest.param(outlier_first, id="outlier-first"),
    pytest.param(half_shifted, id="half-shifted"),
]
