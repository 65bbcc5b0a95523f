"""One step of a network, batch norm -> add -> activation: as one operation where that is the same, else as it was.

What the modules are, and who watches them, is looked at when they run: a hook, another slope or another module put in
the place of one of them takes effect at once. `tritonbn.rewrite` makes forwards that call these functions.
"""

import operator
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial, wraps
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from tritonbn.activations import IDENTITY, Activation, of_call, of_method, of_module
from tritonbn.certainty import is_certain, saves
from tritonbn.modules import TritonBatchNorm
from tritonbn.types import children, is_bare, is_norm, is_sequential, original

# Functions and methods that a forward may call, written anew: their first argument (after self), and what they return,
# may be late.
FUNCTIONS: dict[Any, Any] = {}
METHODS: dict[Any, Any] = {}
# Forwards that do nothing but call these children of theirs, and add and multiply tensors.
ONLY_CALLS: dict[Any, tuple[Any, frozenset[str] | None]] = {}  # with their code
ADDITIONS = (operator.add, operator.iadd, torch.add)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FRESH = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
_TORCHS = {kind for kind in vars(nn.modules).values() if isinstance(kind, type)}
# Values whose operators do nothing but compute.
_PLAIN = {bool, int, float, str, bytes, type(None), tuple, list, dict, torch.dtype, torch.device, torch.Size}
_ITERATIONS = (nn.ModuleList.__iter__, nn.Sequential.__iter__)


class Fused:
    """What the classes of containers with fused steps have in common; see tritonbn.fused_forward."""

    tritonbn_opened: Callable[..., Any]  # the forward, which may return what is late

    def __init_subclass__(cls) -> None:
        """No registry hears of our classes."""


class Late:
    """The output of a batch norm of x, plus what is added to it if there is that, computed when somebody needs it."""

    __slots__ = ("norm", "other", "residual", "value", "x")

    def __init__(self, norm: TritonBatchNorm, x: Tensor) -> None:
        self.norm: TritonBatchNorm | None = norm  # None once it was computed
        self.x: Tensor | None = x
        self.residual: Tensor | None = None
        self.other: tuple[TritonBatchNorm, Tensor] | None = None  # another batch norm, and its input
        self.value: Any = None

    @property
    def added(self) -> bool:
        """Whether something is added to it already."""
        return self.residual is not None or self.other is not None

    @property
    def norms(self) -> tuple[TritonBatchNorm, ...]:
        """The batch norms that wait to be computed."""
        if self.norm is None:
            return ()
        return (self.norm,) if self.other is None else (self.norm, self.other[0])

    def compute(self, activation: Activation = IDENTITY) -> Any:
        """activation(norm(x) + what is added), for the only one who needs it. Raises what the module raises."""
        norm, x, residual, other = self.norm, self.x, self.residual, self.other
        if norm is None:
            return self.value
        assert x is not None
        self.norm = self.x = self.residual = self.other = None
        if other is not None:
            return norm.normalize_add(x, *other, activation)
        return norm.normalize(x, activation, residual)

    def take(self) -> tuple[TritonBatchNorm, Tensor]:
        """The batch norm and its input, for who computes it in this one's place."""
        assert self.norm is not None
        assert self.x is not None
        taken = self.norm, self.x
        self.norm = self.x = None
        return taken

    def settle(self) -> None:
        """Compute it in its place; who needs it will come."""
        if self.norm is not None:
            self.value = self.compute()


def remember(made: Callable[..., Any], function: Any, *inner: Any) -> None:
    """Note of what a function was made: it may be given other code later, as by IPython's autoreload."""
    first = (function, function.__code__, function.__defaults__, function.__kwdefaults__)
    vars(made)["tritonbn_made_of"] = (first, *(one for other in inner for one in vars(other)["tritonbn_made_of"]))


def is_current(made: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether a function is still that of which `made` was made; not asked in compiled code."""
    return made is not None and (is_compiling() or is_unchanged(made))


def is_unchanged(made: Any) -> bool:
    """Whether all functions of which `made` was made are what they were."""
    for function, code, defaults, keywords in getattr(made, "tritonbn_made_of", ()):
        if (
            function.__code__ is not code
            or function.__defaults__ is not defaults
            or function.__kwdefaults__ is not keywords
        ):
            return False
    return True


def finish(value: Any) -> Any:
    """The value; computed now if it is late."""
    return value.compute() if type(value) is Late else value


def call(function: Any, x: Any) -> Any:
    """function(x), where x may be late and so may be what is returned."""
    late = type(x) is Late
    if late and x.norm is None:
        x, late = x.value, False
    if isinstance(function, nn.Module):
        if late:
            if not is_bare(function):
                return function(x.compute())
            activation = of_module(function)
            if activation is not None:
                return _activated(x, activation, function, ())
            if is_idle(function):
                return x
        if isinstance(function, TritonBatchNorm):
            x = x.compute() if late else x
            if isinstance(x, Tensor) and is_norm(function) and is_bare(function):
                return Late(function, x)
        elif isinstance(function, Fused) and (late or is_bare(function)):
            return function.tritonbn_opened(x)
        return function(finish(x) if late else x)
    if type(function) is MethodType:
        opened = METHODS.get(function.__func__)
        return opened(function.__self__, x) if is_current(opened) else function(finish(x))
    if type(function) is FunctionType and is_current(opened := FUNCTIONS.get(function)):
        return opened(x)
    return apply(function, x) if late else function(x)


def follow(function: Any) -> Any:
    """The function, or that which it became if it was written anew: that may return what is late."""
    if type(function) is MethodType:
        opened = METHODS.get(function.__func__)
        return MethodType(opened, function.__self__) if is_current(opened) else function
    opened = FUNCTIONS.get(function) if type(function) is FunctionType else None
    return opened if is_current(opened) else function


def apply(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """function(x, *args, **kwargs), or the method of that name: one that may be an activation or an idle dropout."""
    if type(x) is Late and x.norm is not None:
        if type(function) is partial and not function.args:
            function, kwargs = function.func, function.keywords | kwargs
        if isinstance(function, str):
            activation = of_method(function)
        else:
            activation = of_call(function, args, kwargs)
            if activation is None and any(function is f for f in DROPOUTS) and is_idle_call(*args, **kwargs):
                return x
        if activation is not None:
            return _activated(x, activation, function, args, kwargs)
    x = finish(x)
    return getattr(x, function)(*args) if isinstance(function, str) else function(x, *args, **kwargs)


def add(how: Any, left: Any, right: Any) -> Any:
    """left + right; how: "+", "+=", or a method's name or a function that adds."""
    fresh = type(left) is Late  # nobody else has it
    left, right = (x.value if type(x) is Late and x.norm is None else x for x in (left, right))
    if type(left) is Late and type(right) is Late:
        if _add_up(left, right):
            left.other = right.take()
            return left
        if _adds_frozen(left, right):
            right = right.compute()  # as a residual: its input is not to be saved
        else:
            left = left.compute()  # it came first
    if type(left) is Late and _adds_up(left, right):
        left.residual = right
        return left
    if type(right) is Late and (fresh or how not in ("+=", "add_", operator.iadd)) and _adds_up(right, left):
        right.residual = left
        return right
    left, right = finish(left), finish(right)
    if how == "+":
        return left + right
    if how == "+=":
        return operator.iadd(left, right)  # type: ignore[no-untyped-call]
    return getattr(left, how)(right) if isinstance(how, str) else how(left, right)


def beside(function: Any, x: Any, *waiting: Any) -> Any:
    """function(x) while others may be late: they stay so if the function is a module that cannot tell.

    Then what it returns may be late, too, if computing it will raise no error: they may be added to each other.
    """
    quiet = None  # nobody waits
    for other in waiting:
        if type(other) is Late and other.norm is not None:
            apart = quiet is not False and not (type(x) is Late and x.norm is not None)
            quiet = apart and all(is_quiet(function, norm) for norm in other.norms) and is_certain(other.norm, other.x)
    if quiet:
        y = call(function, finish(x))
        return finish(y) if type(y) is Late and y.norm is not None and (y.added or not is_certain(y.norm, y.x)) else y
    if quiet is not None:
        settle(waiting)
    return call(function, x)


def settled(items: Any, value: Any) -> Any:
    """The value, which stays late while somebody takes an item of modules in a list or tuple; finished for all else."""
    if type(items) in (list, tuple) or getattr(type(items), "__iter__", None) in _ITERATIONS:
        return value
    return finish(value)


def plain(value: Any, *waiting: Any) -> Any:
    """The value; what is late is computed first unless the value is one whose operators do nothing else."""
    if type(value) not in _PLAIN and not isinstance(value, (Enum, nn.ModuleList, nn.Sequential)):
        settle(waiting)
    return value


def settle(values: Iterable[Any]) -> None:
    """Compute all that is late."""
    for value in values:
        if type(value) is Late:
            value.settle()


def settle_after(error: BaseException) -> None:
    """Compute what waited in functions written anew when an error was raised there: as if it had been in its place."""
    place = error.__traceback__
    while place is not None:
        names = place.tb_frame.f_code.co_freevars
        if any(name.startswith("tritonbn_") for name in names) or place.tb_frame.f_globals is globals():
            settle(list(place.tb_frame.f_locals.values()))
        place = place.tb_next


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function written anew: one that leaves nothing late behind when it raises."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            settle_after(error)
            raise

    return run


def closed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with tensors in the place of what is late."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return finish(function(*[finish(argument) for argument in args], **kwargs))

    return run


def sequence(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The modules of a Sequential one after the other; x and the output may be late."""
    if len(args) != 1 or kwargs or not module._modules:
        return nn.Sequential.forward(module, *args, **kwargs)  # type: ignore[arg-type,no-untyped-call]
    x = args[0]
    for child in children(module):
        x = call(child, x)
    return x


def is_quiet(module: Any, norm: nn.Module | None) -> bool:
    """Whether a call of it writes nothing that the norm reads, nor could tell whether that was computed: modules of
    torch that are not in place and not watched, other batch norms, and containers that do no more than call those."""
    if not isinstance(module, nn.Module) or module is norm or not is_bare(module):
        return False
    kind = type(module)
    if (kind in _TORCHS and not module._modules) or is_norm(module):
        return not (module.__dict__.get("inplace") or (module._buffers and share(module, norm)))
    if is_sequential(module):
        before: Any = None
        for child in children(module):
            if not is_quiet(child, norm):
                fresh = type(before) in _FRESH or is_norm(before)  # what it changes in place nobody else has
                if not (fresh and type(child) in _TORCHS and is_bare(child) and not child._modules):
                    return False
            before = child
        return True
    forward: Any = original(kind).forward
    code, calls = ONLY_CALLS.get(forward, (None, None))
    if calls is None or not (is_compiling() or code is forward.__code__):
        return False
    parts = [module._modules.get(name, module) for name in calls]  # module: something else than a child
    return all(part is None or (part is not module and is_quiet(part, norm)) for part in parts)


def share(one: nn.Module, other: nn.Module | None) -> bool:
    """Whether both have the same tensor for their statistics."""
    theirs = other._buffers.values() if other is not None else ()
    return any(mine is not None and mine is its for mine in one._buffers.values() for its in theirs)


def _activated(x: Late, activation: Activation, function: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
    """activation(x), which is what function(x, *args) computes: as one operation if nothing else is saved for it."""
    if activation == IDENTITY:
        return x
    assert x.x is not None
    # Whoever gave the residual may write to it before the backward.
    saves = x.residual is not None and activation.keeps_residual and torch.is_grad_enabled()
    # Autocast computes softplus in float32, whatever its input.
    if saves or (activation.name == "softplus" and torch.is_autocast_enabled(x.x.device.type)):
        y = x.compute()
        return getattr(y, function)() if isinstance(function, str) else function(y, *args, **(kwargs or {}))
    return x.compute(activation)


def _add_up(left: Late, right: Late) -> bool:
    """Whether two batch norms are added element by element, none to itself, and have no statistics in one place."""
    return (
        right.norm is not left.norm
        and not right.added
        and _adds_up(left, right.x)
        and right.norm is not None
        and not share(right.norm, left.norm)
        and saves(left.norm, left.x) == saves(right.norm, right.x)
    )


def _adds_frozen(left: Late, right: Late) -> bool:
    """Whether the second one, of which autograd saves nothing, may be computed first."""
    return (
        right.norm is not None
        and saves(left.norm, left.x)
        and not saves(right.norm, right.x)
        and not share(right.norm, left.norm)
        and is_certain(right.norm, right.x)
    )


def _adds_up(late: Late, other: object) -> bool:
    """Whether the other is added element by element and changes neither shape nor dtype."""
    x = late.x
    assert x is not None
    return (
        not late.added
        and isinstance(other, Tensor)
        and other.shape == x.shape
        and other.dtype == x.dtype
        and other.device == x.device
    )


def is_idle(module: Any) -> bool:
    """Whether it is a dropout that returns its input as it is."""
    return type(module) in DROPOUT_MODULES and (not module.training or module.p == 0)


def is_idle_call(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether F.dropout(x, p, training, inplace) returns x."""
    return p == 0 or not training
