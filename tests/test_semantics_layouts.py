"""Memory layouts of input, output and gradients against torch's function."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm

from tests.parity import assert_as_torch, channels_last, formats, in_both_modes, make_call, random
from tritonbn.functional import batch_norm

pytestmark = pytest.mark.usefixtures("poison")


def shifted(x: Tensor) -> Tensor:
    """The same values, one element into a buffer: no 16-byte alignment."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def window(x: Tensor) -> Tensor:
    """The same values as the inside of a larger tensor: gaps after every row."""
    larger = torch.full([size + 2 for size in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    return larger[tuple(slice(1, -1) for _ in x.shape)].copy_(x)


def reordered(*order: int) -> Callable[[Tensor], Tensor]:
    """The same values with the dimensions lying in memory in this order."""
    back = [order.index(dimension) for dimension in range(len(order))]
    return lambda x: x.permute(order).contiguous().permute(back)


def some_channels(x: Tensor) -> Tensor:
    """The same values as channels 1 to C of a channels_last tensor with C + 2."""
    shape = [x.shape[0], x.shape[1] + 2, *x.shape[2:]]
    larger = channels_last(torch.full(shape, float("nan"), dtype=x.dtype, device=x.device))
    return larger[:, 1:-1].copy_(x)


def every_other_row(x: Tensor) -> Tensor:
    larger = torch.full((2 * x.shape[0], *x.shape[1:]), float("nan"), dtype=x.dtype, device=x.device)
    return larger[::2].copy_(x)


def repeated_batch(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def repeated_channels(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels-last": ((2, 3, 4, 3), channels_last),
    "channels-last-3d": ((2, 3, 2, 3, 2), channels_last),
    "channels-last-batch-of-one": ((1, 3, 4, 3), channels_last),
    "channels-last-one-channel": ((2, 1, 4, 3), channels_last),
    "channels-last-one-pixel": ((4, 3, 1, 1), channels_last),
    "channels-last-some-channels": ((2, 3, 4, 3), some_channels),
    "channels-last-every-other-image": (
        (2, 3, 4, 3),
        lambda x: channels_last(x.repeat_interleave(2, 0))[::2],
    ),
    "unaligned": ((2, 3, 5), shifted),
    "unaligned-channels-last": ((2, 3, 4, 3), lambda x: shifted(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "window": ((2, 3, 4, 3), window),
    "window-2d": ((6, 3), window),
    "every-other-row": ((3, 3, 4), every_other_row),
    "every-other-row-2d": ((6, 3), every_other_row),
    "transposed-2d": ((6, 3), reordered(1, 0)),
    "sequence-channels-last": ((4, 3, 5), reordered(0, 2, 1)),
    "channels-first": ((2, 3, 4, 3), reordered(1, 0, 2, 3)),
    "height-and-width-swapped": ((2, 3, 4, 3), reordered(0, 1, 3, 2)),
    "ambiguous-width-one": ((2, 8, 8, 1), reordered(0, 2, 1, 3)),
    "ambiguous-batch-one": ((1, 3, 2, 3), reordered(0, 2, 1, 3)),
    "space-before-batch": ((2, 3, 4, 3), reordered(2, 3, 0, 1)),
    "repeated-batch": ((4, 3, 5), repeated_batch),
    "repeated-channels": ((4, 3, 5), repeated_channels),
    "repeated-batch-4d": ((4, 3, 2, 3), repeated_batch),
}


@in_both_modes
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_input_layouts(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], training: bool, device: torch.device
) -> None:
    call = make_call(shape, device, training=training)
    call = replace(call, input=layout(call.input))
    ours = assert_as_torch(call)
    theirs = call.run(torch_batch_norm)
    for name in ("output", "grad_input"):
        for memory_format in formats(theirs[name]):
            assert ours[name].is_contiguous(memory_format=memory_format), (name, memory_format)


GRAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels-last": channels_last,
    "expanded-scalar": lambda grad: grad[:1, :1, :1, :1].expand(grad.shape),
    "expanded-batch": repeated_batch,
    "zero": torch.zeros_like,
    "window": window,
    "unaligned": shifted,
    "height-and-width-swapped": reordered(0, 1, 3, 2),
    "every-other-row": every_other_row,
}


@in_both_modes
@pytest.mark.parametrize("input_layout", [torch.Tensor.contiguous, channels_last], ids=["planes", "rows"])
@pytest.mark.parametrize("layout", GRAD_LAYOUTS.values(), ids=GRAD_LAYOUTS)
def test_gradient_layouts(
    layout: Callable[[Tensor], Tensor],
    input_layout: Callable[[Tensor], Tensor],
    training: bool,
    device: torch.device,
) -> None:
    call = make_call((2, 3, 4, 3), device, training=training)
    assert call.grad is not None
    call = replace(call, input=input_layout(call.input), grad=layout(call.grad))
    ours = assert_as_torch(call)
    assert formats(ours["grad_input"]) == formats(call.input)


@in_both_modes
def test_output_is_new_memory(training: bool, device: torch.device) -> None:
    x = random(4, 3).to(device, torch.float32)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    y = batch_norm(x, mean, var, training=training, eps=1e-5 if training else 0.0)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
