"""Put our batch norm into a model, fuse it with what follows, and take all of it out again."""

from typing import TypeVar

from torch import nn

from tritonbn.epilogue import OURS, TORCHS, check_module, is_replaced
from tritonbn.fusion import install, uninstall

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, fuse: bool = False) -> Model:
    """Make every `nn.BatchNorm1d/2d/3d` of `model` (or `model` itself) ours, in place; return `model`.

    The modules stay the same objects and only change their class, so parameters, buffers, hooks, training
    flags and references held elsewhere (an optimizer, a shared module) remain valid. Other types, such as
    subclasses, SyncBatchNorm and lazy modules, are left alone: `report(model)` says which and why.

    fuse: compute batch norm -> activation, batch norm -> add and batch norm -> add -> activation in one operation
    wherever a module's forward or an nn.Sequential does one after the other and nobody else uses what is between. The
    modules stay as and where they are. What changes: each module whose forward fuses something gets an attribute
    `forward`, a function made from its class's forward with torch.fx. That one follows the attributes of its module
    and, in number and kind, its submodules; it does not see later changes to global variables, to objects that
    attributes refer to, or to attributes of submodules (submodules themselves run as they are). Batch norms,
    activations and Sequentials that are fused are not called: hooks on one of them suspend the fusion there, also
    hooks that are added later. A fused module can be deep-copied, pickled and compiled; torch.jit.script needs
    `revert` first, and copy.copy of it would run the original.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    check_module(model)
    _reclass(model, OURS)
    if fuse:
        for module in model.modules():
            install(module)
    return model


def revert(model: Model) -> Model:
    """Undo `convert`: make every `tritonbn.BatchNorm1d/2d/3d` torch's again, in place; return `model`.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    check_module(model)
    _reclass(model, TORCHS)
    for module in model.modules():
        uninstall(module)
    return model


def _reclass(model: nn.Module, to: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        # Exactly these types: a subclass may have another forward or another layout.
        target = to.get(type(module))
        if target is not None and not is_replaced(module):
            module.__class__ = target
