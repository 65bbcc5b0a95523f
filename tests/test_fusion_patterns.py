"""Which forwards fuse what, which do not and why; all train as they did."""

import operator
import random as python_random
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonbn
from tests.fusing import CHANNELS, assert_trains_alike, body, converted, convolution, fused_in, images, net, norm
surroundings = lambda: None

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
    "two-norms-added": (lambda self, x: self.relu(self.bn(x) + self.bn2(self.conv(x))), ["", "add + relu"]),
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
    "assigned-in-loop": (
        lambda self, x: [x := m(y) for y, m in ((x, self.bn), (None, self.relu)) if y is not None][-1].relu(),
        ["relu"],
    ),
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
        ["", "add + relu"],
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
    return self.bn(x).relu() if x.sum() > 0 else self.bn(x)


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


NOT_FUSED: dict[str, tuple[Forward, str]] = {
    "used-twice": (used_later, "its output is used 2 times"),
    "added-to-itself": (lambda self, x: operator.add(*[self.bn(x)] * 2), "its output is used 2 times"),
    "returned": (lambda self, x: self.bn(x), "its output is returned"),
    "returned-in-list": (lambda self, x: [self.bn(x)], "its output is returned"),
    "other-module": (lambda self, x: self.conv2(self.bn(x)).relu(), "its output goes to 'conv2' (Conv2d)"),
    "other-function": (lambda self, x: torch.cat([self.bn(x), x]).relu(), "its output goes to cat"),
    "add-scaled": (lambda self, x: torch.add(x, self.bn(x), alpha=2), "its output goes to add"),
    "add-number": (lambda self, x: (self.bn(x) + 1).relu(), "its output goes to add"),
    "parameter-not-a-number": (lambda self, x: F.leaky_relu(self.bn(x), x.size(0) / 7), "goes to leaky_relu"),
    "method-called": (method_called, "its output is used 2 times"),
    "residual-in-place": (residual_changed, "an add in place, which changes the other operand"),
    "residual-in-place-method": (lambda self, x: self.conv(x).add_(self.bn(x)), "an add in place"),
    "input-changed": (input_changed_between, "mul_ may change what it reads"),
    "input-changed-through-view": (input_changed_through_view, "clamp_ may change what it reads"),
    "residual-changed-after-add": (residual_changed_after_add, "mul_ may change what it reads"),
    "called-between": (called_between, "it is called again before its output is used"),
    "statistics-read-between": (statistics_read, "its statistics are read before its output is used"),
    "sets-attribute": (sets_attribute, "it sets attributes of the module"),
    "data-dependent": (branches, "it branches on the value of a tensor"),
    "makes-tensor": (makes_tensor, "it uses a tensor that is neither an input, a parameter nor a buffer"),
    "python-random": (draws, "it draws random numbers itself"),
    "torch-random": (draws_with_torch, "it draws random numbers itself"),
    "no-grad": (without_gradient, "it changes the grad mode, autocast"),
    "autocast": (with_autocast_off, "it changes the grad mode, autocast"),
    "checkpoint": (checkpointed, "it changes the grad mode, autocast, saved tensor hooks"),
    "generator": (with_generator, "it changes the grad mode, autocast, saved tensor hooks"),
    "isinstance-of-intermediate": (asks_type, "it asks for the type of an intermediate value"),
    "ordered-dict": (ordered, "it makes a OrderedDict"),
    "hasattr-of-intermediate": (lambda self, x: self.bn(x).relu() if not hasattr(self.bn2(x), "o") else x, "reads .o"),
    "prints": (lambda self, x: self.bn(x).relu() if f"{x}" else x, "it prints a tensor"),
    "catches-refusal": (catches_refusal, "it branches on the value of a tensor"),
    "writes-to-part": (writes_to_part, "it writes to a part of a tensor"),
    "number-of-tensor": (lambda self, x: self.bn(x).relu() * int(x.size(0)), "it makes a number of a tensor"),
    "iterates": (lambda self, x: torch.stack([self.bn(y).relu() for y in (x, *x[None])]), "it iterates over a tensor"),
    "sets-attribute-of-tensor": (sets_attribute_of_tensor, "it sets .o of a tensor"),
    "method-of-child": (lambda self, x: self.relu.forward(self.bn(x)), "it calls the method forward of a ReLU"),
    "module-from-elsewhere": (lambda self, x: nn.ReLU()(self.bn(x)), "it calls a ReLU that is none of its submodules"),
    "any-number-of-arguments": (any_number, "it takes any number of arguments"),
    "named-argument-to-norm": (lambda self, x: self.bn(input=x).relu(), "other arguments than one tensor"),
}


@pytest.mark.parametrize(("forward", "why"), NOT_FUSED.values(), ids=NOT_FUSED)
def test_pattern_is_not_fused_and_said_why(forward: Forward, why: str) -> None:
    model, before = net(forward), surroundings()
    ours = converted(model)
    assert why in tritonbn.report(ours).rows[0].alone
    assert fused_in(ours, images())[0] == ""
    assert surroundings() == before, "what a refused forward set is not set any more"
    if forward in (input_changed_between, input_changed_through_view):  # torch refuses their backward
        with torch.no_grad():
            torch.testing.assert_close(ours(images()), model(images()))
    else:
        assert_trains_alike(ours, model, images())


def test_an_error_that_is_its_own_cause_ends_the_trace() -> None:
    model = converted(net(raises_from_itself))
    assert "it branches on the value of a tensor" in tritonbn.report(model).rows[0].alone


def test_what_somebody_is_handling_keeps_its_variables() -> None:
    def fail() -> None:
        held = "kept"
        raise ValueError(held)

    try:
        fail()
    except ValueError as error:
        converted(net(branches))
        frames = [frame.f_locals.get("held") for frame, _ in traceback.walk_tb(error.__traceback__)]
    assert frames[-1] == "kept"
