"""Batch norm folded into the layer before it, for inference."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from tritonbn.activations import IDENTITY, Activation, resolve
from tritonbn.chains import only_user
from tritonbn.effects import Untraceable
from tritonbn.epilogue import (
    OURS,
    TORCHS,
    WITH_ACTIVATION,
    WITH_RESIDUAL,
    OwnForward,
    check_module,
    children,
    is_bare,
    is_sequential,
)
from tritonbn.fusion import install, is_container, usual_graph
from tritonbn.modules import leaf_node

Model = TypeVar("Model", bound=nn.Module)
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear

# The number of dimensions of what each returns, the channels being dimension 1. Exactly these types.
DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}


class Folded(nn.Module):
    """What remains of a batch norm that was folded into the layer before: its activation, if it had one."""

    def __init__(self, into: str, dimensions: int, activation: Activation = IDENTITY) -> None:
        super().__init__()
        self.into, self.dimensions, self.activation = into, dimensions, activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual), [N, C, ...] of the number of dimensions that was folded for; else ValueError.

        The folded layer takes other inputs too, but has its channels in another dimension than batch norm then.
        """
        if (node := leaf_node(self, input, *(() if residual is None else (residual,)))) is not None:
            return node
        if input.dim() != self.dimensions:
            raise ValueError(f"folded for {self.dimensions}D input (got {input.dim()}D input)")
        return self.activation.apply(input if residual is None else input + residual)

    def extra_repr(self) -> str:
        """Where it went."""
        return f"into={self.into}" + ("" if self.activation == IDENTITY else f", activation={self.activation}")


def fold(model: Model) -> Model:
    """A copy of a model in evaluation mode with its batch norms folded into the convolutions and linear layers before.

    Folded are batch norms with running statistics whose input is what one nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d or
    nn.Linear returns when the container's forward is called with tensors only, and neither is used elsewhere, watched
    by a hook or shares parameters. The layer gets their weights, and a bias if it had none; a small module takes the
    place of the batch norm, so `state_dict` changes. `report(folded)` says what was not folded and why. A forward that
    cannot be followed must not call the layers of its children behind their back. What was fused stays fused.

    Raises TypeError if `model` is not a torch.nn.Module, ValueError if a batch norm is in training mode.
    """
    check_module(model)
    training = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if training:
        raise ValueError(f"expected batch norm in evaluation mode, call model.eval() first: {', '.join(training)}")
    folded = copy.deepcopy(model)
    names = {module: name for name, module in folded.named_modules()}
    for norm, layer in folds(folded).items():
        if isinstance(layer, nn.Module):
            _fold_weights(cast(Any, layer), norm)
            parent, _, child = names[norm].rpartition(".")
            folded.get_submodule(parent)._modules[child] = _remaining(norm, names[layer], DIMENSIONS[type(layer)])
    for module in folded.modules():
        if isinstance(vars(module).get("forward"), OwnForward):
            install(module)
    return folded


def folds(model: nn.Module) -> dict[_BatchNorm, nn.Module | str]:
    """For each batch norm of a model in evaluation mode the layer that `fold` folds it into, or why into none."""
    calls: Counter[nn.Module] = Counter()
    before: dict[nn.Module, nn.Module | None] = {}
    for container in filter(is_container, model.modules()):
        for called, layer in _calls(container):
            calls[called] += 1
            before[called] = layer
    for _, module in model.named_modules(remove_duplicate=False):
        calls[module] += 1
    parameters = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def shared(module: nn.Module) -> bool:
        # Once in the tree and once in a forward.
        return calls[module] > 2 or any(parameters[id(p)] > 1 for p in module.parameters())

    def decide(norm: _BatchNorm) -> nn.Module | str:
        layer = before.get(norm)
        if type(norm) not in OURS and type(norm) not in TORCHS and type(norm) not in WITH_RESIDUAL:
            return "its forward may differ"
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics"
        if norm not in before:
            return "no forward that can be followed calls it"
        if layer is None or not _fits(layer, norm):
            return "its input is not what one convolution or linear layer returns"
        if shared(norm) or shared(layer):
            return "it, or the layer before it, is used more than once"
        return layer if is_bare(norm) and is_bare(layer) else "a hook watches it or the layer before it"

    return {norm: decide(norm) for norm in model.modules() if isinstance(norm, _BatchNorm)}


def _fits(layer: nn.Module, norm: _BatchNorm) -> bool:
    if type(layer) not in DIMENSIONS:
        return False
    transposed_groups = isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return bool(channels == norm.num_features) and not transposed_groups


def _calls(container: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each module that a container calls or reads, with the module that alone made its input and for nobody else."""
    if is_sequential(container):
        sequence = children(container)
        yield from zip(sequence, [None, *sequence], strict=False)
        return
    try:
        graph = usual_graph(container)
    except Untraceable:
        return
    modules = dict(container.named_modules())
    for node in graph.nodes:
        if node.op == "call_module":
            source: Any = node.args[0] if node.args else None
            alone = isinstance(source, fx.Node) and source.op == "call_module" and only_user(source) is node
            yield modules[node.target], modules[source.target] if alone else None
        elif node.op == "get_attr":
            yield modules[node.target.rpartition(".")[0]], None


def _fold_weights(layer: Layer, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    statistics = (norm.running_mean, norm.running_var, norm.eps, weight, bias)
    made: tuple[Parameter, Parameter]
    if isinstance(layer, nn.Linear):
        made = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        made = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose=layer.transposed)
    layer.weight, layer.bias = made


def _remaining(norm: _BatchNorm, into: str, dimensions: int) -> nn.Module:
    if type(norm) in WITH_ACTIVATION:
        norm_: Any = norm
        return nn.Sequential(Folded(into, dimensions), norm_.drop, norm_.act).train(norm.training)
    activation = resolve(norm.activation) if isinstance(norm, WITH_RESIDUAL) else IDENTITY
    return Folded(into, dimensions, activation).train(norm.training)
