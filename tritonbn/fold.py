"""Batch norm folded into the layer before it, for inference."""

import ast
import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from tritonbn.activations import IDENTITY, Activation, resolve
from tritonbn.fused_forward import opened_forward, opened_or_why
from tritonbn.modules import leaf_node
from tritonbn.rewrite import Opened
from tritonbn.types import (
    OURS,
    TORCHS,
    WITH_ACTIVATION,
    WITH_RESIDUAL,
    batch_norms,
    check_module,
    class_of,
    is_bare,
    is_sequential,
    unsharded,
)  # fmt: skip
from tritonbn.uses import OTHER, Frame, Known, Values, Waiting, Walk, callers, fuse

Model = TypeVar("Model", bound=nn.Module)

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


_NO_LAYER = "its input is not what one convolution or linear layer returns"
# Methods of nn.Module by which a function reaches modules that it does not name.
_PARTS = ("modules", "named_modules", "children", "named_children", "get_submodule")


class Folded(nn.Module):
    """What remains of a batch norm that was folded into the layer before: its activation, if it had one."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, into: str, dimensions: int, scale: Tensor, shift: Tensor, activation: Activation = IDENTITY
    ) -> None:
        super().__init__()
        self.into, self.dimensions, self.activation = into, dimensions, activation
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual), [N, C, ...] of the number of dimensions that was folded for.

        BatchNorm1d takes 2 and 3 dimensions, and where the layer got the other number its channels are not in
        dimension 1: then what was folded, x * scale + shift, is undone in its last dimension (Linear) or its first
        (unbatched convolution) and applied to dimension 1. Raises what batch norm raised: ValueError for any other
        number of dimensions, RuntimeError for other sizes.
        """
        if (node := leaf_node(self, input, *(() if residual is None else (residual,)))) is not None:
            return node
        y = input if input.dim() == self.dimensions else self._moved(input)
        return self.activation.apply(y if residual is None else y + residual)

    def _moved(self, y: Tensor) -> Tensor:
        if self.dimensions > 3 or y.dim() not in (2, 3):
            expected = "2D or 3D" if self.dimensions <= 3 else f"{self.dimensions}D"
            raise ValueError(f"expected {expected} input (got {y.dim()}D input)")
        if y.shape[1] != len(self.scale):
            raise RuntimeError(f"running_mean should contain {y.shape[1]} elements not {len(self.scale)}")
        own = (-1,) if self.dimensions == 2 else (-1, 1)
        wide = (y.to(self.scale.dtype) - self.shift.view(own)) / self.scale.view(own)
        there = (-1, 1) if y.dim() == 3 else (-1,)
        return (wide * self.scale.view(there) + self.shift.view(there)).to(y.dtype)

    def extra_repr(self) -> str:
        """Where it went."""
        return f"into={self.into}" + ("" if self.activation == IDENTITY else f", activation={self.activation}")


def fold(model: Model, *example: Any) -> Model:
    """A copy of a model in evaluation mode with its batch norms folded into the convolutions and linear layers before.

    Folded are batch norms with running statistics whose input is always what one convolution, transposed convolution
    or nn.Linear returns, where nobody else gets that: by all code of the containers above, whatever their arguments and
    flags. Not folded is what is watched by a hook, shares parameters, or is held by another attribute, list or closure.
    The layer gets their weights, computed in float32 (float64) and rounded once, and a bias if it had none; a small
    module takes the place of the batch norm, so `state_dict` changes. `report(model)` says what will not be folded and
    why. What was fused stays fused.

    example: arguments that the model and the copy are then called with, to compare every output of a folded batch norm.

    Raises TypeError if `model` is not a torch.nn.Module, ValueError if a batch norm is in training mode, or with the
    name of the first layer whose output for the example differs by more than rounding.
    """
    check_module(model)
    training = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if training:
        raise ValueError(f"expected batch norm in evaluation mode, call model.eval() first: {', '.join(training)}")
    names = {module: name for name, module in model.named_modules()}
    folded = copy.deepcopy(model)
    copies = dict(zip(model.modules(), folded.modules(), strict=True))
    changed: dict[str, nn.Module] = {}
    for norm, layer in folds(model).items():
        if isinstance(layer, nn.Module):
            changed[names[norm]] = _fold(folded, copies[norm], copies[layer], names[layer])
    fuse(folded)
    if example:
        _compare(model, folded, changed, example)
    return folded


def folds(model: nn.Module) -> dict[_BatchNorm, nn.Module | str]:
    """For each batch norm of a model in evaluation mode the layer that `fold` folds it into, or why into none."""
    ways = _Ways(model)
    places: dict[nn.Module, Counter[nn.Module]] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            if child is not None:
                places.setdefault(child, Counter())[parent] += 1
    parameters = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    held = dict(_held_elsewhere(model))

    def decide(norm: _BatchNorm) -> nn.Module | str:
        kind = unsharded(type(norm))
        if kind not in OURS and kind not in TORCHS and kind not in WITH_RESIDUAL:
            return "its forward may differ"
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics"
        layer = ways.layer_before(norm)
        if isinstance(layer, str):
            return layer
        if type(layer) not in DIMENSIONS or not isinstance(norm, DIMENSIONS[type(layer)][1]) or not _fits(layer, norm):
            return _NO_LAYER
        for module in (norm, layer):
            if module in held:
                return f"{held[module]} holds it, or the layer before it, too"
            if any(parameters[id(p)] > 1 for p in module.parameters()):
                return "it, or the layer before it, shares parameters"
        if places.get(norm) != places.get(layer) and not _nested(norm, layer, places):
            return "it, or the layer before it, has a second name"
        if not (is_bare(norm) and is_bare(layer)):
            return "a hook watches it or the layer before it"
        if DIMENSIONS[type(layer)][0] <= 3 and not _is_undone(*_affine(norm)):
            return "its weight is too small to be undone for inputs of another number of dimensions"
        return layer

    return {norm: decide(norm) for norm in batch_norms(model)}


def _fits(layer: Any, norm: _BatchNorm) -> bool:
    transposed_groups = isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return bool(channels == norm.num_features) and not transposed_groups


def _nested(norm: nn.Module, layer: nn.Module, places: dict[nn.Module, Counter[nn.Module]]) -> bool:
    """Whether each has one place, be it another one: Sequential(layer, Sequential(norm, ...))."""
    return all(module in places and places[module].total() == 1 for module in (norm, layer))


class _Ways(Walk):
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
        return _NO_LAYER if layer is None else self.escapes.get(layer, layer)

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
        kept = any(isinstance(leaf, (nn.Module, FunctionType, MethodType)) for leaf in tree_leaves(values))
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
        for leaf in tree_leaves([value.value for value in values if isinstance(value, Known)]):
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


def _held_elsewhere(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
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


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """scale and shift [C] of norm(x) = x * scale + shift, in float32 or float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.to(dtype)
        shift = -norm.running_mean.to(dtype) * scale
        return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)


def _is_undone(scale: Tensor, shift: Tensor) -> bool:
    """Whether (y - shift) / scale keeps at least half of the digits of x in y = x * scale + shift."""
    limit = torch.finfo(scale.dtype).eps ** 0.5
    return bool(((scale.abs() > limit * shift.abs()) & (scale.abs() > limit) & scale.isfinite()).all())


@torch.no_grad()
def _fold(model: nn.Module, norm: Any, layer: Any, into: str) -> nn.Module:
    """Fold a norm into the layer before it: weight * scale, bias * scale + shift. What takes its place."""
    scale, shift = _affine(norm)
    dtype = torch.promote_types(scale.dtype, layer.weight.dtype)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    shape = [1] * layer.weight.dim()
    shape[1 if transposed else 0] = -1
    weight = layer.weight.to(dtype) * scale.view(shape)
    bias = shift if layer.bias is None else layer.bias.to(dtype) * scale + shift
    layer.weight, layer.bias = (
        nn.Parameter(made.to(layer.weight.dtype), layer.weight.requires_grad) for made in (weight, bias)
    )
    activation = resolve(norm.activation) if isinstance(norm, WITH_RESIDUAL) else IDENTITY
    rest: nn.Module = Folded(into, DIMENSIONS[type(layer)][0], scale, shift, activation)
    if type(norm) in WITH_ACTIVATION:
        parts: Any = norm
        rest = nn.Sequential(rest, parts.drop, parts.act)
    rest.train(norm.training)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = rest
    return rest


def _compare(model: nn.Module, folded: nn.Module, changed: dict[str, nn.Module], example: tuple[Any, ...]) -> None:
    """Raise ValueError, with the first layer's name, if the outputs of both differ by more than rounding."""
    theirs = _outputs(model, {name: model.get_submodule(name) for name in changed}, example)
    mine = _outputs(folded, changed, example)
    for count, (name, values) in enumerate(theirs.items(), 1):
        for one, other in zip(values, mine.get(name, []), strict=False):
            limit = 32 * (count + 4) * torch.finfo(other.dtype).eps * max(other.abs().max().item(), 1e-30)
            if one.shape != other.shape or not (one - other).abs().max().item() <= limit:
                raise ValueError(
                    f"expected equal outputs of {name or 'the model'} before and after folding, got a difference of "
                    f"{(one - other).abs().max().item():.3g}"
                    if one.shape == other.shape
                    else f"of {name}: other shapes"
                )
        if len(values) != len(mine.get(name, [])):
            raise ValueError(f"expected {len(values)} calls of {name}, got {len(mine.get(name, []))}")


@torch.no_grad()
def _outputs(model: nn.Module, modules: dict[str, nn.Module], example: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """What the modules, and last the model, return for the example, in the order of their calls."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: found.setdefault(name, []).append(output.clone())

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = model(*copy.deepcopy(example))
    finally:
        for hook in hooks:
            hook.remove()
    found.pop("", None)
    found[""] = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found
