"""Syntax trees of functions: found if they are those of the code, and made into functions that do the same."""

import ast
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tritonbn.rewrite import opened
from tritonbn.source import SourceError, source_of

LAMBDAS: list[Any] = [lambda x: x + 1, lambda x: x + 2, lambda x: (lambda y: y * x)(3)]


class Mangled:
    """Private names, super(), defaults, keyword-only arguments and a closure."""

    def __init__(self) -> None:
        self.__hidden = 5

    def hidden(self, x: int, y: int = 2, *more: int, z: int = 3, **rest: int) -> Any:
        return super().__eq__(self), self.__hidden + x + y + z + sum(more) + sum(rest.values())


def counter() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def again(function: Any) -> Any:
    """The same function, made of its tree."""
    source = source_of(function)
    node = source.node
    body = [ast.Return(node.body)] if isinstance(node.body, ast.expr) else node.body
    return source.compiled([ast.fix_missing_locations(ast.copy_location(s, node)) for s in body], {})


def test_nearly_every_function_of_torch_has_a_tree() -> None:
    """Its code is compiled anew and compared: the trees are right in all of these."""
    found = refused = 0
    for module in (torch.nn.functional, torch.nn.modules.module, torch.nn.modules.conv, torch.nn.modules.transformer):
        for value in vars(module).values():
            owners = [value] if inspect.isclass(value) and value.__module__ == module.__name__ else []
            functions = [f for owner in owners for f in vars(owner).values()] + [value]
            for function in functions:
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    try:
                        source_of(function)
                        found += 1
                    except SourceError:
                        refused += 1
    assert found > 250
    assert refused <= 5


@pytest.mark.parametrize("function", LAMBDAS)
def test_lambdas_of_one_line_are_told_apart(function: Any) -> None:
    assert again(function)(7) == function(7)


def test_private_names_super_and_arguments_stay() -> None:
    one = Mangled()
    made = again(Mangled.hidden)
    for args, kwargs in (((1,), {}), ((1, 5, 6, 7), {"z": 8, "w": 9})):
        assert made(one, *args, **kwargs) == one.hidden(*args, **kwargs)
    assert list(inspect.signature(made).parameters) == list(inspect.signature(Mangled.hidden).parameters)
    assert (made.__qualname__, made.__code__.co_filename) == (Mangled.hidden.__qualname__, __file__)


def test_closures_are_shared() -> None:
    step = counter()
    made = again(step)
    assert [step(), made(), step()] == [1, 2, 3]


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_file_that_was_edited_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "generated.py"
    path.write_text("def f(x):\n    return x + 1\n")
    f = module_of(path).f
    path.write_text("def f(x):\n    return x + 2\n")
    with pytest.raises(SourceError, match="has source code that is not what runs"):
        source_of(f)


def test_functions_without_source_are_refused() -> None:
    names: dict[str, Any] = {}
    exec("def f(x): return x", names)
    with pytest.raises(SourceError, match=r"has no source code \(<string>\)"):
        source_of(names["f"])


def test_decorated_functions_are_followed_where_the_decorator_keeps_them_in_its_closure() -> None:
    def double(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            return 2 * function(*args)

        return run

    @double
    def plain(self: Any, x: int) -> int:
        return x + 1

    assert opened(plain, True).function(None, 3) == 8
    kept = {}

    def elsewhere(function: Any) -> Any:
        kept["function"] = function

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            return kept["function"](*args)

        return run

    with pytest.raises(SourceError, match="is decorated in a way that cannot be followed"):
        opened(elsewhere(plain), True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tracebacks of Python 3.10 have no columns")
def test_lines_are_those_that_were_written() -> None:
    function: Any = nn.Linear.forward
    source = source_of(function)
    made: Any = source.compiled(source.node.body, {}).__code__
    assert list(made.co_positions()) == list(function.__code__.co_positions())
