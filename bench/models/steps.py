"""One step of a network, eager, compiled or as a CUDA graph, and when each of its parts ended."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.images import normalized
from bench.models.settings import DTYPES, Setting

LEARNING_RATE, MOMENTUM = 1e-3, 0.9
SENTINEL = -12345.0  # no loss is negative, no logit exactly this
State = dict[str, Tensor]


class Clock:
    """Moments of a device's work: events on CUDA, for which nobody waits; a clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[Any] = []

    def mark(self) -> None:
        if not self._cuda:
            self._moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._moments.append(event)

    def milliseconds(self, marks: int) -> Tensor:
        """[steps, marks - 1] between the marks of each step; on CUDA after everything is done."""
        steps = [self._moments[i : i + marks] for i in range(0, len(self._moments), marks)]
        return torch.tensor(
            [[self._between(*pair) for pair in pairwise(step)] for step in steps],
            dtype=torch.float64,
        )

    def _between(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second) if self._cuda else 1e3 * (second - first))


class Work:
    """A network with its input and optimizer: what one step does, and what it gave: the loss, or the logits."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, setting: Setting) -> None:
        self.network, self.x, self.y = network, x, y
        self.called: Callable[[Tensor], Tensor] = network  # the network, as processes share it, compiled
        self.training, self.dtype = setting.training, DTYPES[setting.dtype]
        self.optimizer = None
        if setting.training:
            parameters = list(network.parameters())
            self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM, foreach=True)
        self.result = torch.full((), torch.nan)
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def marks(self) -> int:
        """Of one step: its parts are forward, backward, optimizer; or it is one part."""
        return 4 if self.training and self.graph is None else 2

    def step(self, mark: Callable[[], None] = lambda: None) -> None:
        mark()
        if self.graph is not None:
            self.graph.replay()
        elif self.optimizer is None:
            with torch.no_grad(), self._autocast():
                self.result = self.called(self.x)
        else:
            with self._autocast():
                loss = cross_entropy(self.called(self.x), self.y)
            mark()
            loss.backward()  # type: ignore[no-untyped-call]
            mark()
            self.optimizer.step()
            self.optimizer.zero_grad()  # a graph begins without gradients, and keeps none
            self.result = loss.detach()
        mark()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def capture(self, pool: Any) -> None:
        """From now on a step is the replay of a CUDA graph; after warm-up, on a stream that is not the default one.

        Graphs of several networks may share a pool: nothing that outlives a step is allocated in it but the result,
        which is kept, so each may overwrite what others left. Raises RuntimeError if a replay does nothing.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            self.step()
        self.graph = graph
        self.result.fill_(SENTINEL)
        self.step()
        if bool((self.result == SENTINEL).all()):
            raise RuntimeError("the graph was captured, but its replay computed nothing")

    def feed(self, images: Tensor, labels: Tensor) -> None:
        """Bytes of images, and labels, take the place of the input; what is in pinned memory is copied meanwhile."""
        self.x.copy_(normalized(images.to(self.x.device, non_blocking=True)))
        self.y.copy_(labels, non_blocking=True)

    def state(self) -> State:
        """A copy of weights and statistics, in main memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.network.state_dict().items()}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """In place, as a graph knows addresses; momentum is 0 again."""
        for name, tensor in self.network.state_dict().items():
            tensor.copy_(state[name])
        if self.optimizer is not None:
            for kept in self.optimizer.state.values():
                kept["momentum_buffer"].zero_()
