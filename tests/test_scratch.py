"""Memory that launches share from call to call: grown, zero where it must be, and apart where it must be."""

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tritonbn import private, tickets
from tritonbn.tickets import LEAST_CAPTURED, LEAST_COUNTERS, LEAST_VALUES, scratch

X = torch.zeros(2, 2)


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "_pool", {})
    monkeypatch.setattr(tickets, "_partials", {})


def test_the_same_memory_every_time() -> None:
    first = scratch(X, 10, torch.float32, "tickets", 3)
    second = scratch(X, 20, torch.float32, "tickets", 5)
    assert all(a is b for a, b in zip(first, second, strict=True))
    values, counters = first
    assert (values.numel(), values.dtype) == (LEAST_VALUES, torch.float32)
    assert (counters.numel(), counters.dtype) == (LEAST_COUNTERS, torch.int32)
    assert not counters.any()


def test_it_grows_and_what_was_larger_stays() -> None:
    small = scratch(X, 10, torch.float32, "tickets", 3)
    large = scratch(X, LEAST_VALUES + 1, torch.float32, "tickets", LEAST_COUNTERS + 1)
    again = scratch(X, 10, torch.float32, "tickets", 3)
    assert large[0].numel() == LEAST_VALUES + 1
    assert large[1].numel() == LEAST_COUNTERS + 1
    assert not large[1].any()
    assert all(a is not b for a, b in zip(small, large, strict=True))
    assert all(a is b for a, b in zip(large, again, strict=True))


def test_one_part_may_grow_without_the_other() -> None:
    values, counters = scratch(X, 10, torch.float32, "tickets", 3)
    assert scratch(X, 10, torch.float32, "tickets", LEAST_COUNTERS + 1)[0] is values
    assert scratch(X, LEAST_VALUES + 1, torch.float32, "tickets", 3)[1] is not counters


def test_dtypes_and_purposes_are_kept_apart() -> None:
    values, counters = scratch(X, 10, torch.float32, "tickets", 3)
    double, same = scratch(X, 10, torch.float64, "tickets", 3)
    same_values, semaphores = scratch(X, 10, torch.float32, "semaphores", 3)
    assert double.dtype == torch.float64
    assert (same is counters, same_values is values) == (True, True)
    assert semaphores is not counters
    assert not semaphores.any()


def test_each_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(tickets, "_stream", lambda x, stream=stream: stream)
        found.append(scratch(X, 10, torch.float32, "tickets", 3))
    assert all(a is not b for a, b in zip(found[0], found[1], strict=True))
    assert all(a is b for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs and streams")
def test_graphs_and_streams_of_a_gpu() -> None:
    x = torch.zeros(2, 2, device="cuda")
    eager = scratch(x, 10, torch.float32, "tickets", 3)
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        aside = scratch(x, 10, torch.float32, "tickets", 3)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = scratch(x, 10, torch.float32, "tickets", 3)
    assert scratch(x, 10, torch.float32, "tickets", 3)[1] is eager[1]
    assert all(t is not eager[1] for t in (aside[1], captured[1]))
    assert captured[1].numel() >= 3
    assert len(tickets._pool) == 2


class Graph:
    """A CUDA graph, as long as somebody has it."""


class Capture:
    """A GPU on the CPU, on which each thread captures a graph of its own."""

    def __init__(self, patch: pytest.MonkeyPatch, reserve: int) -> None:
        self.here = threading.local()
        self.x = SimpleNamespace(device=torch.device("cpu"), is_cuda=True, get_device=lambda: 0)
        patch.setattr(tickets, "_capturing", lambda device: getattr(self.here, "graph", None) is not None)
        patch.setattr(tickets, "_stream", lambda x: getattr(self.here, "stream", 0))
        patch.setattr(private, "capturing_graph", lambda: self.here.graph if self.here.graph is not ... else None)
        patch.setattr(tickets, "RESERVE", reserve)
        patch.setattr(tickets, "_reserves", {})
        patch.setattr(private, "_told", set())

    def counters(self, count: int, graph: Any, stream: int = 0, purpose: Any = "tickets") -> torch.Tensor:
        """Those of a call within the capture of a graph; None: no capture, ...: of a graph that torch does not tell."""
        self.here.graph, self.here.stream = graph, stream
        try:
            return scratch(self.x, 10, torch.float32, purpose, count)[1]  # type: ignore[arg-type]
        finally:
            self.here.graph = None


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    made = Capture(monkeypatch, 4 * LEAST_CAPTURED)
    made.counters(1, None)  # what is captured was run before
    return made


def apart(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether they are of one memory and do not overlap."""
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    ranges = sorted((t.storage_offset(), t.storage_offset() + t.numel()) for t in (first, second))
    return ranges[0][1] <= ranges[1][0]


def test_calls_that_a_graph_captures_on_a_stream_share_counters(capture: Capture) -> None:
    graph, other = Graph(), Graph()
    first = capture.counters(5, graph)
    assert first.numel() == LEAST_CAPTURED
    assert first.data_ptr() % 16 == 0
    assert capture.counters(8, graph) is first
    assert apart(first, capture.counters(5, graph, purpose="semaphores"))
    assert apart(first, capture.counters(5, graph, stream=1))
    assert apart(first, capture.counters(5, other))


def test_counters_of_graphs_that_are_gone_come_back(capture: Capture) -> None:
    """A server captures again and again: nothing is zeroed at each replay."""
    reserve = tickets._reserves[torch.device("cpu")].counters
    for _ in range(20):
        graph = Graph()
        blocks = [capture.counters(5, graph), capture.counters(2 * LEAST_CAPTURED, graph)]
        assert apart(*blocks)
        assert all(block.untyped_storage().data_ptr() == reserve.untyped_storage().data_ptr() for block in blocks)
        del graph, blocks
    capture.counters(5, Graph())
    assert len(tickets._reserves[torch.device("cpu")].lent) == 1


def test_without_any_left_each_replay_zeroes_its_own(capture: Capture) -> None:
    graphs = [Graph() for _ in range(5)]
    reserve = tickets._reserves[torch.device("cpu")].counters
    lent = [capture.counters(5, graph) for graph in graphs[:4]]
    assert all(t.untyped_storage().data_ptr() == reserve.untyped_storage().data_ptr() for t in lent)
    with pytest.warns(UserWarning, match="took all counters"):
        own = capture.counters(5, graphs[4])
    assert own.untyped_storage().data_ptr() != reserve.untyped_storage().data_ptr()
    assert own.tolist() == [0] * 5


def test_where_torch_does_not_tell_the_graph_each_call_has_its_own(capture: Capture) -> None:
    first, second = capture.counters(5, ...), capture.counters(8, ...)
    assert (first.numel(), second.numel()) == (5, 8)
    assert apart(first, second)
    assert second.data_ptr() % 16 == 0


def test_threads_that_capture_at_a_time_get_different_counters(capture: Capture) -> None:
    """Read, add, write back: without a lock two threads read the same number."""
    for _ in range(50):
        start = threading.Barrier(2)
        found: list[torch.Tensor] = []

        def one(start: threading.Barrier = start, found: list[torch.Tensor] = found) -> None:
            graph = Graph()
            start.wait()
            found.append(capture.counters(5, graph))
            start.wait()

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert apart(*found)


def test_a_graph_may_go_while_a_thread_allocates(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that allocates is waited for, and must not wait in turn: it may be the one that finds garbage."""
    graph: Any = Graph()
    capture.counters(5, graph)
    graph.itself = graph  # garbage only once somebody looks
    del graph
    reserve = tickets._reserves[torch.device("cpu")]

    def lasting(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        thread = threading.Thread(target=gc.collect, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it waits for the one that waits for it"
        return torch.zeros(size, dtype=dtype, device=device)

    monkeypatch.setattr(tickets, "_lasting", lasting)
    capture.counters(2 * LEAST_COUNTERS, None)
    capture.counters(5, Graph())
    assert len(reserve.lent) == 1


def test_what_other_threads_keep_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with tickets.returned():
        monkeypatch.setattr(tickets, "_stream", lambda x: 5)
        thread = threading.Thread(target=scratch, args=(X, 10, torch.float32, "tickets", 3))
        thread.start()
        thread.join()
        monkeypatch.setattr(tickets, "_stream", lambda x: 6)
        scratch(X, 10, torch.float32, "tickets", 3)
    assert [stream for _, stream, _ in tickets._pool] == [5]


def test_threads_grow_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    lasting = tickets._lasting

    def slowly(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(size)
        threading.Event().wait(0.01)
        return lasting(size, dtype, device)

    monkeypatch.setattr(tickets, "_lasting", slowly)
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(scratch(X, 10, torch.float32, "tickets", 3)[1])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted([LEAST_VALUES, LEAST_COUNTERS])
    assert len({t.data_ptr() for t in found}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: memory pools")
def test_memory_is_of_no_pool_of_the_thread() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        kept = scratch(torch.zeros(2, 2, device="cuda"), 10, torch.float32, "tickets", 3)
        segments = pool.snapshot()  # type: ignore[no-untyped-call]
    ranges = [(s["address"], s["address"] + s["total_size"]) for s in segments]
    assert not any(low <= t.data_ptr() < high for t in kept for low, high in ranges)


def test_what_was_kept_or_lent_inside_is_given_back(capture: Capture) -> None:
    """What was there before stays, and counters of graphs that are gone are those of the next one."""
    device = torch.device("cpu")
    reserve, before = tickets._reserves[device], capture.counters(4, None)
    with tickets.returned():
        other = capture.counters(4, None, stream=7)
        lent = capture.counters(16, ...)  # of a graph that torch does not tell
        assert len(tickets._pool) == 2
    assert other is not before
    assert capture.counters(4, None) is before
    assert (len(tickets._pool), len(tickets._partials)) == (1, 1)
    assert capture.counters(16, ...).data_ptr() == lent.data_ptr()
    used = reserve.used
    with tickets.returned():
        for _ in range(3):
            graph = Graph()
            capture.counters(4, graph)
            del graph
    assert reserve.used <= used + LEAST_CAPTURED
