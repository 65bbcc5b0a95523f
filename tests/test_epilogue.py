"""Activation and residual in the same kernels: values against the exact result, beside torch's own composition."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import cases, exact
from tests.cases import Layout
from tests.closeness import Distance, assert_as_good_as_torch, distance
from tests.launches import recorded
from tritonbn.activations import NAMES, Activation, resolve
from tritonbn.functional import batch_norm
from tritonbn.plan import forced

pytestmark = pytest.mark.usefixtures("poison")

FLOAT = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RESULTS = ("y", "dx", "dweight", "dbias", "dresidual")
# More parameters than torch's defaults, which could hide that they are ignored.
OTHERS = ["leaky_relu(0.3)", "elu(0.5)", "softplus(2.0, 1.5)"]
ACTIVATIONS = [resolve(name) for name in (*NAMES, *OTHERS)]
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
with_and_without = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


class Problem:
    """Inputs of one call. Where z is next to a jump of the derivative, rounding decides: dy is 0 there."""

    def __init__(
        self, layout: Layout, activation: Activation, residual: bool, dtype: torch.dtype, device: torch.device,
        *, training: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        own = torch.float32 if dtype.itemsize == 2 else dtype
        C = layout.shape[1]

        def tensor(std: float) -> Tensor:
            return layout.arrange(cases.gaussian(0.2, std)(layout.shape, g).to(device, dtype))

        def vector(low: float, high: float) -> Tensor:
            return (torch.rand(C, generator=g, dtype=torch.float64) * (high - low) + low).to(device, own)

        self.x, self.dy, self.residual = tensor(2.0), tensor(1.0), tensor(1.0) if residual else None
        self.weight, self.bias = vector(0.5, 2.5), vector(-1, 1)
        self.running = vector(-1, 1), vector(0.5, 2)
        self.activation, self.training = activation, training
        near = np.zeros(layout.shape, dtype=bool)
        z = self.truth().z
        for jump in exact.jumps(activation):
            near |= np.abs(z - jump) < 8 * torch.finfo(dtype).eps * (2 + np.abs(z))
        self.dy.masked_fill_(torch.from_numpy(near).to(device), 0)

    def truth(self) -> exact.Exact:
        tensors = self.x, self.dy, self.weight, self.bias, *self.running
        return exact.batch_norm(*tensors, self.training, 0.1, 1e-5, self.activation, self.residual)

    def run(self, function: Callable[..., Tensor]) -> Iterator[Tensor]:
        """y and the gradients of `function(x, mean, var, weight, bias, training, residual)`."""
        leaves = [None if t is None else t.detach().requires_grad_() for t in
                  (self.x, self.weight, self.bias, self.residual)]  # fmt: skip
        x, weight, bias, residual = leaves
        y = function(x, *(s.clone() for s in self.running), weight, bias, self.training, residual)
        y.backward(self.dy)  # type: ignore[no-untyped-call]
        yield y.detach()
        yield from (leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)

    def ours(self, *tensors: Any) -> Tensor:
        *others, residual = tensors
        return batch_norm(*others, activation=self.activation, residual=residual)

    def torchs(self, *tensors: Any) -> Tensor:
        *others, residual = tensors
        y = torch.nn.functional.batch_norm(*others)
        return self.activation.apply(y if residual is None else y + residual)

    def distances(self) -> Iterator[tuple[str, Distance]]:
        with recorded() as kernels:
            ours = list(self.run(self.ours))
        assert 2 <= len(kernels) <= 4, "at most two launches each way"
        truth = self.truth()
        for name, mine, theirs in zip(RESULTS, ours, self.run(self.torchs), strict=False):
            yield name, distance(mine, theirs, getattr(truth, name), name)


def check(*args: Any, **options: Any) -> None:
    assert_as_good_as_torch(lambda seed: Problem(*args, seed=seed, **options).distances())


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@with_and_without
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("path", ["single", "split"])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_every_activation(
    layout: Layout, path: Any, activation: Activation, residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    with forced(path, splits=3 if path == "split" else None):
        check(layout, activation, residual, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_both_modes
@with_and_without
@pytest.mark.parametrize("name", ["relu", "silu", "identity"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout(
    layout: Layout, name: str, residual: bool, training: bool, dtype: torch.dtype, device: torch.device
) -> None:
    for path in ("single", "split"):
        with forced(path, splits=3 if path == "split" else None):
            check(layout, resolve(name), residual, dtype, device, training=training)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@with_and_without
def test_evaluation(activation: Activation, residual: bool, device: torch.device) -> None:
    for dtype in FLOAT:
        check(Layout((3, 10, 7, 7)), activation, residual, dtype, device, training=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_and_without
@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("layout", cases.LARGE_LAYOUTS)
def test_large_layouts(layout: Layout, name: str, residual: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(layout, resolve(name), residual, dtype, device)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, 3.0, -3.0, 6.0, 100.0, -100.0, 1e4, -1e4]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_special_values(activation: Activation, device: torch.device) -> None:
    """NaN, infinities and jumps as torch's, value and derivative, in evaluation with mean 0 and variance 1."""
    x = torch.tensor(SPECIAL * 3, device=device, dtype=torch.float64)[:, None]

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        return y.detach(), dx

    mean, var = torch.zeros(1, device=device).double(), torch.ones(1, device=device).double()
    y, dx = run(lambda x: batch_norm(x, mean, var, eps=0.0, activation=activation))
    expected, slope = run(lambda x: activation.apply(x * 1.0))
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-12, atol=1e-40)
    known = x.isfinite()  # torch's own derivatives at NaN differ between dtypes and devices
    torch.testing.assert_close(dx[known], slope[known], rtol=1e-6, atol=1e-11)  # its 1 / 6 is a float32
