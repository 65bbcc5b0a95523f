"""Scratch memory of the split reductions: counters that tell a program whether it is the last, and partial results.

Both are kept for each (device, stream). The kernels of a stream run one after the other, so that what one leaves behind
the next may overwrite; counters are zeroed once, and every kernel leaves them zero. Where more is needed, larger memory
takes the place of what was kept, which work that is still queued may use: it was allocated on this very stream, and
the caching allocator gives it to later work of the same stream only.
"""

import torch
from torch import Tensor

_pool: dict[tuple[torch.device, int], Tensor] = {}
_partials: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}

# Counters and values that are allocated at least, so that a few shapes seldom make a pool grow.
LEAST_TICKETS = 4096
LEAST_VALUES = 1 << 16


def scratch(x: Tensor, values: int, dtype: torch.dtype, groups: int, pooled: bool) -> tuple[Tensor, Tensor]:
    """(room for at least `values` of dtype, unset; zeroed counters [at least groups] int32), of x's device and stream.

    Not pooled, or under graph capture, they are the call's own: its memory may belong to a graph, which is replayed on
    any stream, beside eager work on this one, and overwrites what it does not know to be alive.
    """
    device, stream = x.device, _stream(x) if pooled else None
    if stream is None:
        own = torch.empty(values, dtype=dtype, device=device)
        return own, torch.zeros(groups, dtype=torch.int32, device=device)
    return _partial_results(device, stream, dtype, values), _tickets(device, stream, groups)


def tickets(x: Tensor, groups: int, pooled: bool) -> Tensor:
    """The counters of `scratch` alone, for kernels that keep no partial results."""
    stream = _stream(x) if pooled else None
    if stream is None:
        return torch.zeros(groups, dtype=torch.int32, device=x.device)
    return _tickets(x.device, stream, groups)


def _stream(x: Tensor) -> int | None:
    """The stream that x's device works on now, as a number; None while it is captured."""
    if not x.is_cuda:
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return int(torch._C._cuda_getCurrentRawStream(x.get_device()))


def _tickets(device: torch.device, stream: int, groups: int) -> Tensor:
    kept = _pool.get((device, stream))
    if kept is None or kept.numel() < groups:
        kept = _pool[device, stream] = torch.zeros(max(groups, LEAST_TICKETS), dtype=torch.int32, device=device)
    return kept


def _partial_results(device: torch.device, stream: int, dtype: torch.dtype, values: int) -> Tensor:
    kept = _partials.get((device, stream, dtype))
    if kept is None or kept.numel() < values:
        kept = _partials[device, stream, dtype] = torch.empty(max(values, LEAST_VALUES), dtype=dtype, device=device)
    return kept
