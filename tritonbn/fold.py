"""Batch norm folded into the layer before it, for inference."""

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import private
from tritonbn.activations import IDENTITY, Activation, resolve
from tritonbn.modules import leaf_node
from tritonbn.types import (
    OURS,
    TORCHS,
    WITH_ACTIVATION,
    WITH_RESIDUAL,
    batch_norms,
    check_module,
    is_bare,
    unsharded,
)  # fmt: skip
from tritonbn.uses import fuse
from tritonbn.ways import DIMENSIONS, NO_LAYER, Ways, held_elsewhere

Model = TypeVar("Model", bound=nn.Module)


class Folded(nn.Module):
    """What remains of a batch norm that was folded into the layer before: its activation, if it had one."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, into: str, dimensions: int, scale: Tensor, shift: Tensor, activation: Activation = IDENTITY
    ) -> None:
        super().__init__()
        self.into, self.dimensions, self.activation = into, dimensions, activation
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual), [N, C, ...] of the number of dimensions that was folded for.

        BatchNorm1d takes 2 and 3 dimensions, and where the layer got the other number its channels are not in
        dimension 1: then what was folded, x * scale + shift, is undone in its last dimension (Linear) or its first
        (unbatched convolution) and applied to dimension 1. Raises what batch norm raised: ValueError for any other
        number of dimensions, RuntimeError for other sizes.
        """
        if (node := leaf_node(self, input, *(() if residual is None else (residual,)))) is not None:
            return node
        y = input if input.dim() == self.dimensions else self._moved(input)
        return self.activation.apply(y if residual is None else y + residual)

    def _moved(self, y: Tensor) -> Tensor:
        if self.dimensions > 3 or y.dim() not in (2, 3):
            expected = "2D or 3D" if self.dimensions <= 3 else f"{self.dimensions}D"
            raise ValueError(f"expected {expected} input (got {y.dim()}D input)")
        if y.shape[1] != len(self.scale):
            raise RuntimeError(f"running_mean should contain {y.shape[1]} elements not {len(self.scale)}")
        own = (-1,) if self.dimensions == 2 else (-1, 1)
        wide = (y.to(self.scale.dtype) - self.shift.view(own)) / self.scale.view(own)
        there = (-1, 1) if y.dim() == 3 else (-1,)
        return (wide * self.scale.view(there) + self.shift.view(there)).to(y.dtype)

    def extra_repr(self) -> str:
        """Where it went."""
        return f"into={self.into}" + ("" if self.activation == IDENTITY else f", activation={self.activation}")


def fold(model: Model, *example: Any) -> Model:
    """A copy of a model in evaluation mode with its batch norms folded into the convolutions and linear layers before.

    Folded are batch norms with running statistics whose input is always what one convolution, transposed convolution
    or nn.Linear returns, where nobody else gets that: by all code of the containers above, whatever their arguments and
    flags. Not folded is what is watched by a hook, shares parameters, or is held by another attribute, list or closure.
    The layer gets their weights, computed in float32 (float64) and rounded once, and a bias if it had none; a small
    module takes the place of the batch norm, so `state_dict` changes. `report(model)` says what will not be folded and
    why. What was fused stays fused.

    example: arguments that the model and the copy are then called with, to compare every output of a folded batch norm.

    Raises TypeError if `model` is not a torch.nn.Module, ValueError if a batch norm is in training mode, or with the
    name of the first layer whose output for the example differs by more than rounding.
    """
    check_module(model)
    training = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if training:
        raise ValueError(f"expected batch norm in evaluation mode, call model.eval() first: {', '.join(training)}")
    names = {module: name for name, module in model.named_modules()}
    folded = copy.deepcopy(model)
    copies = dict(zip(model.modules(), folded.modules(), strict=True))
    changed: dict[str, nn.Module] = {}
    for norm, layer in folds(model).items():
        if isinstance(layer, nn.Module):
            changed[names[norm]] = _fold(folded, copies[norm], copies[layer], names[layer])
    fuse(folded)
    if example:
        _compare(model, folded, changed, example)
    return folded


def folds(model: nn.Module) -> dict[_BatchNorm, nn.Module | str]:
    """For each batch norm of a model in evaluation mode the layer that `fold` folds it into, or why into none."""
    ways = Ways(model)
    places: dict[nn.Module, Counter[nn.Module]] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            if child is not None:
                places.setdefault(child, Counter())[parent] += 1
    parameters = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    held = dict(held_elsewhere(model))

    def decide(norm: _BatchNorm) -> nn.Module | str:
        kind = unsharded(type(norm))
        if kind not in OURS and kind not in TORCHS and kind not in WITH_RESIDUAL:
            return "its forward may differ"
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics"
        layer = ways.layer_before(norm)
        if isinstance(layer, str):
            return layer
        if type(layer) not in DIMENSIONS or not isinstance(norm, DIMENSIONS[type(layer)][1]) or not _fits(layer, norm):
            return NO_LAYER
        for module in (norm, layer):
            if module in held:
                return f"{held[module]} holds it, or the layer before it, too"
            if any(parameters[id(p)] > 1 for p in module.parameters()):
                return "it, or the layer before it, shares parameters"
        if places.get(norm) != places.get(layer) and not _nested(norm, layer, places):
            return "it, or the layer before it, has a second name"
        if not (is_bare(norm) and is_bare(layer)):
            return "a hook watches it or the layer before it"
        if DIMENSIONS[type(layer)][0] <= 3 and not _is_undone(*_affine(norm)):
            return "its weight is too small to be undone for inputs of another number of dimensions"
        return layer

    return {norm: decide(norm) for norm in batch_norms(model)}


def _fits(layer: Any, norm: _BatchNorm) -> bool:
    transposed_groups = isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return bool(channels == norm.num_features) and not transposed_groups


def _nested(norm: nn.Module, layer: nn.Module, places: dict[nn.Module, Counter[nn.Module]]) -> bool:
    """Whether each has one place, be it another one: Sequential(layer, Sequential(norm, ...))."""
    return all(module in places and places[module].total() == 1 for module in (norm, layer))


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """scale and shift [C] of norm(x) = x * scale + shift, in float32 or float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.to(dtype)
        shift = -norm.running_mean.to(dtype) * scale
        return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)


def _is_undone(scale: Tensor, shift: Tensor) -> bool:
    """Whether (y - shift) / scale keeps at least half of the digits of x in y = x * scale + shift."""
    limit = torch.finfo(scale.dtype).eps ** 0.5
    return bool(((scale.abs() > limit * shift.abs()) & (scale.abs() > limit) & scale.isfinite()).all())


@torch.no_grad()
def _fold(model: nn.Module, norm: Any, layer: Any, into: str) -> nn.Module:
    """Fold a norm into the layer before it: weight * scale, bias * scale + shift. What takes its place."""
    scale, shift = _affine(norm)
    dtype = torch.promote_types(scale.dtype, layer.weight.dtype)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    shape = [1] * layer.weight.dim()
    shape[1 if transposed else 0] = -1
    weight = layer.weight.to(dtype) * scale.view(shape)
    bias = shift if layer.bias is None else layer.bias.to(dtype) * scale + shift
    layer.weight, layer.bias = (
        nn.Parameter(made.to(layer.weight.dtype), layer.weight.requires_grad) for made in (weight, bias)
    )
    activation = resolve(norm.activation) if isinstance(norm, WITH_RESIDUAL) else IDENTITY
    rest: nn.Module = Folded(into, DIMENSIONS[type(layer)][0], scale, shift, activation)
    if type(norm) in WITH_ACTIVATION:
        parts: Any = norm
        rest = nn.Sequential(rest, parts.drop, parts.act)
    rest.train(norm.training)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = rest
    return rest


def _compare(model: nn.Module, folded: nn.Module, changed: dict[str, nn.Module], example: tuple[Any, ...]) -> None:
    """Raise ValueError, with the first layer's name, if the outputs of both differ by more than rounding."""
    theirs = _outputs(model, {name: model.get_submodule(name) for name in changed}, example)
    mine = _outputs(folded, changed, example)
    for count, (name, values) in enumerate(theirs.items(), 1):
        if len(values) != len(mine.get(name, [])):
            raise ValueError(f"expected {len(values)} calls of {name}, got {len(mine.get(name, []))}")
        what = f"expected equal outputs of {name or 'the model'} before and after folding, got"
        for one, other in zip(values, mine[name], strict=True):
            if one.shape != other.shape:
                raise ValueError(f"{what} {list(one.shape)} and {list(other.shape)}")
            apart = (one - other)[(one != other) & ~(one.isnan() & other.isnan())]
            difference, largest = (
                t.abs().amax().item() if t.numel() else 0.0 for t in (apart, other.nan_to_num(0, 0, 0))
            )
            if not difference <= 32 * (count + 4) * torch.finfo(other.dtype).eps * max(largest, 1e-30):
                raise ValueError(f"{what} a difference of {difference:.3g}")


@torch.no_grad()
def _outputs(model: nn.Module, modules: dict[str, nn.Module], example: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """What the modules, and last the model, return for the example, in the order of their calls."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: found.setdefault(name, []).append(output.clone())

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = model(*copy.deepcopy(example))
    finally:
        for hook in hooks:
            hook.remove()
    found.pop("", None)
    found[""] = [leaf for leaf in private.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found
