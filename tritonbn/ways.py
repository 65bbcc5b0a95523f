"""Every way into the layers and batch norms of a model, so that a layer is folded only if its norm is always next."""

import ast
import inspect
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import private
from tritonbn.activations import Activation
from tritonbn.fused_forward import opened_forward, opened_or_why
from tritonbn.interpreter import OTHER, Frame, Known, Values
from tritonbn.rewrite import Opened
from tritonbn.types import WITH_RESIDUAL, class_of, is_sequential
from tritonbn.uses import Waiting, Walk, callers

# The number of dimensions of what each returns, the channels being dimension 1, and the norms that take those. Exactly
# these types.
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
DIMENSIONS: dict[type[nn.Module], tuple[int, type[nn.Module]]] = {
    nn.Linear: (2, nn.BatchNorm1d),
    nn.Conv1d: (3, nn.BatchNorm1d),
    nn.Conv2d: (4, nn.BatchNorm2d),
    nn.Conv3d: (5, nn.BatchNorm3d),
    nn.ConvTranspose1d: (3, nn.BatchNorm1d),
    nn.ConvTranspose2d: (4, nn.BatchNorm2d),
    nn.ConvTranspose3d: (5, nn.BatchNorm3d),
}


NO_LAYER = "its input is not what one convolution or linear layer returns"
# Methods of nn.Module by which a function reaches modules that it does not name.
_PARTS = ("modules", "named_modules", "children", "named_children", "get_submodule")


class Ways(Walk):
    """Every way into the layers and batch norms of a model: by all functions of its classes, whatever their arguments.

    What is followed is the code written anew: there, a value is used once, or finished first.
    """

    limit = 1_000_000

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inputs: dict[nn.Module, set[nn.Module | None]] = {}  # of norms: the layers that returned them
        self.escapes: dict[nn.Module, str] = {}  # what something else may reach, and how
        self.entered: set[nn.Module] = set()  # containers whose forward was followed from a caller
        self.called_otherwise: set[nn.Module] = set()  # containers that somebody gives what is not known
        self.reached: list[tuple[nn.Module, str]] = []  # whose parts a function looks for, and how
        self.unknown = False  # whether it calls what is not known with one argument
        containers = callers(model)
        for module in containers:
            self.follow_functions(module)
        for module in containers:  # the model first
            if module not in self.entered or module in self.called_otherwise:
                self.finished(self.module(module, (OTHER,)), "")
        if self.steps > self.limit:
            self.escape(model, "its containers' code is too long to be followed")

    def layer_before(self, norm: nn.Module) -> nn.Module | str:
        """The layer whose output is all that the norm ever gets, and that gives it to nobody else; or why none is."""
        layers = self.inputs.get(norm, set())
        if norm in self.escapes or not layers:
            return self.escapes.get(norm, "no forward that can be followed calls it")
        layer = layers.pop() if len(layers) == 1 else None
        return NO_LAYER if layer is None else self.escapes.get(layer, layer)

    def follow_functions(self, module: nn.Module) -> None:
        """What may call its layers besides its forward, and whether that can be followed."""
        kind = class_of(module)
        if "forward" in vars(module):
            self.escape(module, "the forward of its container was replaced")
        elif kind.forward is not nn.Sequential.forward and isinstance(why := opened_forward(kind), str):
            self.escape(module, f"the forward of its container {why}")
        for name, function in _functions(kind):
            bound = not isinstance(inspect.getattr_static(kind, name), staticmethod)
            if function is kind.forward:
                continue
            if isinstance(opened := opened_or_why(function, bound), str):
                self.escape(module, f"{kind.__name__}.{name} {opened}")
                continue
            self.modules.append(module)
            self.finished(self.body(opened, [(Known(module),)] * bound, {}), "")
            self.modules.pop()

    def escape(self, module: nn.Module, why: str) -> None:
        for inner in module.modules():
            self.escapes.setdefault(inner, why)

    def default(self, value: Any) -> Values:
        """Whatever a caller might give."""
        return (OTHER,)

    def module(self, module: nn.Module, x: Values) -> Values:
        if (
            module in self.modules
            or "forward" in vars(module)
            or not (is_sequential(module) or self.is_followed(module))
        ):
            self.finished(x, "")
            return (OTHER,)
        self.entered.add(module)
        return super().module(module, x)

    def body(self, opened: Opened, args: list[Values], kwargs: dict[str, Values]) -> Values:
        outer, self.reached, self.unknown = (self.reached, self.unknown), [], False
        found = super().body(opened, args, kwargs)
        for module, why in self.reached if self.unknown else ():
            self.escape(module, why)
        self.reached, self.unknown = outer
        return found

    def attribute(self, owner: Any, name: str) -> Values:
        """Flags may be changed, and what is read of a layer or norm may be its weight."""
        module = owner.value if isinstance(owner, Known) else None
        found = super().attribute(owner, name)
        if not isinstance(module, nn.Module) or name == "training":
            return found
        if type(module) in DIMENSIONS or isinstance(module, _BatchNorm):
            self.escape(module, f"its .{name} is read, or that of the layer before it")
        elif name in ("_modules", "__dict__"):
            self.escape(module, f"the .{name} of its container is read")
        values = [value.value for value in found if isinstance(value, Known)]
        kept = any(isinstance(leaf, (nn.Module, FunctionType, MethodType)) for leaf in private.tree_leaves(values))
        return found if kept or name in module._modules else (OTHER,)

    def called(self, function: Any, values: Values, why: str) -> Values:
        f = function.value if isinstance(function, Known) else None
        if isinstance(f, nn.Module) and type(f) in DIMENSIONS:
            self.finished(values, why)
            return (Waiting(f, len(self.modules)),)
        if isinstance(f, _BatchNorm):
            layers = {v.norm if isinstance(v, Waiting) and not v.added else None for v in values}
            self.inputs.setdefault(f, set()).update(layers)
            if len(values) > 1:
                self.finished(values, why)
            return (OTHER,)
        if isinstance(f, nn.Module) and f._modules:
            return self.module(f, values)
        self.unknown |= f is None
        return super().called(function, values, why)

    def waiting(self, names: list[ast.expr], functions: Values, frame: Frame, why: str) -> bool:
        """No matter for folding: what a layer returned stays what it is."""
        return False

    def note(self, waiting: Waiting, activation: Activation, why: str, *others: nn.Module) -> None:
        """A layer's output goes elsewhere than into a batch norm."""
        self.escape(waiting.norm, "the output of the layer before it goes elsewhere, too")

    def finished(self, values: Values, why: str) -> Values:
        """A module, or a list of some, may be given to what is not followed, too."""
        for leaf in private.tree_leaves([value.value for value in values if isinstance(value, Known)]):
            leaf = leaf.__self__ if isinstance(leaf, MethodType) else leaf
            if isinstance(leaf, nn.Module):
                self.escape(leaf, "its container, or the layer before it, is given to a function that is not followed")
        return super().finished(values, why)

    def plainly(self, f: Any, args: list[Values], place: str) -> Values:
        if isinstance(f, nn.Module):
            self.called_otherwise.add(f)
            if not f._modules:
                self.escape(f, f"it, or the layer before it, is called in a way that is not followed{place}")
        elif isinstance(f, MethodType) and isinstance(f.__self__, nn.Module) and f.__name__ in _PARTS:
            self.reached.append((f.__self__, f"its container calls self.{f.__name__}() and what that gives{place}"))
        return super().plainly(f, args, place)

    def calls(self, e: ast.Call, frame: Frame) -> Values:
        """A batch norm with a residual is a batch norm of its first argument."""
        if isinstance(e.func, ast.Call) and e.func.args and e.args and isinstance(first := e.args[0], ast.Call):
            functions = self.value(e.func.args[0], frame)
            finishes = isinstance(first.func, ast.Name) and first.func.id == "tritonbn_finish"
            if finishes and all(isinstance(f, Known) and isinstance(f.value, WITH_RESIDUAL) for f in functions):
                for argument in [*e.args[1:], *[keyword.value for keyword in e.keywords]]:
                    self.finished(self.value(argument, frame), "")
                value = self.value(first.args[0], frame)
                return self.called(functions[0], value, "") if len(functions) == 1 else self.finished(value, "")
        return super().calls(e, frame)

    def parts(self, node: ast.AST, frame: Frame) -> Values:
        """Functions within functions may call whatever they mention."""
        if isinstance(node, (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own = frame.opened.source.arguments[:1]
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) or (isinstance(inner, ast.Name) and inner.id not in own):
                    self.finished(self.value(inner, frame), "")
            return (OTHER,)
        return super().parts(node, frame)


def _functions(kind: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class and of those it inherits from, but torch's and special ones (__init__, __repr__)."""
    for parent in kind.__mro__[:-1]:
        for name, value in () if parent.__module__.startswith("torch.") else vars(parent).items():
            value = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
            if isinstance(value, FunctionType) and (name == "__call__" or not name.startswith("__")):
                yield name, value


def held_elsewhere(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules that are held by what is no module: lists, dicts, closures and objects that attributes refer to."""
    seen: set[int] = set()

    def walk(value: Any, depth: int) -> Iterator[nn.Module]:
        if isinstance(value, nn.Module):
            yield value
        elif id(value) not in seen and depth < 6 and not isinstance(value, (Tensor, type, str, bytes, int, float)):
            seen.add(id(value))
            inner: list[Any] = []
            if isinstance(value, (dict, list, tuple, set, frozenset)):
                inner = [*value, *(value.values() if isinstance(value, dict) else ())]
            elif isinstance(value, partial):
                inner = [value.func, *value.args, *value.keywords.values()]
            elif isinstance(value, MethodType):  # that of a container is followed as one of its functions
                inner = [value.__self__] if not getattr(value.__self__, "_modules", None) else []
            elif isinstance(value, FunctionType):
                inner = list(inspect.getclosurevars(value).nonlocals.values())
            elif not type(value).__module__.startswith(("torch", "builtins")):
                inner = list(getattr(value, "__dict__", {}).values())
            for item in inner:
                yield from walk(item, depth + 1)

    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_modules", "_parameters", "_buffers"):
                yield from ((held, f"{name or 'the model'}.{attribute}") for held in walk(value, 0))
