"""BN-Inception, the ImageNet network of the batch normalization paper (arXiv:1502.03167, figure 5).

The figure contradicts itself: the widths it prints for 4c, 4d and 4e are not the sums of their filters, and the grids
it prints for 3c and 4e are those before their stride of 2. Here the filters and strides hold. The first convolution is
a plain 7x7, as in all public versions; the paper's is separable.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Activation = Literal["relu", "sigmoid"]
Stem = Literal["original", "small"]
Pool = Literal["avg", "max"]

CLASSES = 1000
DROPOUT = 0.4
STEM = (64, 64, 192)
NEIGHBOURS = 5  # channels that respond together, as in GoogLeNet


class Filters(NamedTuple):
    """One row of figure 5: the filters of each convolution, and the pool.

    A row without 1x1 filters halves the grid and passes its pool on; the others project it.
    """

    one: int
    reduce: int
    three: int
    double_reduce: int
    double: int
    pool: Pool
    projection: int


BLOCKS = {
    "3a": Filters(64, 64, 64, 64, 96, "avg", 32),
    "3b": Filters(64, 64, 96, 64, 96, "avg", 64),
    "3c": Filters(0, 128, 160, 64, 96, "max", 0),
    "4a": Filters(224, 64, 96, 96, 128, "avg", 128),
    "4b": Filters(192, 96, 128, 96, 128, "avg", 128),
    "4c": Filters(160, 128, 160, 128, 160, "avg", 128),
    "4d": Filters(96, 128, 192, 160, 192, "avg", 128),
    "4e": Filters(0, 128, 192, 192, 256, "max", 0),
    "5a": Filters(352, 192, 320, 160, 224, "avg", 128),
    "5b": Filters(352, 192, 320, 192, 224, "max", 128),
}


@dataclass(frozen=True)
class Units:
    """What all convolutions of one network have in common."""

    batch_norm: bool
    activation: Activation
    width: float

    def scaled(self, filters: int) -> int:
        return math.ceil(filters * self.width)

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
        """Convolution, batch norm, nonlinearity; batch norm takes over the bias. Stride 1 keeps the grid."""
        conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=not self.batch_norm)
        norm = [nn.BatchNorm2d(outputs)] if self.batch_norm else []
        return nn.Sequential(conv, *norm, nn.ReLU(inplace=True) if self.activation == "relu" else nn.Sigmoid())

    def chain(self, inputs: int, *layers: tuple[int, int, int]) -> nn.Sequential:
        """Convolutions one after the other, each given as (filters, kernel, stride) before scaling."""
        chain = nn.Sequential()
        for filters, kernel, stride in layers:
            outputs = self.scaled(filters)
            chain.append(self.conv(inputs, outputs, kernel, stride))
            inputs = outputs
        return chain


class Block(nn.ModuleDict):
    """A row of figure 5: `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`, its branches concatenated."""

    def __init__(self, inputs: int, filters: Filters, units: Units) -> None:
        stride = 1 if filters.one else 2
        double = ((filters.double_reduce, 1, 1), (filters.double, 3, 1), (filters.double, 3, stride))
        super().__init__()
        if filters.one:
            self["1x1"] = units.chain(inputs, (filters.one, 1, 1))
        self["3x3"] = units.chain(inputs, (filters.reduce, 1, 1), (filters.three, 3, stride))
        self["double_3x3"] = units.chain(inputs, *double)
        projection = units.chain(inputs, (filters.projection, 1, 1)) if filters.projection else ()
        self["pool"] = nn.Sequential(pool(filters.pool, stride), *projection)
        added = (filters.one, filters.three, filters.double, filters.projection)
        self.outputs = sum(map(units.scaled, added)) + (0 if filters.projection else inputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.values()], dim=1)


def pool(kind: Pool, stride: int) -> nn.Module:
    """3x3, padded such that stride 1 keeps the grid."""
    return (nn.MaxPool2d if kind == "max" else nn.AvgPool2d)(3, stride=stride, padding=1)


def bn_inception(
    seed: int = 0,
    batch_norm: bool = True,
    *,
    activation: Activation = "relu",
    stem: Stem = "original",
    classes: int = CLASSES,
    width: float = 1.0,
    dropout: float | None = None,
    response_normalization: bool | None = None,
) -> nn.Sequential:
    """`[N, 3, H, W]` to `[N, classes]`; its children are the rows of figure 5, under their names.

    `stem="small"` is for 32x32 images: before 3a it shrinks them by 2, where the original shrinks 224x224 by 8.
    `width` multiplies all channels. `dropout` is the share of features left out before the last layer, 0 for none;
    `response_normalization` is local, in the stem. By default both are there (0.4) where there is no batch norm; the
    paper's BN-Baseline has them too. They stand where GoogLeNet has them: the paper does not say.

    One seed gives the same weights with and without batch norm: Kaiming normal, biases 0, in all arms, since with
    torch's own initialization the network without batch norm forgets its input. Build it on the CPU.
    Raises ValueError for an unknown activation or stem, for sizes that leave nothing and for impossible dropout.
    """
    for name, given, known in (("activation", activation, Activation), ("stem", stem, Stem)):
        if given not in get_args(known):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(known))}, got {given!r}")
    if classes < 1 or width <= 0:
        raise ValueError(f"expected classes of at least 1 and width above 0, got {classes} and {width}")
    if dropout is None:
        dropout = 0.0 if batch_norm else DROPOUT
    if not 0 <= dropout < 1:
        raise ValueError(f"expected dropout of at least 0 and below 1, got {dropout}")
    if response_normalization is None:
        response_normalization = not batch_norm
    units = Units(batch_norm, activation, width)
    layers = stem_layers(units, stem, response_normalization)
    channels = units.scaled(STEM[-1])
    for name, filters in BLOCKS.items():
        layers[name] = block = Block(channels, filters, units)
        channels = block.outputs
    layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["linear"] = nn.Linear(channels, classes)
    network = nn.Sequential(OrderedDict(layers))
    initialize(network, seed)
    return network


def stem_layers(units: Units, stem: Stem, response_normalization: bool) -> dict[str, nn.Module]:
    """What stands before 3a: `[N, 3, H, W]` to `[N, 192, H / 8, W / 8]`, or `[N, 192, H / 2, W / 2]` if small."""
    kernel, stride = (7, 2) if stem == "original" else (3, 1)
    first, *others = STEM
    layers: dict[str, nn.Module] = {"conv1": units.chain(3, (first, kernel, stride)), "pool1": pool("max", 2)}
    if response_normalization:
        layers["response1"] = nn.LocalResponseNorm(NEIGHBOURS)
    layers["conv2"] = units.chain(units.scaled(first), (others[0], 1, 1), (others[1], 3, 1))
    if response_normalization:
        layers["response2"] = nn.LocalResponseNorm(NEIGHBOURS)
    if stem == "original":
        layers["pool2"] = pool("max", 2)
    return layers


def initialize(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
