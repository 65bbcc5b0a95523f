"""Training the arms of the MNIST benchmark: the same weights and batches for all, in turns."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tritonbn
from bench.drift import drift, typical_unit
from bench.measure import timed
from bench.mnist_data import Mnist, Split
from bench.networks.mlp import last_sigmoid_input, mnist_mlp
from tritonbn.timing import quartiles

ARMS = ("none", "torch", "tritonbn")
BATCH = 60
LEARNING_RATE = 0.1
TARGET = 90.0  # percent; at 97% half of the runs without batch norm would never arrive
FIRST_LOSSES = 100
PERCENTILES = (15, 50, 85)
PROBE_IMAGES = 2000
WARM_UP = 10

Progress = Callable[["Arm", int], None]  # called with the number of steps an arm has just made


class Row(TypedDict):
    """One arm with one seed, as in the JSON file. Accuracies are percents."""

    arm: str
    seed: int
    steps: int
    seconds: float
    steps_per_second: float
    images_per_second: float
    step_time_to_none: list[float]  # one per block of steps: this arm's step time over that of `none`
    step_time_to_none_quartiles: list[float]
    test_accuracy: float
    steps_to_90: int | None
    curve: list[list[float]]  # [step, accuracy]
    first_losses: list[float]
    unit: int  # of the last hidden layer
    percentiles: list[list[float]]  # [step, 15%, 50%, 85%] of that unit's sigmoid input
    drift: dict[str, float]  # of the layer: `bench.drift.Drift`


class Arm:
    """A network in training, and what was seen of it."""

    def __init__(self, name: str, seed: int, device: torch.device) -> None:
        self.name, self.seed = name, seed
        self.network = build(name, seed).to(device).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=LEARNING_RATE)
        self.seconds: list[float] = []  # one per block
        self.first_losses: list[float] = []
        self.accuracies: list[float] = []
        self.percentiles: list[Tensor] = []  # one [units, 3] per block

    def train(self, data: Split, batches: Sequence[Tensor]) -> list[Tensor]:
        losses = []
        for batch in batches:
            loss = cross_entropy(self.network(data.images[batch]), data.labels[batch])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(loss.detach())
        return losses

    def block(self, data: Mnist, batches: Sequence[Tensor]) -> None:
        """Train on the batches, timed; then look at the network, not timed."""
        losses, seconds = timed(lambda: self.train(data.train, batches), data.train.images.device)
        self.seconds.append(seconds)
        self.first_losses += torch.stack(losses).tolist()[: FIRST_LOSSES - len(self.first_losses)]
        self.accuracies.append(accuracy(self.network, data.test))
        self.percentiles.append(probe(self.network, data.train.images[:PROBE_IMAGES]))


def build(arm: str, seed: int) -> nn.Sequential:
    network = mnist_mlp(seed, batch_norm=arm != "none")
    if arm == "tritonbn":
        tritonbn.convert(network)
    return network


def evaluation_steps(steps: int) -> list[int]:
    """Each 100 steps while the fast arms are on their way to 90%, then each 500, and at the end."""
    return sorted({*range(100, min(steps, 2000) + 1, 100), *range(2500, steps + 1, 500), steps})


def shuffled(examples: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices, reshuffled each epoch; what is left of an epoch when no batch fits is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(examples, generator=generator)
        yield from order[: examples // BATCH * BATCH].view(-1, BATCH)


def train_arms(data: Mnist, seed: int, steps: int, progress: Progress) -> list[Row]:
    """All arms with one seed, in blocks that end where accuracy is measured.

    Taking turns, in each order equally often, the arms share what else the machine is doing.
    """
    device = data.train.images.device
    arms = [Arm(name, seed, device) for name in ARMS]
    batches = shuffled(len(data.train), seed)
    for arm in arms:
        warm_up(arm, data.train)
    ends = evaluation_steps(steps)
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for length, order in zip(lengths, itertools.cycle(itertools.permutations(arms)), strict=False):
        block = list(torch.stack(list(itertools.islice(batches, length))).to(device))
        for arm in order:
            arm.block(data, block)
            progress(arm, length)
    return [row(arm, arms[0], ends) for arm in arms]


def warm_up(arm: Arm, data: Split) -> None:
    """Compile and allocate outside the clock, on a copy."""
    twin = copy.copy(arm)
    twin.network = copy.deepcopy(arm.network)
    twin.optimizer = torch.optim.SGD(twin.network.parameters(), lr=LEARNING_RATE)
    twin.train(data, [torch.arange(BATCH, device=data.labels.device)] * WARM_UP)


@torch.no_grad()
def accuracy(network: nn.Module, data: Split) -> float:
    """Percent right in eval mode."""
    network.eval()
    right = (network(data.images).argmax(1) == data.labels).sum()
    network.train()
    return 100.0 * int(right) / len(data)


@torch.no_grad()
def probe(network: nn.Sequential, images: Tensor) -> Tensor:
    """Percentiles `[units, 3]` of the last sigmoids' inputs in training mode; the buffers are restored."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    inputs = last_sigmoid_input(network)(images)
    for name, buffer in network.named_buffers():
        buffer.copy_(before[name])
    points = torch.tensor(PERCENTILES, device=inputs.device, dtype=inputs.dtype) / 100
    return torch.quantile(inputs, points, dim=0).T.cpu()


def row(arm: Arm, none: Arm, ends: Sequence[int]) -> Row:
    steps, seconds = ends[-1], sum(arm.seconds)
    ratios = [ours / theirs for ours, theirs in zip(arm.seconds, none.seconds, strict=True)]
    percentiles = torch.stack(arm.percentiles)
    unit = typical_unit(percentiles, ends)
    curve: list[Any] = [list(point) for point in zip(ends, arm.accuracies, strict=True)]
    return Row(
        arm=arm.name,
        seed=arm.seed,
        steps=steps,
        seconds=seconds,
        steps_per_second=steps / seconds,
        images_per_second=BATCH * steps / seconds,
        step_time_to_none=ratios,
        step_time_to_none_quartiles=list(quartiles(ratios)),
        test_accuracy=arm.accuracies[-1],
        steps_to_90=next((step for step, percent in curve if percent >= TARGET), None),
        curve=curve,
        first_losses=arm.first_losses,
        unit=unit,
        percentiles=[[step, *points] for step, points in zip(ends, percentiles[:, unit].tolist(), strict=True)],
        drift=drift(percentiles, ends)._asdict(),
    )
