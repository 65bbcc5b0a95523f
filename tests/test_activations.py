"""Every activation alone, for all inputs of 16 bits: value and derivative beside the exact ones and torch's."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonbn.activations import NAMES, Activation, resolve
from tritonbn.kernels.activations import activate, gradient

ACTIVATIONS = [
    resolve(name) for name in (*NAMES, "leaky_relu(0.3)", "elu(0.5)", "softplus(2.0, 1.5)", "softplus(0.5, 12.0)")
]
SHORT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# What fits err by, as their docstrings say, and what the difference 1 - sigmoid(z) of fp32 leaves: beyond an ulp.
BEYOND: dict[tuple[str, str], dict[torch.dtype, float]] = {
    ("gelu", "value"): {torch.bfloat16: 1e-4, torch.float16: 1e-4},
    ("gelu", "derivative"): {torch.bfloat16: 1.7e-4, torch.float16: 1.7e-5},
    ("gelu_tanh", "value"): {torch.bfloat16: 1e-15, torch.float16: 0.0},  # of torch's own 1 + tanh in float64
    ("gelu_tanh", "derivative"): {torch.bfloat16: 3.3e-5, torch.float16: 9e-6},
    ("sigmoid", "derivative"): {torch.bfloat16: 3e-7, torch.float16: 3e-7},
    ("tanh", "derivative"): {torch.bfloat16: 6e-7, torch.float16: 6e-7},
}


@triton.jit  # type: ignore[untyped-decorator]
def activation_kernel(z_ptr, y_ptr, slope_ptr, N, ACT: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation and its derivative before they are rounded to OUT; z, y, slope: [N] fp32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + i, mask=i < N, other=0.0)
    tl.store(y_ptr + i, activate(z, ACT, OUT), mask=i < N)
    tl.store(slope_ptr + i, gradient(tl.full([BLOCK], 1.0, tl.float32), z, ACT, OUT), mask=i < N)


def ours(z: Tensor, activation: Activation, out: torch.dtype) -> dict[str, Tensor]:
    y, slope = torch.empty(len(z), device=z.device), torch.empty(len(z), device=z.device)
    kind: Any = SHORT.get(out, tl.float32)
    activation_kernel[(triton.cdiv(len(z), 8192),)](z.float(), y, slope, len(z), ACT=activation, OUT=kind, BLOCK=8192)
    return {"value": y.to(out), "derivative": slope.to(out)}


def torchs(z: Tensor, activation: Activation) -> dict[str, Tensor]:
    leaf = z.clone().requires_grad_()
    y = activation.apply(leaf)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return {"value": y.detach(), "derivative": slope}


def ulps(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of the dtype around each exact value."""
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=info.smallest_normal))))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_input_of_16_bits(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    """Each result within an ulp of its own, but for what BEYOND tells; the worst within twice torch's error and an ulp.

    Below 2^-119 results may be 0: a factor of theirs is, below 2^-126.
    """
    z = torch.arange(2**16, device=device).to(torch.int16).view(dtype)
    z = z[z.isfinite()]
    mine, exact, known = ours(z, activation, dtype), torchs(z.double(), activation), torchs(z, activation)
    for what, result in mine.items():
        finite = exact[what].abs() <= torch.finfo(dtype).max
        truth, step = exact[what][finite], ulps(exact[what], dtype)[finite]
        error, allowed = ((r[what].double()[finite] - truth).abs() for r in (mine, known))
        assert result[finite].isfinite().all(), what
        beyond = BEYOND.get((activation.name, what), {}).get(dtype, 0.0) + 2.0**-119
        excess = error - step - beyond
        worst = excess.argmax()
        assert excess[worst] <= 0, f"{what} at {z[finite][worst]}: {result[finite][worst]}, exactly {truth[worst]}"
        usual = z[finite].abs() <= 20
        slack = torch.finfo(dtype).eps * truth[usual].abs().max()
        assert error[usual].max() <= 2 * allowed[usual].max() + slack, what


@pytest.mark.parametrize("dtype", [*SHORT, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_not_finite(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    """NaN and infinities as torch's; torch's own derivatives at NaN differ between dtypes and devices."""
    z = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device, dtype=dtype)
    mine, expected = ours(z, activation, dtype), torchs(z.double(), activation)
    torch.testing.assert_close(mine["value"].double(), expected["value"], equal_nan=True, rtol=0, atol=1e-2)
    torch.testing.assert_close(
        mine["derivative"][1:].double(), expected["derivative"][1:], equal_nan=True, rtol=0, atol=1e-2
    )


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_float32(activation: Activation, device: torch.device) -> None:
    """The worst error of 2^16 inputs within twice torch's and an ulp of the largest result."""
    z = torch.linspace(-12, 12, 2**16, device=device)
    mine, exact, known = ours(z, activation, torch.float32), torchs(z.double(), activation), torchs(z, activation)
    for what in mine:
        error, allowed = ((r[what].double() - exact[what]).abs().max() for r in (mine, known))
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * exact[what].abs().max(), what
