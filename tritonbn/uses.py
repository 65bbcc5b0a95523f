"""Where a container calls batch norms and what follows each, read off its forward written anew: nothing of it runs.

Values are tuples of alternatives, where a branch depends on what is not known: each a `Known` object of the model, a
`Waiting` batch norm, or OTHER.
"""

import ast
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import step
from tritonbn.activations import IDENTITY, Activation, of_call, of_method, of_module
from tritonbn.fused_forward import install, opened_forward, opened_or_why, uninstall
from tritonbn.rewrite import Opened
from tritonbn.types import children, is_norm, is_sequential, original, unsharded

OTHER = object()
RETURNED = "its output is returned"
_PLAIN = (type(None), bool, int, float, str)
_EVALUATED: tuple[Any, ...] = (zip, enumerate, range, len, reversed, list, tuple, str, int, min, max)
_LOOKS = (*_EVALUATED, isinstance, hasattr, getattr, callable, type, id)  # neither call nor keep what they are given
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_DEPTH = 30  # of forwards and functions that are followed into each other


@dataclass(frozen=True)
class Use:
    """One call of a batch norm: what it becomes one operation with, or why with nothing."""

    norm: _BatchNorm
    steps: str  # "relu", "add", "add + relu"; "" for none
    why: str = ""  # for none
    others: tuple[nn.Module, ...] = ()  # whose hooks would suspend it
    containers: tuple[nn.Module, ...] = ()  # whose forwards have to be written anew for it
    functions: tuple[tuple[FunctionType, bool], ...] = ()  # likewise, with whether they are methods


@dataclass
class Uses:
    """The calls of batch norms by one container."""

    found: list[Use] = field(default_factory=list)
    refused: str = ""  # why its forward cannot be written anew


@dataclass(frozen=True)
class Known:
    value: Any


@dataclass(frozen=True)
class Waiting:
    norm: _BatchNorm
    depth: int  # of forwards, where it was called or was returned to
    added: bool = False
    others: tuple[nn.Module, ...] = ()  # that it passed on its way
    containers: tuple[nn.Module, ...] = ()  # that returned it
    adders: tuple[nn.Module, ...] = ()  # and before something was added
    functions: tuple[tuple[FunctionType, bool], ...] = ()  # that returned it


Values = tuple[Any, ...]
_UNKNOWN: Values = (OTHER,)


def uses_of(module: nn.Module) -> Uses:
    """What a container does with batch norms when it is called with a tensor for each argument without default."""
    walk = Walk()
    walk.root(module)
    return walk.uses


class Walk:
    """The forward of one container, and all that it calls."""

    def __init__(self) -> None:
        self.uses = Uses()
        self.steps, self.limit = 0, 20_000  # of one container: what is beyond is not followed
        self.modules: list[nn.Module] = []  # whose forwards we are in
        self.functions: list[tuple[FunctionType, bool]] = []

    def root(self, module: nn.Module) -> None:
        if "forward" in vars(module):
            self.uses.refused = "was replaced on this instance"
            return
        if not is_sequential(module) and isinstance(found := opened_forward(original(unsharded(type(module)))), str):
            self.uses.refused = found
            return
        for value in self.module(module, _UNKNOWN):
            if isinstance(value, Waiting):
                self.note(value, None, RETURNED)

    def note(self, waiting: Waiting, activation: Activation | None, why: str, *others: nn.Module) -> None:
        """A batch norm is computed, with an activation or without."""
        act = "" if activation is None or activation == IDENTITY else str(activation)
        if waiting.added and activation is not None and activation.keeps_residual:
            act = ""  # the step computes it by itself where a backward follows
        steps = " + ".join(["add"] * waiting.added + [act] * bool(act))
        if steps:
            entered = self.modules[waiting.depth :]
            containers = (*waiting.containers, *(entered or self.modules[-1:])) if act else waiting.adders
            functions = (*waiting.functions, *self.functions)
            use = Use(waiting.norm, steps, "", (*waiting.others, *entered, *others), containers, functions)
        else:
            use = Use(waiting.norm, "", why)
        if use not in self.uses.found:
            self.uses.found.append(use)

    def finished(self, values: Values, why: str) -> Values:
        for value in values:
            if isinstance(value, Waiting):
                self.note(value, None, why)
        return tuple(OTHER if isinstance(value, Waiting) else value for value in values)

    # What step.py does

    def call(self, functions: Values, values: Values, why: str) -> Values:
        """`step.call`."""
        return _union(*[self.called(function, values, why) for function in functions])

    def called(self, function: Any, values: Values, why: str) -> Values:
        f = function.value if isinstance(function, Known) else None
        if isinstance(f, nn.Module):
            activation = of_module(f)
            if activation is not None:
                return self.activated(values, activation, f)
            if type(f) in step._DROPOUT_MODULES and (not f.training or f.p == 0):
                return values
            if isinstance(f, _BatchNorm):
                self.finished(values, f"its output goes to a {type(f).__name__}")
                return (Waiting(f, len(self.modules)),) if is_norm(f) else _UNKNOWN
            if is_sequential(f) or self.is_followed(f):
                return self.module(f, values)
            self.finished(values, why)
            return _UNKNOWN
        if isinstance(f, (FunctionType, MethodType)) and not _is_torchs(f):
            return self.function(f, [values], {}, why)
        return self.applied(function, values, [], {}, why)

    def is_followed(self, module: nn.Module) -> bool:
        kind = original(unsharded(type(module)))
        return (
            "forward" not in vars(module)
            and not kind.__module__.startswith("torch.nn.modules.")
            and isinstance(opened_forward(kind), Opened)
        )

    def applied(self, function: Any, values: Values, args: list[Any], kwargs: dict[str, Any], why: str) -> Values:
        """`step.apply`."""
        f = function.value if isinstance(function, Known) else None
        activation = of_method(f) if isinstance(f, str) else of_call(f, tuple(args), kwargs) if callable(f) else None
        if activation is not None:
            return self.activated(values, activation)
        if any(f is dropout for dropout in step.DROPOUTS) and step._is_idle(*args, **kwargs) is True:
            return values
        return self.finished(values, why) and _UNKNOWN

    def activated(self, values: Values, activation: Activation, module: nn.Module | None = None) -> Values:
        others = () if module is None else (module,)
        for value in values:
            if isinstance(value, Waiting) and activation != IDENTITY:
                self.note(value, activation, f"its output goes to {activation}", *others)
        if activation != IDENTITY:
            return _UNKNOWN
        return tuple(replace(v, others=(*v.others, *others)) if isinstance(v, Waiting) else v for v in values)

    def added(self, left: Values, right: Values, in_place: bool) -> Values:
        """`step.add`."""
        owned = [value for value in left if isinstance(value, Waiting)]
        if any(isinstance(value, Waiting) for value in right):
            if in_place and not owned:
                return self.finished(right, "an add in place changes the other operand")
            left = self.finished(left, "it is added to another batch norm, which is fused with the add")
            left, right = right, left
        found: list[Any] = []
        for value in left:
            if isinstance(value, Waiting) and not value.added and any(map(_is_tensor, right)):
                # What is added to in place is nobody else's only if it came late, too.
                containers = [
                    container for other in owned * in_place if other is not value for container in other.containers
                ]
                containers = [*value.containers, *containers]
                adders = (*containers, *(self.modules[value.depth :] or self.modules[-1:]))
                found.append(replace(value, added=True, containers=tuple(containers), adders=adders))
            else:
                found += self.finished((value,), "its output is added to what is no tensor") and [OTHER]
        return tuple(found)

    def module(self, module: nn.Module, x: Values) -> Values:
        """The forward of a container."""
        if module in self.modules or len(self.modules) > _DEPTH:
            self.finished(x, f"its output goes to a {type(module).__name__}")
            return _UNKNOWN
        self.modules.append(module)
        if is_sequential(module):
            for name, child in module._modules.items():
                x = self.call((Known(child),), x, f"its output goes to '{name}' ({type(child).__name__})")
        else:
            opened = opened_forward(original(unsharded(type(module))))
            assert isinstance(opened, Opened)
            x = self.body(opened, [(Known(module),), x], {})
        self.modules.pop()
        return tuple(self.returned(v, module) if isinstance(v, Waiting) else v for v in x)

    def returned(self, waiting: Waiting, module: nn.Module) -> Waiting:
        passed = (*waiting.others, module), (*waiting.containers, module)
        return replace(waiting, depth=min(waiting.depth, len(self.modules)), others=passed[0], containers=passed[1])

    def function(self, function: Any, args: list[Values], kwargs: dict[str, Values], why: str) -> Values:
        """A function or method that is no container's forward."""
        bound = isinstance(function, MethodType)
        key = (function.__func__ if bound else function, bound)
        opened = opened_or_why(*key) if isinstance(key[0], FunctionType) else ""
        if not isinstance(opened, Opened) or key in self.functions or len(self.functions) > _DEPTH:
            for values in (*args, *kwargs.values()):
                self.finished(values, why)
            return _UNKNOWN
        self.functions.append(key)
        owner = [(Known(function.__self__),)] if bound else []
        values = self.body(opened, [*owner, *args], kwargs)
        self.functions.pop()
        return tuple(replace(v, functions=(*v.functions, key)) if isinstance(v, Waiting) else v for v in values)

    # What the interpreter of Python does

    def body(self, opened: Opened, args: list[Values], kwargs: dict[str, Values]) -> Values:
        """What the function returns."""
        function = opened.source.function
        defaults = {
            name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty
        }
        env = {name: self.default(defaults[name]) if name in defaults else _UNKNOWN for name in opened.source.arguments}
        env |= dict(zip(function.__code__.co_varnames[: function.__code__.co_argcount], args, strict=False)) | kwargs
        frame = Frame(opened, env)
        self.block(opened.body, frame)
        return _union(*frame.returned) if frame.returned else _UNKNOWN

    def default(self, value: Any) -> Values:
        """An argument that is not given."""
        return (Known(value),)

    def attribute(self, owner: Any, name: str) -> Values:
        return _attribute(owner, name)

    def block(self, body: Sequence[ast.stmt], frame: "Frame") -> None:
        for statement in body:
            self.steps += 1
            if frame.ended or self.steps > self.limit:
                return
            self.statement(statement, frame)

    def statement(self, s: ast.stmt, frame: "Frame") -> None:
        if isinstance(s, ast.Return):
            frame.returned.append(self.value(s.value, frame) if s.value else (Known(None),))
            frame.ended = True
        elif isinstance(s, (ast.Assign, ast.AnnAssign)):
            value = self.value(s.value, frame) if s.value else _UNKNOWN
            for target in s.targets if isinstance(s, ast.Assign) else [s.target]:
                frame.bind(target, value)
        elif isinstance(s, ast.AugAssign):
            self.value(s.value, frame)
            frame.bind(s.target, _UNKNOWN)
        elif isinstance(s, ast.If):
            self.branches(frame, _truth(self.value(s.test, frame)), s.body, s.orelse)
        elif isinstance(s, ast.For):
            self.loop(s, frame)
        elif isinstance(s, (ast.Raise, ast.Break, ast.Continue)):
            frame.ended = isinstance(s, ast.Raise)
        elif isinstance(s, (ast.While, ast.Try, ast.With)):
            for part in ("items", "test"):
                for node in ast.iter_child_nodes(s) if hasattr(s, part) else ():
                    if isinstance(node, (ast.expr, ast.withitem)):
                        self.parts(node, frame)
            blocks = [s.body, *[handler.body for handler in getattr(s, "handlers", [])], getattr(s, "orelse", [])]
            for block in [*blocks, getattr(s, "finalbody", [])]:
                self.branches(frame, True if isinstance(s, ast.With) and block is s.body else None, block, [])
        elif isinstance(s, ast.Expr):
            self.value(s.value, frame)
        else:
            self.parts(s, frame)

    def branches(self, frame: "Frame", test: bool | None, body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        if test is not None:
            self.block(body if test else orelse, frame)
            return
        first, second = frame.copy(), frame.copy()
        self.block(body, first)
        self.block(orelse, second)
        frame.join(first, second)

    def loop(self, s: ast.For, frame: "Frame") -> None:
        items = _items(self.value(s.iter, frame))
        if items is None:
            frame.bind(s.target, _UNKNOWN)
            self.branches(frame, None, s.body, [])
        for item in items or ():
            frame.bind(s.target, (Known(item),))
            self.block(s.body, frame)
        self.block(s.orelse, frame)

    def parts(self, node: ast.AST, frame: "Frame") -> Values:
        """What is not followed but for the calls in it."""
        inner = frame
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            inner = frame.copy()
            for generator in node.generators:
                items = _items(self.value(generator.iter, inner))
                inner.bind(generator.target, tuple(Known(item) for item in items[:64]) if items else _UNKNOWN)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.finished(self.value(child, inner), "its output is used in a way that is not followed")
            elif not isinstance(child, (ast.stmt, ast.expr_context, ast.comprehension)):
                self.parts(child, inner)
        return _UNKNOWN

    def value(self, e: ast.expr, frame: "Frame") -> Values:
        """The alternatives of an expression's value."""
        self.steps += 1
        if self.steps > self.limit:
            return _UNKNOWN
        if isinstance(e, ast.Name):
            return frame.name(e.id)
        if isinstance(e, ast.Constant):
            return (Known(e.value),)
        if isinstance(e, ast.NamedExpr):
            value = self.value(e.value, frame)
            frame.bind(e.target, value)
            return value
        if isinstance(e, ast.Attribute):
            return _union(*[self.attribute(owner, e.attr) for owner in self.value(e.value, frame)])
        if isinstance(e, ast.Subscript):
            owners, keys = self.value(e.value, frame), self.value(e.slice, frame)
            return _union(*[_item(owner, key) for owner in owners for key in keys])
        if isinstance(e, ast.IfExp):
            test = _truth(self.value(e.test, frame))
            branches = [
                branch for branch, taken in ((e.body, test is not False), (e.orelse, test is not True)) if taken
            ]
            return _union(*[self.value(branch, frame) for branch in branches])
        if isinstance(e, (ast.Compare, ast.UnaryOp, ast.BoolOp)):
            return self.test(e, frame)
        if isinstance(e, (ast.Tuple, ast.List)) and isinstance(e.ctx, ast.Load):
            values = [self.value(item, frame) for item in e.elts]
            if all(len(value) == 1 and isinstance(value[0], Known) for value in values):
                return (Known([value[0].value for value in values]),)
            return _UNKNOWN
        if isinstance(e, ast.Call):
            return self.calls(e, frame)
        return self.parts(e, frame)

    def test(self, e: Any, frame: "Frame") -> Values:
        if isinstance(e, ast.UnaryOp):
            truth = _truth(self.value(e.operand, frame))
            return _UNKNOWN if truth is None or not isinstance(e.op, ast.Not) else (Known(not truth),)
        if isinstance(e, ast.BoolOp):
            unknown = False
            for operand in e.values:
                truth = _truth(self.value(operand, frame))
                if truth is isinstance(e.op, ast.Or):
                    return (Known(truth),) if not unknown else _UNKNOWN
                unknown |= truth is None
            return _UNKNOWN if unknown else (Known(isinstance(e.op, ast.And)),)
        left, *rest = [self.value(operand, frame) for operand in (e.left, *e.comparators)]
        if len(rest) == 1 and len(left) == len(rest[0]) == 1:
            one, other, negated = left[0], rest[0][0], isinstance(e.ops[0], (ast.IsNot, ast.NotEq))
            if isinstance(e.ops[0], (ast.Is, ast.IsNot)) and other == Known(None) and one is not OTHER:
                return (Known((one == Known(None)) is not negated),)
            known = all(isinstance(value, Known) and type(value.value) in _PLAIN for value in (one, other))
            if known and isinstance(e.ops[0], (ast.Eq, ast.NotEq)):
                return (Known((one.value == other.value) is not negated),)
        return _UNKNOWN

    def calls(self, e: ast.Call, frame: "Frame") -> Values:
        name = e.func.id if isinstance(e.func, ast.Name) else ""
        helper = name.removeprefix("tritonbn_") if name.startswith("tritonbn_") else ""
        follows = (
            isinstance(e.func, ast.Call) and isinstance(e.func.func, ast.Name) and e.func.func.id == "tritonbn_follow"
        )
        written = e.args[0] if helper else e.func.args[0] if follows and isinstance(e.func, ast.Call) else e.func
        why, place = f"its output goes to {frame.opened.source.text(written)}", f" ({frame.opened.source.place(e)})"
        if helper == "add":
            how = e.args[0].value if isinstance(e.args[0], ast.Constant) else ""
            return self.added(self.value(e.args[1], frame), self.value(e.args[2], frame), how in ("+=", "add_"))
        functions = _UNKNOWN if helper == "finish" or follows else self.value(written, frame)
        if helper == "finish":
            return self.finished(self.value(e.args[0], frame), vars(e).get("why", ""))
        if helper == "plain":
            return functions
        if helper == "settled":
            value = self.value(e.args[1], frame)
            return value if _items(functions) is not None else self.finished(value, why + place)
        if helper in ("call", "beside"):
            may_tell = f"{frame.opened.source.text(written)} may tell whether it ran{place}"
            waits = helper == "beside" and self.waiting(e.args[2:], functions, frame, may_tell)
            value = self.call(functions, self.value(e.args[1], frame), why + place)
            return self.finished(value, f"another batch norm waits for its output{place}") if waits else value
        args = [self.value(argument, frame) for argument in e.args[1 if helper else 0 :]]
        kwargs = {keyword.arg: self.value(keyword.value, frame) for keyword in e.keywords}
        if helper == "apply":
            plain = [_plain(value) for value in args[1:]], {str(k): _plain(v) for k, v in kwargs.items()}
            return _union(*[self.applied(function, args[0], *plain, why + place) for function in functions])
        if follows:
            functions = self.value(written, frame)
            named = {str(k): v for k, v in kwargs.items()}
            return _union(*[self.followed(f, args, named, why, place) for f in functions])
        looks = all(isinstance(f, Known) and any(f.value is one for one in _LOOKS) for f in functions)
        for values in (*args, *kwargs.values()):
            self.finished(tuple(v for v in values if not (looks and isinstance(v, Known))), why + place)
        return _union(*[self.plainly(function, args, place) for function in functions])

    def waiting(self, names: list[ast.expr], functions: Values, frame: "Frame", why: str) -> bool:
        """Whether something is late while a function is called: it stays so if `step.is_quiet`."""
        waits = False
        for name in names:
            assert isinstance(name, ast.Name)
            values = list(frame.name(name.id))
            for i, value in enumerate(values):
                if isinstance(value, Waiting) and not all(self.is_quiet(f, value.norm) for f in functions):
                    values[i] = self.finished((value,), why)[0]
            frame.variables[name.id] = tuple(values)
            waits |= any(isinstance(value, Waiting) for value in values)
        return waits

    def is_quiet(self, function: Any, norm: nn.Module) -> bool:
        module = function.value if isinstance(function, Known) else None
        if isinstance(module, nn.Module):
            for inner in module.modules():
                opened_forward(original(unsharded(type(inner))))  # says what it does
        return step.is_quiet(module, norm)

    def followed(self, function: Any, args: list[Values], kwargs: dict[str, Values], why: str, place: str) -> Values:
        """`step.follow(function)(*args, **kwargs)`."""
        f = function.value if isinstance(function, Known) else None
        if isinstance(f, (FunctionType, MethodType)) and not _is_torchs(f):
            return self.function(f, args, kwargs, why + place)
        for values in (*args, *kwargs.values()):
            self.finished(values, why + place)
        return self.plainly(function, args, place)

    def plainly(self, function: Any, args: list[Values], place: str) -> Values:
        """A call as it was written."""
        f = function.value if isinstance(function, Known) else None
        known = [value[0].value for value in args if len(value) == 1 and isinstance(value[0], Known)]
        if isinstance(f, _BatchNorm) and is_norm(f):
            self.note(Waiting(f, 0), None, f"it is called in a way that is not followed{place}")
        elif f is getattr and len(known) == len(args) >= 2 and isinstance(known[1], str):
            return self.attribute(Known(known[0]), known[1])
        elif any(f is one for one in _EVALUATED) and len(known) == len(args):
            items = [_items((Known(value),)) if not isinstance(value, _PLAIN) else value for value in known]
            try:
                return (Known(list(f(*items)) if f in (zip, enumerate, range, reversed) else f(*items)),)
            except (TypeError, ValueError):
                return _UNKNOWN
        elif isinstance(f, MethodType) and isinstance(f.__self__, _LISTS) and not args:
            modules = f.__self__._modules
            lists = {"values": modules.values(), "items": modules.items(), "keys": modules.keys()}
            lists |= {"children": modules.values(), "named_children": modules.items()}
            return (Known(list(lists[f.__name__])),) if f.__name__ in lists else _UNKNOWN
        return _UNKNOWN


@dataclass
class Frame:
    """The variables of a function that is followed."""

    opened: Opened
    variables: dict[str, Values]
    returned: list[Values] = field(default_factory=list)
    ended: bool = False

    def name(self, name: str) -> Values:
        if name in self.variables:
            return self.variables[name]
        code = self.opened.source.function.__code__
        if name in code.co_varnames or name in code.co_cellvars:
            return _UNKNOWN
        try:
            return (Known(self.opened.source.value(name)),)
        except KeyError:
            return _UNKNOWN

    def bind(self, target: ast.expr, value: Values) -> None:
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            items = _items(value)
            fits = items is not None and len(items) == len(target.elts)
            for i, part in enumerate(target.elts):
                self.bind(part, (Known(items[i]),) if fits and items else _UNKNOWN)

    def copy(self) -> "Frame":
        return Frame(self.opened, dict(self.variables), self.returned)

    def join(self, *others: "Frame") -> None:
        """What holds after one of these."""
        going = [other.variables for other in others if not other.ended]
        self.ended = not going
        names = dict.fromkeys(name for variables in going for name in variables)
        self.variables = {name: _union(*[v.get(name, self.name(name)) for v in going]) for name in names}


def _union(*values: Values) -> Values:
    found: list[Any] = []
    for value in values:
        for one in value:
            if not any(
                one is other or (type(one) is type(other) is not object and _equal(one, other)) for other in found
            ):
                found.append(one)
    return tuple(found[:16]) or _UNKNOWN


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Known):
        return one.value is other.value or (
            type(one.value) in _PLAIN and type(other.value) is type(one.value) and one.value == other.value
        )
    return bool(one == other)


def _truth(values: Values) -> bool | None:
    """Whether it is true in a test; None if that is not known."""
    found = {_one_truth(value) for value in values}
    return found.pop() if len(found) == 1 else None


def _one_truth(value: Any) -> bool | None:
    if not isinstance(value, Known):
        return None
    if isinstance(value.value, _LISTS):
        return len(value.value._modules) > 0
    if isinstance(value.value, nn.Module):
        return None if hasattr(type(value.value), "__len__") or hasattr(type(value.value), "__bool__") else True
    if type(value.value) in (*_PLAIN, list, tuple, dict, set):
        return bool(value.value)
    return True if isinstance(value.value, (FunctionType, BuiltinFunctionType, MethodType, type)) else None


def _plain(values: Values) -> Any:
    return values[0].value if len(values) == 1 and isinstance(values[0], Known) else OTHER


def _attribute(owner: Any, name: str) -> Values:
    """owner.name, without running anything of the owner's."""
    if not isinstance(owner, Known):
        return _UNKNOWN
    value = owner.value
    if isinstance(value, ModuleType):
        return (Known(getattr(value, name)),) if hasattr(value, name) else _UNKNOWN
    held = getattr(value, "__dict__", None)
    if isinstance(value, nn.Module):
        for place in (value._modules, value._parameters, value._buffers):
            if name in place:
                return (Known(place[name]),)
    if isinstance(held, dict) and name in held and not isinstance(value, type):
        return (Known(held[name]),)
    kind = original(type(value)) if isinstance(value, nn.Module) else type(value)
    found = inspect.getattr_static(kind, name, OTHER)
    if isinstance(found, FunctionType):
        return (Known(MethodType(found, value)),)
    if isinstance(found, staticmethod):
        return (Known(found.__func__),)
    return _UNKNOWN if found is OTHER or hasattr(type(found), "__get__") else (Known(found),)


def _item(owner: Any, key: Any) -> Values:
    items = _items((owner,)) if isinstance(key, Known) and type(key.value) is int else None
    if items is not None and -len(items) <= key.value < len(items):
        return (Known(items[key.value]),)
    if isinstance(owner, Known) and isinstance(key, Known) and type(key.value) is str:
        held = owner.value._modules if isinstance(owner.value, nn.ModuleDict) else owner.value
        if isinstance(held, dict) and key.value in held:
            return (Known(held[key.value]),)
    return _UNKNOWN


def _items(values: Values) -> list[Any] | None:
    """What an object that is iterated over yields, if that is known."""
    if len(values) != 1 or not isinstance(values[0], Known):
        return None
    value = values[0].value
    if isinstance(value, (nn.ModuleList, nn.Sequential)):
        return children(value)
    if isinstance(value, nn.ModuleDict):
        return list(value._modules)
    return list(value) if type(value) in (list, tuple, range) else None


def _is_tensor(value: Any) -> bool:
    return value is OTHER or (isinstance(value, Known) and isinstance(value.value, Tensor))


def _is_torchs(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__module__", None)).startswith("torch.")


def fuse(model: nn.Module) -> None:
    """Give the containers of a model that have something to fuse a forward that does so, and take it from all others."""
    for module in model.modules():
        uninstall(module)
    for module in callers(model.modules()):
        for use in uses_of(module).found:
            for container in use.containers:
                install(container)
            for function, bound in use.functions:
                if isinstance(opened := opened_or_why(function, bound), Opened):
                    step.FUNCTIONS[function] = opened.function


def callers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that have a forward of their own, not compiled by torch.jit, and batch norms below."""
    return [
        module
        for module in modules
        if not isinstance(module, (ScriptModule, _BatchNorm))
        and type(module).forward is not nn.Module.forward  # ModuleList, ModuleDict: never called
        and any(isinstance(child, _BatchNorm) for child in module.modules())
    ]
