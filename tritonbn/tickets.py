"""Counters by which programs find out which of them is the last."""

import torch
from torch import Tensor

_pool: dict[tuple[torch.device, int, str], Tensor] = {}


def semaphores(x: Tensor, slots: int, pooled: bool) -> Tensor:
    """Counters [slots] int32 of x's device and stream, at which the programs of a slot wait for each other."""
    return _counters(x, slots, pooled, "semaphores")


def tickets(x: Tensor, groups: int, pooled: bool) -> Tensor:
    """Zeroed counters [groups] int32 of x's device and stream; kernels leave them zero."""
    return _counters(x, groups, pooled, "tickets")


def _counters(x: Tensor, count: int, pooled: bool, purpose: str) -> Tensor:
    """Counters [count] int32, zero at first.

    Not pooled, or under graph capture, they are the call's own: its memory may belong to a graph, which is replayed on
    any stream, beside eager work on this one, and overwrites what it does not know to be alive.
    """
    if not pooled or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    key = (x.device, stream, purpose)
    kept = _pool.get(key)
    if kept is None or kept.numel() < count:
        kept = _pool[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=x.device)
    return kept
