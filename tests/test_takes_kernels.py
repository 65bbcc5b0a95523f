"""What takes the kernels and what is left to torch: a silent fallback would pass every comparison with torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import tritonbn
from tests.launches import recorded
from tritonbn import dispatch
from tritonbn.functional import batch_norm

FORWARD = {"forward_kernel", "statistics_kernel", "normalize_kernel", "inference_kernel"}


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


SHAPES = [(6, 3), (6, 3, 1), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 2, 2), (2, 3, 2, 2, 2, 2)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_takes_the_kernels(shape: tuple[int, ...], dtype: torch.dtype, training: bool, device: torch.device) -> None:
    for parameters in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
        mean, var, weight, bias = (torch.rand(3, device=device).to(parameters) for _ in range(4))
        x = randn(*shape, device=device, dtype=dtype).requires_grad_()
        with recorded() as kernels:
            y = batch_norm(x, mean, var, weight.requires_grad_(), bias.requires_grad_(), training=training)
            assert 1 <= len(kernels) <= 2
            assert set(kernels) <= FORWARD
            kernels.clear()
            y.sum().backward()  # type: ignore[no-untyped-call]
            assert 1 <= len(kernels) <= 2
            assert not set(kernels) & FORWARD


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "slice": lambda x: x[:, :, 1:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_take_the_kernels(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    with recorded() as kernels:
        batch_norm(layout(randn(2, 3, 4, 4, device=device)), None, None, training=True)
    assert kernels


def test_compiled_code_takes_the_kernels(device: torch.device) -> None:
    compiled = torch.compile(nn.Sequential(tritonbn.BatchNorm1d(3).to(device)), backend="aot_eager", fullgraph=True)
    with recorded() as kernels:
        compiled(randn(6, 3, device=device))
    assert set(kernels) & FORWARD


def test_a_dispatch_mode_keeps_the_kernels(device: torch.device) -> None:
    with recorded() as kernels, FlopCounterMode(display=False):
        batch_norm(randn(6, 3, device=device), None, None, training=True)
    assert set(kernels) & FORWARD


class Subclass(Tensor):
    pass


LEFT: dict[str, Callable[[Tensor], Any]] = {
    "empty": lambda x: batch_norm(x[:0], None, None, training=True),
    "subclass": lambda x: batch_norm(x.as_subclass(Subclass), None, None, training=True),
    "vmap": lambda x: vmap(lambda v: batch_norm(v, None, None, training=True))(x[None]),
    "traced": lambda x: torch.jit.trace(lambda v: batch_norm(v, None, None, training=True), x, check_trace=False)(x),  # type: ignore[no-untyped-call]
    "meta": lambda x: batch_norm(x.to("meta"), None, None, training=True),
    "exported": lambda x: torch.export.export(tritonbn.BatchNorm1d(3).to(x.device).eval(), (x,)),
}


@pytest.mark.parametrize("call", LEFT.values(), ids=LEFT)
def test_left_to_torch(call: Callable[[Tensor], Any], device: torch.device) -> None:
    with recorded() as kernels:
        call(randn(6, 3, device=device))
    assert not kernels


def test_tensors_beyond_32_bit_indices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    asked = []
    monkeypatch.setattr(dispatch, "fits", lambda *sizes: asked.append(sizes))
    with recorded() as kernels:
        batch_norm(randn(2, 3, 4, 5, device=device), None, None, training=True)
    assert not kernels
    assert asked == [(2, 3, 20)]
