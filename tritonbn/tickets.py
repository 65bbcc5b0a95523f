"""Scratch memory of reductions that programs share: their partial results, and counters by which they find each other.

Both are kept for each (device, stream). The kernels of a stream run one after the other, so that what one leaves behind
the next may overwrite; tickets are zeroed once, and every kernel leaves them zero. A call that is captured into a CUDA
graph has memory of the graph for its results, and counters of a reserve that was zeroed before: those of all calls that
one graph captured on one stream, which also run one after the other. They return when the graph is gone.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tritonbn import private

# By tickets programs learn which of them is the last; at semaphores they wait for each other.
Purpose = Literal["tickets", "semaphores"]

# Counters and values that are allocated at least, so that a few shapes seldom make a pool grow.
LEAST_COUNTERS = 4096
LEAST_VALUES = 1 << 16
# Counters of all graphs on a device: 4 MB, for some 1000 graphs of layers with up to 1024 channel groups.
RESERVE = 1 << 20
LEAST_CAPTURED = 1024


class Reserve:
    """Zeroed counters of a device that are lent to CUDA graphs."""

    def __init__(self, counters: Tensor) -> None:
        self.counters = counters
        self.used = 0
        self.returned: list[Tensor] = []
        self.lent: dict[int, dict[tuple[int, Purpose], list[Tensor]]] = {}  # by graph, then stream and purpose
        # Graphs that are gone. Any thread may find that, whatever it is at: it must not wait for another one there.
        self.gone: deque[int] = deque()

    def lend(self, graph: Any, stream: int, purpose: Purpose, counters: int) -> Tensor | None:
        """Zeroed counters for calls of a graph on a stream (no graph: for one call only); None if none are left."""
        if graph is None:
            taken = self._take(counters)
            if taken is not None and hasattr(_here, "lent"):
                _here.lent.append((self, taken))
            return taken
        self._take_back()
        if id(graph) not in self.lent:
            self.lent[id(graph)] = {}
            weakref.finalize(graph, self.gone.append, id(graph)).atexit = False
        blocks = self.lent[id(graph)].setdefault((stream, purpose), [])
        if not blocks or blocks[-1].numel() < counters:
            taken = self._take(max(counters, LEAST_CAPTURED))
            if taken is None:
                return None
            blocks.append(taken)  # earlier calls of the graph still use what was too small
        return blocks[-1]

    def _take(self, counters: int) -> Tensor | None:
        for index, block in enumerate(self.returned):
            if block.numel() >= counters:
                return self.returned.pop(index)
        begin, end = self.used, self.used + -(-counters // 4) * 4  # 16-byte aligned
        if end > self.counters.numel():
            return None
        self.used = end
        return self.counters[begin : begin + counters]

    def _take_back(self) -> None:
        """What graphs had that are gone."""
        while self.gone:
            for blocks in self.lent.pop(self.gone.popleft()).values():
                self.returned += blocks


_pool: dict[tuple[torch.device, int, Purpose], Tensor] = {}
_partials: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
_reserves: dict[torch.device, Reserve] = {}
_lock = threading.RLock()
_here = threading.local()  # what `returned` gives back: lent to graphs that this thread captured; memory that it made


def forget() -> None:
    """Let all memory go that no CUDA graph uses."""
    with _lock:
        _pool.clear()
        _partials.clear()


def scratch(x: Tensor, values: int, dtype: torch.dtype, purpose: Purpose, counters: int) -> tuple[Tensor, Tensor]:
    """(room for `values` of dtype or more, unset; `counters` int32 or more), of x's device and stream.

    Counters are zero at first, tickets at every launch. Threads that work on one stream may have the same memory: its
    kernels run one after the other, and each needs it for itself alone.
    """
    device, stream = x.device, _stream(x)
    if x.is_cuda and _capturing(device):
        own = torch.empty(values, dtype=dtype, device=device)  # a graph may be replayed on any stream
        return own, _captured(device, stream, purpose, counters)
    results = _partials.get((device, stream, dtype))
    if results is None or results.numel() < values:
        results = _grown(_partials, (device, stream, dtype), max(values, LEAST_VALUES), dtype)
    kept = _pool.get((device, stream, purpose))
    if kept is None or kept.numel() < counters:
        kept = _grown(_pool, (device, stream, purpose), max(counters, LEAST_COUNTERS), torch.int32)
        if x.is_cuda and device not in _reserves:
            with _lock:
                if device not in _reserves:
                    _reserves[device] = Reserve(_lasting(RESERVE, torch.int32, device))
    return results, kept


def _captured(device: torch.device, stream: int, purpose: Purpose, counters: int) -> Tensor:
    """Zeroed counters of a captured call; without any left, each replay zeroes them again."""
    with _lock:
        reserve = _reserves.get(device)
        if reserve is not None:
            lent = reserve.lend(private.capturing_graph(), stream, purpose, counters)
            if lent is not None:
                return lent
            private.tell(f"CUDA graphs on {device} took all counters: calls captured now zero theirs at each replay")
    return torch.zeros(counters, dtype=torch.int32, device=device)


def _grown(memory: dict[Any, Tensor], key: tuple[torch.device, int, Any], size: int, dtype: torch.dtype) -> Tensor:
    """memory[key] of `size` at least, zeroed if it is new."""
    device = key[0]
    with _lock:
        old = memory.get(key)
        if old is not None and old.numel() >= size:  # another thread was here
            return old
        new = _lasting(size, dtype, device)
        if old is not None and old.is_cuda:  # work that is queued uses it
            old.record_stream(torch.cuda.current_stream(device))
        memory[key] = new
        if hasattr(_here, "made"):
            _here.made.append((memory, key))
        return new


def _lasting(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that no memory pool of a CUDA graph has: of a thread, which no pool is set for, on a stream of its own.

    torch.compile runs a graph's work before it captures it, with all allocations of the thread in the graph's pool. The
    stream that the device works on now waits for the zeros, not the host: that would break captures in other threads.
    """
    if device.type != "cuda":
        return torch.zeros(size, dtype=dtype, device=device)
    done: list[Any] = []

    def allocate() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
                done.append(torch.zeros(size, dtype=dtype, device=device))
                done.append(torch.cuda.current_stream(device).record_event())
        except BaseException as error:  # of the thread that waits below
            done[:] = [error]

    thread = threading.Thread(target=allocate, name="tritonbn-allocate")
    thread.start()
    thread.join()
    if isinstance(done[0], BaseException):
        raise done[0]
    zeros, event = done
    torch.cuda.current_stream(device).wait_event(event)
    return zeros  # type: ignore[no-any-return]


@contextmanager
def returned() -> Iterator[None]:
    """Afterwards nothing is kept, nor lent, for what this thread ran inside on streams of its own; its graphs are gone.

    Their counters come back by themselves where torch tells which graph is captured.
    """
    _here.lent, _here.made = [], []
    try:
        yield
    finally:
        with _lock:
            for memory, key in _here.made:
                memory.pop(key, None)
            for reserve, block in _here.lent:
                reserve.returned.append(block)
        del _here.lent, _here.made


def _capturing(device: torch.device) -> bool:
    """Whether the stream that the device works on now is being captured."""
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _stream(x: Tensor) -> int:
    """The stream that x's device works on now, as a number."""
    return private.raw_stream(x.get_device()) if x.is_cuda else 0
