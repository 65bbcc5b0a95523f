"""Put our batch norm into a model, fuse it with what follows, and take all of it out again."""

from typing import TypeVar

from torch import nn

from tritonbn.fused_forward import uninstall
from tritonbn.types import OURS, TORCHS, check_module, reclass, unsharded
from tritonbn.uses import fuse as fuse_containers

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, fuse: bool = False) -> Model:
    """Make every `nn.BatchNorm1d/2d/3d` of `model` (or `model` itself) ours, in place; return `model`.

    The modules stay the same objects and only change their class, so parameters, buffers, hooks, training
    flags and references held elsewhere (an optimizer, a shared module) remain valid. Other types, such as
    subclasses, SyncBatchNorm and lazy modules, are left alone: `report(model)` says which and why.

    fuse: compute batch norm -> activation, batch norm -> add and batch norm -> add -> activation in one operation
    wherever a forward or an nn.Sequential does one directly after the other and nobody else uses what is between. The
    modules stay as and where they are; those whose forward fuses something get a class of the same name, made of their
    own, with that forward written anew from its source: what it reads, branches on, writes, draws and logs, it does at
    each call, as before, and only the batch norm runs as late as what it is fused with. Where the source is not to be
    had, or something runs in between that could tell, nothing is fused, and `report` says what and where. Hooks on a
    batch norm, an activation or a Sequential that is fused suspend the fusion there, also hooks that are added later.
    A fused module can be copied, pickled and compiled (what it calls by super() is not fused in compiled code);
    torch.jit.script needs `revert` first.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    check_module(model)
    _reclass(model, OURS)
    if fuse:
        fuse_containers(model)
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
        target = to.get(unsharded(type(module)))
        if target is not None and (to is TORCHS or "forward" not in vars(module)):
            reclass(module, target)
