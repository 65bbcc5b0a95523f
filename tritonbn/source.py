"""The syntax tree of a function, if it is really that of its code, and functions made of changed trees."""

import __future__

import ast
import builtins
import inspect
import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import CellType, CodeType, FunctionType
from typing import Any

_INNER = "tritonbn_inner"
FunctionNode = ast.FunctionDef | ast.Lambda
# What of the compiler's flags a function's code carries: `from __future__ import ...`.
_FUTURE_FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names[2:])
# Those that say what kind of function it is: with *args, **kwargs, a generator or a coroutine.
_KINDS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE


class SourceError(Exception):
    """There is no source that a function could be made of anew; says why, as the end of a sentence about it."""


@dataclass(frozen=True)
class Source:
    """A function and its syntax tree."""

    function: FunctionType
    node: FunctionNode
    class_name: str  # of the class it was written in, which private names like self.__x carry; "" for none
    imports: tuple[str, ...]  # that the file imports at its top: their methods are called by other code

    @property
    def arguments(self) -> list[str]:
        """The names of all parameters, in order."""
        return list(self.function.__code__.co_varnames[: _argument_count(self.function.__code__)])

    def place(self, node: ast.AST) -> str:
        """File and line of a part of the tree."""
        code = self.function.__code__
        return f"{code.co_filename.rpartition('/')[2]}:{getattr(node, 'lineno', code.co_firstlineno)}"

    def text(self, node: ast.expr) -> str:
        """A part of the tree as it might be written, shortened."""
        text = ast.unparse(node)
        return text if len(text) <= 40 else f"{text[:37]}..."

    def value(self, name: str, default: Any) -> Any:
        """What a name that is not local means in the function now."""
        function = self.function
        if name not in function.__code__.co_freevars:
            return function.__globals__.get(name, vars(builtins).get(name, default))
        cell = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))[name]
        try:
            return cell.cell_contents
        except ValueError:  # not assigned yet
            return default

    def compiled(self, body: list[ast.stmt] | ast.expr, names: Mapping[str, Any]) -> FunctionType:
        """The function with another body, in which `names` mean these values; same globals, closure and defaults."""
        function = self.function
        code = _compiled(self, body, [*function.__code__.co_freevars, *names])
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        cells |= {name: CellType(value) for name, value in names.items()}
        closure = tuple(cells[name] for name in code.co_freevars)
        made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
        return made


def source_of(function: FunctionType) -> Source:
    """The tree of a Python function or lambda. Raises SourceError where there is none, or where it is another's.

    The tree is compiled and compared with the function's code: a file that was edited after its import, and a
    function that somebody rewrote, are refused.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise SourceError(f"has no source code ({code.co_filename})")
    functions, imports = _functions("".join(lines))
    for node, class_name in functions.get((code.co_name, code.co_firstlineno), []):
        source = Source(function, node, class_name, imports)
        if _same(_compiled(source, node.body, list(code.co_freevars)), code):
            return source
    raise SourceError(f"has source code that is not what runs ({code.co_filename}:{code.co_firstlineno})")


def _argument_count(code: CodeType) -> int:
    return code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)


@cache
def _functions(text: str) -> tuple[dict[tuple[str, int], list[tuple[FunctionNode, str]]], tuple[str, ...]]:
    """The functions and lambdas of a file by name and first line, each with its class; and the names it imports."""
    found: dict[tuple[str, int], list[tuple[FunctionNode, str]]] = {}
    imports: dict[str, None] = {}

    def walk(node: ast.AST, class_name: str, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                line = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found.setdefault((child.name, line), []).append((child, class_name))
            elif isinstance(child, ast.Lambda):
                found.setdefault(("<lambda>", child.lineno), []).append((child, class_name))
            elif isinstance(child, (ast.Import, ast.ImportFrom)) and top:
                imports.update((alias.asname or alias.name.partition(".")[0], None) for alias in child.names)
            scope = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef))
            walk(child, child.name if isinstance(child, ast.ClassDef) else class_name, top and not scope)

    try:
        walk(ast.parse(text), "", True)
    except (SyntaxError, ValueError, RecursionError):
        return {}, ()
    return found, tuple(name for name in imports if name != "*")


def _compiled(source: Source, body: list[ast.stmt] | ast.expr, free: list[str]) -> CodeType:
    """The code of the function with that body, within a function whose parameters are its free variables."""
    node, code = source.node, source.function.__code__
    arguments = ast.arguments(
        posonlyargs=[ast.arg(a.arg) for a in node.args.posonlyargs],
        args=[ast.arg(a.arg) for a in node.args.args],
        vararg=node.args.vararg and ast.arg(node.args.vararg.arg),
        kwonlyargs=[ast.arg(a.arg) for a in node.args.kwonlyargs],
        kw_defaults=[None] * len(node.args.kwonlyargs),
        kwarg=node.args.kwarg and ast.arg(node.args.kwarg.arg),
        defaults=[],
    )
    inner: ast.stmt
    if isinstance(body, ast.expr):
        inner = ast.Expr(ast.Lambda(arguments, body))
    else:
        # Not by its own name: the function may mean a global of that name.
        inner = ast.FunctionDef(name=_INNER, args=arguments, body=body, decorator_list=[], type_params=[])  # type: ignore[call-arg,unused-ignore]
    outer = ast.FunctionDef(
        name="outer",
        args=ast.arguments(
            posonlyargs=[], args=[ast.arg(name) for name in free], kwonlyargs=[], kw_defaults=[], defaults=[]
        ),
        body=[inner],
        decorator_list=[],
        type_params=[],
    )  # type: ignore[call-arg,unused-ignore]
    statement: ast.stmt = outer
    if source.class_name:  # for names like self.__x
        statement = ast.ClassDef(
            name=source.class_name, bases=[], keywords=[], body=[outer], decorator_list=[], type_params=[]
        )  # type: ignore[call-arg,unused-ignore]
    ast.copy_location(inner, node)
    imports: list[ast.stmt] = [ast.Import([ast.alias(name)]) for name in source.imports]
    module = ast.fix_missing_locations(ast.Module([*imports, statement], []))
    whole: CodeType = compile(module, code.co_filename, "exec", code.co_flags & _FUTURE_FLAGS, dont_inherit=True)
    made: Any = whole
    for name in filter(None, (source.class_name, "outer", _INNER if isinstance(body, list) else "<lambda>")):
        made = next(c for c in made.co_consts if isinstance(c, CodeType) and c.co_name == name)
    names = {"co_qualname": getattr(code, "co_qualname")} if hasattr(code, "co_qualname") else {}  # noqa: B009
    return made.replace(co_firstlineno=code.co_firstlineno, co_name=code.co_name, **names)  # type: ignore[no-any-return]


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether two codes do the same; lines and columns apart."""
    names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount",
             "co_posonlyargcount")  # fmt: skip
    return (
        all(getattr(one, name) == getattr(other, name) for name in names)
        and one.co_flags & _KINDS == other.co_flags & _KINDS
        and len(one.co_consts) == len(other.co_consts)
        and all(
            _same(a, b)
            if isinstance(a, CodeType) and isinstance(b, CodeType)
            else type(a) is type(b) and repr(a) == repr(b)
            for a, b in zip(one.co_consts, other.co_consts, strict=True)
        )
    )
