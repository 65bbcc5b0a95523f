"""What batch_norm saves, refuses and repeats in autograd, against torch's function."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import batch_norm as torch_batch_norm
from torch.utils.checkpoint import checkpoint

from tests.parity import (
    LEAVES,
    STATISTICS,
    Call,
    assert_matches,
    assert_same_error,
    in_both_modes,
    make_call,
    raised_by,
    random,
)
from tritonbn.functional import batch_norm

LEARNED = {
    "none": (),
    "input": ("input",),
    "weight": ("weight",),
    "bias": ("bias",),
    "input-weight": ("input", "weight"),
    "input-bias": ("input", "bias"),
    "weight-bias": ("weight", "bias"),
}


@in_both_modes
@pytest.mark.parametrize("learned", LEARNED.values(), ids=LEARNED)
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5)], ids=["rows", "planes"])
def test_subsets_of_gradients(
    shape: tuple[int, ...], learned: tuple[str, ...], training: bool, device: torch.device
) -> None:
    call = make_call(shape, device, training=training)
    leaves = {name: getattr(call, name).requires_grad_(name in learned) for name in LEAVES}
    y = batch_norm(**leaves, **call.given(*STATISTICS), training=training)
    assert y.requires_grad == bool(learned)
    if learned:
        torch.autograd.backward(y, call.grad)
    exact = make_call(shape, device, training=training).exact().run(torch_batch_norm)
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(learned)
    for name in learned:
        assert_matches({name: leaves[name].grad}, {name: exact[f"grad_{name}"]})


@in_both_modes
def test_only_the_input_is_saved_in_full(training: bool, device: torch.device) -> None:
    call = make_call((4, 3, 5), device, training=training)
    leaves = {name: tensor.requires_grad_() for name, tensor in call.given(*LEAVES).items()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_norm(**leaves, **call.given(*STATISTICS), training=training)
    large = [tensor for tensor in saved if tensor.numel() > 3]
    assert [tensor.data_ptr() for tensor in large] == [call.input.data_ptr()]


def graph(training: bool, device: torch.device, function: Callable[..., Tensor]) -> tuple[dict[str, Any], Any]:
    """The tensors of a call in the graph, and its output."""
    call = make_call((4, 3, 5), device, training=training)
    tensors = {name: tensor.requires_grad_() for name, tensor in call.given(*LEAVES).items()}
    tensors |= call.given(*STATISTICS)
    return tensors, function(**tensors, training=training)


@in_both_modes
@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.add_(1), lambda y: y.zero_()], ids=["relu", "add", "zero"])
def test_output_may_be_changed_in_place(
    change: Callable[[Tensor], Tensor], training: bool, device: torch.device
) -> None:
    def gradient(function: Callable[..., Tensor]) -> Tensor:
        tensors, y = graph(training, device, function)
        weights = random(4, 3, 5, seed=5).to(y)
        (result,) = torch.autograd.grad((change(y) * weights).sum(), [tensors["input"]])
        return result

    assert_matches({"gx": gradient(batch_norm)}, {"gx": gradient(torch_batch_norm)})


@in_both_modes
@pytest.mark.parametrize("name", ["input", "weight"])
def test_changing_what_the_backward_needs_raises(name: str, training: bool, device: torch.device) -> None:
    def backward(function: Callable[..., Tensor]) -> None:
        tensors, y = graph(training, device, function)
        with torch.no_grad():
            tensors[name].add_(1)
        torch.autograd.backward(y.sum())

    expected, raised = (
        raised_by(partial(backward, torch_batch_norm)),
        raised_by(partial(backward, batch_norm)),
    )
    assert expected is not None
    assert raised is not None
    assert raised[0] is expected[0]
    assert raised[1].partition(":")[0] == expected[1].partition(":")[0]


@in_both_modes
def test_bias_may_be_changed_before_the_backward(training: bool, device: torch.device) -> None:
    tensors, y = graph(training, device, batch_norm)
    with torch.no_grad():
        tensors["bias"].add_(1)
    torch.autograd.backward(y.sum())
    assert tensors["bias"].grad is not None


@pytest.mark.parametrize("name", STATISTICS)
def test_given_statistics_changed_by_the_user_raise_as_in_torch(name: str, device: torch.device) -> None:
    for function in (batch_norm, torch_batch_norm):
        tensors, y = graph(False, device, function)
        tensors[name].add_(1)
        error = raised_by(partial(torch.autograd.grad, y, tensors["input"], torch.ones_like(y)))
        assert error is not None
        assert "modified by an inplace operation" in error[1]


def test_running_statistics_of_training_may_change_before_the_backward(device: torch.device) -> None:
    """No gradient depends on them. DistributedDataParallel writes them before each forward."""
    call = make_call((4, 3, 5), device, training=True)
    statistics = call.given(*STATISTICS)
    x = call.input.requires_grad_()
    y = batch_norm(x, **statistics, weight=call.weight, bias=call.bias, training=True)
    for tensor in statistics.values():
        tensor.copy_(torch.rand(3))
    gradient = torch.autograd.grad(y, x, call.grad)[0]
    assert_matches({"gx": gradient}, {"gx": call.exact().run(torch_batch_norm)["grad_input"]})


def test_two_training_forwards_before_one_backward(device: torch.device) -> None:
    call = make_call((4, 3, 5), device, training=True)
    x, statistics = call.input.requires_grad_(), call.given(*STATISTICS)
    first = batch_norm(x, **statistics, weight=call.weight, bias=call.bias, training=True)
    batch_norm(x.detach() + 1, **statistics, training=True)
    gradient = torch.autograd.grad(first, x, call.grad)[0]
    assert_matches({"gx": gradient}, {"gx": call.exact().run(torch_batch_norm)["grad_input"]})


def test_eval_forward_then_training_forward_then_backward_of_the_first(device: torch.device) -> None:
    call = make_call((4, 3, 5), device, training=False)
    x, statistics = call.input.requires_grad_(), call.given(*STATISTICS)
    first = batch_norm(x, **statistics, weight=call.weight, bias=call.bias)
    expected = call.exact().run(torch_batch_norm)["grad_input"]
    batch_norm(x.detach(), **statistics, training=True)
    gradient = torch.autograd.grad(first, x, call.grad)[0]
    assert_matches({"gx": gradient}, {"gx": expected})  # which torch's own is not: it uses the updated variance


@in_both_modes
def test_backward_twice(training: bool, device: torch.device) -> None:
    tensors, y = graph(training, device, batch_norm)
    first = torch.autograd.grad(y.sum(), tensors["weight"], retain_graph=True)[0]
    again = torch.autograd.grad(y.sum(), tensors["weight"])[0]
    assert torch.equal(first, again)


@in_both_modes
def test_backward_through_a_freed_graph_raises_as_torch(training: bool, device: torch.device) -> None:
    def twice(function: Callable[..., Tensor]) -> None:
        _, y = graph(training, device, function)
        loss = y.sum()
        torch.autograd.backward(loss)
        torch.autograd.backward(loss)

    assert_same_error(partial(twice, batch_norm), partial(twice, torch_batch_norm))


@in_both_modes
def test_saved_input_is_freed_after_backward(training: bool, device: torch.device) -> None:
    call = make_call((4, 3, 5), device, training=training)
    x = call.input.requires_grad_() * 1
    alive = weakref.ref(x)
    y = batch_norm(x, **call.given(*STATISTICS), weight=call.weight, training=training)
    loss = y.sum()
    del x
    torch.autograd.backward(loss)
    gc.collect()
    assert alive() is None
    assert y.shape == (4, 3, 5)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpoint_updates_the_statistics_twice(use_reentrant: bool, device: torch.device) -> None:
    def run(function: Callable[..., Tensor], call: Call) -> dict[str, Tensor]:
        statistics = {name: tensor.clone() for name, tensor in call.given(*STATISTICS).items()}
        x = call.input.detach().requires_grad_()
        forward = partial(function, **statistics, weight=call.weight, bias=call.bias, training=True)
        y: Tensor = checkpoint(forward, x, use_reentrant=use_reentrant)
        torch.autograd.backward(y, call.grad)
        assert x.grad is not None
        return statistics | {"gx": x.grad}

    call = make_call((4, 3, 5), device)
    assert_matches(run(batch_norm, call), run(torch_batch_norm, call.exact()))


def test_tensor_hooks_run(device: torch.device) -> None:
    seen: list[str] = []
    tensors, y = graph(True, device, batch_norm)

    def doubled(gradient: Tensor) -> Tensor:
        seen.append("output")
        return gradient * 2

    tensors["input"].register_hook(lambda gradient: seen.append("input"))
    tensors["weight"].register_post_accumulate_grad_hook(lambda leaf: seen.append("weight"))
    y.register_hook(doubled)
    torch.autograd.backward(y.sum())
    assert sorted(seen) == ["input", "output", "weight"]
    assert tensors["bias"].grad is not None
    assert torch.equal(tensors["bias"].grad, torch.full_like(tensors["bias"], 40.0))


def second_order(function: Callable[..., Tensor], call: Call) -> dict[str, Tensor]:
    """Gradients, in the leaves and in the gradient of y, of a weighted sum of all first gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.given(*LEAVES).items()}
    assert call.grad is not None
    upstream = call.grad.detach().requires_grad_()
    y = function(**leaves, **call.given(*STATISTICS), **call.options)
    first = torch.autograd.grad(y, list(leaves.values()), upstream, create_graph=True)
    weights = [random(*gradient.shape, seed=8).to(gradient) for gradient in first]
    leaves["upstream"] = upstream
    second = torch.autograd.grad(first, list(leaves.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), second, strict=True)
    }


@pytest.mark.parametrize("left_out", [(), ("bias",), ("weight", "bias")], ids=["affine", "no-bias", "plain"])
@in_both_modes
def test_double_backward(training: bool, left_out: tuple[str, ...], device: torch.device) -> None:
    call = make_call((2, 3, 4), device, leave_out=left_out, training=training)
    assert_matches(second_order(batch_norm, call), second_order(torch_batch_norm, call.exact()))


@in_both_modes
def test_double_backward_without_weight(training: bool, device: torch.device) -> None:
    """torch 2.13 raises here (it adds an undefined gradient); a weight of ones is the same function."""
    call = make_call((2, 3, 4), device, leave_out=("weight",), training=training)
    ones = torch.ones(3, dtype=torch.float64, device=device)
    exact = second_order(partial(torch_batch_norm, weight=ones), call.exact())
    assert_matches(second_order(batch_norm, call), exact)


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("context", [nullcontext, deterministic], ids=["as-is", "deterministic-algorithms"])
@in_both_modes
def test_same_bits_every_time(training: bool, context: Callable[[], Any], device: torch.device) -> None:
    call = make_call((4, 3, 37), device, training=training)
    with context():
        first, again = call.run(batch_norm), call.run(batch_norm)
    assert all(torch.equal(first[name], again[name]) for name in first)


@in_both_modes
def test_lazily_negated_upstream_gradient(training: bool, device: torch.device) -> None:
    """A contiguous view with the negation still to be done: its memory holds the opposite sign."""
    call = make_call((6, 3), device, training=training)
    assert call.grad is not None
    negated = replace(call, grad=torch._neg_view(call.grad))
    assert_matches(negated.run(batch_norm), negated.run(torch_batch_norm))


@in_both_modes
def test_saved_input_repacked_with_other_strides(training: bool, device: torch.device) -> None:
    """A hook may give a saved tensor back with gaps in its memory."""

    def repack(saved: Tensor) -> Tensor:
        padded = saved.new_full((*saved.shape[:-1], saved.shape[-1] + 3), 7)
        padded[..., : saved.shape[-1]] = saved
        return padded[..., : saved.shape[-1]]

    call = make_call((2, 3, 5), device, training=training)
    expected = call.run(batch_norm)
    with saved_tensors_hooks(lambda saved: saved, repack):
        found = call.run(batch_norm)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
