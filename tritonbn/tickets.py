"""Scratch memory of reductions that programs share: their partial results, and counters by which they find each other.

Both are kept for each (device, stream). The kernels of a stream run one after the other, so that what one leaves behind
the next may overwrite; tickets are zeroed once, and every kernel leaves them zero. Where more is needed, larger memory
takes the place of what was kept, which work that is still queued may use: it was allocated on this very stream, and
the caching allocator gives it to later work of the same stream only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

# By tickets programs learn which of them is the last; at semaphores they wait for each other.
Purpose = Literal["tickets", "semaphores"]

_pool: dict[tuple[torch.device, int, Purpose], Tensor] = {}
_partials: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
# Counters and values that are allocated at least, so that a few shapes seldom make a pool grow.
LEAST_COUNTERS = 4096
LEAST_VALUES = 1 << 16
# Counters of all calls that are ever captured on a device: 4 MB, some 10,000 layers of 100 channel groups.
RESERVE = 1 << 20
_reserve: dict[torch.device, tuple[Tensor, int]] = {}


def scratch(
    x: Tensor, values: int, dtype: torch.dtype, purpose: Purpose, counters: int, pooled: bool
) -> tuple[Tensor, Tensor]:
    """(room for `values` of dtype or more, unset; `counters` int32 or more), of x's device and stream.

    Counters are zero at first, tickets at every launch.
    Not pooled, or under graph capture, both are the call's own: its memory may belong to a graph, which is replayed on
    any stream, beside eager work on this one, and overwrites what it does not know to be alive. A captured call gets
    counters of a reserve that was zeroed before, where there is one: else each replay would zero them again.
    """
    device = x.device
    capturing = x.is_cuda and _capturing(device)
    if capturing or not pooled:
        own = torch.empty(values, dtype=dtype, device=device)
        reserved = _reserved(device, counters) if capturing else None
        return own, torch.zeros(counters, dtype=torch.int32, device=device) if reserved is None else reserved
    stream = _stream(x)
    results = _partials.get((device, stream, dtype))
    if results is None or results.numel() < values:
        results = torch.empty(max(values, LEAST_VALUES), dtype=dtype, device=device)
        _partials[device, stream, dtype] = results
    kept = _pool.get((device, stream, purpose))
    if kept is None or kept.numel() < counters:
        kept = torch.zeros(max(counters, LEAST_COUNTERS), dtype=torch.int32, device=device)
        _pool[device, stream, purpose] = kept
        if device not in _reserve:
            _reserve[device] = torch.zeros(RESERVE if x.is_cuda else 0, dtype=torch.int32, device=device), 0
            if x.is_cuda:  # once: graphs may be replayed on streams that do not wait for this one
                torch.cuda.synchronize(device)
    return results, kept


@contextmanager
def returned(device: torch.device) -> Iterator[None]:
    """Afterwards nothing is kept, nor reserved, for what ran inside on streams of its own; its graphs are gone then."""
    pools: tuple[dict[Any, Tensor], ...] = (_pool, _partials)
    before = [set(pool) for pool in pools]
    used = _reserve[device][1] if device in _reserve else 0
    try:
        yield
    finally:
        for pool, keys in zip(pools, before, strict=True):
            for key in [key for key in pool if key not in keys]:
                del pool[key]
        if device in _reserve:
            _reserve[device] = _reserve[device][0], used


def _reserved(device: torch.device, counters: int) -> Tensor | None:
    """Zeroed counters that no other call gets; None if there are not so many left."""
    reserve, used = _reserve.get(device, (None, 0))
    end = used + -(-counters // 4) * 4  # 16-byte aligned
    if reserve is None or end > reserve.numel():
        return None
    _reserve[device] = reserve, end
    return reserve[used : used + counters]


def _capturing(device: torch.device) -> bool:
    """Whether the stream that the device works on now is being captured."""
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _stream(x: Tensor) -> int:
    """The stream that x's device works on now, as a number."""
    return int(torch._C._cuda_getCurrentRawStream(x.get_device())) if x.is_cuda else 0
