"""Scratch memory of reductions that programs share: their partial results, and counters by which they find each other.

Both are kept for each (device, stream). The kernels of a stream run one after the other, so that what one leaves behind
the next may overwrite; tickets are zeroed once, and every kernel leaves them zero. Where more is needed, larger memory
takes the place of what was kept, which work that is still queued may use: it was allocated on this very stream, and
the caching allocator gives it to later work of the same stream only.
"""

from typing import Literal

import torch
from torch import Tensor

# By tickets programs learn which of them is the last; at semaphores they wait for each other.
Purpose = Literal["tickets", "semaphores"]

_pool: dict[tuple[torch.device, int, Purpose], Tensor] = {}
_partials: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
# Counters and values that are allocated at least, so that a few shapes seldom make a pool grow.
LEAST_COUNTERS = 4096
LEAST_VALUES = 1 << 16


def scratch(
    x: Tensor, values: int, dtype: torch.dtype, purpose: Purpose, counters: int, pooled: bool
) -> tuple[Tensor, Tensor]:
    """(room for `values` of dtype or more, unset; `counters` int32 or more), of x's device and stream.

    Counters are zero at first, tickets at every launch.
    Not pooled, or under graph capture, both are the call's own: its memory may belong to a graph, which is replayed on
    any stream, beside eager work on this one, and overwrites what it does not know to be alive.
    """
    device = x.device
    if not pooled or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        own = torch.empty(values, dtype=dtype, device=device)
        return own, torch.zeros(counters, dtype=torch.int32, device=device)
    stream = _stream(x)
    results = _partials.get((device, stream, dtype))
    if results is None or results.numel() < values:
        results = torch.empty(max(values, LEAST_VALUES), dtype=dtype, device=device)
        _partials[device, stream, dtype] = results
    kept = _pool.get((device, stream, purpose))
    if kept is None or kept.numel() < counters:
        kept = torch.zeros(max(counters, LEAST_COUNTERS), dtype=torch.int32, device=device)
        _pool[device, stream, purpose] = kept
    return results, kept


def _stream(x: Tensor) -> int:
    """The stream that x's device works on now, as a number."""
    return int(torch._C._cuda_getCurrentRawStream(x.get_device())) if x.is_cuda else 0
