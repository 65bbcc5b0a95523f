"""What runs for a tensor or a model, and why, in words."""

from typing import Any

import torch
from torch import Tensor, nn

from tritonbn.choice import Plan
from tritonbn.layers import layers_of
from tritonbn.planning import plan_for


def explain(x_or_module: Tensor | nn.Module, *inputs: Any, **options: Any) -> str:
    """The plans of batch norm, forward and backward: path, tiles, bytes moved, floor, predicted time and source.

    Args:
        x_or_module: x [N, C, ...], of which nothing but shape, dtype, memory format and device is looked at (on the
            device "meta" the plans are those for an NVIDIA H200), or a module, for each of whose batch norm layers the
            plans are told. It then runs once on `inputs` and `options`, in evaluation, without gradients.

    Returns:
        Lines of text. Bytes are those of full tensors for batch norm alone; times are predictions of a model.

    Raises ValueError for a tensor that batch norm does not take, and a module that calls none of ours.
    """
    if isinstance(x_or_module, Tensor):
        return "\n".join(map(str, plans(x_or_module)))
    if not isinstance(x_or_module, nn.Module):
        raise TypeError(f"expected a Tensor or a Module, but got {type(x_or_module).__name__}")
    lines = []
    device = next((t.device for t in inputs if isinstance(t, Tensor)), torch.device("meta"))
    for name, layer in layers_of(x_or_module, inputs, options).items():
        x = layer.empty("meta") if device.type == "meta" else layer.empty(device)
        lines += [f"{name or type(x_or_module).__name__}:", *(f"  {plan}" for plan in plans(x))]
    return "\n".join(lines)


def plans(x: Tensor) -> list[Plan]:
    """The plans of forward and backward."""
    if x.dim() < 2 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"expected a floating-point tensor [N, C, ...], but got {list(x.shape)} of {x.dtype}")
    return [plan_for("forward", x), plan_for("backward", x)]
