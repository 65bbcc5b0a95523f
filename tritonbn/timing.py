"""How a call is timed: warmed up, on inputs that take turns, in a CUDA graph where it can be captured."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

Call = Callable[[int], object]  # with the number of a slot; what it returns is kept until the slot's next turn

SAMPLES = 20
# A sample is as long as this, by what the calls take at the least: starting a graph costs microseconds.
SAMPLE_SECONDS = 2e-3
WARM_SECONDS = 0.02
MOST_CALLS = 1024  # of one sample: capturing a call takes some 0.1 ms
COLD = 4  # inputs that take turns are together so many times the size of the L2 cache


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Quartiles(*points.tolist())


class Timing(NamedTuple):
    """Microseconds per call: median and quartiles of the samples."""

    us: float
    us_low: float
    us_high: float
    timed_by: str  # graph: replays of a CUDA graph; events: eager calls between CUDA events; wall: a clock, on the CPU


def slots_for(input_bytes: int, l2_bytes: int) -> int:
    """How many inputs of this size take turns."""
    return max(1, min(MOST_CALLS, -(-COLD * l2_bytes // input_bytes)))


def gpu(what: str, device: torch.device | str | None) -> torch.device:
    """The GPU, with its number, on which `what` is to measure; by default the current one.

    Raises RuntimeError without a GPU and under CUDA graph capture, ValueError for other devices.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"{what} measures on a GPU, but torch.cuda.is_available() is False")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} cannot run while a CUDA graph is captured")
    where = torch.device("cuda" if device is None else device)
    if where.type != "cuda":
        raise ValueError(f"{what} measures on a GPU, but got the device {where}")
    return torch.device("cuda", torch.cuda.current_device()) if str(where) == "cuda" else where


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
        # What other threads do meanwhile, such as to pin memory, is no part of it and no error.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
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
