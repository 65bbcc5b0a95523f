"""Values of the kernels against the exact result, beside torch's own error."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonbn
from tests import cases, exact
from tests.cases import Fill, Layout
from tests.closeness import Distance, assert_as_good_as_torch, distance
from tests.launches import recorded
from tritonbn.plan import forced

pytestmark = pytest.mark.usefixtures("poison")

FLOAT = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
SPLIT, SINGLE = [pytest.param("split", id="split"), pytest.param("single", id="single")]


class Problem:
    """Inputs of one call; `run` calls a batch norm and its backward on copies of them."""

    def __init__(
        self, layout: Layout, fill: Fill, dtype: torch.dtype, device: torch.device, *, seed: int = 0,
        parameters: torch.dtype | None = None, affine: str = "both", tracked: bool = True, training: bool = True,
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        C = layout.shape[1]
        own = parameters or (torch.float32 if dtype.itemsize == 2 else dtype)

        def vector(low: float, high: float) -> Tensor:
            return (torch.rand(C, generator=g, dtype=torch.float64) * (high - low) + low).to(device, own)

        self.x = layout.arrange(fill(layout.shape, g).to(device, dtype))
        self.dy = layout.arrange(torch.randn(layout.shape, generator=g, dtype=torch.float64).to(device, dtype))
        self.weight = vector(0.5, 1.5) if affine in ("both", "weight") else None
        self.bias = vector(-1, 1) if affine in ("both", "bias") else None
        self.running = (vector(-1, 1), vector(0.5, 2)) if tracked or not training else (None, None)
        self.training, self.eps, self.momentum = training, eps, 0.1

    def run(self, batch_norm: Callable[..., Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of the output, the gradients and the running statistics that there are."""
        before = self.x.clone()
        x = self.x.detach().requires_grad_()
        parameters = [None if p is None else p.clone().requires_grad_() for p in (self.weight, self.bias)]
        running = [None if s is None else s.clone() for s in self.running]
        y = batch_norm(x, *running, *parameters, self.training, self.momentum, self.eps)
        y.backward(self.dy)  # type: ignore[no-untyped-call]
        assert torch.equal(self.x, before), "the input was modified"
        values = (y.detach(), x.grad, *(None if p is None else p.grad for p in parameters), *running)
        yield from ((name, value) for name, value in zip(NAMES, values, strict=True) if value is not None)

    def distances(self) -> Iterator[tuple[str, Distance]]:
        running_mean, running_var = self.running
        truth = exact.batch_norm(
            self.x, self.dy, self.weight, self.bias, running_mean, running_var, self.training, self.momentum, self.eps
        )
        theirs = dict(self.run(torch.nn.functional.batch_norm))
        with recorded() as kernels:
            found = list(self.run(tritonbn.functional.batch_norm))
        assert 2 <= len(kernels) <= 4, "at most two launches each way"
        for name, ours in found:
            true = getattr(truth, name)
            assert true is not None
            yield name, distance(ours, theirs[name], true, name)


def check(*args: Any, **options: Any) -> None:
    assert_as_good_as_torch(lambda seed: Problem(*args, seed=seed, **options).distances())


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("path", [SPLIT, SINGLE])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout(layout: Layout, path: str, training: bool, dtype: torch.dtype, device: torch.device) -> None:
    with forced(path, splits=3 if path == "split" else None):  # type: ignore[arg-type]
        check(layout, cases.gaussian(0.5, 2.0), dtype, device, training=training)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", [None, "single", "split"], ids=["own-plan", "single", "split"])
@pytest.mark.parametrize("layout", cases.LARGE_LAYOUTS)
def test_large_layouts(layout: Layout, path: Any, dtype: torch.dtype, device: torch.device) -> None:
    with forced(path):
        check(layout, cases.gaussian(0.5, 2.0), dtype, device)


@pytest.mark.parametrize("affine", ["weight", "bias", "neither"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("path", [SPLIT, SINGLE])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_parameters(
    dtype: torch.dtype, layout: Layout, path: str, training: bool, affine: str, device: torch.device
) -> None:
    with forced(path):  # type: ignore[arg-type]
        check(layout, cases.gaussian(), dtype, device, affine=affine, tracked=False, training=training)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", [SPLIT, SINGLE])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_parameters_in_half_precision(layout: Layout, path: str, dtype: torch.dtype, device: torch.device) -> None:
    with forced(path):  # type: ignore[arg-type]
        check(layout, cases.gaussian(0.5, 2.0), dtype, device, parameters=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("path", "splits"), [("single", 1), ("split", 1), ("split", 2), ("split", 5)])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
@pytest.mark.parametrize("fill", cases.FILLS)
def test_hard_data(
    fill: Fill, layout: Layout, path: str, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    with forced(path, splits):  # type: ignore[arg-type]
        check(layout, fill, dtype, device)


@pytest.mark.parametrize("path", [SPLIT, SINGLE])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_fp16_near_its_range(layout: Layout, path: str, device: torch.device) -> None:
    """A sum or a square in half precision would overflow."""
    with forced(path):  # type: ignore[arg-type]
        check(layout, cases.gaussian(0.0, 15_000.0), torch.float16, device)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_eps(eps: float, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        check(Layout((12, 8)), cases.gaussian(0.0, 1e-3), dtype, device, eps=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_unaligned_storage(layout: Layout, offset: int, dtype: torch.dtype, device: torch.device) -> None:
    """Tensors that start off a 16-byte boundary."""
    problem = Problem(layout, cases.gaussian(), dtype, device)
    for name in ("x", "dy"):
        tensor = getattr(problem, name)
        storage = torch.zeros(tensor.numel() + offset, dtype=dtype, device=device)
        unaligned = storage.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)
        assert unaligned.data_ptr() % 16
        setattr(problem, name, unaligned)
    for name, found in problem.distances():
        assert found.is_fine(), (name, found)


def test_running_statistics_follow_torch(device: torch.device) -> None:
    ours, theirs = tritonbn.BatchNorm2d(6).to(device), torch.nn.BatchNorm2d(6).to(device)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        x = cases.gaussian(seed, 1 + seed)((2, 6, 5, 5), g).float().to(device)
        for module in (ours, theirs):
            module(x)
    for name, ours_after in ours.state_dict().items():
        torch.testing.assert_close(ours_after, theirs.state_dict()[name], rtol=1e-6, atol=1e-6)
    assert ours.num_batches_tracked is not None
    assert int(ours.num_batches_tracked) == 5
