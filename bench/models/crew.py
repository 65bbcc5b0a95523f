"""The processes that measure together: one, or those of torchrun, each with its own part of the batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.errors import BenchError

# Who waits for another process longer than this gives up: it failed amid a step, or compiles for very long.
PATIENCE = timedelta(seconds=120)
COMMAND = "torchrun --nproc_per_node=2 -m bench models --ddp"


class Crew:
    """This process alone; what it finds is what all find."""

    rank, size = 0, 1

    def any(self, true: bool) -> bool:
        """Is it true in any of the processes? All of them must ask."""
        return true

    def slowest(self, times: Tensor) -> Tensor:
        """Of the same steps in all processes, element by element."""
        return times

    def shared(self, network: nn.Module) -> nn.Module:
        """The network as it is trained by all processes."""
        return network


class Crowd(Crew):
    """All processes of torchrun. They agree over a connection of their own, which no failed step disturbs."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self._device = dist.get_rank(), dist.get_world_size(), device
        self._agreement = dist.new_group(backend="gloo", timeout=5 * PATIENCE)

    def any(self, true: bool) -> bool:
        return bool(self._largest(torch.tensor(float(true))))

    def slowest(self, times: Tensor) -> Tensor:
        return self._largest(times)

    def shared(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, device_ids=[self._device] if self._device.type == "cuda" else None)

    def _largest(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._agreement)
        return values


def local_rank() -> int:
    """The number of this process on its machine; BenchError unless torchrun has started it."""
    if not dist.is_available():
        raise BenchError("--ddp: expected a torch with torch.distributed, got one without")
    if not dist.is_torchelastic_launched():
        raise BenchError(f"--ddp: expected processes started by torchrun, got one started alone: {COMMAND}")
    return int(os.environ["LOCAL_RANK"])


@contextmanager
def together(device: torch.device) -> Iterator[Crew]:
    """The crew of torchrun: NCCL between GPUs, gloo between CPUs."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Crowd(device)
    finally:
        dist.destroy_process_group()
