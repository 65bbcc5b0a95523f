"""The class of a container with fused steps: a subclass of its own, of the same name, with another forward."""

import inspect
from abc import ABCMeta
from functools import wraps
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from tritonbn import private, step
from tritonbn.rewrite import Opened, opened
from tritonbn.source import SourceError
from tritonbn.types import original, reclass, unsharded

# Of a class whose forward somebody replaces again and again: the oldest goes.
MAX_VARIANTS = 16
_OPENED: dict[tuple[FunctionType, bool], tuple[CodeType, Opened | str]] = {}


def opened_or_why(function: FunctionType, bound: bool) -> Opened | str:
    """`opened`, once for each function; or why there is none."""
    key = function, bound
    code, found = _OPENED.get(key, (None, ""))
    if code is not function.__code__ or (isinstance(found, Opened) and not step.is_current(found.function)):
        try:
            found = opened(function, bound)
        except SourceError as reason:
            found = str(reason)
        _OPENED[key] = function.__code__, found
    return found


def opened_forward(kind: type[nn.Module]) -> Opened | str:
    """The forward of a class written anew, or why there is none, as the end of a sentence about the forward."""
    forward = kind.forward
    if type(kind) not in _METACLASSES:  # it may do anything with a new class
        return f"is of a class of a {type(kind).__name__}"
    if not isinstance(forward, FunctionType):
        return f"is no function but a {type(forward).__name__}"
    found = opened_or_why(forward, True)
    if isinstance(found, Opened) and found.calls is not None:
        step.ONLY_CALLS[forward] = forward.__code__, found.calls
    if isinstance(found, str) or not found.reads:
        return found
    if kind.__getattribute__ is not object.__getattribute__ or kind.__getattr__ is not nn.Module.__getattr__:
        return "reads attributes by a __getattr__ of its own"
    for name in sorted(found.reads):
        value = inspect.getattr_static(kind, name, None)
        if hasattr(type(value), "__get__") and not isinstance(value, (FunctionType, staticmethod, classmethod)):
            return f"reads self.{name}, a {type(value).__name__}, between batch norm and what follows"
    return found


def install(module: nn.Module) -> None:
    """Give a container the forward with fused steps. Nothing else of it changes, and nothing where it has none."""
    kind = unsharded(type(module))
    if original(kind) is kind and (made := _fused_class(kind)) is not None:
        reclass(module, made)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    kind = unsharded(type(module))
    if original(kind) is not kind:
        reclass(module, original(kind))


def is_installed(module: nn.Module) -> bool:
    """Whether the module's class is one of `install`."""
    kind = unsharded(type(module))
    return original(kind) is not kind


class _AsOriginal(type):
    """The class of our classes: what is set on one of them is set on the class that it was made of."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if original(cls) is cls:  # a class that somebody made of ours
            super().__setattr__(name, value)
        else:
            setattr(original(cls), name, value)

    def __delattr__(cls, name: str) -> None:
        if original(cls) is cls:
            super().__delattr__(name)
        else:
            delattr(original(cls), name)


class _AsOriginalABC(_AsOriginal, ABCMeta):
    """The same for abstract base classes."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name.startswith(("_abc_", "__abstractmethods__")):
            type.__setattr__(cls, name, value)
        else:
            super().__setattr__(name, value)


_METACLASSES: dict[type, type] = {type: _AsOriginal, ABCMeta: _AsOriginalABC}


class _Fused(step.Fused):
    """What our classes add to those that they are made of."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the original class, and made ours again when it is loaded."""
        kind, reduced = type(self), super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        function, args, *rest = reduced
        args = tuple(original(kind) if argument is kind else argument for argument in args)
        return _restored, (function, args), *rest


def _restored(function: Any, args: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = function(*args)
    install(module)
    return module


def _fused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class made of `kind`, the same one each time; None where its forward cannot be written anew."""
    for known in kind.__subclasses__():
        if vars(known).get("tritonbn_original") is kind:
            return known
    sequential = kind.forward is nn.Sequential.forward
    first = step.sequence if sequential else _function(kind)
    if first is None:
        return None
    variants: dict[Any, Any] = {kind.forward: first}

    def plainly(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *map(step.finish, args), **kwargs)

    def current() -> Any:
        """The forward that the class has now, written anew; torch.export and torch.jit see what was written."""
        function = kind.forward
        made = variants.get(function)
        if not (step.is_unchanged(made) if made else function in variants):
            if len(variants) >= MAX_VARIANTS:
                variants.pop(next(iter(variants)))
            made = variants[function] = _function(kind)
        return plainly if made is None or private.is_tracing() else made

    def late(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward; what is returned, and a first argument that is the only one, may be late."""
        if is_compiling():
            made = variants.get(kind.forward)
            return (plainly if made is None or private.is_exporting() else made)(self, *args, **kwargs)
        try:
            return current()(self, *args, **kwargs)
        except BaseException as error:
            step.settle_after(error)
            raise

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return step.finish(late(self, *args, **kwargs))

    vars(forward)["variants"] = variants
    attributes = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "tritonbn_original": kind,
        "tritonbn_opened": late,
        "forward": forward,
    }
    return _METACLASSES[type(kind)](kind.__name__, (_Fused, kind), attributes)  # type: ignore[no-any-return]


def _function(kind: type[nn.Module]) -> Any:
    found = opened_forward(kind)
    return None if isinstance(found, str) else found.function
