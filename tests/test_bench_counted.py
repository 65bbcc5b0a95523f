"""What counts as an operation of torch within a call, and what does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.counted import other_launches


def test_each_operation_that_computes_counts(device: torch.device) -> None:
    x = torch.zeros(4, dtype=torch.int64, device=device)
    assert other_launches(lambda: x.add_(1).clone()) == ["aten::add_", "aten::copy_"]


@pytest.mark.parametrize(
    "work",
    [
        torch.empty_like,
        torch.detach,
        Tensor.contiguous,
        lambda x: x.to(x.dtype),
        lambda x: x.view(-1).view_as(x).t().expand(2, 4, 4)[0],
        lambda x: x.reshape(2, 8),
        lambda x: x.new_empty(3),
        lambda x: x.resolve_neg().requires_grad_(),
    ],
)
def test_memory_and_views_do_not_count(work: Callable[[Tensor], object], device: torch.device) -> None:
    x = torch.zeros(4, 4, device=device)
    assert other_launches(lambda: work(x)) == []


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        pytest.param(lambda x: x.t().contiguous(), "aten::copy_", id="a-copy-by-contiguous"),
        pytest.param(lambda x: x.t().reshape(16), "aten::copy_", id="a-copy-by-reshape"),
        pytest.param(lambda x: x.to(torch.float64), "aten::copy_", id="a-conversion"),
        pytest.param(torch.ones_like, "aten::fill_", id="ones"),
        pytest.param(lambda x: float(x[0, 0]), "aten::_local_scalar_dense", id="a-wait-for-a-number"),
        pytest.param(lambda x: x.mul(x), "aten::mul", id="arithmetic"),
        pytest.param(torch.zeros_like, "aten::zero_", id="zeros"),
    ],
)
def test_one_operation_counts_once(work: Callable[[Tensor], object], expected: str, device: torch.device) -> None:
    x = torch.randn(4, 4, device=device)
    found = other_launches(lambda: work(x))
    assert found == [expected] or (expected == "aten::zero_" and found == ["aten::fill_"])


def test_the_backward_is_within() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return dy.mul(dy)

    x = torch.randn(4, requires_grad=True)
    g = torch.randn(4)
    assert other_launches(lambda: torch.autograd.grad(Doubled.apply(x), x, g)) == ["aten::mul"]  # type: ignore[no-untyped-call]
