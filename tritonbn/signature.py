"""What the tensors of a call are, and so whether the kernels take them: found out once, then recognized."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonbn import plan as plans
from tritonbn.launch import memory_format_of, plan_for
from tritonbn.plan import Operation, Plan, fits

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Signatures that are kept; all are forgotten when there are too many, of shapes that never repeat.
LIMIT = 4096


class Signature(NamedTuple):
    """What follows from the tensors of a call; `plans` are those found so far."""

    fits: bool  # the kernels can do it, torch would not refuse, and nothing must see each operation
    records: bool  # autograd is to differentiate it
    dense: bool  # x and residual are dense in `memory_format`, all vectors contiguous: nothing has to be copied
    memory_format: torch.memory_format  # of the result
    parameter_dtype: torch.dtype  # of the gradients of weight and bias
    plans: dict[tuple[Operation, bool], tuple[object, Plan]]

    def plan(self, operation: Operation, x: Tensor, costly: bool = False) -> Plan:
        """The plan for x, dense."""
        now = epoch()
        then, plan = self.plans.get((operation, costly), (None, None))
        if plan is None or then != now:
            plan = plan_for(operation, x, costly)
            self.plans[operation, costly] = now, plan
        return plan


NONE = Signature(False, False, False, torch.contiguous_format, torch.float32, {})
_known: dict[tuple[Any, ...], tuple[Any, Signature]] = {}


def epoch() -> object:
    """What changes when plans do."""
    return plans._forced


def known(tensors: tuple[Any, ...], training: bool) -> Signature:
    """The `Signature` of (x, running_mean, running_var, weight, bias, residual).

    It is looked up by the shape of x and by who the parameters are, and holds if the tensors are in each respect what
    they were: type, dtype, device, sizes, strides, requires_grad, and whatever makes torch treat them or this thread
    specially. Torch compares all of that at once, as it does before it runs compiled code.
    """
    x, running_mean, running_var, weight, bias, residual = tensors
    key = (
        x.shape, id(running_mean), id(running_var), id(weight), id(bias), residual is None, training,
        torch.is_grad_enabled(),
    )  # fmt: skip
    given = [t for t in tensors if t is not None]
    try:
        guards, found = _known[key]
        if guards.check(*given):
            return found
    except KeyError:
        pass
    if not _is_plain(given):
        return NONE
    found = signature(tensors, training)
    if (guards := _guards(given)) is not None:
        if len(_known) >= LIMIT:
            _known.clear()
        _known[key] = guards, found
    return found


def _guards(given: list[Tensor]) -> Any:
    """What recognizes these tensors, or others that do not differ from them; None where torch has no such thing."""
    try:
        guards = torch._C._dynamo.guards.TensorGuards(
            *given,
            dynamic_dims_sizes=[list(t.shape) for t in given],
            dynamic_dims_strides=[list(t.stride()) for t in given],
        )
        return guards if guards.check(*given) else None
    except (AttributeError, RuntimeError, SystemError, TypeError):
        return None


def signature(tensors: tuple[Any, ...], training: bool) -> Signature:
    """The `Signature` of tensors that may be symbolic, and are not looked at for what must see each operation."""
    x, running_mean, running_var, weight, bias, residual = tensors
    grad = torch.is_grad_enabled()
    if not _fit(x, running_mean, running_var, weight, bias, residual, training) or (
        grad and any(s is not None and s.requires_grad for s in (running_mean, running_var))
    ):
        return NONE
    memory_format = memory_format_of(x)
    return Signature(
        True,
        grad and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)),
        all(t is None or t.is_contiguous(memory_format=memory_format) for t in (x, residual))
        and all(v is None or v.is_contiguous() for v in tensors[1:5]),
        memory_format,
        parameter_dtype(x, weight, bias),
        {},
    )


def parameter_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The dtype of the parameters' gradients."""
    return next((p.dtype for p in parameters if p is not None), x.dtype)


def _is_plain(given: list[Any]) -> bool:
    """Whether nothing must see each operation: no subclass, lazy negation, transform (nor what one left) or trace.

    Nor tensors of inference mode that autograd would have to save: torch refuses those before it writes anything.
    """
    return (
        all(type(t) in (Tensor, Parameter) and not t.is_neg() for t in given)
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, given))
        and not (torch.is_grad_enabled() and any(t.is_inference() for t in given))
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def _fit(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
) -> bool:
    """Whether shapes, strides, dtypes and devices are those that the kernels take."""
    numel = x.numel()
    if x.dtype not in _DTYPES or x.dim() < 2 or numel == 0 or x.layout is not torch.strided:
        return False
    N, C = x.shape[0], x.shape[1]
    if not fits(N, C, numel // (N * C)):
        return False
    if training:
        if numel == C or (running_mean is None) != (running_var is None):
            return False
    elif running_mean is None or running_var is None:
        return False
    if not _vectors_fit(x, C, running_mean, running_var, weight, bias) or not _residual_fits(x, residual):
        return False
    statistics = [s for s in (running_mean, running_var) if s is not None]
    return C == 1 or all(s.stride(0) != 0 for s in statistics)  # expanded: updates would meet in one place


def _residual_fits(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the residual, whose shape was checked, is of the dtype, device and kind of x."""
    return residual is None or (
        residual.dtype == x.dtype and residual.device == x.device and residual.layout is torch.strided
    )


def _vectors_fit(x: Tensor, C: int, *vectors: Tensor | None) -> bool:
    """Whether weights and statistics are [C] on the device of x, all in its dtype or all in float32 for 16-bit x."""
    given = [v for v in vectors if v is not None]
    allowed = (x.dtype, torch.float32) if x.itemsize == 2 else (x.dtype,)
    return all(
        isinstance(v, Tensor)
        and v.shape == (C,)
        and v.dtype in allowed
        and v.dtype == given[0].dtype
        and v.device == x.device
        for v in given
    )
