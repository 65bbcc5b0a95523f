"""The forward of one container as a torch.fx graph whose leaves are its children, or the reason why there is none.

fx records what happens to the values it follows; all else happens once, while tracing. What such a graph would silently
get wrong is refused here: a forward for which this file returns a graph does the same as its graph.
"""

import math
import operator
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import inplace_methods
from torch.fx.proxy import Attribute
from torch.nn import ParameterDict, ParameterList
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tritonbn.effects import Untraceable, surroundings, without_effects

# What `trace` is given in the place of a tensor.
TENSOR = object()
# fx patches torch.nn.Module while it traces: one trace at a time.
_LOCK = threading.RLock()


def trace(module: nn.Module, leaves: list[Any], spec: TreeSpec) -> fx.Graph:
    """The graph of `type(module).forward(module, *args, **kwargs)`, (args, kwargs) being leaves and spec, flattened.

    leaves: TENSOR for each tensor, which becomes a placeholder; all other values are constants of the graph. It holds
    for the module's attributes of this moment and for the grad mode of this moment. Raises Untraceable.
    """
    outer = sys.exc_info()[1]  # that somebody is handling
    with _LOCK, without_effects(module):
        tracer = _Tracer(leaves, spec)
        try:
            graph = tracer.trace(module)
        except Exception as error:  # whatever a forward may do to a value that it does not expect
            _leave(outer, error, tracer.refusal)
            if isinstance(error, Untraceable):
                raise
            raise Untraceable(" ".join((type(error).__name__, *str(error).splitlines()[:1]))) from error
        if tracer.refusal is not None:  # the forward caught it
            _leave(outer, tracer.refusal)
            raise tracer.refusal
        if not tracer.inputs_unchanged():
            raise Untraceable("it changes a list or dict that it is given")
    return graph


def _leave(outer: BaseException | None, *errors: BaseException | None) -> None:
    """End what the frames behind errors hold, but for those behind `outer`.

    A generator that one of them did not get to the end of, as that of torch.utils.checkpoint up to torch 2.12, has set
    hooks for saved tensors: they are of this thread, and they would stay as long as somebody keeps the error.
    """
    seen = {id(outer)}
    for error in errors:
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__


def _written_in_place(name: str) -> Callable[..., Any]:
    """operator.iadd and the like as a function of our own.

    fx would print operator.iadd as a statement, `a += b`, which binds a number anew under a name that others still use.
    """
    function = getattr(operator, name)

    def apply(left: Any, right: Any) -> Any:
        return function(left, right)

    apply.__name__ = apply.__qualname__ = name
    return apply


IN_PLACE = {name: _written_in_place(name) for name in inplace_methods if name != "setitem"}


class _Symbol(fx.Proxy):
    """A value while tracing; refuses what fx would answer wrongly instead of recording it."""

    tracer: "_Tracer"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What isinstance() is told outside of torch: our placeholders, parameters and buffers are tensors."""
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == "abc" or frame.f_code is torch.is_tensor.__code__:
            assert frame.f_back is not None
            frame = frame.f_back
        if _is_torchs(frame.f_globals.get("__name__", "")):
            return type(self)
        return Tensor if self._is_tensor() else self.tracer.refuse("it asks for the type of an intermediate value")

    def _is_tensor(self) -> bool:
        """Whether that is known: modules may return anything."""
        return self.node.op in ("placeholder", "get_attr")

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name) and not name.startswith("__"):
            return _AttributeSymbol(self, name)
        if name.startswith("__") or self._is_tensor():
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return self.tracer.refuse(f"it reads .{name} of an intermediate value")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            self.tracer.refuse(f"it sets .{name} of a tensor")
        object.__setattr__(self, name, value)


def _refusing(reason: str) -> Callable[..., Any]:
    def method(self: _Symbol, *args: Any) -> Any:
        return self.tracer.refuse(reason)

    return method


for _name in ("__str__", "__format__"):
    setattr(_Symbol, _name, _refusing("it prints a tensor"))
for _name in ("__len__", "__int__", "__float__", "__complex__", "__index__", "__contains__"):
    setattr(_Symbol, _name, _refusing("it makes a number of a tensor"))
for _name in ("__setitem__", "__delitem__"):
    setattr(_Symbol, _name, _refusing("it writes to a part of a tensor"))


def _record(name: str) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", IN_PLACE[name], (self, other), {})

    return method


for _name in IN_PLACE:
    setattr(_Symbol, f"__{_name}__", _record(_name))


class _AttributeSymbol(_Symbol, Attribute):
    """An attribute of a value: a method that is called next, or something like .shape."""


class _Tracer(fx.Tracer):
    """Records one container's own forward. A use of values that were not recorded raises Untraceable."""

    proxy_buffer_attributes = True  # so that writing to a buffer is recorded too

    def __init__(self, leaves: list[Any], spec: TreeSpec) -> None:
        super().__init__(autowrap_modules=(math,))
        self.leaves, self.spec = leaves, spec
        self.surroundings = surroundings()
        self.thread = threading.get_ident()
        self.inputs: tuple[Any, list[Any]] | None = None
        self.refusal: Untraceable | None = None

    def refuse(self, reason: str) -> NoReturn:
        """Raise Untraceable, and once more after the forward, should that catch it."""
        self.refusal = Untraceable(reason)
        raise self.refusal

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("it branches on the value of a tensor")

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse("it iterates over a tensor")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse("it reads keys of a value")

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        flat = [
            self.create_proxy("placeholder", f"input_{i}", (), {}) if leaf is TENSOR else leaf
            for i, leaf in enumerate(self.leaves)
        ]
        self.inputs = tree_unflatten(flat, self.spec), flat
        args, kwargs = self.inputs[0]
        return (lambda: root_fn(self.root, *args, **kwargs)), []

    def inputs_unchanged(self) -> bool:
        """Whether the containers given to the forward hold what they held."""
        assert self.inputs is not None
        flat, spec = tree_flatten(self.inputs[0])
        return spec == self.spec and all(a is b for a, b in zip(flat, self.inputs[1], strict=True))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:  # fx's patches reach every thread
            return forward(*args, **kwargs)
        assert self.submodule_paths is not None
        path = self.submodule_paths.get(m)
        if not path:
            self.refuse(f"it calls a {type(m).__name__} that is none of its submodules")
        return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if surroundings() != self.surroundings:
            self.refuse("it changes the grad mode, autocast, saved tensor hooks or the like for a part of itself")
        self._check_frames()
        return super().create_node(kind, target, *args, **kwargs)

    def _check_frames(self) -> None:
        """A method of a child, called directly, depends on the child's attributes, which nobody watches."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code is not trace.__code__:
            owner = frame.f_locals.get("self")
            kind = type(owner)
            if issubclass(kind, nn.Module) and owner is not self.root and kind not in (ParameterList, ParameterDict):
                self.refuse(f"it calls the method {frame.f_code.co_name} of a {kind.__name__}")
            frame = frame.f_back

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_buffer(a):
            self.refuse("it uses a tensor that is neither an input, a parameter nor a buffer")
        kind = type(a)
        named = isinstance(a, tuple) and hasattr(a, "_fields")
        if isinstance(a, (tuple, list, dict)) and kind not in (tuple, list, dict, torch.Size) and not named:
            self.refuse(f"it makes a {kind.__name__}")  # fx would make it a list or dict
        return super().create_arg(a)

    def _is_buffer(self, tensor: Tensor) -> bool:
        return any(tensor is buffer for buffer in self.root.buffers())


def _is_torchs(name: str) -> bool:
    return name == "torch" or name.startswith("torch.")
