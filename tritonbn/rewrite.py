"""A forward written anew, so that a batch norm runs as late as the addition and the activation that follow it.

The new function is the old one but for calls of one argument, additions and activations: those go through
`tritonbn.step`, where a batch norm's output may be a `Late`, computed when its first user asks for it. Everything else
runs as it was written, at each call. A local variable holds a Late only while nothing else runs that could tell: before
any statement or operation that might (whatever is not on the short list below), it is finished.
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

from tritonbn import step
from tritonbn.activations import METHODS, is_activation
from tritonbn.source import Source, SourceError, source_of

# What the new function means by these names.
NAMES: dict[str, Callable[..., Any]] = {
    "tritonbn_call": step.call,
    "tritonbn_beside": step.beside,
    "tritonbn_apply": step.apply,
    "tritonbn_add": step.add,
    "tritonbn_finish": step.finish,
    "tritonbn_follow": step.follow,
    "tritonbn_settled": step.settled,
    "tritonbn_plain": step.plain,
}
# Functions that show a frame's variables to whoever asks, a Late among them.
_FRAMES = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "stack", "breakpoint"}
_UNKNOWN = object()
# How many layers may run beside a batch norm that waits in a variable: a shortcut's convolution and batch norm.
WAITS = 2


@dataclass(frozen=True)
class Opened:
    """A function written anew: it takes a Late as its first argument (after self), and may return one."""

    source: Source
    function: FunctionType
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
    if function.__code__.co_flags & (0x20 | 0x80 | 0x200):
        raise SourceError("is a generator or a coroutine")
    wrapped = getattr(function, "__wrapped__", None)
    if isinstance(wrapped, FunctionType) and wrapped.__code__ is not function.__code__:
        return _within(function, opened(wrapped, bound))
    if (frames := _FRAMES.intersection(function.__code__.co_names)) and not frames <= {"stack"}:
        raise SourceError(f"asks for its variables: {min(frames)}() ({_where(function)})")
    rewriter = _Rewriter(source_of(function), bound)
    body = rewriter.function()
    made = rewriter.source.compiled(body, NAMES)
    return Opened(rewriter.source, made, body, frozenset(rewriter.reads), _only_calls(rewriter))


def _where(function: FunctionType) -> str:
    return f"{function.__code__.co_filename.rpartition('/')[2]}:{function.__code__.co_firstlineno}"


def _within(wrapper: FunctionType, inner: Opened) -> Opened:
    """A decorator's function around the function written anew, if it calls that from its closure."""
    cells = wrapper.__closure__ or ()
    if sum(cell.cell_contents is wrapper.__wrapped__ for cell in cells) != 1:  # type: ignore[attr-defined]
        raise SourceError(f"is decorated in a way that cannot be followed ({_where(wrapper)})")
    closed = step.closed(inner.function)  # what a decorator does with input and output, it does to tensors
    closure = tuple(type(c)(closed) if c.cell_contents is wrapper.__wrapped__ else c for c in cells)  # type: ignore[attr-defined]
    made = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure)
    made.__kwdefaults__, made.__dict__ = wrapper.__kwdefaults__, dict(wrapper.__dict__)
    return Opened(inner.source, step.closed(made), inner.body, inner.reads, None)


def _only_calls(rewriter: "_Rewriter") -> frozenset[str] | None:
    """The names of self.name(x) in a function that does nothing else but arithmetic and tests for None."""
    names: set[str] = set()
    body = rewriter.source.node.body
    for part in [body] if isinstance(body, ast.expr) else body:
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute):
                if not (isinstance(node.value, ast.Name) and node.value.id == rewriter.self_name):
                    return None
                names.add(node.attr)
            elif isinstance(node, ast.Call):
                if not isinstance(node.func, ast.Attribute) or len(node.args) != 1 or node.keywords:
                    return None
            elif not isinstance(node, _ARITHMETIC) or (
                isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
            ):
                return None
    return frozenset(names)


_ARITHMETIC = (
    ast.Assign, ast.AnnAssign, ast.Return, ast.If, ast.Pass, ast.Expr, ast.Name, ast.Constant, ast.IfExp, ast.Compare,
    ast.Is, ast.IsNot, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.expr_context,
)  # fmt: skip


class _Rewriter:
    """One function's tree written anew. Trees are copied, never changed."""

    def __init__(self, source: Source, bound: bool) -> None:
        self.source = source
        code = source.function.__code__
        # What closures see must be what it was.
        self.locals = set(code.co_varnames) - set(code.co_cellvars)
        self.parameters = source.arguments
        stores = {n.id for n in ast.walk(source.node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self.self_name = self.parameters[0] if bound and self.parameters and self.parameters[0] not in stores else ""
        takes = self.parameters[bound : bound + 1] if len(self.parameters) > bound else []
        self.takes = takes if code.co_argcount > bound else []
        self.late: list[str] = []  # variables that may hold a Late now
        self.waited: Counter[str] = Counter()  # while how many layers ran
        self.reads: set[str] = set()
        self.temporaries = 0
        self.guarded = 0  # within try or with: what is returned must be finished there
        self.liveness = _Liveness(source.node.body)

    def function(self) -> list[ast.stmt]:
        """The new body."""
        body = self.source.node.body
        if isinstance(body, ast.expr):
            body = [ast.copy_location(ast.Return(body), body)]
            self.liveness = _Liveness(body)
        new, _ = self.block(body, set(self.takes))
        return [ast.fix_missing_locations(statement) for statement in new]

    # Statements

    def block(self, body: Sequence[ast.stmt], late: set[str]) -> tuple[list[ast.stmt], set[str]]:
        """Statements written anew, and the variables that may hold a Late after them; `late` do before them."""
        new: list[ast.stmt] = []
        late = set(late)

        def end(names: Iterable[str], why: str, at: ast.stmt) -> None:
            for name in sorted(set(names) & late):
                value = self.finish(_load(name), why, at)
                new.append(_located(ast.Assign([ast.Name(name, ast.Store())], value), at))
                late.discard(name)

        if body:
            hidden = {name for name in late if name not in self.locals}
            end(hidden, "a function within this one uses it", body[0])
            end(late - self.liveness.before(body), "its output is not used", body[0])
        for statement in body:
            waited = self.waited
            while True:
                self.late, self.waited = sorted(late), waited.copy()
                try:
                    made, after = self.statement(statement)
                    break
                except _NotLate as refusal:
                    assert refusal.names & late
                    end(refusal.names, refusal.why, statement)
            new += made
            late = after
            if isinstance(statement, (ast.Return, ast.Raise, ast.Break, ast.Continue)):
                return new, set()
            end(late - self.liveness.after(statement), "its output is not used", statement)
        return new, late

    def inner(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        """A block that nothing late enters or leaves."""
        new, late = self.block(body, set())
        for name in sorted(late):
            value = self.finish(_load(name), "a loop, with or try ends before it is used", body[-1])
            new.append(_located(ast.Assign([ast.Name(name, ast.Store())], value), body[-1]))
        return new

    def statement(self, s: ast.stmt) -> tuple[list[ast.stmt], set[str]]:
        """A statement written anew and the variables that may hold a Late after it; raises _NotLate."""
        self.region = s
        if isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name):
            return self.assign(s, s.targets[0].id, s.value, s.targets[0])
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and s.simple and s.value is not None:
            return self.assign(s, s.target.id, s.value, s.target)
        if isinstance(s, ast.AugAssign) and isinstance(s.op, ast.Add) and isinstance(s.target, ast.Name):
            return self.add_in_place(s, s.target.id)
        if isinstance(s, ast.Return):
            value, _ = self.value(s.value, not self.guarded, "its output is returned") if s.value else (None, False)
            self.disturb("its output is not used", None)
            return [_located(ast.Return(value), s)], set()
        if isinstance(s, ast.If):
            test = self.plain(s.test)
            late = set(self.late)
            body, first = self.block(s.body, late)
            orelse, second = self.branch(s, late)
            return [_located(ast.If(test, body or [ast.Pass()], orelse), s)], first | second
        if isinstance(s, ast.For) and not s.orelse and self.is_own(s.iter) and isinstance(s.target, ast.Name):
            if isinstance(s.iter, ast.Name) or isinstance(s.iter, ast.Attribute) and isinstance(s.iter.value, ast.Name):
                return self.loop(s, s.target.id)
        if isinstance(s, (ast.For, ast.While, ast.With, ast.Try)):
            return [self.compound(s)], set()
        if isinstance(s, ast.Expr):
            if isinstance(s.value, ast.Constant):
                return [s], set(self.late)
            new = ast.Expr(self.plain(s.value))
            return [_located(new, s)], set(self.late)
        if isinstance(s, (ast.Assign, ast.AugAssign)):
            new_value = self.plain(s.value)
            names = {t.id for t in s.targets if isinstance(t, ast.Name)} if isinstance(s, ast.Assign) else set()
            if not isinstance(s, ast.Assign) or len(names) != len(s.targets) or names.intersection(self.late):
                self.disturb(None, s)
            changed = copy.copy(s)
            changed.value = new_value
            return [changed], set(self.late)
        if not isinstance(s, ast.Pass):
            self.disturb(None, s)
        return [s], set(self.late)

    def branch(self, s: ast.If, late: set[str]) -> tuple[list[ast.stmt], set[str]]:
        """The else of an if; what is late and used in the other branch only is finished here."""
        if s.orelse:
            return self.block(s.orelse, late)
        dead = sorted(late - self.liveness.after(s))
        new: list[ast.stmt] = []
        for name in dead:
            value = self.finish(_load(name), "its output is not always used", s)
            new.append(_located(ast.Assign([ast.Name(name, ast.Store())], value), s))
        return new, late - set(dead)

    def loop(self, s: ast.For, target: str) -> tuple[list[ast.stmt], set[str]]:
        """A loop over modules, perhaps: then what is late may stay so from one to the next."""
        late, items = set(self.late), f"tritonbn_{self.temporaries}"
        self.temporaries += 1
        if target in late:
            raise _NotLate([target], "its output is not used")
        first = ast.Assign([ast.Name(items, ast.Store())], self.plain(s.iter))
        entered, live = set(late), self.liveness.before(s.body)
        while True:
            body, left = self.block(s.body, entered)
            if left & live <= entered:
                break
            entered |= left & live
        end = s.body[-1]
        for name in sorted(left - entered):
            value = self.finish(_load(name), "a loop ends before it is used", end)
            body.append(_located(ast.Assign([ast.Name(name, ast.Store())], value), end))

        def settled(names: set[str], at: ast.stmt) -> list[ast.stmt]:
            return [
                _located(
                    ast.Assign([ast.Name(n, ast.Store())], self.helper("settled", [_load(items), _load(n)], at)), at
                )
                for n in sorted(names)
            ]

        loop = ast.For(s.target, _load(items), [*body, *settled(left & entered, end)], [])
        return [_located(first, s), *settled(late, s), _located(loop, s)], entered

    def compound(self, s: ast.stmt) -> ast.stmt:
        """A loop, with or try: nothing late enters or leaves it."""
        new: Any = copy.copy(s)
        if isinstance(s, ast.For):
            new.iter = self.plain(s.iter)
        elif isinstance(s, ast.With):
            new.items = [ast.withitem(self.plain(item.context_expr), item.optional_vars) for item in s.items]
        self.disturb(None, s)
        if isinstance(s, ast.While):
            self.late = []
            new.test = self.plain(s.test)
        guards = isinstance(s, (ast.With, ast.Try))
        self.guarded += guards
        for name in ("body", "orelse", "finalbody"):
            if getattr(s, name, []):
                setattr(new, name, self.inner(getattr(s, name)))
        if isinstance(s, ast.Try):
            new.handlers = [copy.copy(handler) for handler in s.handlers]
            for handler in new.handlers:
                handler.body = self.inner(handler.body)
        self.guarded -= guards
        return new  # type: ignore[no-any-return]

    def assign(self, s: Any, name: str, value: ast.expr, target: ast.Name) -> tuple[list[ast.stmt], set[str]]:
        trying = self.guarded and self.liveness.tries(s)
        want = name in self.locals and name in self.liveness.after(s) and not trying
        new, late = self.value(value, want, "its output is kept in a variable that others see")
        if name in self.late:
            raise _NotLate([name], "its output is not used")
        changed = copy.copy(s)
        changed.value = new
        self.waited[name] = 0
        return [changed], set(self.late) | ({name} if late else set())

    def add_in_place(self, s: ast.AugAssign, name: str) -> tuple[list[ast.stmt], set[str]]:
        if name not in self.late:
            value = self.plain(s.value, "an add in place changes the other operand")
            self.disturb(None, s)
            return [_located(ast.AugAssign(s.target, s.op, value), s)], set()
        if self.liveness.loads(s.value, name):
            raise _NotLate([name], "its output is used several times")
        right, _ = self.value(s.value, True, "it is added to another batch norm, which is fused with the add")
        self.late.remove(name)
        self.disturb(None, s)
        late = name in self.liveness.after(s) and not (self.guarded and self.liveness.tries(s))
        added: ast.expr = self.helper("add", [ast.Constant("+="), _load(name), right], s)
        if not late:
            added = self.finish(added, "its output is not used", s)
        return [_located(ast.Assign([s.target], added), s)], {name} if late else set()

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
        if isinstance(e, ast.Constant):
            return e, False
        if isinstance(e, ast.Attribute):
            return self.attribute(e), False
        if isinstance(e, ast.Call):
            return self.call(e)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            return self.add(e, e.left, e.right, ast.Constant("+"))
        if isinstance(e, ast.IfExp):
            return self.conditional(e)
        if isinstance(e, ast.Compare):
            left, *rest = [self.plain(operand) for operand in (e.left, *e.comparators)]
            if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in e.ops):
                left, *rest = [self.checked(operand) for operand in (left, *rest)]
            return _located(ast.Compare(left, e.ops, rest), e), False
        if isinstance(e, ast.BoolOp):
            values = [self.plain(e.values[0])]
            for operand in e.values[1:]:
                before = list(self.late)
                values.append(self.plain(operand))
                if self.late != before:
                    raise _NotLate(set(before) - set(self.late), "its output is not always used")
            return _located(ast.BoolOp(e.op, values), e), False
        if isinstance(e, ast.UnaryOp):
            operand = self.plain(e.operand)
            if not isinstance(e.op, ast.Not):
                self.disturb(None, e)
            return _located(ast.UnaryOp(e.op, operand), e), False
        if isinstance(e, (ast.Tuple, ast.List)):
            why = f"its output is kept in {self.source.text(e)}"
            return _located(type(e)([self.plain(item, why) for item in e.elts], e.ctx), e), False
        if isinstance(e, ast.Starred):
            inner = ast.Starred(self.plain(e.value), e.ctx)
            self.disturb(None, e)
            return _located(inner, e), False
        if isinstance(e, ast.BinOp):
            both = ast.BinOp(self.plain(e.left, _goes_to(e)), e.op, self.plain(e.right, _goes_to(e)))
            self.disturb(None, e)
            return _located(both, e), False
        if isinstance(e, ast.Subscript):
            owner, key = self.plain(e.value), self.plain(e.slice)
            return _located(ast.Subscript(self.checked(owner), self.checked(key), e.ctx), e), False
        if isinstance(e, ast.Dict) and all(e.keys):
            pairs = [(self.plain(k), self.plain(v)) for k, v in zip(e.keys, e.values, strict=True) if k is not None]
            self.disturb(None, e)
            return _located(ast.Dict([k for k, _ in pairs], [v for _, v in pairs]), e), False
        self.disturb(None, e)  # it stays as it is
        return e, False

    def checked(self, e: ast.expr) -> ast.expr:
        """A value that something is done with that only plain values do for themselves."""
        if not self.late or isinstance(e, ast.Constant):
            return e
        return self.helper("plain", [e, *map(_load, self.late)], e)

    def name(self, e: ast.Name) -> tuple[ast.expr, bool]:
        if e.id not in self.late:
            return e, False
        if not self.liveness.last(self.region, e.id):
            raise _NotLate([e.id], "its output is used several times")
        self.late.remove(e.id)
        return e, True

    def attribute(self, e: ast.Attribute) -> ast.expr:
        if isinstance(e.value, ast.Name) and e.value.id == self.self_name:
            if self.late:
                self.reads.add(e.attr)
            return e
        if self.resolve(e) is not _UNKNOWN:
            return e
        new = ast.Attribute(self.plain(e.value, f"its .{e.attr} is read"), e.attr, e.ctx)
        self.disturb(None, e)
        return _located(new, e)

    def conditional(self, e: ast.IfExp) -> tuple[ast.expr, bool]:
        test = self.plain(e.test)
        before = list(self.late)
        body, one = self.expression(e.body)
        after, self.late = self.late, list(before)
        orelse, other = self.expression(e.orelse)
        if set(after) != set(self.late):
            raise _NotLate(set(after) ^ set(self.late), "its output is not always used")
        return _located(ast.IfExp(test, body, orelse), e), one or other

    def call(self, e: ast.Call) -> tuple[ast.expr, bool]:
        target = self.resolve(e.func)
        args, keywords = e.args, e.keywords
        simple = not any(isinstance(a, ast.Starred) for a in args) and all(k.arg is not None for k in keywords)
        if isinstance(e.func, ast.Attribute) and target is _UNKNOWN and simple and not keywords:
            name = e.func.attr
            if name in METHODS and not args:
                value, late = self.expression(e.func.value)
                if late:
                    return self.helper("apply", [ast.Constant(name), value], e), True
            if name in ("add", "add_") and len(args) == 1:
                return self.add(e, e.func.value, args[0], ast.Constant(name))
        if any(target is f for f in step.ADDITIONS) and len(args) == 2 and simple and _no_scale(keywords):
            return self.add(e, *args, e.func)
        if (target is getattr or target is hasattr) and self.is_look(e):
            return e, False
        func = self.plain(e.func)
        follow = self.may_be_followed(e, target)
        if simple and args and is_fusible(target):
            return self.apply(e, func)
        if follow and len(args) == 1 and not keywords and simple:
            value, _ = self.expression(args[0])
            if not self.late:
                return self.helper("call", [func, value], e), True
            self.waited.update(name for name in self.late if name in self.locals)
            if patient := [name for name in self.late if self.waited[name] > WAITS]:
                raise _NotLate(patient, f"{self.source.text(e)} runs before it is used")
            return self.helper("beside", [func, value, *map(_load, self.late)], e), True
        why = f"its output goes to {self.source.text(e.func)}"
        new = ast.Call(
            func, [self.plain(a, why) for a in args], [ast.keyword(k.arg, self.plain(k.value, why)) for k in keywords]
        )
        self.disturb(None, e)
        _located(new, e)
        if not follow:
            return new, False
        new.func = self.helper("follow", [func], e)
        return new, True

    def apply(self, e: ast.Call, func: ast.expr) -> tuple[ast.expr, bool]:
        """A function of torch that may be an activation: f(x, ...)."""
        value, late = self.expression(e.args[0])
        rest = [*e.args[1:], *[k.value for k in e.keywords]]
        if late and not all(self.is_harmless(a) for a in rest):
            value, late = self.finish(value, f"an argument of {self.source.text(e.func)} may change it", e), False
        others = [self.plain(a) for a in e.args[1:]]
        keywords = [ast.keyword(k.arg, self.plain(k.value)) for k in e.keywords]
        self.disturb(None, e)
        if not late:
            return _located(ast.Call(func, [value, *others], keywords), e), False
        new = self.helper("apply", [func, value, *others], e)
        new.keywords = keywords
        return new, True

    def is_harmless(self, e: ast.expr) -> bool:
        """Whether evaluating it does nothing but read a constant or an attribute of self."""
        if isinstance(e, ast.Attribute) and isinstance(e.value, ast.Name) and e.value.id == self.self_name:
            self.reads.add(e.attr)
            return True
        if isinstance(e, ast.UnaryOp):
            return self.is_harmless(e.operand) and isinstance(e.operand, ast.Constant)
        return isinstance(e, ast.Constant) or (isinstance(e, ast.Name) and e.id not in self.late)

    def add(self, e: ast.expr, left: ast.expr, right: ast.expr, how: ast.expr) -> tuple[ast.expr, bool]:
        """left + right; how: "+", a method's name, or a function."""
        in_place = isinstance(how, ast.Constant) and how.value == "add_"
        first, late = self.expression(left)
        if in_place and not late:
            second, other = self.plain(right, "an add in place changes the other operand"), False
        elif late and not isinstance(right, ast.Name) and not self.is_harmless(right):
            first, second, other = self.held(first, left, right)
        else:
            second, other = self.expression(right)
        self.disturb(None, e)
        if late or other:
            return self.helper("add", [how, first, second], e), True
        if isinstance(e, ast.BinOp):
            return _located(ast.BinOp(first, e.op, second), e), False
        assert isinstance(e, ast.Call)
        if isinstance(how, ast.Constant):
            assert isinstance(e.func, ast.Attribute)
            return _located(
                ast.Call(_located(ast.Attribute(first, e.func.attr, ast.Load()), e), [second], []), e
            ), False
        return _located(ast.Call(how, [first, second], e.keywords), e), False

    def held(self, first: ast.expr, left: ast.expr, right: ast.expr) -> tuple[ast.expr, ast.expr, bool]:
        """A Late that waits in a variable of its own while the other operand is evaluated, if it may."""
        before = list(self.late)
        name = f"tritonbn_{self.temporaries}"
        self.temporaries += 1
        self.late.append(name)
        try:
            second, other = self.expression(right)
        except _NotLate as refusal:
            if name not in refusal.names:
                raise
            self.late = before
            first = self.finish(first, refusal.why, left)
            return first, *self.expression(right)
        self.late.remove(name)
        return _located(ast.NamedExpr(ast.Name(name, ast.Store()), first), left), second, other

    # What expressions mean

    def resolve(self, e: ast.expr) -> Any:
        """What a global name, or an attribute of a module of Python, means now; _UNKNOWN for all else."""
        code = self.source.function.__code__
        if isinstance(e, ast.Name) and e.id not in code.co_varnames and e.id not in code.co_cellvars:
            try:
                return self.source.value(e.id)
            except KeyError:
                return _UNKNOWN
        if isinstance(e, ast.Attribute):
            owner = self.resolve(e.value)
            if isinstance(owner, ModuleType):
                return getattr(owner, e.attr, _UNKNOWN)
        return _UNKNOWN

    def may_be_followed(self, e: ast.Call, target: Any) -> bool:
        """Whether it may call a module, or a function that may return a batch norm's output."""
        if target is not _UNKNOWN:
            return isinstance(target, nn.Module) or (
                isinstance(target, FunctionType) and not (target.__module__ or "").startswith("torch.")
            )
        if all(isinstance(a, (ast.Constant, ast.UnaryOp)) for a in e.args) and not e.keywords:
            return not e.args and isinstance(e.func, ast.Attribute) and self.is_own(e.func.value)
        if isinstance(e.func, ast.Attribute):
            return self.is_own(e.func.value) or not hasattr(torch.Tensor, e.func.attr)
        return True

    def is_look(self, e: ast.Call) -> bool:
        """Whether it is getattr(self, "name", constant) or hasattr(self, "name")."""
        owner, *rest = e.args or [e.func]
        own = isinstance(owner, ast.Name) and owner.id == self.self_name and not e.keywords and len(rest) in (1, 2)
        if not own or not all(isinstance(a, ast.Constant) for a in rest):
            return False
        if self.late and isinstance(rest[0], ast.Constant):
            self.reads.add(str(rest[0].value))
        return True

    def is_own(self, e: ast.expr) -> bool:
        """Whether it is self, one of its attributes (of theirs, ...), or super()."""
        while isinstance(e, (ast.Attribute, ast.Subscript)):
            e = e.value
        if isinstance(e, ast.Call):
            return isinstance(e.func, ast.Name) and e.func.id == "super"
        return isinstance(e, ast.Name) and e.id == self.self_name

    def disturb(self, why: str | None, at: ast.stmt | ast.expr | None) -> None:
        """Something runs here that could tell whether a Late was computed."""
        if self.late:
            if why is None and at is not None:
                text = ast.unparse(at).partition("\n")[0]
                text = text if len(text) <= 40 else f"{text[:37]}..."
                why = f"'{text}' comes between it and what follows ({self.source.place(at)})"
            raise _NotLate(self.late, why or "")

    def finish(self, e: ast.expr, why: str, at: ast.AST) -> ast.expr:
        call = self.helper("finish", [e], at)
        place = self.source.place(at)
        vars(call)["why"] = why if "(" in why and why.endswith(")") else f"{why} ({place})"
        return call

    def helper(self, name: str, args: list[ast.expr], at: ast.AST) -> ast.Call:
        return _located(ast.Call(_load(f"tritonbn_{name}"), args, []), at)


class _Liveness:
    """Which variables are read after a statement, before they are written again."""

    def __init__(self, body: list[ast.stmt] | ast.expr) -> None:
        self._after: dict[int, frozenset[str]] = {}
        self._before: dict[int, frozenset[str]] = {}
        self._tries: set[int] = set()
        if isinstance(body, list):
            self._block(body, frozenset(), frozenset(), frozenset(), frozenset())

    def after(self, s: ast.stmt) -> frozenset[str]:
        return self._after[id(s)]

    def before(self, body: Sequence[ast.stmt]) -> frozenset[str]:
        return self._before[id(body[0])]

    def tries(self, s: ast.stmt) -> bool:
        """Whether it stands within a try, whose handlers expect the errors of batch norm there."""
        return id(s) in self._tries

    def last(self, s: ast.stmt, name: str) -> bool:
        """Whether a statement (what comes before its blocks) reads a variable once, and nobody does afterwards."""
        header = _header(s)
        if sum(self.loads(part, name) for part in header) != 1:
            return False
        if isinstance(s, ast.If):
            return name not in self.before(s.body) and name not in (
                self.before(s.orelse) if s.orelse else self.after(s)
            )
        if isinstance(s, (ast.For, ast.While, ast.With)):
            return name not in self._before[id(s.body[0])] and name not in self.after(s)
        return name not in self.after(s) or name in _stored(s)

    def loads(self, part: ast.AST, name: str) -> int:
        """How often it reads the variable, at most."""
        if isinstance(part, ast.IfExp):
            return self.loads(part.test, name) + max(self.loads(part.body, name), self.loads(part.orelse, name))
        own = isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load)
        return own + sum(self.loads(child, name) for child in ast.iter_child_nodes(part))

    def _block(
        self, body: Sequence[ast.stmt], after: frozenset[str], exits: frozenset[str], again: frozenset[str],
        caught: frozenset[str],
    ) -> frozenset[str]:  # fmt: skip
        """What is read from the block's start on; exits, again: after break and continue; caught: by handlers."""
        for s in reversed(body):
            after = after | caught
            self._after[id(s)] = after
            if caught is not _NOBODY and caught:
                self._tries.add(id(s))
            after = self._statement(s, after, exits, again, caught)
            self._before[id(s)] = after
        return after

    def _statement(
        self, s: ast.stmt, after: frozenset[str], exits: frozenset[str], again: frozenset[str], caught: frozenset[str]
    ) -> frozenset[str]:
        if isinstance(s, (ast.Return, ast.Raise)):
            return _read(s) | caught
        if isinstance(s, ast.Break):
            return exits | caught
        if isinstance(s, ast.Continue):
            return again | caught
        if isinstance(s, ast.If):
            orelse = self._block(s.orelse, after, exits, again, caught)
            return _read(s.test) | self._block(s.body, after, exits, again, caught) | orelse
        if isinstance(s, (ast.For, ast.AsyncFor, ast.While)):
            head = frozenset[str]()
            own = _read(s.test) if isinstance(s, ast.While) else _read(s.target)
            while True:
                new = own | after | self._block(s.orelse, after, exits, again, caught)
                new |= self._block(s.body, head, after, head, caught)
                if new <= head:
                    break
                head |= new
            return head | (frozenset() if isinstance(s, ast.While) else _read(s.iter))
        if isinstance(s, (ast.With, ast.AsyncWith)):
            items = frozenset[str]().union(*[_read(item) for item in s.items])
            return items | self._block(s.body, after, exits, again, caught)
        blocks = [getattr(s, name, []) for name in ("body", "orelse", "finalbody")]
        if blocks[0] and not isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):  # try
            anything = _read(s) | after | {""}
            for block in (*blocks, *[handler.body for handler in getattr(s, "handlers", [])]):
                self._block(block, anything, exits | anything, again | anything, anything)
            return anything
        if isinstance(s, ast.Match):
            anything = _read(s) | after
            for case in s.cases:
                self._block(case.body, anything, exits, again, caught)
            return anything
        return (after - _stored(s)) | _read(s)


_NOBODY: frozenset[str] = frozenset()


def _header(s: ast.stmt) -> list[ast.AST]:
    """The parts of a statement that come before its blocks."""
    if isinstance(s, (ast.If, ast.While)):
        return [s.test]
    if isinstance(s, ast.For):
        return [s.iter]
    return list(s.items) if isinstance(s, ast.With) else [s]


def _read(part: ast.AST) -> frozenset[str]:
    """The names that it reads; those that it adds to in place, too."""
    names = {n.id for n in ast.walk(part) if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Load, ast.Del))}
    return frozenset(
        names | ({part.target.id} if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name) else set())
    )


def _stored(s: ast.stmt) -> frozenset[str]:
    """The names that a statement certainly writes and does not read for that."""
    targets = s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AnnAssign) and s.value else []
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _located(new: Any, old: ast.AST) -> Any:
    return ast.copy_location(new, old)


def _goes_to(e: ast.BinOp) -> str:
    return f"its output goes to {type(e.op).__name__.lower()}"


def _no_scale(keywords: list[ast.keyword]) -> bool:
    return all(k.arg == "alpha" and isinstance(k.value, ast.Constant) and k.value.value == 1 for k in keywords)


def is_fusible(target: Any) -> bool:
    """Whether it is a function that may be fused with a batch norm, or that does nothing at times: dropout."""
    return is_activation(target) or any(target is f for f in step.DROPOUTS)
