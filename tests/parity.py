"""torch's own answer to the same call: what the tests about semantics compare with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm

from tests.launches import recorded
from tritonbn.functional import batch_norm

# Of the largest value. A wrong formula is off by far more; how accurate we are has tests of its own.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

STATISTICS = ("running_mean", "running_var")
LEAVES = ("input", "weight", "bias")
TENSORS = (*LEAVES, *STATISTICS, "grad")

BatchNorm = Callable[..., Tensor]

in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def random(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> Tensor:
    """float64 values in [low, high) within [-2, 2], in steps of 1/64: every dtype holds them unrounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(low * 64), int(high * 64), shape, generator=generator).double() / 64


@dataclass(frozen=True)
class Call:
    """One call of batch_norm and its backward; no tensor is written, `run` copies the statistics.

    input, grad: [N, C, ...] in any layout; the others: [C] or None. Without grad there is no backward.
    """

    input: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    grad: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named tensors that are not None."""
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def run(self, batch_norm: BatchNorm) -> dict[str, Tensor]:
        """The output, the gradients of all leaves and the statistics afterwards, by name."""
        leaves = {name: tensor.detach() for name, tensor in self.given(*LEAVES).items()}
        if self.grad is not None:
            leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        statistics = {name: tensor.clone() for name, tensor in self.given(*STATISTICS).items()}
        arguments = dict.fromkeys(LEAVES + STATISTICS) | leaves | statistics
        output = batch_norm(**arguments, **self.options)
        results = {"output": output.detach()} | statistics
        if self.grad is not None:
            gradients = torch.autograd.grad(output, list(leaves.values()), self.grad)
            results |= {f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
        return results

    def exact(self) -> "Call":
        """The call on contiguous float64 copies: torch's CPU kernels get some strided gradients wrong."""
        tensors = self.given(*TENSORS)
        copies: dict[str, Any] = {name: tensor.detach().double().contiguous() for name, tensor in tensors.items()}
        return replace(self, **copies)


def make_call(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    leave_out: tuple[str, ...] = (),
    backward: bool = True,
    **options: Any,
) -> Call:
    """A call on random contiguous tensors; `leave_out` names the [C] tensors that are None."""
    channels = shape[1]
    per_channel = {
        "running_mean": random(channels, seed=1),
        "running_var": random(channels, seed=2, low=0.5),
        "weight": random(channels, seed=3),
        "bias": random(channels, seed=4),
    }
    kept = {
        name: tensor.to(device, parameters or dtype) for name, tensor in per_channel.items() if name not in leave_out
    }
    grad = random(*shape, seed=5).to(device, dtype) if backward else None
    return Call(random(*shape).to(device, dtype), grad=grad, options=options, **kept)


def assert_matches(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """The same names, shapes and values, within the roundings of our dtypes; NaN equals NaN."""
    assert ours.keys() == exact.keys()
    for name, tensor in ours.items():
        truth = exact[name].detach().double()
        finite = truth[truth.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
        torch.testing.assert_close(
            tensor.detach().double(),
            truth,
            rtol=0,
            atol=TOLERANCE[tensor.dtype] * scale,
            equal_nan=True,
            check_stride=False,
            msg=partial("{}: {}".format, name),
        )


def assert_as_torch(call: Call) -> dict[str, Tensor]:
    """Our kernels' results equal torch's on exact copies and none of the arguments was written; our results.

    Empty tensors are torch's own affair.
    """
    before = {name: tensor.clone() for name, tensor in call.given(*TENSORS).items()}
    with recorded() as kernels:
        ours = call.run(batch_norm)
    assert bool(kernels) != (call.input.numel() == 0), kernels
    for name, tensor in before.items():
        torch.testing.assert_close(getattr(call, name), tensor, rtol=0, atol=0, equal_nan=True)
    assert_matches(ours, call.exact().run(torch_batch_norm))
    return ours


def raised_by(call: Callable[[], object]) -> tuple[type[Exception], str] | None:
    """Type and text of what `call` raises; None if it returns."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def assert_same_error(ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Both raise, with the same type and the same text."""
    expected = raised_by(theirs)
    assert expected is not None, "torch accepts this call"
    raised = raised_by(ours)
    assert raised == expected, f"torch raises {expected}, ours {raised}"


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels contiguous."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def formats(x: Tensor) -> list[torch.memory_format]:
    """The memory formats in which x is contiguous: two where sizes of 1 leave it open."""
    candidates = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])
    return [f for f in (torch.contiguous_format, *candidates) if x.is_contiguous(memory_format=f)]
