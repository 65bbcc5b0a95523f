"""What the tensors of a call are, and so whether the kernels take them: looked at once, then recognized."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonbn.plan import Operation, Plan
from tritonbn.planning import alone, plan_for
from tritonbn.tables import epoch

# Signatures that are kept; all are forgotten when there are too many, of shapes that never repeat.
LIMIT = 4096


class Signature(NamedTuple):
    """What follows from the tensors of a call; `plans` are those found so far."""

    fits: bool  # the kernels can do it, torch would not refuse, and nothing must see each operation
    records: bool  # autograd is to differentiate it
    dense: bool  # x and residual are dense in `memory_format`, all vectors contiguous: nothing has to be copied
    memory_format: torch.memory_format  # of the result
    parameter_dtype: torch.dtype  # of the gradients of weight and bias
    plans: dict[tuple[Operation, bool, bool], tuple[int, Plan]]
    own: dict[int, tuple[Plan, Plan]]  # the plans that others share, and this signature's own instead

    def plan(self, operation: Operation, x: Tensor, costly: bool = False) -> Plan:
        """The plan for x, dense, which is this signature's own: its forward always launches the same kernels."""
        key = operation, costly, torch.are_deterministic_algorithms_enabled()
        now, kept = epoch(), self.plans.get(key)
        if kept is None or kept[0] != now or (kept[1].cooperative and not alone()):
            shared = plan_for(operation, x, costly)
            _, own = self.own.setdefault(id(shared), (shared, replace(shared, kept={})))  # shared is kept: so is its id
            kept = self.plans[key] = now, own
        return kept[1]


NONE = Signature(False, False, False, torch.contiguous_format, torch.float32, {}, {})
# Of tensors in compiled code, which say no more.
SYMBOLIC = NONE._replace(fits=True)
_known: dict[tuple[Any, ...], tuple[Any, Callable[[Any], Any], Signature]] = {}


def known(tensors: tuple[Any, ...], training: bool, look: Callable[[tuple[Any, ...], bool], Signature]) -> Signature:
    """look(tensors, training), the `Signature` of (x, running_mean, running_var, weight, bias, residual).

    It is looked up by the shape of x and by who the parameters are, and holds if the tensors are in each respect what
    they were: type, dtype, device, sizes, strides, requires_grad, and whatever makes torch treat them or this thread
    specially. Torch compares all of that at once, as it does before it runs compiled code.
    """
    x, running_mean, running_var, weight, bias, residual = tensors
    key = (
        x.shape, id(running_mean), id(running_var), id(weight), id(bias), residual is None, training,
        torch.is_grad_enabled(),
    )  # fmt: skip
    try:
        guards, given, found = _known[key]
        if guards.check(*given(tensors)):
            return found
    except KeyError:
        pass
    found = look(tensors, training)
    there = [index for index, t in enumerate(tensors) if t is not None]
    if found.fits and (guards := _guards([tensors[index] for index in there])) is not None:
        if len(_known) >= LIMIT:
            _known.clear()
        given = operator.itemgetter(*there) if len(there) > 1 else operator.itemgetter(slice(1))  # tuples, both
        _known[key] = guards, given, found
    return found


def forget() -> None:
    """Look at everything again."""
    _known.clear()


def _guards(given: list[Tensor]) -> Any:
    """What recognizes these tensors, or others that do not differ from them; None where torch has no such thing."""
    sizes: list[Any] = [list(t.shape) for t in given]
    strides: list[Any] = [list(t.stride()) for t in given]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guards if guards.check(*given) else None
    except (AttributeError, RuntimeError, SystemError, TypeError):
        return None


def parameter_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The dtype of the parameters' gradients."""
    return next((p.dtype for p in parameters if p is not None), x.dtype)
