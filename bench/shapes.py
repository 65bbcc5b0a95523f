"""Which batch norm layers are measured: those of networks, counted in the networks themselves, and awkward ones."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bench.networks.bn_inception import bn_inception
from bench.networks.mlp import PIXELS, mnist_mlp
from bench.networks.mobilenet import MobileNetV2
from bench.networks.resnet import resnet50

Shape = tuple[int, ...]

FULLY_CONNECTED: list[Shape] = [
    (60, 100),
    (61, 100),
    (256, 1000),
    (4096, 1024),
    (100_000, 32),
    (140_000, 1),
    (64, 3),
    (60, 7),
]
# Few channels, long planes, odd sizes, one channel, more than 2**31 elements.
AWKWARD: list[Shape] = [
    (32, 128, 16384), (4, 24, 160, 256), (64, 16, 224, 224), (4096, 2, 49), (32, 2048, 7, 7), (64, 256, 14, 14),
    (70, 32, 100, 100, 100), (8, 192, 17, 17), (8, 192, 35, 35), (5, 3, 13), (2, 1, 37, 41),
]  # fmt: skip

# DenseNet-121 (arXiv:1608.06993, table 1): layers of each block, channels that a layer adds, and those inside it.
DENSE_BLOCKS = (6, 12, 24, 16)
GROWTH = 32
BOTTLENECK = 4 * GROWTH


@dataclass(frozen=True)
class Layer:
    """The input `[N, C, ...]` of a batch norm layer, and how often it occurs in its network."""

    shape: Shape
    count: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def layers_of(network: nn.Module, image: Shape) -> list[Layer]:
    """The inputs of a network's batch norm layers for input `image`, in the order in which they first run."""
    found: Counter[Shape] = Counter()

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found[tuple(inputs[0].shape)] += 1

    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(note)
    network.to("meta").train()(torch.empty(image, device="meta"))
    return [Layer(shape, count) for shape, count in found.items()]


def densenet121(batch: int) -> list[Layer]:
    """The 121 layers for 224 x 224 images: each block reads all that its layers added before."""

    def inputs() -> Iterator[Shape]:
        channels, side = 2 * GROWTH, 112
        yield batch, channels, side, side
        side //= 2
        for index, layers in enumerate(DENSE_BLOCKS):
            for _ in range(layers):
                yield batch, channels, side, side
                yield batch, BOTTLENECK, side, side
                channels += GROWTH
            yield batch, channels, side, side  # of the transition, or the last one of the network
            if index < len(DENSE_BLOCKS) - 1:
                channels, side = channels // 2, side // 2

    return [Layer(shape, count) for shape, count in Counter(inputs()).items()]


def on_meta(build: Callable[[], nn.Module], batch: int) -> list[Layer]:
    with torch.device("meta"):
        network = build()
    return layers_of(network, (batch, 3, 224, 224))


# In order of importance. Batches are those of the papers, or usual ones on one GPU.
SETS: dict[str, Callable[[], list[Layer]]] = {
    "resnet50-256": lambda: on_meta(resnet50, 256),
    "mnist": lambda: layers_of(mnist_mlp(0, batch_norm=True), (60, PIXELS)),
    "bninception-32": lambda: layers_of(bn_inception(), (32, 3, 224, 224)),
    "mobilenet": lambda: on_meta(MobileNetV2, 256),
    "densenet": lambda: densenet121(64),
    "awkward": lambda: [Layer(shape) for shape in FULLY_CONNECTED + AWKWARD],
}


def shapes_of(name: str) -> list[Shape]:
    """The distinct shapes of a set."""
    return [layer.shape for layer in SETS[name]()]


def shape(text: str) -> Shape:
    """`64,256,14,14` as numbers; for argparse."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not 2 <= len(sizes) <= 5 or min(sizes) < 1 or math.prod(sizes) == sizes[1]:
        raise argparse.ArgumentTypeError(
            f"expected N,C or N,C,L or N,C,H,W or N,C,D,H,W with several values per channel, got {text}"
        )
    return sizes
