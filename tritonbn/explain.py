"""What runs for a tensor or a model, and why, in words."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tritonbn import launch
from tritonbn.choice import Plan
from tritonbn.layers import Layer, layer_of, layers_of
from tritonbn.plan import fits
from tritonbn.planning import plan_for

META = torch.device("meta")


def explain(x_or_module: Tensor | nn.Module, *inputs: Any, **options: Any) -> str:
    """The plans of batch norm, forward and backward: path, tiles, bytes moved, floor, predicted time and source.

    Args:
        x_or_module: x [N, C, ...], of which nothing but shape, dtype, memory format and device is looked at (on the
            device "meta" the plans are those for an NVIDIA H200), or a module, for each of whose batch norm layers the
            plans are told. It then runs once on `inputs` and `options`, in evaluation, without gradients.

    Returns:
        Lines of text. Bytes are those of full tensors for batch norm alone; times are predictions of a model. Where
        torch computes instead of our kernels, as on the CPU, the first line says so.

    Raises ValueError for a tensor that batch norm does not take, and a module that calls none of ours.
    """
    if isinstance(x_or_module, Tensor):
        return "\n".join(_lines(layer_of(x_or_module)))
    if not isinstance(x_or_module, nn.Module):
        raise TypeError(f"expected a Tensor or a Module, but got {type(x_or_module).__name__}")
    lines = []
    for name, layers in layers_of(x_or_module, inputs, options).items():
        lines.append(f"{name or type(x_or_module).__name__}:")
        lines += [f"  {line}" for layer in layers for line in _lines(layer)]
    return "\n".join(lines)


def plans(layer: Layer, device: torch.device) -> list[Plan]:
    """The plans of forward and backward on a device; "meta" is an NVIDIA H200."""
    x = layer.empty(META)
    return [plan_for("forward", x, device=device), plan_for("backward", x, device=device)]


def _lines(layer: Layer) -> list[str]:
    layer.check()
    N, C = layer.shape[:2]
    if not fits(N, C, prod(layer.shape[2:])):
        return [f"{list(layer.shape)}: torch computes it, 32-bit indices do not reach all of it"]
    device, remark = layer.device or META, []
    if device.type == "cpu" and launch.INTERPRETED:
        remark = ["In Triton's interpreter, on the CPU; device and times are an NVIDIA H200's:"]
    elif device.type not in ("cuda", "meta"):
        remark = [f"torch computes it on the device {device.type}; on an NVIDIA H200 these would run:"]
        device = META
    return [*remark, *map(str, plans(layer, device))]
