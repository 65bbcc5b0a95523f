"""The kernels' derivatives in float64 against finite differences, first and second order, and against autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tritonbn
from tests import cases
from tests.cases import Layout
from tritonbn import reference
from tritonbn.plan import forced

LAYOUTS = [
    pytest.param(Layout((5, 3)), id="rows"),
    pytest.param(Layout((4, 3)), id="rows-folded"),
    pytest.param(Layout((2, 2, 3)), id="planes-folded"),
    pytest.param(Layout((2, 2, 130)), id="planes"),
    pytest.param(Layout((2, 4, 2, 2), torch.channels_last), id="channels-last"),
]
PATHS = ["single", "split"]


def inputs(layout: Layout, device: torch.device, *, weight: bool = True, bias: bool = True) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    C = layout.shape[1]
    x = layout.arrange(cases.gaussian(0.5, 2.0)(layout.shape, g).to(device)).requires_grad_()
    vectors = [cases.gaussian(1.0, 0.3)((C,), g).to(device).requires_grad_() for _ in range(2)]
    return [x, vectors[0] if weight else None, vectors[1] if bias else None]


def function(training: bool, C: int, device: torch.device) -> torch.nn.Module:
    """Batch norm of (x, weight, bias) with fixed statistics; each call has its own copies, for it may update them."""

    class Call(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            mean, var = (torch.linspace(low, 2, C, dtype=torch.float64, device=device) for low in (-1, 1))
            return tritonbn.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-3)

    return Call()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_and_second_derivative(layout: Layout, training: bool, path: str, device: torch.device) -> None:
    call = function(training, layout.shape[1], device)
    fast = layout.shape[-1] > 100
    with forced(path, splits=2):  # type: ignore[arg-type]
        assert torch.autograd.gradcheck(call, inputs(layout, device), fast_mode=fast)
        assert torch.autograd.gradgradcheck(call, inputs(layout, device), fast_mode=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_absent_parameters(weight: bool, bias: bool, training: bool, device: torch.device) -> None:
    layout = Layout((3, 2, 3))
    call = function(training, 2, device)
    given = inputs(layout, device, weight=weight, bias=bias)
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_third_derivative_is_that_of_the_formula(training: bool, device: torch.device) -> None:
    """torch's own third derivative is not right (2.13); the composite formula's is."""

    def third(batch_norm: Callable[..., Tensor]) -> Tensor:
        x, weight, bias = inputs(Layout((4, 2)), device)
        mean, var = torch.zeros(2, device=device).double(), torch.ones(2, device=device).double()
        result = batch_norm(x, mean, var, weight, bias, training=training, eps=1e-3).square().sum()
        for _ in range(3):
            (result,) = torch.autograd.grad(result.pow(2).sum(), [x], create_graph=True)
        return result.detach()

    torch.testing.assert_close(third(tritonbn.functional.batch_norm), third(reference.batch_norm), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_second_derivative_in_low_precision(dtype: torch.dtype, device: torch.device) -> None:
    """Computed in float32 at least, whatever the input's dtype."""

    def second(dtype: torch.dtype) -> Tensor:
        g = torch.Generator().manual_seed(1)
        x, dy, v = (cases.gaussian()((8, 4), g).bfloat16().to(device, dtype).requires_grad_() for _ in range(3))
        weight = torch.full((4,), 1.5, device=device, dtype=torch.promote_types(dtype, torch.float32))
        y = tritonbn.functional.batch_norm(x, None, None, weight, training=True)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return torch.autograd.grad(dx, x, v)[0].double()

    exact = second(torch.float64)
    error = (second(dtype) - exact).abs().max() / exact.abs().max()
    assert error <= 4 * torch.finfo(dtype).eps


def test_second_derivative_of_a_strided_input(device: torch.device) -> None:
    """The dense copy is made outside of the operation, so that x is still a variable in its backward."""
    g = torch.Generator().manual_seed(0)
    base = cases.gaussian()((4, 3, 5), g).to(device).requires_grad_()
    call = function(True, 3, device)
    weight = torch.full((3,), 1.5, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: call(x.transpose(0, 2), weight, None).pow(3), base, fast_mode=True)


@pytest.mark.parametrize("weight", [True, False])
def test_gradient_penalty_with_frozen_statistics(weight: bool, device: torch.device) -> None:
    """dx does not depend on x there: the second derivative is none, not an error."""
    x, w, _ = inputs(Layout((5, 3)), device, weight=weight)
    w = None if w is None else w.detach()
    y = function(False, 3, device)(x, w, None)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    penalty = (dx * x).sum()
    penalty.backward()
    torch.testing.assert_close(x.grad, dx.detach())


def test_second_derivative_under_a_dispatch_mode(device: torch.device) -> None:
    """There the operation is a torch.library operator."""
    x, weight, bias = inputs(Layout((6, 3)), device)

    def second() -> Tensor:
        y = tritonbn.functional.batch_norm(x, None, None, weight, bias, training=True)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        result: Tensor = torch.autograd.grad(dx.pow(2).sum(), x)[0]
        return result

    expected = second()
    with FlopCounterMode(display=False):
        found = second()
    torch.testing.assert_close(found, expected)
