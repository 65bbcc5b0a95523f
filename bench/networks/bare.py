"""Networks without their batch norm: what it costs is the difference."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn.fold import folds
from tritonbn.ways import Layer

Model = TypeVar("Model", bound=nn.Module)


def without_batch_norm(model: Model, images: Tensor | None = None) -> Model:
    """A copy of `model` with nothing in the place of each batch norm, and a bias, 0, in the layer before that had none.

    What the layer before is, is what `tritonbn.fold` would fold into. timm's batch norms keep their activation.

    images: scale the weights of these layers until their outputs have standard deviation 1 on these images, which is
    what batch norm gives them at the start. Without, the values of deep networks may leave what a dtype can hold.
    """
    bare = copy.deepcopy(model).eval()
    layers: list[Any] = [layer for layer in folds(bare).values() if isinstance(layer, nn.Module)]
    for layer in layers:
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(outputs(layer)))
    for parent in list(bare.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, remaining(child))
    if images is not None:
        hooks = [layer.register_forward_hook(scale) for layer in layers]
        with torch.no_grad():
            bare(images)
        for hook in hooks:
            hook.remove()
    return bare.train(model.training)


def outputs(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def remaining(norm: Any) -> nn.Module:
    return nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()


def scale(layer: nn.Module, _: object, output: Tensor) -> Tensor:
    """A forward hook: divide by the standard deviation, the weights too."""
    std = float(output.float().std())
    if not std > 0:
        return output
    layer.get_parameter("weight").data.div_(std)
    return output / std
