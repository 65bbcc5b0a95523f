"""A network of the MNIST experiment in training, and what is measured of it on the way: drift and landscape.

Everything is measured on a copy, so the training is bit for bit that of a network nobody looks at.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.drift import drift, typical_unit, width
from bench.mnist_data import Mnist, Split
from bench.study.landscape import Landscape, Shift, internal_shift, landscape
from bench.training import LEARNING_RATE, PERCENTILES, PROBE_IMAGES, Arm, accuracy, shuffled

MOMENTS = 100  # of a run: after so many equal parts of it, and before the first step
LOOK_SEED = 1_000_000  # far from the seeds of training: the batch that is looked at is a random one too

Progress = Callable[[str, int, float], None]  # arm, steps just made, loss of the batch that is looked at


class Watched:
    """An arm, and the figures of each moment."""

    def __init__(self, name: str, seed: int, data: Mnist) -> None:
        device = data.train.images.device
        self.arm, self.data = Arm(name, seed, device), data
        chosen = next(shuffled(len(data.train), LOOK_SEED + seed)).to(device)
        self.batch = Split(data.train.images[chosen], data.train.labels[chosen])
        self.percentiles: list[list[Tensor]] = []  # by moment and hidden layer [units, 3]
        self.changes: list[list[float]] = []  # by moment but the first, and hidden layer
        self.landscapes: list[Landscape] = []
        self.shifts: list[list[Shift]] = []
        self.before: list[Tensor] = []  # the inputs of each hidden layer's sigmoids at the last moment, sorted

    def look(self) -> None:
        """Measure here, on a copy in training mode."""
        copied = copy.deepcopy(self.arm.network)
        inputs = [x.sort(0).values for x in sigmoid_inputs(copied, self.data.train.images[:PROBE_IMAGES])]
        points = torch.tensor(PERCENTILES, device=inputs[0].device, dtype=inputs[0].dtype) / 100
        percentiles = [torch.quantile(x, points, dim=0).T.cpu() for x in inputs]
        if self.before:
            widths = zip(self.percentiles[-1], percentiles, strict=True)
            scales = [(width(old) + width(new)) / 2 for old, new in widths]
            pairs = zip(self.before, inputs, scales, strict=True)
            self.changes.append([float((wasserstein(old, new).cpu() / scale).median()) for old, new, scale in pairs])
        self.before = inputs
        self.percentiles.append(percentiles)

        def loss() -> Tensor:
            return cross_entropy(copied(self.batch.images), self.batch.labels)

        self.landscapes.append(landscape(loss, list(copied.parameters()), LEARNING_RATE))
        self.shifts.append(internal_shift(loss, layers_of(copied), LEARNING_RATE))

    def row(self, steps: int) -> dict[str, Any]:
        """All of it for the JSON file; lists go along the moments."""
        times = moments(steps)
        layers = []
        for index in range(len(self.before)):
            percentiles = torch.stack([moment[index] for moment in self.percentiles])
            unit = typical_unit(percentiles, times)
            layers.append({
                "unit": unit,
                "percentiles": [[step, *p] for step, p in zip(times, percentiles[:, unit].tolist(), strict=True)],
                "drift": drift(percentiles, times)._asdict(),
                "change": [None, *[moment[index] for moment in self.changes]],
            })  # fmt: skip
        return {
            "arm": self.arm.name,
            "seed": self.arm.seed,
            "steps": steps,
            "test_accuracy": accuracy(self.arm.network, self.data.test),
            "moments": times,
            "layers": layers,
            "landscape": {
                name: [getattr(moment, name) for moment in self.landscapes] for name in Landscape._fields
            },
            "internal_shift": {
                name: [[getattr(shift, name) for shift in moment] for moment in self.shifts] for name in Shift._fields
            },
        }  # fmt: skip


def moments(steps: int) -> list[int]:
    """The steps after which a network is looked at, equally far apart; 0 is before the first."""
    return list(range(0, steps + 1, max(1, steps // MOMENTS)))


def watch(data: Mnist, seed: int, steps: int, arms: tuple[str, ...], progress: Progress) -> list[dict[str, Any]]:
    """A row for each arm; all start from the same weights and train on the same batches."""
    device = data.train.images.device
    watched = [Watched(arm, seed, data) for arm in arms]
    batches = shuffled(len(data.train), seed)
    for length, look in parts(steps):
        block = list(torch.stack(list(itertools.islice(batches, length))).to(device)) if length else []
        for each in watched:
            each.arm.train(data.train, block)
            if look:
                each.look()
            progress(each.arm.name, length, each.landscapes[-1].loss)
    return [each.row(steps) for each in watched]


def parts(steps: int) -> Iterator[tuple[int, bool]]:
    """(steps to train, whether to look afterwards)"""
    times = moments(steps)
    yield 0, True
    yield from ((later - earlier, True) for earlier, later in itertools.pairwise(times))
    if times[-1] < steps:
        yield steps - times[-1], False


@torch.no_grad()
def sigmoid_inputs(network: nn.Sequential, images: Tensor) -> list[Tensor]:
    """The input [images, units] of each sigmoid; in training mode running statistics advance."""
    found, x = [], images
    for layer in network:
        if isinstance(layer, nn.Sigmoid):
            found.append(x)
        x = layer(x)
    return found


def wasserstein(before: Tensor, after: Tensor) -> Tensor:
    """The 1-Wasserstein distance of each unit's two samples [samples, units], both sorted along the samples."""
    return (before - after).abs().mean(0)


def layers_of(network: nn.Sequential) -> list[list[Tensor]]:
    """The parameters of each linear layer with its batch norm, the lowest first."""
    found: list[list[Tensor]] = []
    for module in network:
        if isinstance(module, nn.Linear):
            found.append([])
        found[-1].extend(module.parameters())
    return found
