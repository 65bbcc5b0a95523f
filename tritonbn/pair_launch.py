"""The launches of the sum of two batch norms, as `launch` has them for one: activation(BN(x) + BN(other)).

x and other are dense and laid out alike, dy as they are, vectors are contiguous: `pair` sees to that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonbn import launch
from tritonbn.activations import IDENTITY, Activation
from tritonbn.kernels.pair import (
    pair_backward_kernel,
    pair_forward_kernel,
    pair_gradient_kernel,
    pair_inference_kernel,
    pair_normalize_kernel,
    pair_sums_kernel,
)
from tritonbn.kernels.statistics import statistics_kernel
from tritonbn.launch import Planned
from tritonbn.plan import Operation
from tritonbn.planning import memory_format_of, pair_plan_for

Plans = Callable[[Operation, Tensor, bool], Planned]


class Norm(NamedTuple):
    """One batch norm: its input, and what it has beside."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: Tensor | None
    momentum: float | None  # None: 1 / counter
    eps: float


class Kept(NamedTuple):
    """What the backward needs of one batch norm."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None  # if the derivative of the activation is to be computed from it
    mean: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """Of x, weight and bias, then of the other's; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    other: Tensor | None
    other_weight: Tensor | None
    other_bias: Tensor | None


# y, bits, mean, rstd, other_mean, other_rstd
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def planned(operation: Operation, x: Tensor, training: bool) -> Planned:
    """The plan of a call that no record is at hand for."""
    return Planned(pair_plan_for(operation, x, training), {})


def forward(
    norm: Norm, other: Norm, activation: Activation = IDENTITY, keep_bits: bool = False, plans: Plans = planned
) -> Results:
    """With statistics of the batch; the running ones and the counters of both are updated in place."""
    x = norm.x
    plan, launches = plans("forward", x, True)
    y, bits = launch._output(x, plan, keep_bits)
    (mean, rstd), (other_mean, other_rstd) = (launch._vectors(x, one.running_mean) for one in (norm, other))
    if plan.launches == 1:
        launch._launch(
            pair_forward_kernel, (plan.groups,), plan,
            x, other.x, norm.weight, norm.bias, other.weight, other.bias, y, bits,
            mean, rstd, *norm[3:6], other_mean, other_rstd, *other[3:6], *plan.sizes,
            norm.eps, norm.momentum or 0.0, other.eps, other.momentum or 0.0, launches=launches, which=keep_bits,
            ACT=activation, CUMULATIVE=norm.momentum is None, OTHER_CUMULATIVE=other.momentum is None,
        )  # fmt: skip
        return y, bits, mean, rstd, other_mean, other_rstd
    for which, one, vectors in (("x", norm, (mean, rstd)), ("other", other, (other_mean, other_rstd))):
        launch._launch(
            statistics_kernel, (plan.groups, plan.splits), plan,
            one.x, *vectors, *one[3:6], *launch._scratch(x, plan, 3, "tickets"),
            *plan.sizes, plan.reduce_tiles, one.eps, one.momentum or 0.0,
            launches=launches, which=which, CUMULATIVE=one.momentum is None, BLOCK_P=plan.merge_block,
        )  # fmt: skip
    plan, launches = plans("inference", x, True)
    launch._launch(
        pair_normalize_kernel, (plan.groups, plan.apply_splits), plan,
        x, other.x, mean, rstd, norm.weight, norm.bias, other_mean, other_rstd, other.weight, other.bias, y, bits,
        *plan.sizes, plan.apply_tiles, launches=launches, which=keep_bits, ACT=activation,
    )  # fmt: skip
    return y, bits, mean, rstd, other_mean, other_rstd


def inference(
    norm: Norm,
    other: Norm,
    activation: Activation = IDENTITY,
    keep_bits: bool = False,
    keep: bool = False,
    plans: Plans = planned,
) -> Results:
    """With given statistics; means and rstds as the backward needs them if `keep`, else None."""
    x = norm.x
    plan, launches = plans("inference", x, False)
    y, bits = launch._output(x, plan, keep_bits)
    vectors = [v for one in (norm, other) for v in (launch._vectors(x, one.running_mean) if keep else (None, None))]
    launch._launch(
        pair_inference_kernel, (plan.groups, plan.apply_splits), plan,
        x, other.x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
        other.running_mean, other.running_var, other.weight, other.bias, y, bits, *vectors, *plan.sizes,
        plan.apply_tiles, norm.eps, other.eps, launches=launches, which=(keep, keep_bits), ACT=activation,
    )  # fmt: skip
    mean, rstd, other_mean, other_rstd = vectors
    return y, bits, mean, rstd, other_mean, other_rstd


def backward(
    dy: Tensor,
    norm: Kept,
    other: Kept,
    bits: Tensor | None,
    training: bool,
    activation: Activation,
    parameter_dtypes: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, ...],
    plans: Plans = planned,
) -> Gradients:
    """The gradients that are wanted: two launches at most, one where statistics were given (not `training`)."""
    plan, launches = plans("backward", dy, training)
    bits = launch.checked_bits(bits, plan)
    gradients = _gradients(dy, parameter_dtypes, wanted)
    dx, dweight, dbias, dother, other_dweight, other_dbias = gradients
    vectors = *_vectors(norm), *_vectors(other)
    parameters = dweight, dbias, other_dweight, other_dbias
    both_passes = training and (dx is not None or dother is not None)
    tensors = dy, norm.x, other.x, bits
    common: dict[str, Any] = {"launches": launches, "which": (wanted, training), "ACT": activation}
    if not any(wanted):
        return gradients
    if plan.launches == 1:
        launch._launch(
            pair_backward_kernel, (plan.groups,), plan,
            *tensors, *vectors, dx, dother, *parameters, *plan.sizes, **common,
        )  # fmt: skip
        return gradients
    # The second launch reads what the first one sums up: the gradients of bias and weights, or their likes.
    sums, own = _sums(norm.rstd, dbias, dweight, other_dweight) if both_passes else ((None,) * 3, (None,) * 3)
    if both_passes or any(p is not None for p in parameters):
        launch._launch(
            pair_sums_kernel, (plan.groups, plan.splits), plan,
            *tensors, *vectors, *((None, None) if training else (dx, dother)), *parameters, *own,
            *launch._scratch(dy, plan, 3, "tickets"), *plan.sizes, plan.reduce_tiles,
            **common, BLOCK_P=plan.merge_block,
        )  # fmt: skip
        if not both_passes:
            return gradients
    if not both_passes and (bits is not None or activation == IDENTITY):
        tensors = dy, None, None, bits  # type: ignore[assignment]
    launch._launch(
        pair_gradient_kernel, (plan.groups, plan.apply_splits), plan,
        *tensors, *vectors, *sums, dx, dother, *plan.sizes, plan.apply_tiles, **common,
    )  # fmt: skip
    return gradients


def _vectors(kept: Kept) -> tuple[Tensor | None, ...]:
    return kept.mean, kept.rstd, kept.weight, kept.bias


def _sums(rstd: Tensor, *vectors: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Where the sums are, in the dtype of the arithmetic: in the gradients, or in tensors of their own."""
    own = tuple(None if v is not None and v.dtype is rstd.dtype else torch.empty_like(rstd) for v in vectors)
    held = tuple(v if mine is None else mine for v, mine in zip(vectors, own, strict=True))
    return held, own  # type: ignore[return-value]


def _gradients(x: Tensor, dtypes: tuple[torch.dtype, torch.dtype], wanted: tuple[bool, ...]) -> Gradients:
    found: list[Tensor | None] = []
    for dtype, want in zip(dtypes, (wanted[:3], wanted[3:]), strict=True):
        found.append(torch.empty_like(x, memory_format=memory_format_of(x)) if want[0] else None)
        found += [torch.empty(x.shape[1], dtype=dtype, device=x.device) if w else None for w in want[1:]]
    return Gradients(*found)
