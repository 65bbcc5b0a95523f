"""Triton's interpreter without what it does again and again, for tests and rehearsals: half of the time that they take.

Kernels compute what they compute in the interpreter as it is. Its parts that are replaced are private.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_PARTS = ("_patch_lang", "_get_np_dtype", "interpreter_builder", "TritonSemantic")


def hurry() -> None:
    """Replace the slow parts, once, before any kernel runs; a version of Triton that has not got them stays slow.

    Triton's language stays what it is while kernels run: whoever compiles in this process puts it back.
    """
    if not all(hasattr(interpreter, name) for name in _PARTS):
        return
    _replace_language_once()
    _find_dtypes_once()
    _describe_blocks_once()
    _broadcast_what_differs()
    # A check that sums of integers fit, which compiled kernels have only where somebody asks for it.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _replace_language_once() -> None:
    """Once, not at each launch and at each call of a device function."""
    replace_language = interpreter._patch_lang
    nothing_to_restore = SimpleNamespace(restore=lambda: None)
    used: dict[Any, list[Any]] = {}  # by a function, of Triton's language

    def replace_once(function: Any) -> Any:
        if function not in used:
            seen = {id(value) for value in function.__globals__.values()}
            used[function] = [of for of in (tl, core) if id(of) in seen]
        if any(core.is_builtin(of.load) for of in used[function]):
            replace_language(function)
        return nothing_to_restore

    interpreter._patch_lang = replace_once


def _find_dtypes_once() -> None:
    """NumPy's dtype of one of Triton's: not from a table that is made anew for each operation."""
    find = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def find_once(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in found:
            found[scalar.name] = find(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = find_once


def _describe_blocks_once() -> None:
    """What follows from a block's shape and dtype, and from a value's type."""
    describe_block, describe_value = core.block_type.__init__, core.tensor.__init__
    blocks: dict[Any, Any] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not core.dtype:  # pointers
            describe_block(self, element_ty, shape)
            return
        key = element_ty.name, *[getattr(size, "value", size) for size in shape]
        if key not in blocks:
            describe_block(self, element_ty, shape)
            blocks[key] = self.__dict__
        self.__dict__ = blocks[key]

    def value(self: Any, handle: Any, type: Any) -> None:
        known = vars(type).get("of_values")
        if known is None:
            describe_value(self, handle, type)
            type.of_values = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known

    core.block_type.__init__, core.tensor.__init__ = block, value


def _broadcast_what_differs() -> None:
    """Operands of one shape are what they are."""
    of = interpreter.TritonSemantic
    broadcast = of.broadcast_impl_value

    def broadcast_value(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one is other or _sizes(one) == _sizes(other):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def _sizes(of: Any) -> Any:
        return of.shape.values if of.is_block() else None

    of.broadcast_impl_value = broadcast_value
