"""A forward written anew, so that a batch norm runs as late as the addition and the activation that follow it.

The new function is the old one but for calls of one argument, additions and activations: those go through
`tritonbn.step`, where a batch norm's output may be a `Late`, computed when its first user asks for it. Everything else
runs as it was written, at each call. A local variable holds a Late only while nothing else runs that could tell: it is
finished before any statement or operation that might, which is all that is not listed below.
"""

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from tritonbn import step
from tritonbn.activations import METHODS, is_activation
from tritonbn.liveness import Liveness, reads
from tritonbn.source import Source, SourceError, source_of

# What the new function means by "tritonbn_call" and so on.
HELPERS: tuple[Callable[..., Any], ...] = (
    step.call, step.beside, step.apply, step.add, step.finish, step.follow, step.settled, step.plain, is_compiling,
)  # fmt: skip
# How many layers may run beside a batch norm that waits in a variable: a shortcut's convolution and batch norm.
WAITS = 2
# Functions that show a frame's variables to whoever asks, a Late among them.
_FRAMES = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "breakpoint"}
_UNKNOWN = object()
# Expressions that do nothing but evaluate their parts; and those that do more, in the order of their parts.
_HARMLESS = (ast.Tuple, ast.List, ast.Slice)
_STRICT = (ast.BinOp, ast.UnaryOp, ast.Starred, ast.Dict, *_HARMLESS)
_ARITHMETIC = (
    ast.Assign, ast.AnnAssign, ast.Return, ast.If, ast.Pass, ast.Expr, ast.Name, ast.Constant, ast.IfExp, ast.Compare,
    ast.Is, ast.IsNot, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.expr_context,
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A function written anew: it takes a Late as its first argument (after self), and may return one."""

    source: Source
    function: Callable[..., Any]
    body: list[ast.stmt]
    reads: frozenset[str]  # attributes of self that it reads while a Late waits: they must be plain ones
    calls: frozenset[str] | None  # children, if all that it does is to call these and to add and multiply tensors


class _NotLate(Exception):
    """These variables must not hold a Late here, and why."""

    def __init__(self, names: Iterable[str], why: str) -> None:
        super().__init__(why)
        self.names, self.why = frozenset(names), why


def opened(function: FunctionType, bound: bool) -> Opened:
    """The function written anew; bound: its first parameter is the module. Raises SourceError where it cannot be."""
    code = function.__code__
    where = f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"
    if code.co_flags & (0x20 | 0x80 | 0x200):
        raise SourceError(f"is a generator or a coroutine ({where})")
    wrapped = getattr(function, "__wrapped__", None)
    if isinstance(wrapped, FunctionType) and wrapped.__code__ is not code:
        return _within(function, wrapped, opened(wrapped, bound), where)
    if frames := _FRAMES.intersection(code.co_names):
        raise SourceError(f"asks for its variables: {min(frames)}() ({where})")
    rewriter = _Rewriter(source_of(function), bound)
    body = rewriter.function()
    made = rewriter.source.compiled(body, {f"tritonbn_{helper.__name__}": helper for helper in HELPERS})
    return Opened(rewriter.source, made, body, frozenset(rewriter.reads), rewriter.only_calls())


def _within(wrapper: FunctionType, wrapped: FunctionType, inner: Opened, where: str) -> Opened:
    """A decorator's function around the function written anew, if it calls that from its closure."""
    cells = wrapper.__closure__ or ()
    if sum(cell.cell_contents is wrapped for cell in cells) != 1:
        raise SourceError(f"is decorated in a way that cannot be followed ({where})")
    closed = step.closed(inner.function)  # what a decorator does with input and output, it does to tensors
    closure = tuple(type(cell)(closed) if cell.cell_contents is wrapped else cell for cell in cells)
    made = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure)
    made.__kwdefaults__, made.__dict__ = wrapper.__kwdefaults__, dict(wrapper.__dict__)
    return Opened(inner.source, step.closed(made), inner.body, inner.reads, None)


class _Rewriter:
    """One function's tree written anew. Trees are copied, never changed."""

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
        self.region: ast.stmt = self.body[0]
        self.takes = set(source.arguments[bound : bound + 1] if self.code.co_argcount > bound else [])

    def function(self) -> list[ast.stmt]:
        """The new body."""
        new, _ = self.block(self.body, self.takes)
        return [ast.fix_missing_locations(statement) for statement in new]

    def only_calls(self) -> frozenset[str] | None:
        """The names of self.name(x) in a function that does nothing else but arithmetic and tests for None."""
        names: set[str] = set()
        for node in (node for statement in self.body for node in ast.walk(statement)):
            if isinstance(node, ast.Attribute) and self.is_self(node.value):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
                if node.keywords:
                    return None
            elif not isinstance(node, _ARITHMETIC) or not all(isinstance(t, ast.Name) for t in _targets(node)):
                return None
        return frozenset(names)

    # Statements

    def block(
        self, body: Sequence[ast.stmt], late: set[str], after: frozenset[str] | None = None
    ) -> tuple[list[ast.stmt], set[str]]:
        """Statements written anew, and the variables that may hold a Late after them; `late` do before them.

        after: what is read after a block that may be empty.
        """
        new: list[ast.stmt] = []
        late = set(late)

        def end(names: Iterable[str], why: str, at: ast.stmt) -> None:
            new.extend(self.finished(late.intersection(names), why, at))
            late.difference_update(names)

        if body:
            end(late - self.locals, "a function within this one uses it", body[0])
        end(late - (self.liveness.before(body[0]) if body else after or late), "its output is not used", self.region)
        for statement in body:
            waited = self.waited
            while True:
                self.late, self.waited, self.region = sorted(late), waited.copy(), statement
                try:
                    made, following = self.statement(statement)
                    break
                except _NotLate as refusal:
                    if not refusal.names & late:
                        raise SourceError(f"cannot be followed ({self.source.place(statement)})") from None
                    end(refusal.names, refusal.why, statement)
            new += made
            late = following
            if isinstance(statement, (ast.Return, ast.Raise, ast.Break, ast.Continue)):
                return new, set()
            end(late - self.liveness.after(statement), "its output is not used", statement)
        return new, late

    def finished(self, names: Iterable[str], why: str, at: ast.stmt) -> list[ast.stmt]:
        return [_assign(name, self.finish(_load(name), why, at), at) for name in sorted(names)]

    def statement(self, s: ast.stmt) -> tuple[list[ast.stmt], set[str]]:
        """A statement written anew and the variables that may hold a Late after it; raises _NotLate."""
        new: Any = copy.copy(s)
        if isinstance(s, ast.Return):
            new.value = s.value and self.value(s.value, not self.guarded, "its output is returned")[0]
            self.disturb(None, "its output is not used")
        elif isinstance(s, ast.If):
            new.test = self.plain(s.test)
            late = set(self.late)
            new.body, one = self.block(s.body, late)
            self.region = s
            new.orelse, other = self.block(s.orelse, late, self.liveness.after(s))
            return [new], one | other
        elif isinstance(s, ast.For) and self.may_iterate_modules(s):
            return self.loop(s)
        elif isinstance(s, (ast.For, ast.While, ast.With, ast.Try)):
            self.compound(s, new)
        elif isinstance(s, ast.AugAssign) and isinstance(s.op, ast.Add) and isinstance(s.target, ast.Name):
            return self.add_in_place(s, s.target.id)
        elif isinstance(s, (ast.Assign, ast.AnnAssign)) and s.value and isinstance(_targets(s)[0], ast.Name):
            return self.assign(s, new)
        elif isinstance(s, (ast.Assign, ast.AugAssign, ast.Expr)):
            new.value = self.plain(s.value, "an add in place changes the other operand" if _adds(s) else "")
            if not isinstance(s, ast.Expr):
                self.disturb(s)
        elif not isinstance(s, ast.Pass):
            self.disturb(s)
        return [new], set(self.late)

    def assign(self, s: ast.Assign | ast.AnnAssign, new: Any) -> tuple[list[ast.stmt], set[str]]:
        names = [target.id for target in _targets(s) if isinstance(target, ast.Name)]
        assert s.value is not None
        want = len(names) == len(_targets(s)) == 1 and self.may_hold(names[0], s)
        new.value, late = self.value(s.value, want, "its output is kept in a variable that others see")
        if lost := set(names).intersection(self.late):
            raise _NotLate(lost, "its output is not used")
        if len(names) != len(_targets(s)):
            self.disturb(s)
        self.waited[names[0]] = 0
        return [new], {*self.late, *(names if late else [])}

    def may_hold(self, name: str, s: ast.stmt) -> bool:
        """Whether a variable that a statement writes may hold a Late."""
        return name in self.locals and name in self.liveness.after(s) and not self.liveness.is_tried(s)

    def add_in_place(self, s: ast.AugAssign, name: str) -> tuple[list[ast.stmt], set[str]]:
        if name not in self.late:
            new = ast.AugAssign(s.target, s.op, self.plain(s.value, "an add in place changes the other operand"))
            self.disturb(s)
            return [_located(new, s)], set()
        if reads(s.value, name):
            raise _NotLate([name], "its output is used several times")
        right, _ = self.expression(s.value)
        self.late.remove(name)
        self.disturb(s)
        late = self.may_hold(name, s)
        added: ast.expr = self.helper("add", [ast.Constant("+="), _load(name), right], s)
        value = added if late else self.finish(added, "its output is not used", s)
        return [_assign(name, value, s)], {name} if late else set()

    def may_iterate_modules(self, s: ast.For) -> bool:
        owner = s.iter.value if isinstance(s.iter, ast.Attribute) else s.iter
        return self.is_self(owner) and isinstance(s.target, ast.Name) and not s.orelse and s.target.id not in self.late

    def loop(self, s: ast.For) -> tuple[list[ast.stmt], set[str]]:
        """A loop over modules, perhaps: then what is late may stay so from one to the next."""
        late, items, live = set(self.late), self.temporary(), self.liveness.before(s.body[0])
        iterated, entered = self.plain(s.iter), set(self.late)
        while True:
            body, left = self.block(s.body, entered)
            if left & live <= entered:
                break
            entered |= left & live

        def settled(names: set[str], at: ast.stmt) -> list[ast.stmt]:
            return [_assign(n, self.helper("settled", [_load(items), _load(n)], at), at) for n in sorted(names)]

        ends = self.finished(left - entered, "a loop ends before it is used", s.body[-1])
        loop = ast.For(s.target, _load(items), [*body, *ends, *settled(left & entered, s.body[-1])], [])
        return [_assign(items, iterated, s), *settled(late, s), _located(loop, s)], entered

    def compound(self, s: ast.For | ast.While | ast.With | ast.Try, new: Any) -> None:
        """A loop, with or try: nothing late enters or leaves it."""
        if isinstance(s, ast.For):
            new.iter = self.plain(s.iter)
        elif isinstance(s, ast.With):
            new.items = [ast.withitem(self.plain(item.context_expr), item.optional_vars) for item in s.items]
        self.disturb(s)
        if isinstance(s, ast.While):
            new.test = self.plain(s.test)
        guards = isinstance(s, (ast.With, ast.Try))
        self.guarded += guards
        self.inside(new)
        if isinstance(s, ast.Try):
            new.handlers = [self.inside(copy.copy(handler)) for handler in s.handlers]
        self.guarded -= guards
        self.late = []

    def inside(self, place: Any) -> Any:
        for name in ("body", "orelse", "finalbody"):
            if block := getattr(place, name, []):
                new, left = self.block(block, set())
                ends = self.finished(left, "a loop, with or try ends before it is used", block[-1])
                setattr(place, name, [*new, *ends])
        return place

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
                    raise _NotLate(skipped, "its output is not always used")
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
            raise _NotLate([e.id], "its output is used several times")
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
            raise _NotLate(after.symmetric_difference(self.late), "its output is not always used")
        return _located(ast.IfExp(test, body, orelse), e), one or other

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
                raise _NotLate(patient, f"{self.source.text(e)} runs before it is used")
            return self.helper("beside" if self.late else "call", [func, value, *map(_load, self.late)], e), True
        why = f"its output goes to {self.source.text(e.func)}"
        new: Any = copy.copy(e)
        new.func = self.helper("follow", [func], e) if follow else func
        if follow and "super()." in ast.unparse(func):  # compilers know what is called, and nothing else of it
            new.func = _located(ast.IfExp(self.helper("is_compiling", [], e), func, new.func), e)
        new.args = [self.plain(a, why) for a in e.args]
        new.keywords = [ast.keyword(k.arg, self.plain(k.value, why)) for k in e.keywords]
        self.disturb(e)
        return new, follow

    def apply(self, e: ast.Call, func: ast.expr) -> tuple[ast.expr, bool]:
        """A function of torch that may be an activation: f(x, ...)."""
        value, late = self.expression(e.args[0])
        if late and not all(self.is_quiet(a) for a in (*e.args[1:], *[k.value for k in e.keywords])):
            value, late = self.finish(value, f"an argument of {self.source.text(e.func)} may change it", e), False
        new = self.helper("apply", [func, value], e) if late else _located(ast.Call(func, [value], []), e)
        new.args += map(self.plain, e.args[1:])
        new.keywords = [ast.keyword(k.arg, self.plain(k.value)) for k in e.keywords]
        self.disturb(e)
        return new, late

    def add(self, e: Any, left: ast.expr, right: ast.expr, how: ast.expr) -> tuple[ast.expr, bool]:
        """left + right; how: "+", a method's name, or a function."""
        first, late = self.expression(left)
        if not late and isinstance(how, ast.Constant) and how.value == "add_":
            second, other = self.plain(right, "an add in place changes the other operand"), False
        elif late and not isinstance(right, ast.Name) and not self.is_quiet(right):
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
            new.func, new.args = _located(ast.Attribute(first, e.func.attr, ast.Load()), e), [second]
        else:
            new.args = [first, second]
        return new, False

    def held(self, first: ast.expr, left: ast.expr, right: ast.expr) -> tuple[ast.expr, ast.expr, bool]:
        """A Late that waits in a variable of its own while the other operand is evaluated, if it may."""
        before, name = list(self.late), self.temporary()
        self.late.append(name)
        try:
            second, other = self.expression(right)
        except _NotLate as refusal:
            if name not in refusal.names:
                raise
            self.late = before
            return self.finish(first, refusal.why, left), *self.expression(right)
        self.late.remove(name)
        return _located(ast.NamedExpr(ast.Name(name, ast.Store()), first), left), second, other

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
            raise _NotLate(self.late, why)

    def checked(self, e: ast.expr) -> ast.expr:
        """A value that something is done with that does nothing else only for plain values."""
        return (
            self.helper("plain", [e, *map(_load, self.late)], e) if self.late and not isinstance(e, ast.Constant) else e
        )

    def finish(self, e: ast.expr, why: str, at: ast.AST) -> ast.expr:
        call: ast.expr = self.helper("finish", [e], at)
        vars(call)["why"] = why if why.endswith(")") else f"{why} ({self.source.place(at)})"
        return call

    def helper(self, name: str, args: list[ast.expr], at: ast.AST) -> Any:
        return _located(ast.Call(_load(f"tritonbn_{name}"), args, []), at)

    def temporary(self) -> str:
        self.temporaries += 1
        return f"tritonbn_{self.temporaries}"


def _targets(s: ast.AST) -> list[ast.expr]:
    return s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AnnAssign) else []


def _adds(s: ast.stmt) -> bool:
    return isinstance(s, ast.AugAssign) and isinstance(s.op, ast.Add)


def _scales(e: ast.Call) -> bool:
    """Whether an addition multiplies: alpha is given and not 1."""
    return not all(k.arg == "alpha" and isinstance(k.value, ast.Constant) and k.value.value == 1 for k in e.keywords)


def _assign(name: str, value: ast.expr, at: ast.AST) -> ast.stmt:
    return _located(ast.Assign([ast.Name(name, ast.Store())], value), at)  # type: ignore[no-any-return]


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _located(new: Any, old: ast.AST) -> Any:
    return ast.copy_location(new, old)
