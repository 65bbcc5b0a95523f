"""How a call is timed: warmed up, on inputs that take turns, in a CUDA graph where it can be captured."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from bench.measure import quartiles, synchronize

Call = Callable[[int], object]  # with the number of a slot; what it returns is kept until the slot's next turn

SAMPLES = 20
# A sample is as long as this, by what the calls take at the least: starting a graph costs microseconds.
SAMPLE_SECONDS = 2e-3
WARM_SECONDS = 0.02
MOST_CALLS = 1024  # of one sample: capturing a call takes some 0.1 ms
COLD = 4  # inputs that take turns are together so many times the size of the L2 cache
COPY_BYTES = 1 << 30


class Timing(NamedTuple):
    """Microseconds per call: median and quartiles of the samples."""

    us: float
    us_low: float
    us_high: float
    timed_by: str  # graph: replays of a CUDA graph; events: eager calls between CUDA events; wall: a clock, on the CPU


def slots_for(input_bytes: int, l2_bytes: int) -> int:
    """How many inputs of this size take turns."""
    return max(1, min(MOST_CALLS, -(-COLD * l2_bytes // input_bytes)))


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """A stream for everything: graphs cannot be captured on the default one, and autograd returns to the forward's."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def measure(call: Call, slots: int, device: torch.device, least: float, samples: int = SAMPLES) -> Timing:
    """Time `call`, which takes `least` seconds or more; on CUDA within `measuring`.

    A call that cannot be captured is timed eagerly, which `timed_by` tells; raises what the call itself raises.
    """
    outputs: list[object] = [None] * slots  # kept, so that outputs take turns too

    def rotate(calls: int) -> None:
        for index in range(calls):
            slot = index % slots
            outputs[slot] = None
            outputs[slot] = call(slot)

    if device.type != "cuda":
        rotate(1)
        return timing(clocked(lambda: rotate(slots), samples), slots, "wall")
    calls = max(slots, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / least)))
    rotate(min(slots, 3))
    torch.cuda.synchronize(device)
    graph = captured(lambda: rotate(calls))
    run, timed_by = (lambda: rotate(calls), "events") if graph is None else (graph.replay, "graph")
    warm_up(run)
    return timing(by_events(run, samples), calls, timed_by)


def warm_up(run: Callable[[], object]) -> None:
    """Until the clocks of an idle GPU are up."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_SECONDS:
        run()
        torch.cuda.synchronize()


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """The work as a graph, None if it cannot be captured; what it allocates lives as long as the graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()  # raises again if the device itself failed
        return None
    return graph


def by_events(run: Callable[[], object], samples: int) -> list[float]:
    """Seconds of each run on the GPU. All are queued at once, so that none waits for the host."""

    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    events = [(event(), event()) for _ in range(samples)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def clocked(run: Callable[[], object], samples: int) -> list[float]:
    """Seconds of each run by the clock."""
    seconds = []
    for _ in range(samples):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def timing(seconds: list[float], calls: int, timed_by: str) -> Timing:
    low, median, high = quartiles([value / calls * 1e6 for value in seconds])
    return Timing(median, low, high, timed_by)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes allocated during a run, above what was there before; None on the CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def l2_bytes(device: torch.device) -> int:
    """Of the GPU; 0 on the CPU, where nothing takes turns."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copy_bandwidth(device: torch.device, samples: int = SAMPLES) -> float:
    """Bytes read and written per second by the faster of a plain copy and an elementwise kernel; within `measuring`."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES >> 5
    slots = slots_for(size, l2_bytes(device))
    source = [torch.empty(size // 4, device=device).normal_() for _ in range(slots)]
    target = [torch.empty_like(x) for x in source]
    with torch.no_grad():
        ways: list[Call] = [lambda i: target[i].copy_(source[i]), lambda i: torch.neg(source[i], out=target[i])]
        fastest = min(measure(way, slots, device, size / 1e13, samples).us for way in ways)
    return 2e6 * size / fastest
