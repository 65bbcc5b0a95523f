"""Where a container calls batch norms and what follows each, read off its forward written anew: nothing of it runs."""

import ast
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from tritonbn import step
from tritonbn.activations import IDENTITY, Activation, of_call, of_method, of_module
from tritonbn.fused_forward import install, opened_forward, opened_or_why, uninstall
from tritonbn.interpreter import LOOKS, OTHER, UNKNOWN, Frame, Interpreter, Known, Values, items_of, plain_value, union
from tritonbn.rewrite import Opened
from tritonbn.types import class_of, is_norm, is_sequential

RETURNED = "its output is returned"
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
    other: _BatchNorm | None = None  # the batch norm that it is added to in the same pass


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
    other: Any = None  # another batch norm that was added


def uses_of(module: nn.Module) -> tuple[list[Use], str]:
    """The uses of batch norms by a container that is called as usual, and why its forward cannot be written anew."""
    walk = Walk()
    if "forward" in vars(module):
        return [], "was replaced on this instance"
    if not is_sequential(module) and isinstance(why := opened_forward(class_of(module)), str):
        return [], why
    walk.finished(walk.module(module, UNKNOWN), RETURNED)
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
                (step.METHODS if bound else step.FUNCTIONS)[function] = step.guarded(opened.function)


def callers(model: nn.Module) -> list[nn.Module]:
    """The modules that have a forward of their own, not compiled by torch.jit, and batch norms below."""
    return [
        module
        for module in model.modules()
        if not isinstance(module, (ScriptModule, _BatchNorm))
        and type(module).forward is not nn.Module.forward  # ModuleList, ModuleDict: never called
        and any(isinstance(child, _BatchNorm) for child in module.modules())
    ]


class Walk(Interpreter):
    """The forward of one container, and all that it calls: what step.py does with what is late."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.modules: list[nn.Module] = []  # whose forwards we are in
        self.functions: list[tuple[FunctionType, bool]] = []

    def note(self, waiting: Waiting, activation: Activation, why: str, *others: nn.Module) -> None:
        """A batch norm is computed, with an activation or without."""
        # After an addition, the activation runs by itself where a backward would need the residual.
        has_residual = waiting.added and waiting.other is None
        act = [str(activation)] * (activation != IDENTITY and not (has_residual and activation.keeps_residual))
        use = Use(waiting.norm, "", why)
        if steps := " + ".join(["add"] * waiting.added + act):
            entered = self.modules[waiting.depth :]
            containers = (*waiting.containers, *self.modules[waiting.depth - 1 :]) if act else waiting.adders
            functions = (*waiting.functions, *self.functions)
            watched = (*waiting.others, *entered, *others)
            use = Use(waiting.norm, steps, "", waiting.dropped, watched, containers, functions, waiting.other)
        both = [use]
        if use.other is not None:
            both = [replace(use, others=(use.other, *use.others))]
            both.append(replace(use, norm=use.other, others=(use.norm, *use.others), other=use.norm))
        self.uses += [use for use in both if use not in self.uses]

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
            return (Waiting(f, len(self.modules)),) if isinstance(f, _BatchNorm) and is_norm(f) else UNKNOWN
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
        return UNKNOWN

    def dropped(self, values: Values, idle: bool) -> Values:
        return tuple(replace(v, dropped=v.dropped or not idle) if isinstance(v, Waiting) else v for v in values)

    def activated(self, values: Values, activation: Activation, *module: nn.Module) -> Values:
        waiting = [value for value in values if isinstance(value, Waiting)]
        if activation == IDENTITY:
            return tuple(replace(v, others=(*v.others, *module)) if v in waiting else v for v in values)
        for value in waiting:
            self.note(value, activation, f"its output goes to {activation}", *module)
        return UNKNOWN

    def added(self, left: Values, right: Values, in_place: bool, owned: list[Waiting]) -> Values:
        """`step.add`; owned: what the left one was, if it came late."""
        if any(isinstance(value, Waiting) for value in right):
            if in_place and not owned:
                return self.finished(right, "an add in place changes the other operand")
            if len(left) == len(right) == 1 and isinstance(left[0], Waiting) and _add_up(left[0], right[0]):
                return (self.both(left[0], right[0]),)
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

    def both(self, left: Waiting, right: Waiting) -> Waiting:
        """The sum of two batch norms."""
        depth = min(left.depth, right.depth)
        containers = (*left.containers, *right.containers)
        return Waiting(
            left.norm, depth, True, left.dropped or right.dropped, (*left.others, *right.others), containers,
            (*containers, *self.modules[depth - 1 :]), (*left.functions, *right.functions), right.norm,
        )  # fmt: skip

    def waiting(self, names: list[ast.expr], functions: Values, frame: Frame, why: str) -> bool:
        """Whether something is late while a function is called: it stays so if `step.is_quiet`."""
        waits = False
        for name in (name.id for name in names if isinstance(name, ast.Name)):
            for function in functions:
                module = function.value if isinstance(function, Known) else None
                for inner in module.modules() if isinstance(module, nn.Module) else ():
                    opened_forward(class_of(inner))  # says what it does
                told = [
                    v
                    for v in frame.name(name)
                    if isinstance(v, Waiting)
                    and not all(step.is_quiet(module, norm) for norm in (v.norm, v.other) if norm is not None)
                ]
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
            return UNKNOWN
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
            return UNKNOWN
        self.functions.append(key)
        values = self.body(opened, [*([(Known(function.__self__),)] if bound else []), *args], kwargs)
        self.functions.pop()
        return tuple(replace(v, functions=(*v.functions, key)) if isinstance(v, Waiting) else v for v in values)

    def plainly(self, f: Any, args: list[Values], place: str) -> Values:
        if isinstance(f, _BatchNorm) and is_norm(f):
            self.note(Waiting(f, 0), IDENTITY, f"it is called in a way that is not followed{place}")
        return super().plainly(f, args, place)

    def calls(self, e: ast.Call, frame: Frame) -> Values:
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
            came, right = self.value(e.args[1], frame), self.value(e.args[2], frame)
            first = e.args[1].target if isinstance(e.args[1], ast.NamedExpr) else e.args[1]
            # It may have been computed while the right one was evaluated.
            left = frame.name(first.id) if isinstance(first, ast.Name) else came
            owned = [value for value in came if isinstance(value, Waiting)]
            return self.added(left, right, how in ("+=", "add_"), owned)
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
            return value if items_of(functions) is not None else self.finished(value, why)
        if helper in ("call", "beside"):
            may_tell = f"{source.text(written)} may tell whether it ran{place}"
            waits = self.waiting(e.args[2:], functions, frame, may_tell)
            values = self.value(e.args[1], frame)
            value = union(*[self.called(function, values, why) for function in functions])
            if waits:  # it may be added to what waits
                added = tuple(v for v in value if isinstance(v, Waiting) and v.added)
                self.finished(added, f"another batch norm waits for its output{place}")
                value = tuple(OTHER if v in added else v for v in value)
            return value
        args = [self.value(argument, frame) for argument in e.args[1 if helper else 0 :]]
        kwargs = {str(keyword.arg): self.value(keyword.value, frame) for keyword in e.keywords}
        if helper == "apply":
            plain = [plain_value(value) for value in args[1:]], {k: plain_value(v) for k, v in kwargs.items()}
            return union(*[self.applied(plain_value((function,)), args[0], *plain, why) for function in functions])
        if follows and all(isinstance(f, Known) and _is_users(f.value) for f in functions):
            return union(*[self.function(f.value, args, kwargs, why) for f in functions])
        looks = all(isinstance(f, Known) and any(f.value is one for one in LOOKS) for f in functions)
        for values in (*args, *kwargs.values()):
            self.finished(tuple(v for v in values if not (looks and isinstance(v, Known))), why)
        return union(*[self.plainly(f.value if isinstance(f, Known) else None, args, place) for f in functions])


def _add_up(left: Waiting, right: Any) -> bool:
    """`step._add_up`, as far as modules tell."""
    return (
        isinstance(right, Waiting)
        and not (left.added or right.added)
        and left.norm is not right.norm
        and all(isinstance(one.norm, _BatchNorm) for one in (left, right))
        and not step.share(left.norm, right.norm)
    )


def _is_users(function: Any) -> bool:
    """Whether it is a function or method that is not torch's."""
    return isinstance(function, (FunctionType, MethodType)) and not str(function.__module__).startswith("torch.")


def _is_tensor(value: Any) -> bool:
    return value is OTHER or (isinstance(value, Known) and isinstance(value.value, Tensor))
