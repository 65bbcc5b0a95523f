"""What is where: the batch norm modules of a model, which of them are ours, and what each is fused with."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from tritonbn.activations import of_module, resolve
from tritonbn.fold import Folded, folds
from tritonbn.fused_forward import is_installed
from tritonbn.types import (
    OURS,
    TORCHS,
    WITH_ACTIVATION,
    WITH_RESIDUAL,
    check_module,
    class_of,
    is_bare,
    is_norm,
    sharded,
    unsharded,
)
from tritonbn.uses import RETURNED, Use, callers, uses_of

Status = Literal["replaced", "convertible", "left alone", "folded"]


@dataclass(frozen=True)
class SwapRow:
    """One batch norm module of a model: its qualified name, type, status and the reason for it, and its fusion."""

    name: str
    type: str
    status: Status
    why: str
    fused: str = ""  # what is computed in one operation with it: "relu", "add + relu", "add"; "" for nothing
    alone: str = ""  # why nothing is, as far as that can be told
    folds: str = ""  # in evaluation mode: the layer that `fold` folds it into, or why into none
    other: str = ""  # the batch norm, a shortcut's, that it is added to and computed with in the same pass


@dataclass(frozen=True)
class SwapReport:
    """The batch norm modules of a model at one moment, in the order of `model.named_modules()`."""

    rows: tuple[SwapRow, ...]

    @property
    def replaced(self) -> int:
        """How many run our forward."""
        return self._count("replaced")

    @property
    def fused(self) -> int:
        """How many run it in one operation with what follows them."""
        return sum(bool(row.fused) for row in self.rows)

    @property
    def convertible(self) -> int:
        """How many `convert` would replace."""
        return self._count("convertible")

    @property
    def left_alone(self) -> int:
        """How many neither `convert` nor `revert` touches."""
        return self._count("left alone")

    def _count(self, status: Status) -> int:
        return sum(row.status == status for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no batch norm modules"
        lines = [("module", "type", "status", "fused with", "why")]
        for row in self.rows:
            other = row.other and f"in the same pass as {row.other}"
            why = "; ".join(filter(None, (row.why, other, row.alone, row.folds)))
            lines.append((row.name or "(the model itself)", row.type, row.status, row.fused or "-", why))
        widths = [max(len(line[column]) for line in lines) for column in range(4)] + [0]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        counts = (
            f"{len(self.rows)} found: {self.replaced} replaced, {self.fused} fused, "
            f"{self.convertible} convertible, {self.left_alone} left alone"
        )
        folded = self._count("folded")
        return "\n".join([*table, f"{counts}, {folded} folded" if folded else counts])


def report(model: nn.Module) -> SwapReport:
    """What runs our forward and what it is fused with, what `convert` would replace or fuse, what it cannot and why.

    Computed from the present state of `model`, converted or not, for its present mode, training or evaluation. A shared
    module is listed once. Raises TypeError if `model` is not a torch.nn.Module.
    """
    check_module(model)
    fusion = _Fusion(model)
    rows = (_row(name, module, fusion) for name, module in model.named_modules())
    return SwapReport(tuple(row for row in rows if row is not None))


class _Fusion:
    """Who calls the batch norms of a model, and what follows."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.named_modules())
        evaluation = not any(isinstance(module, _BatchNorm) and module.training for _, module in modules)
        names = self.names = {module: name for name, module in modules}
        self.folds = {
            norm: f"fold() folds it into {names[to]}" if isinstance(to, nn.Module) else f"not folded: {to}"
            for norm, to in (folds(model) if evaluation else {}).items()
        }
        self.uses: dict[nn.Module, list[Use]] = {}
        self.refused: dict[str, str] = {}
        for module in callers(model):
            uses, refused = uses_of(module)
            for use in uses:
                self.uses.setdefault(use.norm, []).append(use)
            if refused:
                above = names[module] or "the model"
                self.refused[names[module]] = f"{above} ({class_of(module).__name__}): its forward {refused}"

    def of(self, name: str, norm: _BatchNorm) -> tuple[str, str]:
        """What a batch norm is fused with, and why not."""
        kind = unsharded(type(norm))
        if isinstance(norm, WITH_RESIDUAL):
            return str(resolve(norm.activation)), ""
        if kind in WITH_ACTIVATION and not is_norm(norm):
            return _within(norm)
        if sharded(type(norm)):
            return "", "torch.distributed shards it, by hooks around its calls"
        fused, alone = [], []
        uses = self.uses.get(norm, [])
        for use in uses:
            if why := _hindered(use):
                alone += [why] if why != RETURNED or all(use.why == RETURNED for use in uses) else []
            elif not _runs(use):
                alone.append(f"convert(fuse=True) fuses {use.steps}")
            else:
                fused.append(use.steps)
        if not uses:
            alone = [why for above, why in self.refused.items() if _is_caller(above, name)][-1:]
        return ", ".join(dict.fromkeys(fused)), ", ".join(dict.fromkeys(alone))

    def other(self, norm: _BatchNorm) -> str:
        """The batch norms that it is computed with in one pass."""
        uses = [use for use in self.uses.get(norm, []) if use.other is not None and _runs(use)]
        outside = "a batch norm outside of the model"
        return ", ".join(dict.fromkeys(self.names.get(use.other, outside) for use in uses if use.other is not None))


def _runs(use: Use) -> bool:
    """Whether this use of a batch norm is fused when it runs."""
    norms = [norm for norm in (use.norm, use.other) if norm is not None]
    ours = all(unsharded(type(norm)) in TORCHS for norm in norms)
    return ours and not _hindered(use) and all(map(is_installed, use.containers))


def _hindered(use: Use) -> str:
    """Why this use of a batch norm is not fused when it runs; "" if it is."""
    if not use.steps:
        return use.why
    if use.dropped:
        return f"a dropout is active before {use.steps}: it is fused in evaluation"
    watched = next((module for module in (use.norm, *use.others) if not is_bare(module)), None)
    return "" if watched is None else f"a hook watches the {type(watched).__name__}"


def _within(norm: _BatchNorm) -> tuple[str, str]:
    """The same for timm's module, which applies its drop and act itself."""
    parts: Any = norm
    activation = of_module(parts.act) if is_bare(parts.act) else None
    if activation is None or type(parts.drop) is not nn.Identity or not is_bare(parts.drop):
        return "", "its act or drop cannot be fused, or a hook watches it"
    return (str(activation), "") if unsharded(type(norm)) in TORCHS else ("", "")


def _is_caller(above: str, name: str) -> bool:
    return not above or name.startswith(f"{above}.")


def _row(name: str, module: nn.Module, fusion: _Fusion) -> SwapRow | None:
    """The report's row of one module; None if it is no batch norm."""
    kind = unsharded(type(module))
    if isinstance(module, ScriptModule):
        original = str(getattr(module, "original_name", ""))
        if "BatchNorm" not in original:
            return None
        return SwapRow(name, f"{_full_name(kind)}({original})", "left alone", "scripted: its code is fixed")
    if isinstance(module, Folded):
        return SwapRow(name, _full_name(kind), "folded", f"into {module.into}")
    if not isinstance(module, _BatchNorm):
        return None
    status, why = _status(module)
    followed = status != "left alone" or isinstance(module, WITH_RESIDUAL)
    fused, alone = fusion.of(name, module) if followed else ("", "")
    other = fusion.other(module) if fused else ""
    return SwapRow(name, _full_name(kind), status, why, fused, alone, fusion.folds.get(module, ""), other)


def _status(module: _BatchNorm) -> tuple[Status, str]:
    kind = unsharded(type(module))
    if kind in OURS or kind in TORCHS:
        if "forward" in vars(module):
            return "left alone", "its forward was replaced on this instance"
        if kind in TORCHS:
            return "replaced", f"revert makes it {_full_name(TORCHS[kind])}"
        return "convertible", f"convert makes it {_full_name(OURS[kind])}"
    if kind in WITH_RESIDUAL:
        return "left alone", "ours, with its activation"
    if isinstance(module, LazyModuleMixin):
        return "left alone", "not materialized yet: run a batch through the model, then convert"
    if isinstance(module, nn.SyncBatchNorm):
        return "left alone", "reduces its statistics over processes"
    base = next(_full_name(parent) for parent in kind.__mro__[1:] if issubclass(parent, _BatchNorm))
    if parametrize.is_parametrized(module):
        return "left alone", f"parametrized {base}: convert before parametrizing"
    return "left alone", f"subclass of {base}: its forward may differ"


def _full_name(kind: type) -> str:
    """The name a reader would import it by: the public one for our modules and torch.nn's."""
    for public in ("torch.nn", "tritonbn"):
        if kind.__module__.startswith(f"{public}.modules"):
            return f"{public}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"
