"""The forward of a container with fused steps, put into the instance: `vars(module)["forward"]`."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_flatten

from tritonbn.chains import Use, fuse, fuse_sequence
from tritonbn.effects import Untraceable
from tritonbn.epilogue import OwnForward, children, is_replaced, is_sequential, run, seen_by_others
from tritonbn.tracing import TENSOR, trace

# Beyond, the arguments or attributes change with every call: tracing would cost more than fusing saves.
MAX_VARIANTS = 16
_REPLICATE = "_replicate_for_data_parallel"
# torch.compile marks the module that it is given.
_INTERNAL = dict.fromkeys({"forward", _REPLICATE, "_is_torch_compile", *vars(nn.Module())} - {"training"})
# Before torch 2.13 compiled code can ask a module for an attribute by its name, and not what attributes there are.
_ASK_NAMES = TorchVersion(torch.__version__) < "2.13"
# Values that a trace may hold as constants, and that are compared by value.
_CONSTANTS = dict.fromkeys((
    bool, int, float, complex, str, bytes, type(None), type, type(...), FunctionType, BuiltinFunctionType, torch.dtype,
    torch.device, torch.memory_format, torch.layout,
))  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """What a container does with batch norms: its uses of them, or why its forward cannot be followed."""

    uses: list[Use]
    untraceable: str = ""
    function: Callable[..., Any] | None = None  # (module, *tensors): the forward with fused steps, if there are any


def analyse(module: nn.Module) -> Analysis | None:
    """What a container does with batch norms when it is called as usual; None where there are none, or no forward."""
    if not is_container(module):
        return None
    if is_sequential(module):
        return Analysis(fuse_sequence(module))
    try:
        graph = usual_graph(module)
    except Untraceable as refusal:
        return Analysis([], str(refusal))
    return _fused(graph, module)


def is_container(module: nn.Module) -> bool:
    """Whether it has a forward of its own, and batch norms below."""
    return (
        not isinstance(module, (ScriptModule, _BatchNorm))
        and type(module).forward is not nn.Module.forward  # ModuleList, ModuleDict: never called
        and any(isinstance(child, _BatchNorm) for child in module.modules())
    )


def usual_graph(module: nn.Module) -> fx.Graph:
    """The forward of a container called with a tensor for each parameter without default; raises Untraceable."""
    if is_replaced(module):
        raise Untraceable("it was replaced on this instance")
    usual = _usual_arguments(type(module).forward)
    if usual is None:
        raise Untraceable("it takes any number of arguments, or some by name only")
    return trace(module, *tree_flatten((usual, {})))


def _usual_arguments(forward: Callable[..., Any]) -> tuple[object, ...] | None:
    """TENSOR for each required parameter but self."""
    required = [p for p in list(inspect.signature(forward).parameters.values())[1:] if p.default is p.empty]
    if any(p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY) for p in required):
        return None
    return tuple(TENSOR for p in required if p.kind is not p.VAR_KEYWORD)


def _fused(graph: fx.Graph, module: nn.Module) -> Analysis:
    uses = fuse(graph, module)
    return Analysis(uses, "", _compiled(graph, type(module).__name__) if any(use.steps for use in uses) else None)


def _compiled(graph: fx.Graph, name: str) -> Callable[..., Any]:
    for node in graph.nodes:
        node.meta.clear()  # torch.fx.wrap would register the generated function
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<{name}.forward, fused by tritonbn>", "exec"), names)
    return names["forward"]  # type: ignore[no-any-return]


def install(module: nn.Module) -> None:
    """Give a container that has something to fuse a forward that does so, as far as its children allow at each call."""
    uninstall(module)
    forward = FusedSequence(module) if is_sequential(module) else FusedForward(module)
    if analyse(module) is not None and forward.prepare():
        vars(module)["forward"] = forward
        vars(module)[_REPLICATE] = forward.replicate


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    if isinstance(vars(module).get("forward"), OwnForward):
        del vars(module)["forward"], vars(module)[_REPLICATE]


class _Installed(OwnForward):
    """What the fused forwards share."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def __code__(self) -> CodeType:  # torch.export names the place that it exports
        return type(self.module).forward.__code__

    @property
    def original(self) -> Callable[..., Any]:
        """The forward of the class."""
        return partial(type(self.module).forward, self.module)

    def replicate(self) -> nn.Module:
        """A replica for torch.nn.DataParallel, without us: it copies vars(module), and we would run the original."""
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)  # type: ignore[no-untyped-call]
        del vars(replica)["forward"], vars(replica)[_REPLICATE]
        return replica


class FusedSequence(_Installed):
    """The forward of a Sequential."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if seen_by_others(*args) or len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        return run(children(self.module), args[0])

    def prepare(self) -> bool:
        """Whether there is something to fuse."""
        return any(use.steps for use in fuse_sequence(self.module))


class FusedForward(_Installed):
    """The forward of any other container, as a function generated for each kind of call that occurs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # None: the class's own forward. The functions take the module as an argument, so that copies can share them.
        self.variants: dict[Any, Callable[..., Any] | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not seen_by_others():
            kind, tensors = _kind(args, kwargs)
            if kind is not None:
                key = (kind, _state(self.module, self.names() if _ASK_NAMES and is_compiling() else None))
                function = self.variants[key] if key in self.variants else self._variant(key, args, kwargs)
                if function is not None:
                    return function(self.module, *tensors)
        return self.original(*args, **kwargs)

    def prepare(self) -> bool:
        """Generate the functions for usual calls in training and evaluation; whether there are any."""
        module, mode = self.module, self.module.training
        count = len(_usual_arguments(type(module).forward) or ())
        try:
            for module.training, gradients in itertools.product((mode, not mode), (True, False)):
                with torch.set_grad_enabled(gradients):
                    analysis = analyse(module)
                    self.variants[count, _state(module)] = analysis.function if analysis else None
        finally:
            module.training = mode
        return any(self.variants.values())

    def _variant(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """Trace a kind of call that is new."""
        if len(self.variants) >= MAX_VARIANTS or is_compiling():
            return None
        leaves, spec = tree_flatten((args, kwargs))
        marked = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        try:
            function = _fused(trace(self.module, marked, spec), self.module).function
        except Untraceable:
            function = None
        self.variants[key] = function
        return function

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedForward":
        other = type(self)(copy.deepcopy(self.module, memo))
        other.variants = dict(self.variants)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "variants": {}}  # generated functions cannot be pickled


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(what a trace depends on, the tensors) of a call's arguments; None first where they cannot be followed."""
    if not kwargs and all(type(argument) is Tensor for argument in args):
        return len(args), args
    leaves, spec = tree_flatten((args, kwargs))
    tensors = []
    kinds: list[Any] = [spec]
    for leaf in leaves:
        if issubclass(type(leaf), Tensor):
            tensors.append(leaf)
            kinds.append(TENSOR)
        elif type(leaf) in _CONSTANTS:
            kinds.append((type(leaf), leaf))
        else:
            return None, ()
    return tuple(kinds), tensors


def _state(module: nn.Module, names: Iterable[str] | None = None) -> Any:
    """What a trace depends on besides the arguments: code, attributes (these), kinds of children, grad mode."""
    held = module.__dict__  # here and there, where compilers look: before torch 2.9 they do not know vars()
    own = tuple([(name, _frozen(held[name])) for name in (names or held) if name not in _INTERNAL])
    return type(module).forward, own, _structure(module), torch.is_grad_enabled()


def _frozen(value: Any) -> Any:
    """An attribute's value to compare, as far as it is plain."""
    kind = type(value)
    if kind in _CONSTANTS:
        return kind, value
    if kind in (tuple, list):
        return kind, tuple([_frozen(item) for item in value])
    if kind is dict:
        return kind, tuple([(key, _frozen(item)) for key, item in value.items()])
    return kind


def _structure(module: nn.Module) -> Any:
    """The kinds of children, those in lists too, and how many are distinct: a trace takes equal ones for the first."""
    found = module._modules.values()
    lists = [child for child in found if isinstance(child, (nn.ModuleList, nn.ModuleDict))]
    return tuple(map(type, found)), len(set(map(id, found))), tuple(map(_structure, lists))
