"""Memory that launches share from call to call: grown, zero where it must be, and apart where it must be."""

import pytest
import torch

from tritonbn import tickets
from tritonbn.tickets import LEAST_COUNTERS, LEAST_VALUES, scratch

X = torch.zeros(2, 2)


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "_pool", {})
    monkeypatch.setattr(tickets, "_partials", {})


def test_the_same_memory_every_time() -> None:
    first = scratch(X, 10, torch.float32, "tickets", 3, pooled=True)
    second = scratch(X, 20, torch.float32, "tickets", 5, pooled=True)
    assert all(a is b for a, b in zip(first, second, strict=True))
    values, counters = first
    assert (values.numel(), values.dtype) == (LEAST_VALUES, torch.float32)
    assert (counters.numel(), counters.dtype) == (LEAST_COUNTERS, torch.int32)
    assert not counters.any()


def test_it_grows_and_what_was_larger_stays() -> None:
    small = scratch(X, 10, torch.float32, "tickets", 3, pooled=True)
    large = scratch(X, LEAST_VALUES + 1, torch.float32, "tickets", LEAST_COUNTERS + 1, pooled=True)
    again = scratch(X, 10, torch.float32, "tickets", 3, pooled=True)
    assert large[0].numel() == LEAST_VALUES + 1
    assert large[1].numel() == LEAST_COUNTERS + 1
    assert not large[1].any()
    assert all(a is not b for a, b in zip(small, large, strict=True))
    assert all(a is b for a, b in zip(large, again, strict=True))


def test_one_part_may_grow_without_the_other() -> None:
    values, counters = scratch(X, 10, torch.float32, "tickets", 3, pooled=True)
    assert scratch(X, 10, torch.float32, "tickets", LEAST_COUNTERS + 1, pooled=True)[0] is values
    assert scratch(X, LEAST_VALUES + 1, torch.float32, "tickets", 3, pooled=True)[1] is not counters


def test_dtypes_and_purposes_are_kept_apart() -> None:
    values, counters = scratch(X, 10, torch.float32, "tickets", 3, pooled=True)
    double, same = scratch(X, 10, torch.float64, "tickets", 3, pooled=True)
    same_values, semaphores = scratch(X, 10, torch.float32, "semaphores", 3, pooled=True)
    assert double.dtype == torch.float64
    assert (same is counters, same_values is values) == (True, True)
    assert semaphores is not counters
    assert not semaphores.any()


def test_each_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(tickets, "_stream", lambda x, stream=stream: stream)
        found.append(scratch(X, 10, torch.float32, "tickets", 3, pooled=True))
    assert all(a is not b for a, b in zip(found[0], found[1], strict=True))
    assert all(a is b for a, b in zip(found[0], found[2], strict=True))


def test_what_is_not_pooled_is_the_calls_own() -> None:
    first = scratch(X, 10, torch.float32, "tickets", 3, pooled=False)
    second = scratch(X, 10, torch.float32, "tickets", 3, pooled=False)
    assert (first[0].numel(), first[1].numel()) == (10, 3)
    assert not first[1].any()
    assert all(a is not b for a, b in zip(first, second, strict=True))
    assert not tickets._pool
    assert not tickets._partials


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs and streams")
def test_graphs_and_streams_of_a_gpu() -> None:
    x = torch.zeros(2, 2, device="cuda")
    eager = scratch(x, 10, torch.float32, "tickets", 3, pooled=True)
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        aside = scratch(x, 10, torch.float32, "tickets", 3, pooled=True)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = scratch(x, 10, torch.float32, "tickets", 3, pooled=True)
    assert scratch(x, 10, torch.float32, "tickets", 3, pooled=True)[1] is eager[1]
    assert all(t is not eager[1] for t in (aside[1], captured[1]))
    assert captured[1].numel() == 3
    assert len(tickets._pool) == 2


def test_captured_calls_share_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own, aligned as memory of its own would be; without any left they are zeroed at each replay."""
    device = torch.device("cpu")
    monkeypatch.setattr(tickets, "_reserve", {device: (torch.zeros(16, dtype=torch.int32), 0)})
    first, second, third = (tickets._reserved(device, counters) for counters in (5, 8, 1))
    assert first is not None
    assert second is not None
    assert (first.numel(), first.storage_offset()) == (5, 0)
    assert (second.numel(), second.storage_offset()) == (8, 8)
    assert third is None
    assert tickets._reserved(torch.device("meta"), 1) is None


def test_what_was_kept_or_reserved_inside_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays, and counters of graphs that are gone are those of the next one."""
    device = torch.device("cpu")
    x = torch.empty(4)
    monkeypatch.setattr(tickets, "_pool", {})
    monkeypatch.setattr(tickets, "_partials", {})
    monkeypatch.setattr(tickets, "_reserve", {device: (torch.zeros(64, dtype=torch.int32), 8)})
    before = tickets.scratch(x, 10, torch.float32, "tickets", 4, pooled=True)
    with tickets.returned(device):
        monkeypatch.setattr(tickets, "_stream", lambda x: 7)
        tickets.scratch(x, 10, torch.float32, "tickets", 4, pooled=True)
        assert tickets._reserved(device, 16) is not None
        assert (len(tickets._pool), tickets._reserve[device][1]) == (2, 24)
    monkeypatch.setattr(tickets, "_stream", lambda x: 0)
    after = tickets.scratch(x, 10, torch.float32, "tickets", 4, pooled=True)
    assert [t.data_ptr() for t in after] == [t.data_ptr() for t in before]
    assert (len(tickets._pool), len(tickets._partials), tickets._reserve[device][1]) == (1, 1, 8)
