"""The sum of two batch norms, eagerly: what the backward needs, and what it returns; differentiable to any order."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonbn import autograd, handles, pair_launch, private, reference
from tritonbn.activations import IDENTITY, Activation
from tritonbn.dispatch import EACH, Call
from tritonbn.launch import Planned, Saved
from tritonbn.pair_launch import Gradients, Kept, Norm
from tritonbn.plan import Operation
from tritonbn.planning import pair_pays, pair_plan_for
from tritonbn.tables import epoch


class Pair(NamedTuple):
    """The record of a call: that of each batch norm, and the plans of both."""

    one: Call
    other: Call
    planned: dict[tuple[Operation, bool, bool], tuple[int, Planned]]  # with the epoch of the plan
    paying: dict[bool, tuple[int, bool]]  # likewise
    saved: tuple[dict[Any, Any], dict[Any, Any]]  # see `autograd.dense_saved`

    def plan(self, operation: Operation, x: Tensor, training: bool) -> Planned:
        """The plan for x, dense, and what such calls launched."""
        key = operation, training, torch.are_deterministic_algorithms_enabled()
        now, found = epoch(), self.planned.get(key)
        if found is None or found[0] != now:
            found = self.planned[key] = now, Planned(pair_plan_for(operation, x, training), {})
        return found[1]

    def pays(self, x: Tensor, training: bool) -> bool:
        """Whether one pass moves less than two operations for x, of any strides; with given statistics it does."""
        if not training:
            return True
        key = torch.are_deterministic_algorithms_enabled()
        now, found = epoch(), self.paying.get(key)
        if found is None or found[0] != now:
            found = self.paying[key] = now, pair_pays(x)
        return found[1]

    @property
    def dense(self) -> bool:
        return self.one.dense and self.other.dense

    @property
    def parameter_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.one.parameter_dtype, self.other.parameter_dtype


def recognize(one: Call, other: Call) -> Pair | None:
    """The record of two calls on tensors of one shape, dtype and device; None if no kernel takes both together."""
    if one.reason or other.reason or one.memory_format is not other.memory_format:
        return None
    found = one.pairs.get(id(other))
    if found is None:
        found = Pair(one, other, {}, {}, ({}, {}))  # holds the other's record, so that its id remains its own
        handles.put(one.pairs, id(other), found, EACH)
    return found


def add(norm: Norm, other: Norm, training: bool, activation: Activation, pair: Pair) -> Tensor:
    """activation(BN(x) + BN(other)) of tensors [N, C, ...]; running statistics and counters are updated in place."""
    if not pair.dense:
        norm, other = (n._replace(x=n.x.contiguous(memory_format=pair.one.memory_format)) for n in (norm, other))
    if pair.one.records or pair.other.records:
        given = (*norm[3:], *other[3:], training, activation)
        y: Tensor = _record(*norm[:3], *other[:3], given, pair)
        return y
    return forward(norm, other, training, activation, False, False, pair)[0]


def forward(
    norm: Norm, other: Norm, training: bool, activation: Activation, keep: bool, keep_bits: bool, pair: Pair
) -> pair_launch.Results:
    """(y, bits, mean, rstd, other_mean, other_rstd) of dense tensors; vectors of any strides."""
    one, two = norm, other
    if not pair.dense:
        one, two = _contiguous(norm), _contiguous(other)
    if not training:
        return pair_launch.inference(one, two, activation, keep_bits, keep, pair.plan)
    results = pair_launch.forward(one, two, activation, keep_bits, pair.plan)
    for before, after in ((norm, one), (other, two)):
        autograd._bring_back(before.running_mean, after.running_mean)
        autograd._bring_back(before.running_var, after.running_var)
    return results


def _contiguous(norm: Norm) -> Norm:
    """With vectors without gaps."""
    weight, bias, mean, var = map(autograd._contiguous, norm[1:5])
    return norm._replace(weight=weight, bias=bias, running_mean=mean, running_var=var)


def backward(
    dy: Tensor,
    kept: tuple[Tensor | None, ...],
    training: bool,
    activation: Activation,
    wanted: tuple[bool, ...],
    pair: Pair,
) -> Gradients:
    """Gradients of (x, weight, bias) of both; dy and kept tensors of any strides.

    kept: (x, weight, bias, mean, rstd) of one, of the other, and the bits.
    """
    bits = kept[10]
    found = []
    dense = dy
    for at, own, dtype, recognized in zip((0, 5), (bits, None), pair.parameter_dtypes, pair.saved, strict=True):
        x, weight, bias, mean, rstd = kept[at : at + 5]
        assert x is not None
        assert mean is not None
        assert rstd is not None
        saved = Saved(x, weight, bias, None, own, mean, rstd)
        dense, saved = autograd.dense_saved(dense, saved, dtype, pair.one.memory_format, recognized)
        found.append(saved)
    one, other = (Kept(s.x, s.weight, s.bias, s.mean, s.rstd) for s in found)
    return pair_launch.backward(
        dense, one, other, found[0].bits, training, activation, pair.parameter_dtypes, wanted, pair.plan
    )


def slope(dy: Tensor, kept: tuple[Tensor | None, ...], activation: Activation, pair: Pair) -> Tensor:
    """The derivative of a two-valued activation at each element, as the bits tell it; laid out as dy's gradient."""
    x, _, _, mean, rstd = kept[:5]
    assert x is not None
    assert mean is not None
    assert rstd is not None
    saved = Saved(x, None, None, None, kept[10], mean, rstd)
    only = False, False, False, True
    dtype, memory_format = pair.one.parameter_dtype, pair.one.memory_format
    found = autograd.backward(torch.ones_like(dy), saved, False, activation, dtype, only, memory_format).residual
    assert found is not None
    return found


class BatchNormAdd(torch.autograd.Function):
    """y of dense x and other, and the weights and biases of both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        other: Tensor,
        other_weight: Tensor | None,
        other_bias: Tensor | None,
        given: tuple[Any, ...],
        pair: Pair,
    ) -> Tensor:
        *vectors, training, activation = given
        one, two = Norm(x, weight, bias, *vectors[:5]), Norm(other, other_weight, other_bias, *vectors[5:])
        keep_bits = activation.two_valued
        y, bits, *statistics = forward(one, two, training, activation, True, keep_bits, pair)
        if keep_bits or activation == IDENTITY:  # nothing needs what entered the activation
            bias = other_bias = None
        # Those that were given are not needed, but torch refuses a backward after a user changed them in place.
        fixed = () if training else (one.running_mean, one.running_var, two.running_mean, two.running_var)
        ctx.save_for_backward(
            x, weight, bias, *statistics[:2], other, other_weight, other_bias, *statistics[2:], bits, *fixed
        )
        ctx.constants = training, activation, (one.eps, two.eps), pair
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        training, activation, eps, pair = ctx.constants
        kept, wanted = ctx.saved_tensors[:11], ctx.needs_input_grad[:6]
        if not torch.is_grad_enabled():
            return *backward(dy, kept, training, activation, wanted, pair), None, None
        constants = training, activation, wanted, pair
        gradients = BatchNormAddBackward.apply(dy, *kept, eps, constants)  # type: ignore[no-untyped-call]
        return *gradients, None, None


_record: Any = private.apply_of(BatchNormAdd)


class BatchNormAddBackward(torch.autograd.Function):
    """`Gradients` as functions of dy and the (x, weight, bias) of both."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        *kept, ctx.eps, constants = arguments
        ctx.save_for_backward(dy, *kept)
        ctx.constants = constants
        return tuple(backward(dy, tuple(kept), *constants))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *kept = ctx.saved_tensors
        training, activation, _, pair = ctx.constants
        derivative = None
        if activation.two_valued:
            with torch.no_grad():
                derivative = slope(dy, tuple(kept), activation, pair)
        needs = ctx.needs_input_grad
        needed = needs[:4] + needs[6:9]  # dy, then x, weight and bias of both
        found = _second(dy, kept, training, activation, ctx.eps, upstream, needed, derivative)
        return *found[:4], None, None, *found[4:], None, None, None, None, None


def _second(
    dy: Tensor,
    kept: list[Any],
    training: bool,
    activation: Activation,
    eps: tuple[float, float],
    upstream: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    derivative: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (dy, x, weight, bias, other, other_weight, other_bias), those of the formula by autograd.

    upstream: those of `Gradients`. derivative: of a two-valued activation, which does not change.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh views: dy is itself a function of x, and that path is not ours to follow.
        views = [None if t is None else t.view_as(t) for t in (dy, *kept[:3], *kept[5:8])]
        dz = views[0]
        assert dz is not None
        if derivative is not None:
            dz, activation = dz * derivative, IDENTITY
        statistics = (None, None) if training else (tuple(kept[3:5]), tuple(kept[8:10]))
        outputs = reference.pair_gradients(dz, views[1:4], views[4:], statistics, eps, activation)
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
    wanted = [v for v, need in zip(views, needed, strict=True) if v is not None and need]
    if not pairs or not wanted:
        return (None,) * len(needed)
    o, u = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(o, wanted, u, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if need and v is not None else None for v, need in zip(views, needed, strict=True))
