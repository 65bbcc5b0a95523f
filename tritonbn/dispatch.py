"""The record of a call: what its tensors are, whether the kernels take them, and what then runs. Made once, recognized.

A call is recognized by what the tensors are, not by who they are: fresh parameters of the same kind, as those of
`torch.func.functional_call`, find the record that others left.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonbn import handles, launch, planning, private, tickets
from tritonbn.launch import Planned
from tritonbn.plan import Operation, fits
from tritonbn.planning import alone, memory_format_of, plan_for
from tritonbn.tables import epoch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Sorts of calls that are kept, and records of each; the oldest are forgotten, of shapes that never repeat.
LIMIT = 2048
EACH = 16

# Reasons of calls that are no loss.
REFUSED = "torch refuses it"
EMPTY = "the input is empty"

# input, running_mean, running_var, weight, bias, residual, num_batches_tracked
Tensors = tuple[Any, ...]


class Call(NamedTuple):
    """What follows from the tensors of a call; the dictionaries are filled as they are asked."""

    reason: str  # why torch computes it and not the kernels; empty: they do
    records: bool  # autograd is to differentiate it
    dense: bool  # x and residual are dense in `memory_format`, all vectors contiguous: nothing has to be copied
    memory_format: torch.memory_format  # of the result
    parameter_dtype: torch.dtype  # of the gradients of weight and bias
    planned: dict[tuple[Operation, bool, bool], tuple[int, Planned]]  # with the epoch of the plan
    saved: dict[Any, Any]  # what recognizes the tensors of a backward that are dense, see `autograd.dense_saved`
    pairs: dict[int, Any]  # of calls whose result is added to that of another one, by the id of its record

    def plan(self, operation: Operation, x: Tensor, costly: bool = False) -> Planned:
        """The plan for x, dense, and what such calls launched; costly: see `make_plan`."""
        key = operation, costly, torch.are_deterministic_algorithms_enabled()
        now, found = epoch(), self.planned.get(key)
        if found is None or found[0] != now or (found[1].plan.cooperative and not alone()):
            found = self.planned[key] = now, Planned(plan_for(operation, x, costly), {})
        return found[1]


def torchs(reason: str) -> Call:
    """The record of a call that torch computes."""
    return Call(reason, False, False, torch.contiguous_format, torch.float32, {}, {}, {})


# Of tensors in compiled code, which say no more.
SYMBOLIC = torchs("")
Entry = tuple[Any, Callable[[Any], Any], Call]
_calls: dict[tuple[Any, ...], tuple[Entry, ...]] = {}


def recognize(tensors: Tensors, training: bool) -> Call:
    """The record of a call of x [N, C, ...] and the others, each a tensor or None.

    Looked up by the shape of x and by which of the others are there; it holds if the tensors are in each respect what
    they were: type, dtype, device, sizes, strides, requires_grad, and whatever makes torch treat them or this thread
    specially. Torch compares all of that at once, as it does before it runs compiled code.
    """
    x, running_mean, running_var, weight, bias, residual, counter = tensors
    key = (
        x.shape, running_mean is None, running_var is None, weight is None, bias is None, residual is None,
        counter is None, training, torch.is_grad_enabled(),
    )  # fmt: skip
    entries = _calls.get(key, ())
    try:
        for entry in entries:
            guards, there, call = entry
            if guards.check(*there(tensors)):
                if entry is not entries[0]:  # the latest first
                    _calls[key] = (entry, *[other for other in entries if other is not entry])
                return call
    except TypeError:  # something is no tensor
        pass
    call = _look(tensors, training)
    present = [index for index, t in enumerate(tensors) if t is not None]
    if not call.reason and (guards := private.guards([tensors[index] for index in present])) is not None:
        there = operator.itemgetter(*present) if len(present) > 1 else operator.itemgetter(slice(1))  # tuples, both
        handles.put(_calls, key, ((guards, there, call), *entries[: EACH - 1]), LIMIT)
    return call


def forget_calls() -> None:
    """Look at all tensors again."""
    _calls.clear()


def forget() -> None:
    """Forget all that calls left: records, compiled kernels, scratch memory that no graph has, what a GPU refused."""
    forget_calls()
    for part in (handles, launch, planning, tickets):
        part.forget()


def _look(tensors: Tensors, training: bool) -> Call:
    """The record of the tensors."""
    x, _, _, weight, bias, residual, _ = tensors
    if reason := why_torch(tensors, training):
        return torchs(reason)
    memory_format = memory_format_of(x)
    return Call(
        "",
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)),
        all(t is None or t.is_contiguous(memory_format=memory_format) for t in (x, residual))
        and all(v is None or v.is_contiguous() for v in tensors[1:5]),
        memory_format,
        parameter_dtype(x, weight, bias),
        {},
        {},
        {},
    )


def why_torch(tensors: Tensors, training: bool) -> str:
    """Why torch computes a call of these tensors, wherever they are; empty: the kernels do."""
    return _not_plain([t for t in tensors if t is not None]) or misfit(tensors, training)


def _not_plain(given: list[Any]) -> str:
    """Why something must see each operation: a subclass, lazy negation, transform (or what one left) or trace.

    Or tensors of inference mode that autograd would have to save: torch refuses those before it writes anything.
    """
    other = next((t for t in given if type(t) not in (Tensor, Parameter)), None)
    if other is not None:
        return f"{type(other).__name__} is not Tensor, but a class of its own"
    if any(t.is_neg() for t in given):
        return "a tensor is the lazy negation of another"
    if private.transforms_active() or any(map(private.is_transformed, given)):
        return "a transform of torch.func is active"
    if torch.is_grad_enabled() and any(t.is_inference() for t in given):
        return "a tensor is of inference mode, which autograd cannot save"
    return "torch.jit.trace records it" if private.is_tracing() else ""


def misfit(tensors: Tensors, training: bool) -> str:
    """What of shapes, strides, dtypes and devices the kernels do not take; empty: nothing."""
    x, running_mean, running_var, weight, bias, residual, counter = tensors
    numel = x.numel()
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        return "the input is not float32, bfloat16, float16 or float64, or not dense"
    if numel == 0:
        return EMPTY
    if x.dim() < 2:
        return REFUSED
    N, C = x.shape[0], x.shape[1]
    if not fits(N, C, numel // (N * C)):
        return "32-bit indices do not reach all of the input"
    if training:
        if numel == C or (running_mean is None) != (running_var is None):
            return REFUSED
    elif running_mean is None or running_var is None:
        return REFUSED
    if not _vectors_fit(x, C, running_mean, running_var, weight, bias):
        return (
            "weights and statistics are not all [C] on the device of the input, of its dtype (or float32 for 16 bits)"
        )
    if counter is not None and not (
        counter.dtype is torch.int64 and counter.numel() == 1 and counter.device == x.device
    ):
        return "num_batches_tracked is no int64 on the device of the input"
    if residual is not None and residual.layout is not torch.strided:
        return "the residual is sparse"
    statistics = [s for s in (running_mean, running_var) if s is not None]
    if torch.is_grad_enabled() and any(s.requires_grad for s in statistics):
        return "running statistics require gradients"
    if C > 1 and any(s.stride(0) == 0 for s in statistics):
        return "running statistics are expanded: updates would meet in one place"
    return ""


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


def check_residual(input: Tensor | None, residual: Tensor | None, name: str = "residual") -> None:
    """Raise what `batch_norm` raises for a residual that does not go with the input; name: of the argument."""
    if residual is None and name == "residual":
        return
    if not isinstance(residual, Tensor):
        none = " or None" if name == "residual" else ""
        raise TypeError(f"{name} must be a Tensor{none}, but got {type(residual).__name__}")
    if not isinstance(input, Tensor):
        return
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(input, what), getattr(residual, what)
        if expected != got:
            raise ValueError(f"{name} should have the {what} of the input, {expected}, but got {got}")


def parameter_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The dtype of the parameters' gradients."""
    return next((p.dtype for p in parameters if p is not None), x.dtype)
