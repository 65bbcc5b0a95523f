"""One function per operation: look the plan up, allocate, launch, return. No mathematics, no second dispatch.

All functions take x dense in its memory format, see `memory_format_of`, and return tensors in that format; residual and
dy are laid out as x, vectors are contiguous: `autograd` sees to that. planned: the plan and what such calls launched,
if that is known, or a plan.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from tritonbn import handles, planning, private
from tritonbn.activations import IDENTITY, Activation
from tritonbn.kernels.backward import backward_kernel, gradient_sums_kernel, input_gradient_kernel
from tritonbn.kernels.cooperative import cooperative_backward_kernel, cooperative_forward_kernel
from tritonbn.kernels.normalize import forward_kernel, inference_kernel, normalize_kernel
from tritonbn.kernels.statistics import statistics_kernel
from tritonbn.plan import Operation, Plan, independent
from tritonbn.planning import device_of, memory_format_of, plan_for, problem_of
from tritonbn.tickets import Purpose, scratch

# The kernels run on CPU tensors too: TRITON_INTERPRET was set when they were defined.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
# The one place where a kernel starts.
_launch = handles.start
# Plans whose programs a device, by its index, was found not to hold at a time; the oldest are forgotten.
_too_many: dict[tuple[int, Plan], bool] = {}
LIMIT = 1024


def forget() -> None:
    """Try plans again that did not fit."""
    _too_many.clear()


class Saved(NamedTuple):
    """What the backward needs beside dy."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None  # if the derivative of the activation is to be computed from it
    bits: Tensor | None  # if they tell the derivative of the activation
    mean: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """Of x and residual (dense as x), weight and bias; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


Wanted = tuple[bool, bool, bool, bool]


class Planned(NamedTuple):
    """A plan, and what calls of one sort launched by it."""

    plan: Plan
    launches: handles.Launches


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: Activation = IDENTITY,
    keep_bits: bool = False,
    planned: Planned | Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, bits, mean, rstd) with statistics of the batch; the running ones and the counter are updated in place.

    momentum None: the weight of this batch in the running statistics is 1 / counter.
    """
    plan, launches = _planned(planned, "forward", x)
    y, bits = _output(x, plan, keep_bits)
    mean, rstd = _vectors(x, running_mean)
    cumulative = momentum is None
    numbers = eps, 0.0 if momentum is None else momentum
    operands = x, residual, weight, bias, y, bits, mean, rstd, running_mean, running_var, counter
    if plan.cooperative:
        if _launch_together(
            cooperative_forward_kernel, plan,
            *operands, *_scratch(x, plan, 3, "semaphores"), *plan.sizes, plan.reduce_tiles, plan.groups, *numbers,
            launches=launches, which=keep_bits, ACT=activation, CUMULATIVE=cumulative, BLOCK_P=plan.merge_block,
        ):  # fmt: skip
            return y, bits, mean, rstd
        plan, launches = independent(problem_of("forward", x), device_of(x.device)), None
    if plan.launches == 1:
        _launch(
            forward_kernel, (plan.groups,), plan, *operands, *plan.sizes, *numbers,
            launches=launches, which=keep_bits, ACT=activation, CUMULATIVE=cumulative,
        )  # fmt: skip
        return y, bits, mean, rstd
    _launch(
        statistics_kernel, (plan.groups, plan.splits), plan,
        x, mean, rstd, running_mean, running_var, counter, *_scratch(x, plan, 3, "tickets"),
        *plan.sizes, plan.reduce_tiles, *numbers, launches=launches, CUMULATIVE=cumulative, BLOCK_P=plan.merge_block,
    )  # fmt: skip
    _launch(
        normalize_kernel, (plan.groups, plan.apply_splits), plan,
        x, residual, mean, rstd, weight, bias, y, bits, *plan.sizes, plan.apply_tiles,
        launches=launches, which=keep_bits, ACT=activation,
    )  # fmt: skip
    return y, bits, mean, rstd


def inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: Activation = IDENTITY,
    keep_bits: bool = False,
    keep: bool = False,
    planned: Planned | Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, bits, mean, rstd) with given statistics; mean and rstd as the backward needs them if `keep`, else None."""
    plan, launches = _planned(planned, "inference", x)
    y, bits = _output(x, plan, keep_bits)
    mean, rstd = _vectors(x, running_mean) if keep else (None, None)
    _launch(
        inference_kernel, (plan.groups, plan.apply_splits), plan,
        x, residual, running_mean, running_var, weight, bias, y, bits, mean, rstd, *plan.sizes, plan.apply_tiles,
        eps, launches=launches, which=(keep, keep_bits), ACT=activation,
    )  # fmt: skip
    return y, bits, mean, rstd


def backward(
    dy: Tensor,
    saved: Saved,
    training: bool,
    activation: Activation,
    parameter_dtype: torch.dtype,
    wanted: Wanted,
    planned: Planned | Plan | None = None,
) -> Gradients:
    """The gradients that are wanted: two launches at most, one where statistics were given (not `training`)."""
    x, weight, bias, residual, bits, mean, rstd = saved
    costly = costs(activation, bits)
    plan, launches = _planned(planned, "backward", x, costly)
    bits = checked_bits(bits, plan)
    gradients = dx, dweight, dbias, dresidual = _gradients(x, parameter_dtype, wanted)
    vectors = mean, rstd, weight, bias
    outputs = dx, dresidual, dweight, dbias
    operands = dy, x, residual, bits, *vectors
    both_passes = training and dx is not None
    which = wanted, training
    if plan.cooperative:
        if both_passes and _launch_together(
            cooperative_backward_kernel, plan,
            *operands, *outputs, *_scratch(x, plan, 2, "semaphores"), *plan.sizes, plan.reduce_tiles, plan.groups,
            launches=launches, which=which, ACT=activation, BLOCK_P=plan.merge_block,
        ):  # fmt: skip
            return gradients
        plan, launches = independent(problem_of("backward", x, costly), device_of(x.device)), None
    if plan.launches == 1 and both_passes:
        _launch(
            backward_kernel, (plan.groups,), plan, *operands, *outputs, *plan.sizes,
            launches=launches, which=which, ACT=activation,
        )  # fmt: skip
        return gradients
    # The second launch reads what the first one sums up: the gradients of bias and weight, or their likes.
    s1, s2, own1, own2 = dbias, dweight, None, None
    if both_passes and (s1 is None or s1.dtype is not rstd.dtype):
        s1 = own1 = torch.empty_like(rstd)
    if both_passes and (s2 is None or s2.dtype is not rstd.dtype):
        s2 = own2 = torch.empty_like(rstd)
    if both_passes or s1 is not None or s2 is not None:
        _launch(
            gradient_sums_kernel, (plan.groups, plan.splits), plan,
            dy, x, residual, bits, *vectors, None if training else dx, dresidual, dweight, dbias, own1, own2,
            *_scratch(x, plan, 2, "tickets"), *plan.sizes, plan.reduce_tiles,
            launches=launches, which=which, ACT=activation, BLOCK_P=plan.merge_block,
        )  # fmt: skip
        if not both_passes:
            return gradients
        if dresidual is not None:  # it is dz: nothing but it and x is read again
            dy, residual, bits, dresidual, activation = dresidual, None, None, None, IDENTITY
            vectors = mean, rstd, weight, None
    elif dx is None and dresidual is None:
        return gradients
    needs_x = both_passes or (bits is None and activation != IDENTITY)
    _launch(
        input_gradient_kernel, (plan.groups, plan.apply_splits), plan,
        dy, x if needs_x else None, residual, bits, *vectors, s1, s2, dx, dresidual, *plan.sizes, plan.apply_tiles,
        launches=launches, which=which, ACT=activation,
    )  # fmt: skip
    return gradients


def checked_bits(bits: Tensor | None, plan: Plan) -> Tensor | None:
    """The bits, at an address that words can be read from. Raises RuntimeError for bits of another tensor."""
    if bits is not None and bits.numel() != plan.bit_bytes:
        raise RuntimeError(f"expected {plan.bit_bytes} bytes of bits for {list(plan.shape)}, got {bits.numel()}")
    return bits.clone() if bits is not None and bits.data_ptr() % 4 else bits


def costs(activation: Activation, bits: Tensor | None) -> bool:
    """Whether the backward computes exponentials for each element."""
    return bits is None and activation.costly


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in, and the dtype of saved statistics: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def holds(plan: Plan, device: torch.device) -> bool:
    """Whether a device was not found to refuse the plan, or not to hold its programs at a time."""
    return not plan.cooperative or ((device.index, plan) not in _too_many and planning.holds_together(device))


def running(plan: Plan, x: Tensor, costly: bool = False, device: torch.device | None = None) -> Plan:
    """What runs by a plan for x: another one where a device was found not to hold its programs at a time.

    device: if it is not to be that of x.
    """
    where = device or x.device
    if holds(plan, where):
        return plan
    return independent(problem_of(plan.operation, x, costly), device_of(where))


def _planned(
    planned: Planned | Plan | None, operation: Operation, x: Tensor, costly: bool = False
) -> tuple[Plan, handles.Launches | None]:
    """The plan that runs, and what such calls launched by it."""
    if type(planned) is Planned and not planned.plan.cooperative:
        return planned
    if planned is None:
        return running(plan_for(operation, x, costly), x, costly), None
    if isinstance(planned, Plan):
        return running(planned, x, costly), None
    instead = running(planned.plan, x, costly)
    return planned if instead is planned.plan else (instead, None)


def _launch_together(kernel: Any, plan: Plan, *args: Any, **rest: Any) -> bool:
    """Launch programs that wait for each other; False, and nothing happened, if the GPU does not hold all of them."""
    device = args[0].device
    try:
        _launch(kernel, plan.grid, plan, *args, **rest)
    except handles.TooManyPrograms:
        handles.put(_too_many, (device.index, plan), True, LIMIT)
        return False
    except torch.OutOfMemoryError:
        raise
    except TritonError as error:  # too much shared memory, say
        if not isinstance(kernel, triton.JITFunction):  # the interpreter's
            raise
        handles.put(_too_many, (device.index, plan), True, LIMIT)
        private.tell(f"{device} cannot run {kernel.__name__} by {plan}, so that another plan runs: {error}")
        return False
    except RuntimeError as error:  # under MPS or in a green context, say
        planning.refuse_together(device)
        private.tell(f"{device} refuses programs that wait for each other, so that others run: {error}")
        return False
    return True


def _output(x: Tensor, plan: Plan, keep_bits: bool) -> tuple[Tensor, Tensor | None]:
    """y, laid out as x is, and, if they are to be kept, the bits."""
    return torch.empty_like(x), torch.empty(plan.bit_bytes, dtype=torch.uint8, device=x.device) if keep_bits else None


def _vectors(x: Tensor, like: Tensor | None) -> tuple[Tensor, Tensor]:
    """mean and rstd [C] in the dtype of the arithmetic on x."""
    if like is not None and like.dtype is arithmetic_dtype(x):  # half the time
        return torch.empty_like(like), torch.empty_like(like)
    C, dtype, device = x.shape[1], arithmetic_dtype(x), x.device
    return torch.empty(C, dtype=dtype, device=device), torch.empty(C, dtype=dtype, device=device)


def _gradients(x: Tensor, parameter_dtype: torch.dtype, wanted: Wanted) -> Gradients:
    memory_format = memory_format_of(x)
    dx, dresidual = (
        torch.empty_like(x, memory_format=memory_format) if want else None for want in (wanted[0], wanted[3])
    )
    dweight, dbias = (
        torch.empty(x.shape[1], dtype=parameter_dtype, device=x.device) if want else None for want in wanted[1:3]
    )
    return Gradients(dx, dweight, dbias, dresidual)


def _scratch(x: Tensor, plan: Plan, values: int, purpose: Purpose) -> tuple[Tensor, Tensor]:
    """Room for partial results [P, values, C] in the dtype of the arithmetic on x, and counters of the groups."""
    counters = plan.slots if purpose == "semaphores" else plan.groups
    return scratch(x, plan.splits * values * x.shape[1], arithmetic_dtype(x), purpose, counters)
