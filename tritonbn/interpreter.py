"""What a function would do, as far as that is known beforehand: nothing of it runs, and no attribute is computed.

A value is a tuple of alternatives, where a branch depends on what is not known: each a `Known` object of the model,
OTHER, or what a subclass makes of calls.
"""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from tritonbn.rewrite import Opened
from tritonbn.types import children, class_of

OTHER = object()
Values = tuple[Any, ...]
UNKNOWN: Values = (OTHER,)
_PLAIN = (type(None), bool, int, float, str)
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_EVALUATED: tuple[Any, ...] = (zip, enumerate, range, len, reversed, list, tuple)
LOOKS = (*_EVALUATED, isinstance, hasattr, getattr, callable, type, id)  # neither call nor keep what they are given


@dataclass(frozen=True)
class Known:
    """An object that is there now."""

    value: Any


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
            return self.variables.get(name, UNKNOWN)
        found = self.opened.source.value(name, OTHER)
        return UNKNOWN if found is OTHER else (Known(found),)

    def inherited(self, name: str) -> Values:
        """super().name"""
        source = self.opened.source
        kind, module = source.value("__class__", None), plain_value(self.name("".join(source.arguments[:1])))
        kinds = class_of(module).__mro__ if isinstance(module, nn.Module) else ()
        for parent in kinds[kinds.index(kind) + 1 :] if kind in kinds else ():
            if name in vars(parent):
                found = vars(parent)[name]
                return (Known(MethodType(found, module)),) if isinstance(found, FunctionType) else UNKNOWN
        return UNKNOWN

    def bind(self, target: ast.expr, value: Values) -> None:
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            items = items_of(value) or []
            for i, part in enumerate(target.elts):
                self.bind(part, (Known(items[i]),) if len(items) == len(target.elts) else UNKNOWN)


class Interpreter:
    """One function after the other, and what they call. Subclasses say what calls do."""

    limit = 20_000  # of steps

    def __init__(self) -> None:
        self.steps = 0

    def calls(self, e: ast.Call, frame: Frame) -> Values:
        """The value of a call."""
        raise NotImplementedError

    def finished(self, values: Values, why: str) -> Values:
        """What values are where somebody uses them who is not followed."""
        return values

    def default(self, value: Any) -> Values:
        """An argument that is not given."""
        return (Known(value),)

    def body(self, opened: Opened, args: list[Values], kwargs: dict[str, Values]) -> Values:
        """What the function returns."""
        function = opened.source.function
        variables = dict.fromkeys(opened.source.arguments, UNKNOWN)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                variables[name] = self.default(parameter.default)
        variables |= dict(zip(function.__code__.co_varnames[: function.__code__.co_argcount], args, strict=False))
        frame = Frame(opened, variables | kwargs)
        self.block(opened.body, frame)
        return union(*frame.returned)

    def block(self, body: Sequence[ast.stmt], frame: Frame) -> None:
        for statement in body:
            self.steps += 1
            if frame.ended or self.steps > self.limit:
                return
            self.statement(statement, frame)

    def statement(self, s: ast.stmt, frame: Frame) -> None:
        if isinstance(s, ast.Return):
            frame.returned.append(self.value(s.value, frame) if s.value else (Known(None),))
            frame.ended = True
        elif isinstance(s, (ast.Assign, ast.AnnAssign)):
            value = self.value(s.value, frame) if s.value else UNKNOWN
            for target in s.targets if isinstance(s, ast.Assign) else [s.target]:
                frame.bind(target, value)
        elif isinstance(s, ast.AugAssign):
            self.value(s.value, frame)
            frame.bind(s.target, UNKNOWN)
        elif isinstance(s, ast.If):
            test = _truth(self.value(s.test, frame))
            self.either(
                frame,
                *[branch for branch, taken in ((s.body, test is not False), (s.orelse, test is not True)) if taken],
            )
        elif isinstance(s, ast.For):
            items = items_of(self.value(s.iter, frame))
            for item in [UNKNOWN] if items is None else [(Known(item),) for item in items]:
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

    def either(self, frame: Frame, *blocks: list[ast.stmt]) -> None:
        """One of these blocks runs."""
        if len(blocks) == 1:
            return self.block(blocks[0], frame)
        frames = [Frame(frame.opened, dict(frame.variables), frame.returned) for _ in blocks]
        for block, each in zip(blocks, frames, strict=True):
            self.block(block, each)
        going = [each.variables for each in frames if not each.ended]
        frame.ended = not going
        names = dict.fromkeys(name for variables in going for name in variables)
        frame.variables = {name: union(*[v.get(name, UNKNOWN) for v in going]) for name in names}
        return None

    def parts(self, node: ast.AST, frame: Frame) -> Values:
        """What is not followed but for the calls in it."""
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            frame = Frame(frame.opened, dict(frame.variables))
            for generator in node.generators:
                items = items_of(self.value(generator.iter, frame))
                frame.bind(generator.target, tuple(Known(item) for item in items[:64]) if items else UNKNOWN)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.finished(self.value(child, frame), "its output is used in a way that is not followed")
            elif not isinstance(child, (ast.stmt, ast.expr_context, ast.comprehension)):
                self.parts(child, frame)
        return UNKNOWN

    def value(self, e: ast.expr, frame: Frame) -> Values:
        """The alternatives of an expression's value."""
        self.steps += 1
        if self.steps > self.limit:
            return UNKNOWN
        if isinstance(e, ast.Name):
            return frame.name(e.id)
        if isinstance(e, ast.Constant):
            return (Known(e.value),)
        if isinstance(e, ast.NamedExpr):
            value = self.value(e.value, frame)
            frame.bind(e.target, value)
            return value
        if isinstance(e, ast.Attribute) and isinstance(e.value, ast.Call) and ast.unparse(e.value) == "super()":
            return frame.inherited(e.attr)
        if isinstance(e, ast.Attribute):
            return union(*[self.attribute(owner, e.attr) for owner in self.value(e.value, frame)])
        if isinstance(e, ast.Subscript):
            owners, keys = self.value(e.value, frame), self.value(e.slice, frame)
            return union(*[_item(owner, key) for owner in owners for key in keys])
        if isinstance(e, ast.IfExp):
            test = _truth(self.value(e.test, frame))
            branches = [
                branch for branch, taken in ((e.body, test is not False), (e.orelse, test is not True)) if taken
            ]
            return union(*[self.value(branch, frame) for branch in branches])
        if isinstance(e, (ast.Compare, ast.UnaryOp, ast.BoolOp)):
            truth = self.test(e, frame)
            return UNKNOWN if truth is None else (Known(truth),)
        if isinstance(e, (ast.Tuple, ast.List)):
            values = [self.value(item, frame) for item in e.elts]
            known = [value[0].value for value in values if len(value) == 1 and isinstance(value[0], Known)]
            return (Known(known),) if len(known) == len(values) else UNKNOWN
        if not isinstance(e, ast.Call):
            return self.parts(e, frame)
        if isinstance(e.func, ast.IfExp) and "tritonbn_is_compiling" in ast.dump(e.func.test):
            e = ast.copy_location(ast.Call(e.func.orelse, e.args, e.keywords), e)
        return self.calls(e, frame)

    def test(self, e: Any, frame: Frame) -> bool | None:
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

    def plainly(self, f: Any, args: list[Values], place: str) -> Values:
        """A call as it was written."""
        known = [value[0].value for value in args if len(value) == 1 and isinstance(value[0], Known)]
        if f is getattr and len(known) == len(args) >= 2 and isinstance(known[1], str):
            return self.attribute(Known(known[0]), known[1])
        if any(f is one for one in _EVALUATED) and len(known) == len(args):
            items = [value if isinstance(value, _PLAIN) else items_of((Known(value),)) for value in known]
            try:
                made = f(*items)
            except (TypeError, ValueError):
                return UNKNOWN
            return (Known(made if isinstance(made, int) else list(islice(made, 1000))),)
        if isinstance(f, MethodType) and isinstance(f.__self__, _LISTS) and not args:
            held = f.__self__._modules
            lists: dict[str, Any] = {"keys": held.keys(), "values": held.values(), "items": held.items()}
            lists |= {"children": held.values(), "named_children": held.items()}
            return (Known(list(lists[f.__name__])),) if f.__name__ in lists else UNKNOWN
        return UNKNOWN

    def attribute(self, owner: Any, name: str) -> Values:
        """owner.name, without running anything of the owner's."""
        value = owner.value if isinstance(owner, Known) else None
        if isinstance(value, ModuleType):
            return (Known(getattr(value, name)),) if hasattr(value, name) else UNKNOWN
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
        return UNKNOWN if value is None or found is OTHER or hasattr(type(found), "__get__") else (Known(found),)


def union(*values: Values) -> Values:
    found: list[Any] = []
    for one in (one for value in values for one in value):
        if not any(_is_same(one, other) for other in found):
            found.append(one)
    return tuple(found[:16]) or UNKNOWN


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Known) and isinstance(other, Known):
        plain = type(one.value) is type(other.value) and type(one.value) in _PLAIN
        return one.value is other.value or (plain and bool(one.value == other.value))
    return one is other or (one is not OTHER and bool(one == other))


def _is_none(value: Any) -> bool:
    return isinstance(value, Known) and value.value is None


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


def plain_value(values: Values) -> Any:
    return values[0].value if len(values) == 1 and isinstance(values[0], Known) else OTHER


def _item(owner: Any, key: Any) -> Values:
    at: Any = key.value if isinstance(key, Known) else None
    items = items_of((owner,)) if type(at) is int else None
    if items is not None and -len(items) <= at < len(items):
        return (Known(items[at]),)
    held = owner.value if isinstance(owner, Known) else None
    held = held._modules if isinstance(held, nn.ModuleDict) else held
    return (Known(held[at]),) if type(at) is str and isinstance(held, dict) and at in held else UNKNOWN


def items_of(values: Values) -> list[Any] | None:
    """What an object that is iterated over yields, if that is known."""
    value = plain_value(values)
    if isinstance(value, (nn.ModuleList, nn.Sequential)):
        return children(value)
    if isinstance(value, nn.ModuleDict):
        return list(value._modules)
    return list(value) if type(value) in (list, tuple, range) else None
