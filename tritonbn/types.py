"""Which modules are batch norms that can be swapped, ours and torch's, and who else takes part in their calls."""

import importlib
import sys
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import private
from tritonbn.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in OURS.items()}
WITH_RESIDUAL = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)
# Those of OURS that apply `self.drop` and `self.act` to what they normalize; see tritonbn.timm.
WITH_ACTIVATION: set[type[nn.Module]] = set()
# How a module is called where nobody follows it: torch.fx replaces it while it traces.
_CALL = nn.Module.__call__


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward and nothing else: no hook, no other forward."""
    return not ("forward" in module.__dict__ or type(module).__call__ is not _CALL or private.has_hooks(module))


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm module whose forward we know, torch's or ours, and nothing but batch norm."""
    kind = type(module)  # exactly: a subclass may have another forward
    if kind in WITH_ACTIVATION:
        parts: Any = module
        return all(type(part) is nn.Identity and is_bare(part) for part in (parts.drop, parts.act))
    return kind in OURS or kind in TORCHS


def is_sequential(module: nn.Module) -> bool:
    """Whether its forward is that of nn.Sequential, and not empty."""
    kind: Any = type(module)
    return (
        isinstance(module, nn.Sequential)
        and original(kind).forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
        and len(module._modules) > 0
        and "forward" not in module.__dict__
    )


def children(module: nn.Module) -> list[Any]:
    """The modules of a Sequential."""
    return list(module._modules.values())


def original(kind: type[Any]) -> type[Any]:
    """The class that a class of ours for containers was made of; any other class itself."""
    return vars(kind).get("tritonbn_original", kind)  # type: ignore[no-any-return]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class before we, or torch.distributed, made another of it."""
    return original(unsharded(type(module)))


def sharded(kind: type) -> bool:
    """Whether torch.distributed.fsdp.fully_shard made the class: a subclass of (FSDPModule, the module's class)."""
    return [base.__name__ for base in kind.__bases__[:-1]] == ["FSDPModule"]


def unsharded(kind: type[Any]) -> type[Any]:
    """The class of a module before fully_shard."""
    return kind.__bases__[1] if sharded(kind) else kind


def reclass(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make `kind` the module's class, and keep what fully_shard added to it."""
    mine = type(module)
    if sharded(mine):
        attributes = {k: v for k, v in vars(mine).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        kind = type(f"FSDP{kind.__name__}", (mine.__bases__[0], kind), attributes)
    module.__class__ = kind


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """All batch norm modules of a model, of any kind."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def check_module(model: object) -> None:
    """Raise TypeError if it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected torch.nn.Module, got {type(model).__name__}")
    if "timm.layers.norm_act" in sys.modules:  # timm is in use: make its type known
        importlib.import_module("tritonbn.timm")
