"""Expressions of a function written anew: what may be late in them, and where it must be computed first."""

import ast
import copy
from collections import Counter
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from tritonbn import step
from tritonbn.activations import METHODS, is_activation
from tritonbn.liveness import Liveness
from tritonbn.source import Source

# How many layers may run beside a batch norm that waits in a variable: a shortcut's convolution and batch norm.
WAITS = 2
_UNKNOWN = object()
# Expressions that do nothing but evaluate their parts; and those that do more, in the order of their parts.
_HARMLESS = (ast.Tuple, ast.List, ast.Slice)
_STRICT = (ast.BinOp, ast.UnaryOp, ast.Starred, ast.Dict, *_HARMLESS)


class NotLate(Exception):
    """These variables must not hold a Late here, and why."""

    def __init__(self, names: Iterable[str], why: str) -> None:
        super().__init__(why)
        self.names, self.why = frozenset(names), why


class Expressions:
    """Those of one function. Trees are copied, never changed."""

    def __init__(self, source: Source, bound: bool) -> None:
        self.source, self.code = source, source.function.__code__
        body = source.node.body
        self.body = [ast.copy_location(ast.Return(body), body)] if isinstance(body, ast.expr) else body
        self.liveness = Liveness(self.body)
        # What functions within this one see must be what it was.
        self.locals = set(self.code.co_varnames) - set(self.code.co_cellvars)
        stored = {n.id for n in ast.walk(source.node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        first = source.arguments[0] if bound and source.arguments else ""
        self.self_name = "" if first in stored else first
        self.late: list[str] = []  # variables that may hold a Late now
        self.waited: Counter[str] = Counter()  # while how many layers ran
        self.reads: set[str] = set()
        self.temporaries = 0
        self.guarded = 0  # within try or with: what is returned must be finished there
        self.caught = 0  # where an error may be caught: nothing waits for what may raise one
        self.region: ast.stmt = self.body[0]
        self.takes = set(source.arguments[bound : bound + 1] if self.code.co_argcount > bound else [])

    # Expressions, in the order in which they are evaluated

    def plain(self, e: ast.expr, why: str = "") -> ast.expr:
        """An expression whose value is no Late."""
        return self.value(e, False, why)[0]

    def value(self, e: ast.expr, want: bool, why: str = "") -> tuple[ast.expr, bool]:
        """An expression written anew, and whether its value may be a Late; never unless `want`."""
        new, late = self.expression(e)
        if late and not want:
            return self.finish(new, why or f"its output is used in {self.source.text(e)}", e), False
        return new, late

    def expression(self, e: ast.expr) -> tuple[ast.expr, bool]:
        if isinstance(e, ast.Name):
            return self.name(e)
        if isinstance(e, ast.Call):
            return self.call(e)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            return self.add(e, e.left, e.right, ast.Constant("+"))
        if isinstance(e, ast.IfExp):
            return self.conditional(e)
        new: Any = copy.copy(e)
        if isinstance(e, ast.Attribute):
            return self.attribute(e, new), False
        if isinstance(e, ast.Compare):
            new.left, *new.comparators = map(self.plain, (e.left, *e.comparators))
            if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in e.ops):
                new.left, *new.comparators = map(self.checked, (new.left, *new.comparators))
        elif isinstance(e, ast.Subscript):
            new.value, new.slice = map(self.checked, [self.plain(e.value), self.plain(e.slice)])
        elif isinstance(e, ast.BoolOp):
            new.values = [self.plain(e.values[0])]
            for operand in e.values[1:]:
                before = set(self.late)
                new.values.append(self.plain(operand))
                if skipped := before.difference(self.late):
                    raise NotLate(skipped, "its output is not always used")
        elif isinstance(e, _STRICT):
            why = f"its output is kept in {self.source.text(e)}" if isinstance(e, _HARMLESS) else ""
            for name, part in ast.iter_fields(e):
                if isinstance(part, ast.expr):
                    setattr(new, name, self.plain(part, why))
                elif isinstance(part, list):
                    setattr(new, name, [item and self.plain(item, why) for item in part])
            if not isinstance(e, _HARMLESS) and not (isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.Not)):
                self.disturb(e)
        elif not isinstance(e, ast.Constant):
            self.disturb(e)  # it stays as it is
        return new, False

    def name(self, e: ast.Name) -> tuple[ast.expr, bool]:
        if e.id not in self.late:
            return e, False
        if not self.liveness.is_last(self.region, e.id):
            raise NotLate([e.id], "its output is used several times")
        self.late.remove(e.id)
        return e, True

    def attribute(self, e: ast.Attribute, new: Any) -> ast.expr:
        if self.is_self(e.value):
            if self.late:
                self.reads.add(e.attr)
        elif self.resolve(e) is _UNKNOWN:
            new.value = self.plain(e.value, f"its .{e.attr} is read")
            self.disturb(e)
        return new  # type: ignore[no-any-return]

    def conditional(self, e: ast.IfExp) -> tuple[ast.expr, bool]:
        test = self.plain(e.test)
        before = list(self.late)
        body, one = self.expression(e.body)
        after, self.late = set(self.late), before
        orelse, other = self.expression(e.orelse)
        if after.symmetric_difference(self.late):
            raise NotLate(after.symmetric_difference(self.late), "its output is not always used")
        return located(ast.IfExp(test, body, orelse), e), one or other

    def call(self, e: ast.Call) -> tuple[ast.expr, bool]:
        target = self.resolve(e.func)
        simple = not any(isinstance(a, ast.Starred) for a in e.args) and all(k.arg for k in e.keywords)
        single = simple and len(e.args) == 1 and not e.keywords
        if isinstance(e.func, ast.Attribute) and target is _UNKNOWN:
            if e.func.attr in METHODS and not e.args and not e.keywords:
                value, late = self.expression(e.func.value)
                if late:
                    return self.helper("apply", [ast.Constant(e.func.attr), value], e), True
            if e.func.attr in ("add", "add_") and single:
                return self.add(e, e.func.value, e.args[0], ast.Constant(e.func.attr))
        if any(target is f for f in step.ADDITIONS) and len(e.args) == 2 and simple and not _scales(e):
            return self.add(e, e.args[0], e.args[1], e.func)
        if (target is getattr or target is hasattr) and self.is_look(e):
            return e, False
        func, follow = self.plain(e.func), self.may_be_followed(e, target)
        if simple and e.args and (is_activation(target) or any(target is f for f in step.DROPOUTS)):
            return self.apply(e, func)
        if follow and single:
            value, _ = self.expression(e.args[0])
            self.waited.update(name for name in self.late if name in self.locals)
            if patient := [name for name in self.late if self.waited[name] > WAITS]:
                raise NotLate(patient, f"{self.source.text(e)} runs before it is used")
            return self.helper("beside" if self.late else "call", [func, value, *map(load, self.late)], e), True
        why = f"its output goes to {self.source.text(e.func)}"
        new: Any = copy.copy(e)
        new.func = self.helper("follow", [func], e) if follow else func
        if follow and "super()." in ast.unparse(func):  # compilers know what is called, and nothing else of it
            new.func = located(ast.IfExp(self.helper("is_compiling", [], e), func, new.func), e)
        new.args = [self.plain(a, why) for a in e.args]
        new.keywords = [ast.keyword(k.arg, self.plain(k.value, why)) for k in e.keywords]
        self.disturb(e)
        return new, follow

    def apply(self, e: ast.Call, func: ast.expr) -> tuple[ast.expr, bool]:
        """A function of torch that may be an activation: f(x, ...)."""
        value, late = self.expression(e.args[0])
        others = [*e.args[1:], *[k.value for k in e.keywords]]
        if late and not all(self.is_safe(a) if self.caught else self.is_quiet(a) for a in others):
            value, late = self.finish(value, f"an argument of {self.source.text(e.func)} may change it", e), False
        elif late and not all(map(self.is_safe, others)):
            value = self.kept(value)
        new = self.helper("apply", [func, value], e) if late else located(ast.Call(func, [value], []), e)
        new.args += map(self.plain, e.args[1:])
        new.keywords = [ast.keyword(k.arg, self.plain(k.value)) for k in e.keywords]
        self.disturb(e)
        return new, late

    def add(self, e: Any, left: ast.expr, right: ast.expr, how: ast.expr) -> tuple[ast.expr, bool]:
        """left + right; how: "+", a method's name, or a function."""
        first, late = self.expression(left)
        if not late and isinstance(how, ast.Constant) and how.value != "+":
            self.disturb(e)  # whatever it is may have no such method
        if not late and isinstance(how, ast.Constant) and how.value == "add_":
            second, other = self.plain(right, "an add in place changes the other operand"), False
        elif late and self.caught and not self.is_safe(right):
            why = f"{self.source.text(right)} may raise what is caught here"
            first, late = self.finish(first, why, e), False
            second, other = self.expression(right)
        elif late and not self.is_safe(right):
            first, second, other = self.held(first, left, right)
        else:
            second, other = self.expression(right)
        self.disturb(e)
        if late or other:
            return self.helper("add", [how, first, second], e), True
        new = copy.copy(e)
        if isinstance(e, ast.BinOp):
            new.left, new.right = first, second
        elif isinstance(how, ast.Constant):
            new.func, new.args = located(ast.Attribute(first, e.func.attr, ast.Load()), e), [second]
        else:
            new.args = [first, second]
        return new, False

    def held(self, first: ast.expr, left: ast.expr, right: ast.expr) -> tuple[ast.expr, ast.expr, bool]:
        """A Late that waits in a variable of its own while the other operand is evaluated, if it may."""
        before, name = list(self.late), first.id if isinstance(first, ast.Name) else self.temporary()
        self.late.append(name)
        try:
            second, other = self.expression(right)
        except NotLate as refusal:
            if name not in refusal.names:
                raise
            self.late = before
            return self.finish(first, refusal.why, left), *self.expression(right)
        self.late.remove(name)
        return self.kept(first, name), second, other

    def kept(self, value: ast.expr, name: str = "") -> ast.expr:
        """A Late in a variable of its own, where it is found if an error is raised before somebody needs it."""
        if isinstance(value, ast.Name):
            return value
        return located(ast.NamedExpr(ast.Name(name or self.temporary(), ast.Store()), value), value)  # type: ignore[no-any-return]

    # What expressions mean

    def resolve(self, e: ast.expr) -> Any:
        """What a global name, or an attribute of a module of Python, means now; _UNKNOWN for all else."""
        if isinstance(e, ast.Name) and e.id not in self.code.co_varnames and e.id not in self.code.co_cellvars:
            return self.source.value(e.id, _UNKNOWN)
        owner = self.resolve(e.value) if isinstance(e, ast.Attribute) else None
        return (
            getattr(owner, e.attr, _UNKNOWN)
            if isinstance(owner, ModuleType) and isinstance(e, ast.Attribute)
            else _UNKNOWN
        )

    def is_self(self, e: ast.expr) -> bool:
        return isinstance(e, ast.Name) and bool(e.id) and e.id == self.self_name

    def is_quiet(self, e: ast.expr) -> bool:
        """Whether evaluating it does nothing but read a constant, a variable or an attribute of self."""
        if isinstance(e, ast.Attribute) and self.is_self(e.value):
            self.reads.add(e.attr)
            return True
        if isinstance(e, ast.UnaryOp):
            return isinstance(e.operand, ast.Constant)
        return isinstance(e, ast.Constant) or (isinstance(e, ast.Name) and e.id not in self.late)

    def is_safe(self, e: ast.expr) -> bool:
        """Whether evaluating it does nothing and raises no error."""
        return isinstance(e, ast.Constant) or (isinstance(e, ast.UnaryOp) and isinstance(e.operand, ast.Constant))

    def is_torchs(self, e: ast.expr) -> bool:
        """Whether it calls a function or class of torch."""
        target = self.resolve(e.func) if isinstance(e, ast.Call) else None
        return str(getattr(target, "__module__", "")).startswith("torch.")

    def is_look(self, e: ast.Call) -> bool:
        """Whether it is getattr(self, "name", constant) or hasattr(self, "name")."""
        names = [a.value for a in e.args[1:] if isinstance(a, ast.Constant)]
        if e.keywords or not 1 <= len(names) == len(e.args) - 1 <= 2 or not self.is_self(e.args[0]):
            return False
        if self.late:
            self.reads.add(str(names[0]))
        return True

    def may_be_followed(self, e: ast.Call, target: Any) -> bool:
        """Whether it may call a module, or a function that may return a batch norm's output."""
        if target is not _UNKNOWN:
            torchs = str(getattr(target, "__module__", "")).startswith("torch.")
            return isinstance(target, nn.Module) or (isinstance(target, FunctionType) and not torchs)
        own = isinstance(e.func, ast.Attribute) and self.is_own(e.func.value)
        if all(isinstance(a, (ast.Constant, ast.UnaryOp)) for a in e.args) and not e.keywords:
            return own and not e.args
        return own or not (isinstance(e.func, ast.Attribute) and hasattr(torch.Tensor, e.func.attr))

    def is_own(self, e: ast.expr) -> bool:
        """Whether it is self, one of its attributes (of theirs, ...), or super()."""
        while isinstance(e, (ast.Attribute, ast.Subscript)):
            e = e.value
        return self.is_self(e) or (isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id == "super")

    # What is made

    def disturb(self, at: ast.stmt | ast.expr | None, why: str = "") -> None:
        """Something runs here that could tell whether a Late was computed."""
        if self.late:
            if at is not None:
                text = ast.unparse(at).partition("\n")[0]
                text = text if len(text) <= 40 else f"{text[:37]}..."
                why = f"'{text}' comes between it and what follows ({self.source.place(at)})"
            raise NotLate(self.late, why)

    def checked(self, e: ast.expr) -> ast.expr:
        """A value that something is done with that does nothing else only for plain values."""
        return (
            self.helper("plain", [e, *map(load, self.late)], e) if self.late and not isinstance(e, ast.Constant) else e
        )

    def finish(self, e: ast.expr, why: str, at: ast.AST) -> ast.expr:
        call: ast.expr = self.helper("finish", [e], at)
        vars(call)["why"] = why if why.endswith(")") else f"{why} ({self.source.place(at)})"
        return call

    def helper(self, name: str, args: list[ast.expr], at: ast.AST) -> Any:
        return located(ast.Call(load(f"tritonbn_{name}"), args, []), at)

    def temporary(self) -> str:
        self.temporaries += 1
        return f"tritonbn_{self.temporaries}"


def _scales(e: ast.Call) -> bool:
    """Whether an addition multiplies: alpha is given and not 1."""
    return not all(k.arg == "alpha" and isinstance(k.value, ast.Constant) and k.value.value == 1 for k in e.keywords)


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def located(new: Any, old: ast.AST) -> Any:
    return ast.copy_location(new, old)
