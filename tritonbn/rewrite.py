"""A forward written anew, so that a batch norm runs as late as the addition and the activation that follow it.

The new function is the old one but for calls of one argument, additions and activations: those go through
`tritonbn.step`, where a batch norm's output may be a `Late`, computed when its first user asks for it. Everything else
runs as it was written, at each call. A local variable holds a Late only while nothing else runs that could tell: it is
finished before any statement or operation that might, which is all that is not listed below.
"""

import ast
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch.compiler import is_compiling

from tritonbn import step
from tritonbn.expressions import Expressions, NotLate, load, located
from tritonbn.liveness import reads
from tritonbn.source import Source, SourceError, source_of

# What the new function means by "tritonbn_call" and so on.
HELPERS: tuple[Callable[..., Any], ...] = (
    step.call, step.beside, step.apply, step.add, step.finish, step.follow, step.settled, step.plain, is_compiling,
)  # fmt: skip
# Functions that show a frame's variables to whoever asks, a Late among them.
_FRAMES = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "breakpoint"}
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
    if "_version" in code.co_names:
        raise SourceError(f"asks how often a tensor was written to: ._version ({where})")
    rewriter = _Rewriter(source_of(function), bound)
    body = rewriter.function()
    made = rewriter.source.compiled(body, {f"tritonbn_{helper.__name__}": helper for helper in HELPERS})
    step.remember(made, function)
    return Opened(rewriter.source, made, body, frozenset(rewriter.reads), rewriter.only_calls())


def _within(wrapper: FunctionType, wrapped: FunctionType, inner: Opened, where: str) -> Opened:
    """A decorator's function around the function written anew, if it calls that from its closure."""
    cells = wrapper.__closure__ or ()
    if sum(cell.cell_contents is wrapped for cell in cells) != 1:
        raise SourceError(f"is decorated in a way that cannot be followed ({where})")
    # What a decorator does with input and output, it does to tensors.
    closed = step.closed(step.guarded(inner.function))
    closure = tuple(type(cell)(closed) if cell.cell_contents is wrapped else cell for cell in cells)
    made = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure)
    made.__kwdefaults__, made.__dict__ = wrapper.__kwdefaults__, dict(wrapper.__dict__)
    outer = step.closed(made)
    step.remember(outer, wrapper, inner.function)
    return Opened(inner.source, outer, inner.body, inner.reads, None)


class _Rewriter(Expressions):
    """One function's tree written anew."""

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
                except NotLate as refusal:
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
        return [_assign(name, self.finish(load(name), why, at), at) for name in sorted(names)]

    def statement(self, s: ast.stmt) -> tuple[list[ast.stmt], set[str]]:
        """A statement written anew and the variables that may hold a Late after it; raises NotLate."""
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
            raise NotLate(lost, "its output is not used")
        if len(names) != len(_targets(s)):
            self.disturb(s)
        self.waited[names[0]] = 0
        return [new], {*self.late, *(names if late else [])}

    def may_hold(self, name: str, s: ast.stmt) -> bool:
        """Whether a variable that a statement writes may hold a Late."""
        return name in self.locals and name in self.liveness.after(s) and not self.caught

    def add_in_place(self, s: ast.AugAssign, name: str) -> tuple[list[ast.stmt], set[str]]:
        if name not in self.late:
            new = ast.AugAssign(s.target, s.op, self.plain(s.value, "an add in place changes the other operand"))
            self.disturb(s)
            return [located(new, s)], set()
        if reads(s.value, name):
            raise NotLate([name], "its output is used several times")
        right, _ = self.expression(s.value)
        self.late.remove(name)
        self.disturb(s)
        late = self.may_hold(name, s)
        added: ast.expr = self.helper("add", [ast.Constant("+="), load(name), right], s)
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
            return [_assign(n, self.helper("settled", [load(items), load(n)], at), at) for n in sorted(names)]

        ends = self.finished(left - entered, "a loop ends before it is used", s.body[-1])
        loop = ast.For(s.target, load(items), [*body, *ends, *settled(left & entered, s.body[-1])], [])
        return [_assign(items, iterated, s), *settled(late, s), located(loop, s)], entered

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
        catches = guards and not (isinstance(s, ast.With) and all(self.is_torchs(i.context_expr) for i in s.items))
        self.guarded += guards
        self.caught += catches
        self.inside(new)
        if isinstance(s, ast.Try):
            new.handlers = [self.inside(copy.copy(handler)) for handler in s.handlers]
        self.guarded -= guards
        self.caught -= catches
        self.late = []

    def inside(self, place: Any) -> Any:
        for name in ("body", "orelse", "finalbody"):
            if block := getattr(place, name, []):
                new, left = self.block(block, set())
                ends = self.finished(left, "a loop, with or try ends before it is used", block[-1])
                setattr(place, name, [*new, *ends])
        return place


def _targets(s: ast.AST) -> list[ast.expr]:
    return s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AnnAssign) else []


def _adds(s: ast.stmt) -> bool:
    return isinstance(s, ast.AugAssign) and isinstance(s.op, ast.Add)


def _assign(name: str, value: ast.expr, at: ast.AST) -> ast.stmt:
    return located(ast.Assign([ast.Name(name, ast.Store())], value), at)  # type: ignore[no-any-return]
