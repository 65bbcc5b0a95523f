"""Counters by which programs find out which of them is the last."""

import torch
from torch import Tensor

_pool: dict[tuple[torch.device, int], Tensor] = {}


def tickets(x: Tensor, groups: int, pooled: bool) -> Tensor:
    """Zeroed counters [groups] int32 of x's device and stream; kernels leave them zero.

    Not pooled, or under graph capture, they are the call's own: its memory may belong to a graph, which is replayed on
    any stream, beside eager work on this one, and overwrites what it does not know to be alive.
    """
    if not pooled or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(groups, dtype=torch.int32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    key = (x.device, stream)
    kept = _pool.get(key)
    if kept is None or kept.numel() < groups:
        kept = _pool[key] = torch.zeros(max(groups, 4096), dtype=torch.int32, device=x.device)
    return kept
