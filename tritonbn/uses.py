"""Where a container calls batch norms and what follows each, read off its forward written anew: nothing of it runs.

A value is a tuple of alternatives, where a branch depends on what is not known: each a `Known` object of the model, a
`Waiting` batch norm, or OTHER.
"""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import step
from tritonbn.activations import IDENTITY, Activation, of_call, of_method, of_module
from tritonbn.fused_forward import install, opened_forward, opened_or_why, uninstall
from tritonbn.rewrite import Opened
from tritonbn.types import children, class_of, is_norm, is_sequential

RETURNED = "its output is returned"
OTHER = object()
Values = tuple[Any, ...]
_UNKNOWN: Values = (OTHER,)
_PLAIN = (type(None), bool, int, float, str)
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_EVALUATED: tuple[Any, ...] = (zip, enumerate, range, len, reversed, list, tuple)
_LOOKS = (*_EVALUATED, isinstance, hasattr, getattr, callable, type, id)  # neither call nor keep what they are given
_DEPTH = 30  # of forwards and functions that are followed into each other


@dataclass(frozen=True)
class Use:
    """One call of a batch norm: what it becomes one operation with, or why with nothing."""

    norm: _BatchNorm
    steps: str  # "relu", "add", "add + relu"; "" for none
    why: str = ""  # for none
    dropped: bool = False  # not at present: there is a dropout in between, which is active
    others: tuple[nn.Module, ...] = ()  # whose hooks would suspend it
    containers: tuple[nn.Module, ...] = ()  # whose forwards have to be written anew for it
    functions: tuple[tuple[FunctionType, bool], ...] = ()  # likewise, with whether they are methods


@dataclass(frozen=True)
class Known:
    """An object that is there now."""

    value: Any


@dataclass(frozen=True)
class Waiting:
    """The output of a batch norm that nobody has used yet."""

    norm: Any
    depth: int  # of forwards, where it was called or was returned to
    added: bool = False
    dropped: bool = False  # by a dropout that is active at present
    others: tuple[nn.Module, ...] = ()  # that it passed on its way
    containers: tuple[nn.Module, ...] = ()  # that returned it
    adders: tuple[nn.Module, ...] = ()  # and before something was added
    functions: tuple[tuple[FunctionType, bool], ...] = ()  # that returned it


def uses_of(module: nn.Module) -> tuple[list[Use], str]:
    """The uses of batch norms by a container that is called as usual, and why its forward cannot be written anew."""
    walk = Walk()
    if "forward" in vars(module):
        return [], "was replaced on this instance"
    if not is_sequential(module) and isinstance(why := opened_forward(class_of(module)), str):
        return [], why
    walk.finished(walk.module(module, _UNKNOWN), RETURNED)
    return walk.uses, ""


def fuse(model: nn.Module) -> None:
    """Give the containers of a model that have something to fuse a forward that does so, and all others their own."""
    for module in model.modules():
        uninstall(module)
    for use in (use for module in callers(model) for use in uses_of(module)[0]):
        for container in use.containers:
            install(container)
        for function, bound in use.functions:
            if isinstance(opened := opened_or_why(function, bound), Opened):
                step.FUNCTIONS[function] = opened.function


def callers(model: nn.Module) -> list[nn.Module]:
    """The modules that have a forward of their own, not compiled by torch.jit, and batch norms below."""
    return [
        module
        for module in model.modules()
        if not isinstance(module, (ScriptModule, _BatchNorm))
        and type(module).forward is not nn.Module.forward  # ModuleList, ModuleDict: never called
        and any(isinstance(child, _BatchNorm) for child in module.modules())
    ]


class Walk:
    """The forward of one container, and all that it calls: what step.py does with what is late, and Python's rest."""

    limit = 20_000  # of steps

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.steps = 0
        self.modules: list[nn.Module] = []  # whose forwards we are in
        self.functions: list[tuple[FunctionType, bool]] = []

    def note(self, waiting: Waiting, activation: Activation, why: str, *others: nn.Module) -> None:
        """A batch norm is computed, with an activation or without."""
        # After an addition, the activation runs by itself where a backward would need the residual.
        act = [str(activation)] * (activation != IDENTITY and not (waiting.added and activation.keeps_residual))
        use = Use(waiting.norm, "", why)
        if steps := " + ".join(["add"] * waiting.added + act):
            entered = self.modules[waiting.depth :]
            containers = (*waiting.containers, *self.modules[waiting.depth - 1 :]) if act else waiting.adders
            functions = (*waiting.functions, *self.functions)
            watched = (*waiting.others, *entered, *others)
            use = Use(waiting.norm, steps, "", waiting.dropped, watched, containers, functions)
        if use not in self.uses:
            self.uses.append(use)

    def finished(self, values: Values, why: str) -> Values:
        """`step.finish`."""
        for value in values:
            if isinstance(value, Waiting):
                self.note(value, IDENTITY, why)
        return tuple(OTHER if isinstance(value, Waiting) else value for value in values)

    def called(self, function: Any, values: Values, why: str) -> Values:
        """`step.call`."""
        f = function.value if isinstance(function, Known) else None
        if isinstance(f, nn.Module):
            if (activation := of_module(f)) is not None:
                return self.activated(values, activation, f)
            if type(f) in step.DROPOUT_MODULES:
                return self.dropped(values, step.is_idle(f))
            if is_sequential(f) or self.is_followed(f):
                return self.module(f, values)
            self.finished(values, why)
            return (Waiting(f, len(self.modules)),) if isinstance(f, _BatchNorm) and is_norm(f) else _UNKNOWN
        if _is_users(f):
            return self.function(f, [values], {}, why)
        return self.applied(f, values, [], {}, why)

    def applied(self, f: Any, values: Values, args: list[Any], kwargs: dict[str, Any], why: str) -> Values:
        """`step.apply`."""
        if type(f) is partial and not f.args:
            f, kwargs = f.func, f.keywords | kwargs
        activation = of_method(f) if isinstance(f, str) else of_call(f, tuple(args), kwargs) if callable(f) else None
        if activation is not None:
            return self.activated(values, activation)
        if any(f is one for one in step.DROPOUTS):
            return self.dropped(values, step.is_idle_call(*args, **kwargs) is True)
        self.finished(values, why)
        return _UNKNOWN

    def dropped(self, values: Values, idle: bool) -> Values:
        return tuple(replace(v, dropped=v.dropped or not idle) if isinstance(v, Waiting) else v for v in values)

    def activated(self, values: Values, activation: Activation, *module: nn.Module) -> Values:
        waiting = [value for value in values if isinstance(value, Waiting)]
        if activation == IDENTITY:
            return tuple(replace(v, others=(*v.others, *module)) if v in waiting else v for v in values)
        for value in waiting:
            self.note(value, activation, f"its output goes to {activation}", *module)
        return _UNKNOWN

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
                given = [module for other in owned * in_place if other is not value for module in other.containers]
                containers = (*value.containers, *given)
                adders = (*containers, *self.modules[value.depth - 1 :])
                found.append(replace(value, added=True, containers=containers, adders=adders))
            else:
                found += self.finished((value,), "its output is added to what is no tensor") and [OTHER]
        return tuple(found)

    def waiting(self, names: list[ast.expr], functions: Values, frame: "Frame", why: str) -> bool:
        """Whether something is late while a function is called: it stays so if `step.is_quiet`."""
        waits = False
        for name in (name.id for name in names if isinstance(name, ast.Name)):
            for function in functions:
                module = function.value if isinstance(function, Known) else None
                for inner in module.modules() if isinstance(module, nn.Module) else ():
                    opened_forward(class_of(inner))  # says what it does
                told = [v for v in frame.name(name) if isinstance(v, Waiting) and not step.is_quiet(module, v.norm)]
                self.finished(tuple(told), why)
                frame.variables[name] = tuple(OTHER if value in told else value for value in frame.name(name))
            waits |= any(isinstance(value, Waiting) for value in frame.name(name))
        return waits

    def is_followed(self, module: nn.Module) -> bool:
        kind = class_of(module)
        own = not kind.__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
        return own and not isinstance(module, _BatchNorm) and isinstance(opened_forward(kind), Opened)

    def module(self, module: nn.Module, x: Values) -> Values:
        """The forward of a container."""
        if module in self.modules or len(self.modules) > _DEPTH:
            self.finished(x, f"its output goes to a {type(module).__name__}")
            return _UNKNOWN
        self.modules.append(module)
        if is_sequential(module):
            for name, child in module._modules.items():
                x = self.called(Known(child), x, f"its output goes to '{name}' ({type(child).__name__})")
        elif isinstance(opened := opened_forward(class_of(module)), Opened):
            x = self.body(opened, [(Known(module),), x], {})
        depth = len(self.modules) - 1
        self.modules.pop()
        return tuple(
            replace(v, depth=min(v.depth, depth), others=(*v.others, module), containers=(*v.containers, module))
            if isinstance(v, Waiting)
            else v
            for v in x
        )

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
        values = self.body(opened, [*([(Known(function.__self__),)] if bound else []), *args], kwargs)
        self.functions.pop()
        return tuple(replace(v, functions=(*v.functions, key)) if isinstance(v, Waiting) else v for v in values)

    def default(self, value: Any) -> Values:
        """An argument that is not given."""
        return (Known(value),)

    def body(self, opened: Opened, args: list[Values], kwargs: dict[str, Values]) -> Values:
        """What the function returns."""
        function = opened.source.function
        variables = dict.fromkeys(opened.source.arguments, _UNKNOWN)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                variables[name] = self.default(parameter.default)
        variables |= dict(zip(function.__code__.co_varnames[: function.__code__.co_argcount], args, strict=False))
        frame = Frame(opened, variables | kwargs)
        self.block(opened.body, frame)
        return _union(*frame.returned)

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
            test = _truth(self.value(s.test, frame))
            self.either(
                frame,
                *[branch for branch, taken in ((s.body, test is not False), (s.orelse, test is not True)) if taken],
            )
        elif isinstance(s, ast.For):
            items = _items(self.value(s.iter, frame))
            for item in [_UNKNOWN] if items is None else [(Known(item),) for item in items]:
                frame.bind(s.target, item)
                self.either(frame, s.body, *([[]] if items is None else []))
            self.block(s.orelse, frame)
        elif isinstance(s, (ast.While, ast.Try, ast.With)):
            for part in ast.iter_child_nodes(s):
                if isinstance(part, (ast.expr, ast.withitem)):
                    self.parts(part, frame)
            self.either(frame, s.body, *([] if isinstance(s, ast.With) else [[]]))
            for block in (
                *[h.body for h in getattr(s, "handlers", [])],
                getattr(s, "orelse", []),
                getattr(s, "finalbody", []),
            ):
                self.either(frame, block, [])
        elif isinstance(s, ast.Expr):
            self.value(s.value, frame)
        elif not isinstance(s, (ast.Break, ast.Continue)):
            self.parts(s, frame)
            frame.ended = isinstance(s, ast.Raise)

    def either(self, frame: "Frame", *blocks: list[ast.stmt]) -> None:
        """One of these blocks runs."""
        if len(blocks) == 1:
            return self.block(blocks[0], frame)
        frames = [Frame(frame.opened, dict(frame.variables), frame.returned) for _ in blocks]
        for block, each in zip(blocks, frames, strict=True):
            self.block(block, each)
        going = [each.variables for each in frames if not each.ended]
        frame.ended = not going
        names = dict.fromkeys(name for variables in going for name in variables)
        frame.variables = {name: _union(*[v.get(name, _UNKNOWN) for v in going]) for name in names}
        return None

    def parts(self, node: ast.AST, frame: "Frame") -> Values:
        """What is not followed but for the calls in it."""
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            frame = Frame(frame.opened, dict(frame.variables))
            for generator in node.generators:
                items = _items(self.value(generator.iter, frame))
                frame.bind(generator.target, tuple(Known(item) for item in items[:64]) if items else _UNKNOWN)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.finished(self.value(child, frame), "its output is used in a way that is not followed")
            elif not isinstance(child, (ast.stmt, ast.expr_context, ast.comprehension)):
                self.parts(child, frame)
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
            truth = self.test(e, frame)
            return _UNKNOWN if truth is None else (Known(truth),)
        if isinstance(e, (ast.Tuple, ast.List)):
            values = [self.value(item, frame) for item in e.elts]
            known = [value[0].value for value in values if len(value) == 1 and isinstance(value[0], Known)]
            return (Known(known),) if len(known) == len(values) else _UNKNOWN
        if not isinstance(e, ast.Call):
            return self.parts(e, frame)
        if isinstance(e.func, ast.IfExp) and "tritonbn_is_compiling" in ast.dump(e.func.test):
            e = ast.copy_location(ast.Call(e.func.orelse, e.args, e.keywords), e)
        return self.calls(e, frame)

    def test(self, e: Any, frame: "Frame") -> bool | None:
        """Whether a test is true, if that is known."""
        if isinstance(e, ast.UnaryOp):
            truth = _truth(self.value(e.operand, frame))
            return None if truth is None or not isinstance(e.op, ast.Not) else not truth
        if isinstance(e, ast.BoolOp):
            truths = [_truth(self.value(operand, frame)) for operand in e.values]
            decided = isinstance(e.op, ast.Or)
            return decided if decided in truths else None if None in truths else not decided
        left, *rest = [self.value(operand, frame) for operand in (e.left, *e.comparators)]
        if len(rest) != 1 or len(left) != 1 or len(rest[0]) != 1:
            return None
        one, other, negated = left[0], rest[0][0], isinstance(e.ops[0], (ast.IsNot, ast.NotEq))
        if isinstance(e.ops[0], (ast.Is, ast.IsNot)) and other == Known(None) and one is not OTHER:
            return _is_none(one) is not negated
        plain = all(isinstance(value, Known) and type(value.value) in _PLAIN for value in (one, other))
        return (
            (one.value == other.value) is not negated if plain and isinstance(e.ops[0], (ast.Eq, ast.NotEq)) else None
        )

    def calls(self, e: ast.Call, frame: "Frame") -> Values:
        source = frame.opened.source
        helper = (
            e.func.id.removeprefix("tritonbn_")
            if isinstance(e.func, ast.Name) and e.func.id.startswith("tritonbn_")
            else ""
        )
        if helper == "finish":
            return self.finished(self.value(e.args[0], frame), vars(e)["why"])
        if helper == "add":
            how = e.args[0].value if isinstance(e.args[0], ast.Constant) else ""
            return self.added(self.value(e.args[1], frame), self.value(e.args[2], frame), how in ("+=", "add_"))
        follows = (
            isinstance(e.func, ast.Call) and isinstance(e.func.func, ast.Name) and e.func.func.id == "tritonbn_follow"
        )
        written = e.args[0] if helper else e.func.args[0] if follows and isinstance(e.func, ast.Call) else e.func
        functions, place = self.value(written, frame), f" ({source.place(e)})"
        why = f"its output goes to {source.text(written)}{place}"
        if helper == "plain":
            return functions
        if helper == "settled":
            value = self.value(e.args[1], frame)
            return value if _items(functions) is not None else self.finished(value, why)
        if helper in ("call", "beside"):
            may_tell = f"{source.text(written)} may tell whether it ran{place}"
            waits = self.waiting(e.args[2:], functions, frame, may_tell)
            values = self.value(e.args[1], frame)
            value = _union(*[self.called(function, values, why) for function in functions])
            return self.finished(value, f"another batch norm waits for its output{place}") if waits else value
        args = [self.value(argument, frame) for argument in e.args[1 if helper else 0 :]]
        kwargs = {str(keyword.arg): self.value(keyword.value, frame) for keyword in e.keywords}
        if helper == "apply":
            plain = [_plain(value) for value in args[1:]], {k: _plain(v) for k, v in kwargs.items()}
            return _union(*[self.applied(_plain((function,)), args[0], *plain, why) for function in functions])
        if follows and all(isinstance(f, Known) and _is_users(f.value) for f in functions):
            return _union(*[self.function(f.value, args, kwargs, why) for f in functions])
        looks = all(isinstance(f, Known) and any(f.value is one for one in _LOOKS) for f in functions)
        for values in (*args, *kwargs.values()):
            self.finished(tuple(v for v in values if not (looks and isinstance(v, Known))), why)
        return _union(*[self.plainly(f.value if isinstance(f, Known) else None, args, place) for f in functions])

    def plainly(self, f: Any, args: list[Values], place: str) -> Values:
        """A call as it was written."""
        known = [value[0].value for value in args if len(value) == 1 and isinstance(value[0], Known)]
        if isinstance(f, _BatchNorm) and is_norm(f):
            self.note(Waiting(f, 0), IDENTITY, f"it is called in a way that is not followed{place}")
        elif f is getattr and len(known) == len(args) >= 2 and isinstance(known[1], str):
            return self.attribute(Known(known[0]), known[1])
        elif any(f is one for one in _EVALUATED) and len(known) == len(args):
            items = [value if isinstance(value, _PLAIN) else _items((Known(value),)) for value in known]
            try:
                made = f(*items)
            except (TypeError, ValueError):
                return _UNKNOWN
            return (Known(made if isinstance(made, int) else list(made)),)
        elif isinstance(f, MethodType) and isinstance(f.__self__, _LISTS) and not args:
            held = f.__self__._modules
            lists: dict[str, Any] = {"keys": held.keys(), "values": held.values(), "items": held.items()}
            lists |= {"children": held.values(), "named_children": held.items()}
            return (Known(list(lists[f.__name__])),) if f.__name__ in lists else _UNKNOWN
        return _UNKNOWN

    def attribute(self, owner: Any, name: str) -> Values:
        """owner.name, without running anything of the owner's."""
        value = owner.value if isinstance(owner, Known) else None
        if isinstance(value, ModuleType):
            return (Known(getattr(value, name)),) if hasattr(value, name) else _UNKNOWN
        held = {} if isinstance(value, type) else getattr(value, "__dict__", {})
        for place in (
            [value._modules, value._parameters, value._buffers, held] if isinstance(value, nn.Module) else [held]
        ):
            if name in place:
                return (Known(place[name]),)
        found = inspect.getattr_static(class_of(value) if isinstance(value, nn.Module) else type(value), name, OTHER)
        if isinstance(found, FunctionType):
            return (Known(MethodType(found, value)),)
        if isinstance(found, staticmethod):
            return (Known(found.__func__),)
        return _UNKNOWN if value is None or found is OTHER or hasattr(type(found), "__get__") else (Known(found),)


@dataclass
class Frame:
    """The variables of a function that is followed."""

    opened: Opened
    variables: dict[str, Values]
    returned: list[Values] = field(default_factory=list)
    ended: bool = False

    def name(self, name: str) -> Values:
        code = self.opened.source.function.__code__
        if name in self.variables or name in code.co_varnames or name in code.co_cellvars:
            return self.variables.get(name, _UNKNOWN)
        found = self.opened.source.value(name, OTHER)
        return _UNKNOWN if found is OTHER else (Known(found),)

    def bind(self, target: ast.expr, value: Values) -> None:
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            items = _items(value) or []
            for i, part in enumerate(target.elts):
                self.bind(part, (Known(items[i]),) if len(items) == len(target.elts) else _UNKNOWN)


def _union(*values: Values) -> Values:
    found: list[Any] = []
    for one in (one for value in values for one in value):
        if not any(_is_same(one, other) for other in found):
            found.append(one)
    return tuple(found[:16]) or _UNKNOWN


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Known) and isinstance(other, Known):
        plain = type(one.value) is type(other.value) and type(one.value) in _PLAIN
        return one.value is other.value or (plain and bool(one.value == other.value))
    return one is other or (isinstance(one, Waiting) and one == other)


def _is_users(function: Any) -> bool:
    """Whether it is a function or method that is not torch's."""
    return isinstance(function, (FunctionType, MethodType)) and not str(function.__module__).startswith("torch.")


def _is_none(value: Any) -> bool:
    return isinstance(value, Known) and value.value is None


def _is_tensor(value: Any) -> bool:
    return value is OTHER or (isinstance(value, Known) and isinstance(value.value, Tensor))


def _truth(values: Values) -> bool | None:
    """Whether it is true in a test; None if that is not known."""
    found: set[bool | None] = set()
    for value in (value.value if isinstance(value, Known) else value for value in values):
        if isinstance(value, _LISTS):
            found.add(len(value._modules) > 0)
        elif (
            isinstance(value, nn.Module)
            and not hasattr(type(value), "__len__")
            and not hasattr(type(value), "__bool__")
        ):
            found.add(True)
        else:
            found.add(bool(value) if type(value) in (*_PLAIN, list, tuple, dict, FunctionType, MethodType) else None)
    return found.pop() if len(found) == 1 else None


def _plain(values: Values) -> Any:
    return values[0].value if len(values) == 1 and isinstance(values[0], Known) else OTHER


def _item(owner: Any, key: Any) -> Values:
    at: Any = key.value if isinstance(key, Known) else None
    items = _items((owner,)) if type(at) is int else None
    if items is not None and -len(items) <= at < len(items):
        return (Known(items[at]),)
    held = owner.value if isinstance(owner, Known) else None
    held = held._modules if isinstance(held, nn.ModuleDict) else held
    return (Known(held[at]),) if type(at) is str and isinstance(held, dict) and at in held else _UNKNOWN


def _items(values: Values) -> list[Any] | None:
    """What an object that is iterated over yields, if that is known."""
    value = _plain(values)
    if isinstance(value, (nn.ModuleList, nn.Sequential)):
        return children(value)
    if isinstance(value, nn.ModuleDict):
        return list(value._modules)
    return list(value) if type(value) in (list, tuple, range) else None
