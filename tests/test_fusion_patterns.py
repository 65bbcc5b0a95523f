"""Which forwards fuse what, which do not and why; all train as they did."""

import contextlib
import operator
import random as python_random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import tritonbn
from tests.fusing import CHANNELS, assert_trains_alike, body, converted, convolution, fused_in, images, net, norm
from tritonbn.fused_forward import install, is_installed

Forward = Callable[..., Any]


def iadd(self: Any, x: Tensor) -> Any:
    out = self.bn(self.conv(x))
    out += x
    return out.relu_()


def iadd_with_operator(self: Any, x: Tensor) -> Any:
    return F.relu_(operator.iadd(self.bn(x), x))  # type: ignore[no-untyped-call]


def helper_method(self: Any, x: Tensor) -> Any:
    return type(self).rest(self, self.bn(x))


def residual_first(self: Any, x: Tensor) -> Any:
    shortcut = self.bn2(self.conv(x)).relu()
    return torch.relu(shortcut + self.bn(self.conv2(x)))


def number_incremented(self: Any, x: Tensor) -> Any:
    n = m = x.size(0)
    n += 1
    return self.bn(x).relu() * n / m


FOUND: dict[str, tuple[Forward, list[str]]] = {
    "module": (lambda self, x: self.relu(self.bn(self.conv(x))), ["relu"]),
    "function": (lambda self, x: F.relu(self.bn(x)), ["relu"]),
    "function-in-place": (lambda self, x: F.relu(self.bn(x), inplace=True), ["relu"]),
    "function-in-place-by-position": (lambda self, x: F.leaky_relu(self.bn(x), 0.2, True), ["leaky_relu(0.2)"]),
    "function-with-parameter": (lambda self, x: F.elu(self.bn(x), alpha=0.5), ["elu(0.5)"]),
    "torch-function": (lambda self, x: torch.sigmoid(self.bn(x)), ["sigmoid"]),
    "torch-function-in-place": (lambda self, x: torch.relu_(self.bn(x)), ["relu"]),
    "method": (lambda self, x: self.bn(x).tanh(), ["tanh"]),
    "method-in-place": (lambda self, x: self.bn(x).relu_(), ["relu"]),
    "gelu-tanh": (lambda self, x: F.gelu(self.bn(x), approximate="tanh"), ["gelu_tanh"]),
    "add": (lambda self, x: self.bn(x) + x, ["add"]),
    "add-other-order": (lambda self, x: x + self.bn(x), ["add"]),
    "torch-add": (lambda self, x: torch.add(x, self.bn(x)), ["add"]),
    "torch-add-alpha-1": (lambda self, x: torch.add(x, self.bn(x), alpha=1), ["add"]),
    "method-add": (lambda self, x: self.bn(x).add(x), ["add"]),
    "method-add-other-order": (lambda self, x: x.add(self.bn(x)), ["add"]),
    "method-add-in-place": (lambda self, x: self.bn(x).add_(x), ["add"]),
    "iadd-method-relu": (iadd, ["add + relu"]),
    "iadd-operator": (iadd_with_operator, ["add + relu"]),
    "add-relu": (lambda self, x: self.relu(x + self.bn(self.conv(x))), ["add + relu"]),
    "two-norms-added": (lambda self, x: self.relu(self.bn(x) + self.bn2(self.conv(x))), ["add + relu"] * 2),
    "one-norm-twice-added": (lambda self, x: self.relu(self.bn(x) + self.bn(self.conv(x))), ["", "add + relu"]),
    "residual-is-fused-itself": (residual_first, ["relu", "add + relu"]),
    "one-norm-twice": (lambda self, x: self.bn(self.bn(x).relu()).relu(), ["relu", "relu"]),
    "tuple": (lambda self, x: (self.bn(x).relu(), x), ["relu"]),
    "dict": (lambda self, x: {"out": self.bn(x).relu()}, ["relu"]),
    "shape-arithmetic": (lambda self, x: self.bn(x).relu().view(x.size(0), -1), ["relu"]),
    "is-tensor": (lambda self, x: self.bn(x).relu() if torch.is_tensor(x) else x, ["relu"]),
    "hasattr-of-input": (lambda self, x: x if hasattr(x, "tensors") else self.bn(x).relu(), ["relu"]),
    "number-incremented": (number_incremented, ["relu"]),
    "isinstance-of-input": (lambda self, x: self.bn(x if isinstance(x, Tensor) else x[0]).relu(), ["relu"]),
    "default-argument": (lambda self, x, scale=None: self.bn(x).relu() if scale is None else x, ["relu"]),
    "parameter-read": (lambda self, x: self.bn(x).relu() * self.conv.weight.mean(), ["relu"]),
    "buffer-written": (lambda self, x: self.bn(x).relu() + self.bn2.running_mean.add_(1).mean(), ["relu"]),
}


@pytest.mark.parametrize(("forward", "expected"), FOUND.values(), ids=FOUND)
def test_pattern_is_fused(forward: Forward, expected: list[str]) -> None:
    model = net(forward)
    ours = converted(model)
    assert fused_in(ours, images()) == expected
    assert_trains_alike(ours, model, images())


CHILDREN: dict[str, tuple[Forward, dict[str, nn.Module], list[str]]] = {
    "sequential-ends-in-norm": (lambda self, x: self.relu(self.body(x) + x), {"body": body()}, ["add + relu"]),
    "nested-sequentials": (
        lambda self, x: self.relu(x + self.body(x)),
        {"body": nn.Sequential(body(nn.ReLU()), nn.Sequential(convolution(), nn.Sequential(norm())))},
        ["relu", "add + relu"],
    ),
    "identity-before-add": (lambda self, x: x + self.drop(self.bn(x)), {"drop": nn.Identity()}, ["add"]),
    "identity-before-activation": (lambda self, x: self.relu(self.drop(self.bn(x))), {"drop": nn.Identity()}, ["relu"]),
    "identity-before-both": (
        lambda self, x: self.relu(x + self.drop(self.bn(x))),
        {"drop": nn.Identity()},
        ["add + relu"],
    ),
    "in-place-relu-shared": (
        lambda self, x: self.relu(self.bn2(self.conv2(self.relu(self.bn(self.conv(x))))) + x),
        {"relu": nn.ReLU(inplace=True)},
        ["relu", "add + relu"],
    ),
    "one-norm-under-two-names": (
        lambda self, x: self.bn2(self.bn(x).relu()).relu(),
        dict.fromkeys(("bn", "bn2"), norm()),
        ["relu", "relu"],
    ),
    "shortcut-with-norm": (
        lambda self, x: self.relu(self.bn(self.conv(x)) + self.shortcut(x)),
        {"shortcut": body()},
        ["add + relu", "add + relu"],
    ),
}


@pytest.mark.parametrize(("forward", "children", "expected"), CHILDREN.values(), ids=CHILDREN)
def test_pattern_with_children_is_fused(forward: Forward, children: dict[str, nn.Module], expected: list[str]) -> None:
    model = net(forward, **children)
    ours = converted(model)
    assert fused_in(ours, images()) == expected
    assert_trains_alike(ours, model, images())


SEQUENCES: dict[str, tuple[Callable[[], list[nn.Module]], list[str]]] = {
    "norm-relu": (lambda: [norm(), nn.ReLU()], ["relu"]),
    "in-place": (lambda: [convolution(), norm(), nn.ReLU(inplace=True)], ["relu"]),
    "identity-between": (lambda: [norm(), nn.Identity(), nn.Identity(), nn.SiLU()], ["silu"]),
    "nested": (lambda: [body(), nn.LeakyReLU(0.3), body(nn.ReLU())], ["leaky_relu(0.3)", "relu"]),
    "norm-norm": (lambda: [norm(), norm(), nn.ReLU()], ["", "relu"]),
    "other-activation": (lambda: [norm(), nn.PReLU(CHANNELS), norm(), nn.ReLU()], ["", "relu"]),
    "ends-in-norm": (lambda: [norm(), nn.ReLU(), norm()], ["relu", ""]),
}


@pytest.mark.parametrize(("make", "expected"), SEQUENCES.values(), ids=SEQUENCES)
def test_sequential_is_fused(make: Callable[[], list[nn.Module]], expected: list[str]) -> None:
    model = nn.Sequential(*make()).double()
    ours = converted(model)
    assert fused_in(ours, images()) == expected
    assert_trains_alike(ours, model, images())


def used_later(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return y.relu() + y


def residual_changed(self: Any, x: Tensor) -> Any:
    identity = self.conv(x)
    identity += self.bn(x)
    return identity


def input_changed_between(self: Any, x: Tensor) -> Any:
    z = self.conv(x) * 2
    y = self.bn(z)
    return y + z.mul_(2)


def input_changed_through_view(self: Any, x: Tensor) -> Any:
    z = self.conv(x)
    y = self.bn(z)
    w = z.view(-1).clamp_(0)
    return y + w.view(z.shape)


def residual_changed_after_add(self: Any, x: Tensor) -> Any:
    identity = self.conv(x)
    y = self.bn(x) + identity
    identity.mul_(3)
    return y.relu() - identity


def called_between(self: Any, x: Tensor) -> Any:
    return torch.relu(self.bn(x) + self.bn(self.conv(x)).sigmoid())


def statistics_read(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return y + (x + self.bn.running_mean.sum())


def sets_attribute(self: Any, x: Tensor) -> Any:
    self.seen = x.shape
    return self.bn(x).relu()


def appends_to_attribute(self: Any, x: Tensor) -> Any:
    self.notes.append(x.shape[0])
    self.notes = self.notes[-2:]
    return self.bn(x).relu()


def branches(self: Any, x: Tensor) -> Any:
    return self.bn(x).relu() if x.sum() < 1e9 else self.bn(x)


def makes_tensor(self: Any, x: Tensor) -> Any:
    return self.bn(x).relu() + torch.full((1,), 2.0, dtype=x.dtype if False else torch.float64)


def draws(self: Any, x: Tensor) -> Any:
    python_random.seed(3)
    return self.bn(x).relu() if python_random.random() < 2 else x


def draws_with_torch(self: Any, x: Tensor) -> Any:
    return self.bn(x).relu() * (1 + torch.rand(1).item())


def without_gradient(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = self.bn(x).relu()
    return self.conv(y)


def with_autocast_off(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        return self.bn(x).relu()


def checkpointed(self: Any, x: Tensor) -> Any:
    return checkpoint(lambda x: self.bn(self.conv(x)).relu(), x, use_reentrant=False)


def with_generator(self: Any, x: Tensor) -> Any:
    """As torch.utils.checkpoint is written up to torch 2.12: what fails between its steps leaves the hooks set."""
    hooks = hooked()
    next(hooks)
    y = self.bn(x).relu()
    next(hooks, None)
    return y


def hooked() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


def raises_from_itself(self: Any, x: Tensor) -> Any:
    try:
        return self.bn(x).relu() if x.sum() < 1e9 else x
    except Exception as error:
        raise error from error


def asks_type(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return y.relu() if isinstance(y, Tensor) else y[0]


def ordered(self: Any, x: Tensor) -> Any:
    return OrderedDict(out=self.bn(x).relu())


def calls_childs_method(self: Any, x: Tensor) -> Any:
    return self.inner.forward(x).relu()


def method_called(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    y.requires_grad_()
    return y.relu()


def catches_refusal(self: Any, x: Tensor) -> Any:
    try:
        return self.bn(x).relu() if x.sum() < 1e9 else x
    except Exception:
        return self.bn(x).sigmoid()


def writes_to_part(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    y[0] = 1
    return y.relu()


def sets_attribute_of_tensor(self: Any, x: Any) -> Any:
    x.o = 1
    return self.bn(x).relu()


def any_number(self: Any, *xs: Tensor) -> Any:
    return self.bn(xs[0]).relu()


def kept_in_a_closure(self: Any, x: Tensor) -> Any:
    y = self.bn(x)

    def again() -> Any:
        return y

    return y.relu() + again()


def draws_between(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    z = torch.rand(1)
    return y.relu() * (1 + 0 * z)


def shows_variables(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return y.relu() * len(locals())


def asks_for_a_version(self: Any, x: Tensor) -> Any:
    y = F.relu(self.bn(x), inplace=True)
    return y * (1 + y._version)


def is_a_generator(self: Any, x: Tensor) -> Any:
    yield self.bn(x).relu()


FUSED_AS_WRITTEN: dict[str, tuple[Forward, list[str]]] = {
    "sets-attribute": (sets_attribute, ["relu"]),
    "appends-to-attribute": (appends_to_attribute, ["relu"]),
    "data-dependent": (branches, ["relu"]),
    "makes-tensor": (makes_tensor, ["relu"]),
    "python-random": (draws, ["relu"]),
    "torch-random": (draws_with_torch, ["relu"]),
    "no-grad": (without_gradient, ["relu"]),
    "autocast": (with_autocast_off, ["relu"]),
    "generator": (with_generator, ["relu"]),
    "ordered-dict": (ordered, ["relu"]),
    "hasattr-of-intermediate": (
        lambda self, x: self.bn(x).relu() if not hasattr(self.bn2(x), "o") else x,
        ["", "relu"],
    ),
    "prints": (lambda self, x: self.bn(x).relu() if f"{x}" else x, ["relu"]),
    "catches": (catches_refusal, ["relu"]),
    "raises-from-itself": (raises_from_itself, ["relu"]),
    "number-of-tensor": (lambda self, x: self.bn(x).relu() * int(x.size(0)), ["relu"]),
    "sets-attribute-of-tensor": (sets_attribute_of_tensor, ["relu"]),
    "any-number-of-arguments": (any_number, ["relu"]),
    "square-root-by-numpy": (lambda self, x: self.bn(x).relu() * np.sqrt(2), ["relu"]),
    "called-between": (called_between, ["", "sigmoid"]),
    "comprehension": (lambda self, x: sum([layer(x) for layer in (self.conv,)]) + self.bn(x).relu(), ["relu"]),
}


@pytest.mark.parametrize(("forward", "expected"), FUSED_AS_WRITTEN.values(), ids=FUSED_AS_WRITTEN)
def test_whatever_else_a_forward_does_it_does_at_each_call(forward: Forward, expected: list[str]) -> None:
    model = net(forward)
    vars(model)["notes"] = []
    ours = converted(model)
    assert model.notes == ours.notes == [], "looking at a model runs nothing of it"
    state = torch.get_rng_state()
    assert sorted(fused_in(ours, images())) == sorted(expected)
    torch.set_rng_state(state)
    assert_trains_alike(ours, model, images())
    assert ours.notes == model.notes
    assert getattr(ours, "seen", None) == getattr(model, "seen", None)


NOT_FUSED: dict[str, tuple[Forward, str]] = {
    "used-twice": (used_later, "its output is used several times (test_fusion_patterns.py:"),
    "added-to-itself": (
        lambda self, x: operator.add(*[self.bn(x)] * 2),
        "its output is kept in [self.bn(x)] (test_fus",
    ),
    "returned": (lambda self, x: self.bn(x), "its output is returned"),
    "returned-in-list": (lambda self, x: [self.bn(x)], "its output is kept in [self.bn(x)] (test_fusion_patterns.py:"),
    "other-module": (
        lambda self, x: self.conv2(self.bn(x)).relu(),
        "its output goes to self.conv2 (test_fusion_patterns",
    ),
    "other-function": (lambda self, x: torch.cat([self.bn(x), x]).relu(), "its output is kept in [self.bn(x), x]"),
    "add-scaled": (lambda self, x: torch.add(x, self.bn(x), alpha=2), "its output goes to torch.add"),
    "add-number": (lambda self, x: (self.bn(x) + 1).relu(), "its output is added to what is no tensor"),
    "parameter-not-a-number": (lambda self, x: F.leaky_relu(self.bn(x), x.size(0) / 7), "F.leaky_relu may change it"),
    "method-called": (method_called, "its output is used several times"),
    "residual-in-place": (residual_changed, "an add in place changes the other operand"),
    "residual-in-place-method": (lambda self, x: self.conv(x).add_(self.bn(x)), "an add in place"),
    "input-changed": (input_changed_between, "'z.mul_' comes between it and what follows (test_fusion_patterns.py:"),
    "input-changed-through-view": (input_changed_through_view, "'z.view' comes between it and what follows"),
    "statistics-read-between": (statistics_read, "'self.bn.running_mean' comes between it and what follows"),
    "checkpoint": (checkpointed, "it is called in a way that is not followed (test_fusion_patterns.py:"),
    "isinstance-of-intermediate": (asks_type, "its output is used several times"),
    "writes-to-part": (writes_to_part, "'y[0] = 1' comes between it and what follows"),
    "iterates": (
        lambda self, x: torch.stack([self.bn(y).relu() for y in (x, *x[None])]),
        "in a way that is not followed",
    ),
    "method-of-child": (lambda self, x: self.relu.forward(self.bn(x)), "its output goes to self.relu.forward"),
    "module-from-elsewhere": (lambda self, x: nn.ReLU()(self.bn(x)), "its output goes to nn.ReLU()"),
    "named-argument-to-norm": (lambda self, x: self.bn(input=x).relu(), "it is called in a way that is not followed"),
    "kept-in-a-closure": (kept_in_a_closure, "its output is kept in a variable that others see"),
    "drawn-between": (draws_between, "'torch.rand(1)' comes between it and what follows"),
    "asks-for-its-variables": (shows_variables, "its forward asks for its variables: locals()"),
    "asks-for-a-version": (asks_for_a_version, "its forward asks how often a tensor was written to: ._version"),
    "is-a-generator": (is_a_generator, "its forward is a generator or a coroutine"),
}


@pytest.mark.parametrize(("forward", "why"), NOT_FUSED.values(), ids=NOT_FUSED)
def test_pattern_is_not_fused_and_said_why(forward: Forward, why: str) -> None:
    model = net(forward)
    ours = converted(model)
    assert why in tritonbn.report(ours).rows[0].alone
    if forward is is_a_generator:
        torch.testing.assert_close(list(ours(images())), list(model(images())))
        return
    assert fused_in(ours, images())[0] == ""
    if forward in (input_changed_between, input_changed_through_view):  # torch refuses their backward
        with torch.no_grad():
            torch.testing.assert_close(ours(images()), model(images()))
    else:
        assert_trains_alike(ours, model, images())


def number_has_no_add(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    number = 1
    return number.add_(y)  # type: ignore[attr-defined]


def module_is_missing(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return self.missing(y)


def global_is_missing(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    return missing(y)  # type: ignore[name-defined]  # noqa: F821


def variable_is_missing(self: Any, x: Tensor) -> Any:
    if not x.shape:
        shortcut = x
    return torch.relu(self.bn(x) + shortcut)


def operand_is_missing(self: Any, x: Tensor) -> Any:
    return torch.relu(self.bn(x) + self.missing)


def parameter_is_missing(self: Any, x: Tensor) -> Any:
    return F.leaky_relu(self.bn(x), self.missing)


def keyword_is_missing(self: Any, x: Tensor) -> Any:
    return F.leaky_relu(self.bn(x), negative_slope=self.missing)


def missing_after_two(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    z = self.bn2(x)
    return self.missing(y + z)


def missing_in_a_method(self: Any, x: Tensor) -> Any:
    return self.relu(operand_is_missing(self, self.bn2(x)))


def handled(self: Any, x: Tensor) -> Any:
    try:
        y = self.bn(x)
        y = self.missing(y)
    except AttributeError:
        y = x
    return torch.relu(y)


def operand_handled(self: Any, x: Tensor) -> Any:
    try:
        y = torch.relu(self.bn(x) + self.missing)
    except AttributeError:
        y = x
    return y


def slope_handled(self: Any, x: Tensor) -> Any:
    try:
        y = F.leaky_relu(self.bn(x), self.missing)
    except AttributeError:
        y = x
    return y


def suppressed(self: Any, x: Tensor) -> Any:
    y = x
    with contextlib.suppress(AttributeError):
        y = self.bn(x)
        y = self.missing(y)
    return torch.relu(y)


def operand_suppressed(self: Any, x: Tensor) -> Any:
    y = x
    with contextlib.suppress(AttributeError):
        y = self.bn(x) + self.missing
    return torch.relu(y)


def handled_by_the_caller(self: Any, x: Tensor) -> Any:
    try:
        return operand_is_missing(self, x)
    except AttributeError:
        return x


def raised_in_a_context(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = self.bn(x)
        return self.missing(y)


def both_norms_fail(self: Any, x: Tensor) -> Any:
    x = x.half()
    y = self.bn(x)
    z = self.bn2(x)
    return torch.relu(y) + z


def layer_beside_fails(self: Any, x: Tensor) -> Any:
    y = self.bn(x)
    z = self.linear(x)
    return torch.relu(y + z)


@pytest.mark.parametrize(
    "forward",
    [
        number_has_no_add, module_is_missing, global_is_missing, variable_is_missing, operand_is_missing,
        parameter_is_missing, keyword_is_missing, missing_after_two, missing_in_a_method, handled, operand_handled,
        slope_handled, suppressed, operand_suppressed, handled_by_the_caller, raised_in_a_context, layer_beside_fails,
        both_norms_fail,
    ],
)  # fmt: skip
@pytest.mark.parametrize("within", [False, True])
def test_what_raises_before_the_norm_is_used_raises_after_it_ran(forward: Forward, within: bool) -> None:
    model = net(forward, linear=nn.Linear(7, 7))
    if within:
        model = net(handled_by_the_caller_of_a_block, block=model)
    ours = converted(model)
    for module in ours.modules():  # also where there is nothing to fuse
        if module._modules:
            install(module)
    assert is_installed(ours)
    outcomes = []
    for one in (model, ours):
        try:
            outcomes.append(one(images()))
        except (AttributeError, NameError, RuntimeError) as error:
            outcomes.append((type(error), str(error)))
    torch.testing.assert_close(ours.state_dict(), model.state_dict())
    if isinstance(outcomes[0], Tensor):
        torch.testing.assert_close(outcomes[1], outcomes[0])
    else:
        assert outcomes[0] == outcomes[1]


def handled_by_the_caller_of_a_block(self: Any, x: Tensor) -> Any:
    y = x
    with contextlib.suppress(Exception):
        y = self.block(self.bn(x))
    return self.relu(self.bn2(y))


def test_residual_that_is_written_after_the_add_is_added_before() -> None:
    model = net(residual_changed_after_add)
    ours = converted(model)
    assert fused_in(ours, images()) == ["add"]
    assert_trains_alike(ours, model, images())


@pytest.mark.parametrize("shared", [(), ("running_mean",), ("running_var",), ("num_batches_tracked",)])
def test_statistics_that_the_shortcut_shares_are_updated_in_order(shared: tuple[str, ...]) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        out = self.bn(self.conv(x))
        out += self.shortcut(x)
        return torch.relu(out)

    model = net(forward, shortcut=body())
    for name in shared:
        model.shortcut[1]._buffers[name] = model.bn._buffers[name]
    if shared == ("num_batches_tracked",):
        model.bn.momentum = model.shortcut[1].momentum = None
    ours = converted(model)
    assert_trains_alike(ours, model, images())
    assert fused_in(ours, images()) == ["" if shared else "add + relu", "add + relu"]  # whichever comes last


def test_what_docs_say_stays_different() -> None:
    """The version of what a fused step returns, a weight changed through .data, a hook gone before a recomputation."""
    model = net(lambda self, x: F.relu(self.bn(x), inplace=True))
    ours = converted(model)
    assert (model(images())._version, ours(images())._version) == (1, 0)
    outputs = [one(images()) for one in (model, ours)]
    for one, output in zip((model, ours), outputs, strict=True):
        one.bn.weight.data.zero_()
        output.sum().backward()
    assert not torch.allclose(ours.bn.bias.grad, model.bn.bias.grad)
    watched = converted(net(lambda self, x: torch.relu(self.bn(x) + x)))
    handle = watched.bn.register_forward_hook(lambda *_: None)
    output = checkpoint(watched, images().requires_grad_(), use_reentrant=False)
    handle.remove()
    with pytest.raises(CheckpointError):
        output.sum().backward()


def test_one_report_of_six_refused_forwards_names_what_and_where() -> None:
    six = (
        "input-changed",
        "statistics-read-between",
        "drawn-between",
        "kept-in-a-closure",
        "used-twice",
        "writes-to-part",
    )
    lines = str(tritonbn.report(nn.ModuleList([net(NOT_FUSED[name][0]) for name in six]))).splitlines()
    for i, name in enumerate(six):
        line = next(line for line in lines if line.startswith(f"{i}.bn "))
        assert NOT_FUSED[name][1] in line
        assert "(test_fusion_patterns.py:" in line
