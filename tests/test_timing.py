"""How calls are timed, with clocks and graphs that are only pretended where there is no GPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench import timing as bounds
from tritonbn import timing
from tritonbn.timing import measure, slots_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("input_bytes", "l2_bytes", "slots"),
    [(12_000, 50_000_000, 1024), (12_800_000, 60_000_000, 19), (240_000_000, 60_000_000, 1), (1 << 32, 50_000_000, 1),
     (100, 0, 1)],
)  # fmt: skip
def test_as_many_inputs_as_exceed_the_cache_fourfold(input_bytes: int, l2_bytes: int, slots: int) -> None:
    assert slots_for(input_bytes, l2_bytes) == slots


def test_samples_become_quartiles_of_a_call() -> None:
    found = timing.timing([2e-6, 4e-6, 6e-6, 8e-6, 10e-6], 2, "graph")
    assert found[:3] == pytest.approx((3.0, 2.0, 4.0))
    assert found.timed_by == "graph"


def test_on_the_cpu_inputs_take_turns_and_a_clock_runs() -> None:
    calls = []

    def call(slot: int) -> None:
        calls.append(slot)
        time.sleep(0.002)

    found = measure(call, 3, CPU, 1e-6, samples=2)
    assert calls == [0, *[0, 1, 2] * 2]
    assert found.timed_by == "wall"
    assert 2000 < found.us_low <= found.us <= found.us_high


def test_outputs_of_other_slots_are_kept() -> None:
    """So that an output does not land where the last one is still in the cache."""
    pointers = []

    def call(slot: int) -> torch.Tensor:
        y = torch.empty(10)
        pointers.append(y.data_ptr())
        return y

    measure(call, 3, CPU, 1e-6, samples=2)
    assert len(set(pointers[-3:])) == 3


class Pretended:
    """torch.cuda as `tritonbn.timing` sees it: the work runs at once, a graph replays it, events read a clock."""

    def __init__(self, refuse: Exception | None = None) -> None:
        self.refuse = refuse
        self.replays = 0

    def CUDAGraph(self) -> Any:
        return Graph(self)

    @contextmanager
    def graph(self, graph: Any, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads of the user pin memory"
        if self.refuse is not None:
            raise self.refuse
        yield

    def current_stream(self, device: object = None) -> str:
        return "stream"

    def synchronize(self, device: object = None) -> None:
        pass

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return Event()


class Graph:
    def __init__(self, cuda: Pretended) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.replays += 1
        time.sleep(0.004)


class Event:
    seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pretended]:
    def install(refuse: Exception | None = None) -> Pretended:
        cuda = Pretended(refuse)
        for name in ("CUDAGraph", "graph", "current_stream", "synchronize", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        return cuda

    return install


def test_a_graph_holds_enough_calls_and_is_replayed(pretend: Callable[..., Pretended]) -> None:
    cuda = pretend()
    calls: list[int] = []
    found = measure(calls.append, 3, CUDA, least=1e-4, samples=5)
    assert found.timed_by == "graph"
    assert cuda.replays > 5 + 1  # and some to warm up
    assert calls == [0, 1, 2] + [index % 3 for index in range(20)]  # warm-up; 2 ms of calls of 0.1 ms
    assert found.us == pytest.approx(4000 / 20, rel=0.5)


def test_many_slots_all_have_their_turn_in_the_graph(pretend: Callable[..., Pretended]) -> None:
    pretend()
    calls: list[int] = []
    measure(calls.append, 50, CUDA, least=1e-3, samples=1)
    assert calls[3:] == list(range(50))


def test_what_cannot_be_captured_is_timed_eagerly(pretend: Callable[..., Pretended]) -> None:
    cuda = pretend(RuntimeError("operation not permitted when stream is capturing"))
    calls: list[int] = []

    def call(slot: int) -> None:
        calls.append(slot)
        time.sleep(0.001)

    found = measure(call, 2, CUDA, least=1e-3, samples=3)
    assert (found.timed_by, cuda.replays) == ("events", 0)
    assert len(calls) > 2 + 3 * 2 + 2
    assert calls[:6] == [0, 1, 0, 1, 0, 1]
    assert found.us > 1000


def test_too_little_memory_is_an_error_and_no_reason_to_time_eagerly(pretend: Callable[..., Pretended]) -> None:
    pretend(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        measure(lambda slot: None, 1, CUDA, least=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a real graph")
def test_a_real_graph_and_what_it_refuses() -> None:
    x = [torch.randn(1 << 20, device="cuda") for _ in range(3)]
    with timing.measuring(CUDA):
        found = measure(lambda slot: x[slot] + 1, 3, CUDA, 1e-6)
        assert found.timed_by == "graph"
        assert 0 < found.us < 100
        assert measure(lambda slot: x[slot].sum().item(), 3, CUDA, 1e-4).timed_by == "events"
        assert measure(lambda slot: x[slot] + 1, 3, CUDA, 1e-6).timed_by == "graph"


def test_a_copy_is_measured(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(bounds, "COPY_BYTES", 1 << 27)
    with timing.measuring(device):
        found = bounds.copy_bandwidth(device, samples=3)
    assert 1e8 < found < 2e13


def test_peak_memory_is_what_a_call_adds(device: torch.device) -> None:
    found = bounds.peak_bytes(lambda: torch.empty(1 << 20, device=device), device)
    if device.type == "cpu":
        assert found is None
    else:
        assert found is not None
        assert 4 << 20 <= found < 8 << 20
