"""What runs for a tensor or a model, and why, in words."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tritonbn import launch
from tritonbn.layers import Layer, layer_of, layers_of
from tritonbn.plan import fits
from tritonbn.planning import pair_pays, pair_plan_for, plan_for
from tritonbn.report import report
from tritonbn.traffic import PairOperands, pair_bytes

META = torch.device("meta")


def explain(x_or_module: Tensor | nn.Module, *inputs: Any, **options: Any) -> str:
    """The plans of batch norm, forward and backward: path, tiles, bytes moved, floor, predicted time and source.

    Args:
        x_or_module: x [N, C, ...], of which nothing but shape, dtype, memory format and device is looked at (on the
            device "meta" the plans are those for an NVIDIA H200), or a module, for each of whose batch norm layers the
            plans are told. It then runs once on `inputs` and `options`, in evaluation, without gradients.

    Returns:
        Lines of text. Bytes are those of full tensors for batch norm alone (of both batch norms and a ReLU for two that
        are computed in one pass); times are predictions of a model. Where torch computes instead of our kernels, as on
        the CPU, the first line says so, and the line of a layer says why: its parameters are of another dtype, for
        instance.

    Raises ValueError for a tensor that batch norm does not take, and a module that calls none of ours.
    """
    if isinstance(x_or_module, Tensor):
        layer = layer_of(x_or_module)
        return "\n".join([*_remarks([layer]), *_plans(layer)])
    if not isinstance(x_or_module, nn.Module):
        raise TypeError(f"expected a Tensor or a Module, but got {type(x_or_module).__name__}")
    called = layers_of(x_or_module, inputs, options)
    others = {row.name: row.other for row in report(x_or_module).rows}
    lines = _remarks([layer for layers in called.values() for layer in layers])
    for name, layers in called.items():
        other = others.get(name, "")
        lines.append(f"{name or type(x_or_module).__name__}:" + f" in the same pass as {other}" * bool(other))
        lines += [f"  {plan}" for layer in layers for plan in (_plans_of_both(layer) if other else _plans(layer))]
    return "\n".join(lines)


def _remarks(layers: list[Layer]) -> list[str]:
    """What is to be said of devices on which the plans do not run as they are told."""
    remarks = []
    for kind in dict.fromkeys(layer.device.type for layer in layers if layer.device is not None):
        if kind == "cpu" and launch.INTERPRETED:
            remarks.append("In Triton's interpreter, on the CPU; device and times are an NVIDIA H200's:")
        elif kind not in ("cuda", "meta"):
            remarks.append(f"On the device {kind} torch computes batch norm; on an NVIDIA H200 these plans would run:")
    return remarks


def _plans_of_both(layer: Layer) -> list[str]:
    """Of forward and backward in one pass with another batch norm, followed by ReLU; or apart."""
    layer.check()
    device, x = _where(layer), layer.empty(META)
    N, C = layer.shape[:2]
    if layer.why or not fits(N, C, prod(layer.shape[2:])) or not pair_pays(x, device):
        return ["in training apart:", *_plans(layer)]
    lines = []
    for operation, split in (("forward", 3), ("backward", 2)):
        plan = pair_plan_for(operation, x, device=device)  # type: ignore[arg-type]
        launches = split if plan.path == "split" else 1
        moved = pair_bytes(plan, PairOperands(bits=True))
        lines.append(
            f"{operation} of both {list(layer.shape)} x {plan.itemsize} bytes: path {plan.path}, {launches} launch"
            f"{'es' if launches > 1 else ''}; moves {moved:,} bytes"
        )
    return lines


def _where(layer: Layer) -> torch.device:
    """The device whose plans are told."""
    runs = layer.device is not None and (layer.device.type == "cuda" or launch.INTERPRETED)
    return layer.device if runs and layer.device is not None else META


def _plans(layer: Layer) -> list[str]:
    """Of forward and backward."""
    layer.check()
    if layer.why:
        return [f"{list(layer.shape)}: torch computes it, {layer.why}"]
    N, C = layer.shape[:2]
    if not fits(N, C, prod(layer.shape[2:])):
        return [f"{list(layer.shape)}: torch computes it, 32-bit indices do not reach all of it"]
    device, x = _where(layer), layer.empty(META)
    return [str(plan_for("forward", x, device=device)), str(plan_for("backward", x, device=device))]
