"""What is known of a call's tensors is looked at again as soon as anything about them changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.launches import recorded
from tritonbn import dispatch, plan
from tritonbn.dispatch import Call, recognize
from tritonbn.functional import batch_norm

Tensors = dict[str, Any]
NAMES = ("x", "running_mean", "running_var", "weight", "bias", "residual", "counter")


def tensors(device: torch.device) -> Tensors:
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    w, b = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    return dict(zip(NAMES, (torch.randn(4, 3, device=device), mean, var, w, b, None, None), strict=True))


class Looks:
    """`recognize`, and how often it had to look."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.look = dispatch._look
        patch.setattr(dispatch, "_look", self.counting)

    def __call__(self, given: Tensors, training: bool = True) -> Call:
        return recognize(tuple(given[name] for name in NAMES), training)

    def counting(self, given: tuple[Any, ...], training: bool) -> Call:
        self.count += 1
        return self.look(given, training)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def test_tensors_that_look_the_same_are_known(device: torch.device, looks: Looks) -> None:
    given = tensors(device)
    first = looks(given)
    for x in (given["x"], given["x"], torch.randn(4, 3, device=device), torch.zeros(8, 3, device=device)[:4]):
        assert looks(given | {"x": x}) is first
    assert looks.count == 1
    assert not first.reason
    assert first.records
    assert first.dense


def other_data(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """The same tensor object with other data."""

    def apply(given: Tensors) -> None:
        given[name].data = change(given[name].data)

    return apply


def other(name: str, make: Callable[[Tensor], Any]) -> Callable[[Tensors], None]:
    """Another tensor in its place."""

    def apply(given: Tensors) -> None:
        given[name] = make(given[name])

    return apply


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.detach().clone()


class Subclass(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


CHANGES: dict[str, Callable[[Tensors], None]] = {
    "dtype": other("x", Tensor.half),
    "shape": other("x", lambda x: x[:2]),
    "strides": other("x", lambda x: torch.zeros(3, 4, device=x.device).t()),
    "requires-grad": other("x", lambda x: x.detach().requires_grad_()),
    "negative-view": other("x", torch._neg_view),
    "inference-tensor": other("x", inference),
    "subclass": other("x", lambda x: x.as_subclass(Subclass)),
    "residual": other("residual", lambda _: torch.zeros(4, 3)),
    "no-weight": other("weight", lambda w: None),
    "no-statistics": other("running_mean", lambda m: None),
    "weight-dtype-in-place": other_data("weight", Tensor.double),
    "weight-shape-in-place": other_data("weight", lambda w: w[:2]),
    "weight-strides-in-place": other_data("weight", lambda w: torch.ones(6, device=w.device)[::2]),
    "weight-frozen-in-place": lambda given: given["weight"].requires_grad_(False),
    "statistics-dtype-in-place": other_data("running_mean", Tensor.half),
    "statistics-expanded-in-place": other_data("running_var", lambda v: v[:1].expand(3)),
    "statistics-learned-in-place": lambda given: given["running_var"].requires_grad_(),
    "statistics-of-inference-mode": other("running_mean", inference),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_is_looked_at(change: Callable[[Tensors], None], device: torch.device, looks: Looks) -> None:
    given = tensors(device)
    looks(given)
    change(given)
    found = looks(given)
    assert looks.count == 2
    assert found == looks.look(tuple(given[name] for name in NAMES), True)


def test_the_mode_is_looked_at(device: torch.device, looks: Looks) -> None:
    given = tensors(device)
    assert looks(given).records
    with torch.no_grad():
        assert not looks(given).records
    assert looks(given).records
    looks(given, training=False)
    assert looks.count == 3
    with torch.inference_mode():
        assert not looks(given).records


def test_transforms_and_traces_see_each_operation(device: torch.device, looks: Looks) -> None:
    given = tensors(device)
    given["x"].requires_grad_(False)
    assert not looks(given).reason
    found = []

    def inside(x: Tensor) -> Tensor:
        found.append(looks(given).reason)
        found.append(looks(given | {"x": x}).reason)
        leaked.append(x)
        return x.sum()

    leaked: list[Tensor] = []
    torch.func.grad(inside)(given["x"])
    torch.jit.trace(inside, given["x"], check_trace=False)  # type: ignore[no-untyped-call]
    assert found == ["a transform of torch.func is active"] * 2 + ["torch.jit.trace records it"] * 2
    assert looks(given | {"x": leaked[0]}).reason, "a tensor of a transform that is over"
    assert not looks(given).reason


def test_plans_follow_what_forces_them(device: torch.device, looks: Looks) -> None:
    given = tensors(device)
    found = looks(given)
    own = found.plan("forward", given["x"])
    assert found.plan("forward", given["x"]) is own
    with plan.forced("split"):
        assert found.plan("forward", given["x"]).plan.path == "split"
    assert found.plan("forward", given["x"]).plan == own.plan
    assert found.plan("backward", given["x"]).plan.operation == "backward"


def test_parameters_converted_in_place_get_kernels_of_their_dtype(device: torch.device) -> None:
    """The module keeps its tensors, and `.double()` gives them other data: a launch for float32 would misread it."""
    module = nn.BatchNorm1d(3, device=device)
    x = torch.randn(8, 3, device=device)
    for dtype in (torch.float32, torch.float64, torch.float32):
        module.to(dtype)
        given = module.running_mean, module.running_var, module.weight, module.bias
        with recorded() as kernels:
            y = batch_norm(x.to(dtype), *given, training=True)
        assert kernels
        expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
