"""Put our batch norm into a model, take it out again, and say what is where."""

from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from tritonbn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

Model = TypeVar("Model", bound=nn.Module)
Status = Literal["replaced", "convertible", "left alone"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in _OURS.items()}


@dataclass(frozen=True)
class SwapRow:
    """One batch norm module of a model: its qualified name, type, status and the reason for it."""

    name: str
    type: str
    status: Status
    why: str


@dataclass(frozen=True)
class SwapReport:
    """The batch norm modules of a model at one moment, in the order of `model.named_modules()`."""

    rows: tuple[SwapRow, ...]

    @property
    def replaced(self) -> int:
        """How many run our forward."""
        return self._count("replaced")

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
        counts = f"{self.replaced} replaced, {self.convertible} convertible, {self.left_alone} left alone"
        if not self.rows:
            return f"no batch norm modules: {counts}"
        lines = [("module", "type", "status", "why")]
        lines += [(row.name or "(the model itself)", row.type, row.status, row.why) for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(3)] + [0]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*table, counts])


def convert(model: Model) -> Model:
    """Make every `nn.BatchNorm1d/2d/3d` of `model` (or `model` itself) ours, in place; return `model`.

    The modules stay the same objects and only change their class, so parameters, buffers, hooks, training
    flags and references held elsewhere (an optimizer, a shared module) remain valid. Other types, such as
    subclasses, SyncBatchNorm and lazy modules, are left alone: `report(model)` says which and why.
    Raises TypeError if `model` is not a torch.nn.Module.
    """
    return _reclass(model, _OURS)


def revert(model: Model) -> Model:
    """Undo `convert`: make every `tritonbn.BatchNorm1d/2d/3d` torch's again, in place; return `model`.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    return _reclass(model, _TORCHS)


def report(model: nn.Module) -> SwapReport:
    """What runs our forward, what `convert` would replace, and what it leaves alone and why.

    Computed from the present state of `model`, converted or not; a shared module is listed once.
    Raises TypeError if `model` is not a torch.nn.Module.
    """
    _check_module(model)
    rows = (_row(name, module) for name, module in model.named_modules())
    return SwapReport(tuple(row for row in rows if row is not None))


def _reclass(model: Model, to: dict[type[nn.Module], type[nn.Module]]) -> Model:
    _check_module(model)
    for module in model.modules():
        # Exactly these types: a subclass may have another forward or another layout.
        target = to.get(type(module))
        if target is not None and not _has_own_forward(module):
            module.__class__ = target
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected torch.nn.Module, got {type(model).__name__}")


def _has_own_forward(module: nn.Module) -> bool:
    """Whether someone replaced the forward of this one instance, which the class can then not change."""
    return "forward" in vars(module)


def _row(name: str, module: nn.Module) -> SwapRow | None:
    """The report's row of one module; None if it is no batch norm."""
    kind = type(module)
    if isinstance(module, ScriptModule):
        original = str(getattr(module, "original_name", ""))
        if "BatchNorm" not in original:
            return None
        return SwapRow(name, f"{_full_name(kind)}({original})", "left alone", "scripted: its code is fixed")
    if not isinstance(module, _BatchNorm):
        return None
    status, why = _status(module)
    return SwapRow(name, _full_name(kind), status, why)


def _status(module: _BatchNorm) -> tuple[Status, str]:
    kind = type(module)
    if kind in _OURS or kind in _TORCHS:
        if _has_own_forward(module):
            return "left alone", "its forward was replaced on this instance"
        if kind in _TORCHS:
            return "replaced", f"revert makes it {_full_name(_TORCHS[kind])}"
        return "convertible", f"convert makes it {_full_name(_OURS[kind])}"
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
