"""A network in training on the device: the whole step is one CUDA graph, and its whole state can be put back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tritonbn
from bench.measure import timed
from bench.networks.bn_inception import bn_inception
from bench.study.augment import Pixels
from bench.study.batches import Stream
from bench.study.recipe import Recipe

Norm = Literal["torch", "tritonbn"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL_SIDE = 64  # up to here the stem for small images
WARM_UP = 3  # steps that compile and allocate before the clock runs
AT_ONCE = 500  # images of an evaluation


class Options(NamedTuple):
    """What all runs have in common beside the data."""

    width: float
    classes: int
    dtype: str  # of `DTYPES`; parameters, statistics and the loss stay in float32
    graph: bool
    block: int  # the most steps that are trained without looking


def build(recipe: Recipe, norm: Norm | None, seed: int, side: int, options: Options) -> nn.Sequential:
    """One seed gives all arms the same weights."""
    network = bn_inception(
        seed, recipe.batch_norm, activation=recipe.activation, stem="small" if side <= SMALL_SIDE else "original",
        classes=options.classes, width=options.width, dropout=recipe.dropout,
        response_normalization=recipe.response_normalization,
    )  # fmt: skip
    return tritonbn.convert(network, fuse=True) if norm == "tritonbn" else network


class Trainer:
    """One arm with one seed.

    The step reads what to train on from buffers, at a place that it advances itself: a replay needs nothing from the
    host. On CUDA use it within `tritonbn.timing.measuring`: everything has to be on one stream that is not the default.
    """

    def __init__(self, recipe: Recipe, norm: Norm | None, seed: int, data: Pixels, options: Options) -> None:
        self.recipe, self.data, self.options = recipe, data, options
        self.device = data.images.device
        self.stream = Stream(len(data), recipe.batch, data.side, seed, recipe.thorough_shuffling, recipe.jitter)
        network: Any = build(recipe, norm, seed, data.side, options)
        self.network: nn.Sequential = network.to(self.device, memory_format=torch.channels_last).train()
        self.rate = torch.zeros((), device=self.device)
        self.optimizer = sgd(self.network, recipe, self.rate)
        block = max(options.block, WARM_UP)
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.rates, self.losses = torch.zeros(2, block, device=self.device)
        self.places = torch.zeros(block, 4, recipe.batch, dtype=torch.int64, device=self.device)
        self.factors = torch.ones(block, 3, recipe.batch, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.prepare()
        torch.manual_seed(seed)  # of dropout

    def step(self) -> None:
        """Forward, backward, update; nothing in it waits for the device."""
        places, factors = (buffer.index_select(0, self.place)[0] for buffer in (self.places, self.factors))
        images, labels = self.data.augmented(places, factors), self.data.labels[places[0]]
        self.optimizer.zero_grad()
        with self.precision():
            loss = cross_entropy(self.network(images), labels)
        torch.autograd.backward(loss)
        self.rate.copy_(self.rates.index_select(0, self.place)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.place, loss.detach().float().view(1))
        self.place.add_(1)

    def precision(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.options.dtype]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def prepare(self) -> None:
        """Compile, allocate and capture outside the clock; then all is as it was."""
        state = {name: tensor.clone() for name, tensor in self.tensors().items()}
        chance = self.chance()
        self.fill(0, WARM_UP)
        for _ in range(WARM_UP if self.device.type == "cuda" else 1):
            self.step()
        if self.device.type == "cuda" and self.options.graph:
            self.place.zero_()
            self.graph = torch.cuda.CUDAGraph()
            # The default generator is registered with the graph: each replay draws other noise for dropout.
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(self.device)):
                self.step()
        self.restore(state, chance)

    def fill(self, start: int, stop: int) -> None:
        """Put what the steps from `start` up to `stop` are made of into the buffers."""
        draws, count = self.stream.draws(start, stop), stop - start
        self.places[:count].copy_(draws.places)
        self.factors[:count].copy_(draws.factors)
        self.rates[:count].copy_(torch.tensor([self.recipe.rate(step) for step in range(start, stop)]))
        self.place.zero_()

    def train(self, start: int, stop: int, stopped: Callable[[], bool] = lambda: False) -> tuple[list[float], float]:
        """The loss of each step, and the seconds that all took; less than asked for once `stopped`."""

        def work() -> int:
            self.fill(start, stop)
            advance = self.step if self.graph is None else self.graph.replay
            for made in range(1, stop - start + 1):
                advance()
                if stopped():
                    return made
            return stop - start

        made, seconds = timed(work, self.device)
        return self.losses[:made].tolist(), seconds

    def inputs(self, start: int, stop: int) -> Iterator[Tensor]:
        """The images of steps, as the step makes them."""
        for step in range(start, stop):
            places, factors = (drawn[0].to(self.device) for drawn in self.stream.draws(step, step + 1))
            yield self.data.augmented(places, factors)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, under the names of `state_dict`."""
        state: dict[str, Tensor] = dict(self.network.state_dict())
        for name, parameter in self.network.named_parameters():
            state[f"{name}.momentum"] = self.optimizer.state[parameter]["momentum_buffer"]
        return state

    def chance(self) -> dict[str, Tensor]:
        """The states of torch's generators; by the kind of device."""
        on_cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **on_cuda}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], chance: dict[str, Tensor]) -> None:
        """Undo and redo training; in place, where the graph looks."""
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
        torch.set_rng_state(chance["cpu"])
        if "cuda" in chance:
            torch.cuda.set_rng_state(chance["cuda"], self.device)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions in float32 proper: torch lets them round to ten bits on CUDA."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def logits(network: nn.Module, data: Pixels) -> Tensor:
    """[N, classes] float32 of all images as they are, in evaluation mode."""
    training = network.training
    network.eval()
    starts = range(0, len(data), AT_ONCE)
    found = [network(data.plain(slice(start, start + AT_ONCE))).float() for start in starts]
    network.train(training)
    return torch.cat(found)


def sgd(network: nn.Module, recipe: Recipe, rate: Tensor) -> torch.optim.SGD:
    """One kernel for each of both groups, which reads the learning rate on the device."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.l2},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, fused=True)
    for parameter in parameters:  # there from the start, so that the first step is captured like any other
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
