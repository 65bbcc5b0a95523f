"""The same input gives the same bits, whoever comes last; and tickets are left as they were found."""

import pytest
import torch
from torch import Tensor

import tritonbn
from tests import cases
from tests.cases import Layout
from tritonbn import tickets
from tritonbn.plan import forced


def step(layout: Layout, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    C = layout.shape[1]
    x = layout.arrange(cases.gaussian(1.0)(layout.shape, g).to(device, dtype)).requires_grad_()
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.linspace(0.5, 1.5, C, device=device, dtype=parameters).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(C, device=device, dtype=parameters), torch.ones(C, device=device, dtype=parameters)
    y = tritonbn.functional.batch_norm(x, mean, var, weight, bias, training=True)
    gradients = torch.autograd.grad(y, [x, weight, bias], torch.sin(x).detach())
    return [y.detach(), mean, var, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["single", "split"])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_repeats_bitwise(layout: Layout, path: str, dtype: torch.dtype, device: torch.device) -> None:
    with forced(path, splits=4):  # type: ignore[arg-type]
        first = step(layout, dtype, device)
        for _ in range(20 if device.type == "cuda" else 2):
            assert all(torch.equal(a, b) for a, b in zip(first, step(layout, dtype, device), strict=True))


def test_deterministic_mode(device: torch.device) -> None:
    layout = Layout((6, 3, 20, 33))
    with forced("split", splits=4):
        expected = step(layout, torch.float32, device)
        torch.use_deterministic_algorithms(True)
        try:
            found = step(layout, torch.float32, device)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_tickets_return_to_zero(device: torch.device) -> None:
    with forced("split", splits=3):
        step(Layout((37, 100)), torch.float32, device)
    assert tickets._pool
    assert all(int(kept.abs().sum()) == 0 for kept in tickets._pool.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: programs that run at once")
def test_many_programs_race_for_the_last_ticket() -> None:
    device = torch.device("cuda")
    layout = Layout((8192, 96))
    with forced("split", splits=500):
        first = step(layout, torch.bfloat16, device)
        for _ in range(2000):
            assert all(torch.equal(a, b) for a, b in zip(first, step(layout, torch.bfloat16, device), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs and streams")
def test_graph_replay_beside_eager_work_on_another_stream() -> None:
    device = torch.device("cuda")
    x = torch.randn(8192, 96, device=device)
    with forced("split", splits=64):
        expected = tritonbn.functional.batch_norm(x, None, None, training=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tritonbn.functional.batch_norm(x, None, None, training=True)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for _ in range(200):
            graph.replay()
            with torch.cuda.stream(side):
                beside = tritonbn.functional.batch_norm(x, None, None, training=True)
        torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert torch.equal(beside, expected)
