"""One step of a network, batch norm -> add -> activation: as one operation where that is the same, else as it was.

What the modules are, and who watches them, is looked at when they run: a hook, another slope or another module put in
the place of one of them takes effect at once.
"""

import importlib
import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from tritonbn.activations import IDENTITY, Activation, of_module
from tritonbn.functional import exporting
from tritonbn.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    TritonBatchNorm,
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


def fused(
    norm: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    in_place: bool = False,
    activation: nn.Module | Activation | None = None,
    idle: tuple[nn.Module, ...] = (),
) -> Tensor:
    """activation(idle(norm(x)) + residual), any shapes that these take; `in_place`: += in the place of +.

    Raises what the modules raise. norm None: x is what the norm returned.
    """
    act = known(activation)
    if (
        act is not None
        and isinstance(norm, TritonBatchNorm)
        and is_norm(norm)
        and is_bare(norm)
        and all(type(module) is nn.Identity and is_bare(module) for module in idle)
        and (residual is None or _adds_up(x, residual))
        # Autocast computes softplus in float32, whatever its input.
        and not (act.name == "softplus" and torch.is_autocast_enabled(x.device.type))
    ):
        return norm.normalize(x, act, residual)
    y: Tensor = x if norm is None else norm(x)
    for module in idle:
        y = module(y)
    if residual is not None:
        y = operator.iadd(y, residual) if in_place else y + residual  # type: ignore[no-untyped-call]
    if isinstance(activation, nn.Module):
        return activation(y)  # type: ignore[no-any-return]
    return y if activation is None else activation.apply(y)


def opened(sequence: nn.Module, x: Tensor) -> tuple[nn.Module | None, Tensor]:
    """All of a Sequential but the batch norm it ends with: that batch norm and its input.

    (None, the output) if it does not end with one any more, or if someone watches what it returns.
    """
    if not is_sequential(sequence) or not is_bare(sequence):
        return None, sequence(x)
    *first, last = children(sequence)
    x = run(first, x)
    return (last, x) if is_norm(last) else opened(last, x)


def run(modules: list[Any], x: Tensor) -> Tensor:
    """The modules of a Sequential, one after the other, each batch norm with the activation that follows it."""
    i = 0
    while i < len(modules):
        module, i = modules[i], i + 1
        if tail(module) is not None and (end := following(modules, i)) is not None:
            norm, x = (module, x) if is_norm(module) else opened(module, x)
            x = fused(norm, x, activation=modules[end], idle=tuple(modules[i:end]))
            i = end + 1
        else:
            x = module(x)
    return x


def following(modules: list[Any], i: int) -> int | None:
    """The index of the activation among `modules[i:]` that nothing but Identity modules precede."""
    while i < len(modules) and type(modules[i]) is nn.Identity:
        i += 1
    return i if i < len(modules) and of_module(modules[i]) not in (None, IDENTITY) else None


def known(activation: nn.Module | Activation | None) -> Activation | None:
    """The Activation to fuse; None if it is a module that computes none, or one that someone watches."""
    if activation is None:
        return IDENTITY
    if isinstance(activation, nn.Module):
        return of_module(activation) if is_bare(activation) else None
    return activation


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's (or our) forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
        or is_replaced(module)
    )


def children(sequence: nn.Module) -> list[Any]:
    """The modules of a Sequential."""
    return list(sequence._modules.values())


def is_replaced(module: nn.Module) -> bool:
    """Whether someone else replaced the forward of this one instance."""
    own = module.__dict__.get("forward")
    return own is not None and not isinstance(own, OwnForward)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm module whose forward we know, torch's or ours, and nothing but batch norm."""
    kind = type(module)  # exactly: a subclass may have another forward
    if kind in WITH_ACTIVATION:
        return all(type(part) is nn.Identity and is_bare(part) for part in (module.drop, module.act))
    return kind in OURS or kind in TORCHS


def is_sequential(module: nn.Module) -> bool:
    """Whether its forward is that of nn.Sequential, and not empty."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and type(module).__iter__ is nn.Sequential.__iter__
        and len(module._modules) > 0
        and not is_replaced(module)
    )


def tail(module: nn.Module) -> _BatchNorm | None:
    """The batch norm that computes the module's output: itself, or the last of a Sequential."""
    while is_sequential(module):
        module = children(module)[-1]
    return module if isinstance(module, _BatchNorm) and is_norm(module) else None


class OwnForward:
    """What we put into an instance as its forward: the class's own, with fused steps."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def names(self) -> tuple[str, ...]:
        """The module's attributes; in compiled code those that it had when that was compiled."""
        return tuple(vars(self.module))

    # What torch.compiler.assume_constant_result does, which imports the whole compiler for it.
    names._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _adds_up(x: Tensor, residual: object) -> bool:
    """Whether the residual is added element by element and changes neither shape nor dtype."""
    return isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype


def seen_by_others(*values: object) -> bool:
    """Whether someone follows the values through the class's own forward: torch.fx, torch.jit, torch.export."""
    if torch.compiler.is_compiling():
        return exporting()
    return torch._C._get_tracing_state() is not None or any(issubclass(type(value), fx.Proxy) for value in values)


def notice_timm() -> None:
    """Make timm's type known if timm is in use. It is not imported otherwise."""
    if "timm.layers.norm_act" in sys.modules:
        importlib.import_module("tritonbn.timm")


def check_module(model: object) -> None:
    """Raise TypeError if it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected torch.nn.Module, got {type(model).__name__}")
    notice_timm()
