"""batch_norm against torch's function: values, scalars, dtypes, NaN, statistics and empty tensors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm

from tests.parity import STATISTICS, Call, assert_as_torch, assert_matches, in_both_modes, make_call, raised_by, random
from tritonbn.functional import batch_norm

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = {
    "2d": (6, 3),
    "3d": (4, 3, 5),
    "4d": (2, 3, 4, 3),
    "5d": (2, 3, 2, 3, 2),
    "6d": (2, 3, 2, 1, 2, 2),
    "7d": (2, 3, 1, 2, 1, 2, 2),
    "one-channel": (3, 1, 4),
    "one-pixel": (4, 3, 1, 1),
    "batch-of-one": (1, 3, 5),
    "two-values": (2, 3),
    "more-channels-than-values": (2, 37),
    "prime-space": (1, 2, 1, 131),
}


@in_both_modes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...], training: bool, device: torch.device) -> None:
    assert_as_torch(make_call(shape, device, training=training))


LEFT_OUT: dict[str, tuple[str, ...]] = {
    "all-given": (),
    "no-weight": ("weight",),
    "no-bias": ("bias",),
    "not-affine": ("weight", "bias"),
    "no-statistics": STATISTICS,
    "input-only": (*STATISTICS, "weight", "bias"),
}
# Evaluation needs the statistics.
optional_tensors = pytest.mark.parametrize(
    ("left_out", "training"),
    [
        pytest.param(left_out, training, id=f"{name}-{'training' if training else 'eval'}")
        for name, left_out in LEFT_OUT.items()
        for training in (True, False)
        if training or "running_mean" not in left_out
    ],
)


@optional_tensors
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5)], ids=["rows", "planes"])
def test_optional_tensors(
    shape: tuple[int, ...], left_out: tuple[str, ...], training: bool, device: torch.device
) -> None:
    assert_as_torch(make_call(shape, device, leave_out=left_out, training=training))


SCALARS: dict[str, dict[str, Any]] = {
    "momentum-zero": {"momentum": 0.0},
    "momentum-one": {"momentum": 1.0},
    "momentum-negative": {"momentum": -1.2},
    "momentum-over-one": {"momentum": 2.5},
    "momentum-nan-poisons-statistics-only": {"momentum": float("nan")},
    "momentum-int": {"momentum": 1},
    "momentum-tensor": {"momentum": torch.tensor(0.25)},
    "momentum-tensor-of-integers": {"momentum": torch.tensor(1)},
    "momentum-numpy": {"momentum": numpy.float64(0.25)},
    "momentum-numpy-of-integers": {"momentum": numpy.int32(1)},
    "momentum-true": {"momentum": True},
    "eps-large": {"eps": 10.0},
    "eps-int": {"eps": 1},
    "eps-tensor": {"eps": torch.tensor(0.25)},
    "eps-numpy": {"eps": numpy.float64(1e-3)},
    "eps-numpy-float32": {"eps": numpy.float32(0.25)},
    "eps-tiny": {"eps": 1e-12},
}


@in_both_modes
@pytest.mark.parametrize("scalars", SCALARS.values(), ids=SCALARS)
def test_momentum_and_eps(scalars: dict[str, Any], training: bool, device: torch.device) -> None:
    assert_as_torch(make_call((4, 3, 5), device, training=training, **scalars))


def test_eps_zero_in_eval(device: torch.device) -> None:
    call = make_call((4, 3, 5), device, training=False, eps=0.0)
    if raised_by(lambda: call.run(torch_batch_norm)):
        pytest.skip("this torch refuses it, others do not")
    assert_as_torch(call)


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5)], ids=["rows", "planes"])
def test_statistics_over_several_steps(shape: tuple[int, ...], device: torch.device) -> None:
    first = make_call(shape, device, training=True)
    ours = first.given(*STATISTICS)
    theirs = first.exact().given(*STATISTICS)
    for seed in range(4):
        x = random(*shape, seed=seed).to(device, torch.float32)
        batch_norm(x, **ours, training=True, momentum=0.3)
        torch_batch_norm(x.double(), **theirs, training=True, momentum=0.3)
    assert_matches(ours, theirs)


DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16-with-float32-parameters": (torch.float16, torch.float32),
    "bfloat16-with-float32-parameters": (torch.bfloat16, torch.float32),
}


@optional_tensors
@pytest.mark.parametrize(("dtype", "parameters"), DTYPES.values(), ids=DTYPES)
def test_dtypes(
    dtype: torch.dtype,
    parameters: torch.dtype,
    left_out: tuple[str, ...],
    training: bool,
    device: torch.device,
) -> None:
    call = make_call((4, 3, 5), device, dtype=dtype, parameters=parameters, leave_out=left_out, training=training)
    results = assert_as_torch(call)
    assert {name: tensor.dtype for name, tensor in results.items()} == {
        name: dtype if name in ("output", "grad_input") else parameters for name in results
    }


def test_half_values_near_the_range_of_half(device: torch.device) -> None:
    x = torch.full((2, 1, 64), 6e4, dtype=torch.float16, device=device)
    x[:, :, ::2] *= -1
    mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    assert_matches({"y": y.double().float()}, {"y": x.double().sign()})
    assert float(var) == pytest.approx(6e4**2 * 128 / 127, rel=1e-3)
    half = torch.ones(1, dtype=torch.float16, device=device)
    assert batch_norm(x, half.clone(), half, training=True, momentum=1.0).isfinite().all()
    assert half.isinf().all()


@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, training: bool, device: torch.device) -> None:
    call = make_call((4, 3, 5), device, dtype=dtype, parameters=torch.float32, training=training)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = call.run(batch_norm)
    assert ours["output"].dtype == dtype
    assert_matches(ours, call.exact().run(torch_batch_norm))


def poisoned(call: Call, name: str, index: tuple[int, ...], value: float) -> Call:
    """The call with one element of one tensor replaced."""
    tensor = getattr(call, name).clone()
    tensor[index] = value
    return replace(call, **{name: tensor})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5)], ids=["rows", "planes"])
def test_bad_value_spoils_its_channel_in_training(shape: tuple[int, ...], value: float, device: torch.device) -> None:
    index = (1, 2, *(3,) * (len(shape) - 2))
    call = poisoned(make_call(shape, device, training=True), "input", index, value)
    ours, theirs = call.run(batch_norm), call.exact().run(torch_batch_norm)
    good = make_call(shape, device, training=True).exact().run(torch_batch_norm)
    assert ours["output"][:, 2].isnan().all()
    for name in STATISTICS:
        torch.testing.assert_close(ours[name][2].double(), theirs[name][2], equal_nan=True)
    assert_matches({"y": ours["output"][:, :2]}, {"y": good["output"][:, :2]})
    assert_matches({"gx": ours["grad_input"][:, :2]}, {"gx": good["grad_input"][:, :2]})
    for name in STATISTICS:
        assert_matches({name: ours[name][:2]}, {name: good[name][:2]})


POISONS: dict[str, tuple[str, tuple[int, ...], float]] = {
    "nan-in-input": ("input", (1, 2, 3), float("nan")),
    "inf-in-input": ("input", (1, 2, 3), float("inf")),
    "negative-variance": ("running_var", (1,), -1.0),
    "zero-variance": ("running_var", (1,), 0.0),
    "nan-variance": ("running_var", (1,), float("nan")),
    "inf-variance": ("running_var", (1,), float("inf")),
    "nan-mean": ("running_mean", (1,), float("nan")),
    "nan-weight": ("weight", (1,), float("nan")),
    "nan-bias": ("bias", (1,), float("nan")),
    "inf-bias": ("bias", (1,), float("inf")),
}


@pytest.mark.parametrize(("name", "index", "value"), POISONS.values(), ids=POISONS)
def test_bad_value_spoils_what_it_touches_in_eval(
    name: str, index: tuple[int, ...], value: float, device: torch.device
) -> None:
    call = replace(make_call((2, 3, 5), device, training=False), grad=None)
    assert_as_torch(poisoned(call, name, index, value))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_nan_parameter_in_training_leaves_statistics_good(name: str, device: torch.device) -> None:
    call = replace(make_call((2, 3, 5), device, training=True), grad=None)
    assert_as_torch(poisoned(call, name, (1,), float("nan")))


@in_both_modes
def test_nan_gradient_spoils_its_channel_as_in_torch(training: bool, device: torch.device) -> None:
    call = poisoned(make_call((2, 3, 5), device, training=training), "grad", (1, 2, 3), float("nan"))
    assert_as_torch(call)


def strided(values: Tensor) -> tuple[Tensor, Tensor]:
    base = torch.full((2 * values.numel() + 1,), 7.0, dtype=values.dtype, device=values.device)
    return base, base[1::2].copy_(values)


def column(values: Tensor) -> tuple[Tensor, Tensor]:
    base = torch.full((values.numel(), 3), 7.0, dtype=values.dtype, device=values.device)
    return base, base[:, 1].copy_(values)


def part_of_a_buffer(values: Tensor) -> tuple[Tensor, Tensor]:
    base = torch.full((values.numel() + 3,), 7.0, dtype=values.dtype, device=values.device)
    return base, base[1:-2].copy_(values)


VIEWS = {"every-other": strided, "column": column, "inside-a-buffer": part_of_a_buffer}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5)], ids=["rows", "planes"])
def test_statistics_that_are_views_are_updated_in_place(
    shape: tuple[int, ...], view: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device
) -> None:
    call = make_call(shape, device, backward=False, training=True)
    made = {name: view(tensor) for name, tensor in call.given(*STATISTICS).items()}
    statistics: dict[str, Any] = {name: tensor for name, (_, tensor) in made.items()}
    batch_norm(call.input, **statistics, training=True)
    expected = call.exact().run(torch_batch_norm)
    for name, (base, tensor) in made.items():
        assert_matches({name: tensor}, {name: expected[name]})
        assert int((base == 7.0).sum()) == base.numel() - 3


@in_both_modes
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("view", [strided, column], ids=["every-other", "column"])
def test_parameters_and_statistics_may_be_strided(
    view: Callable[[Tensor], tuple[Tensor, Tensor]], name: str, training: bool, device: torch.device
) -> None:
    call = make_call((2, 3, 5), device, training=training)
    changed: dict[str, Any] = {name: view(getattr(call, name))[1]}
    assert_as_torch(replace(call, **changed))


@in_both_modes
def test_expanded_parameters(training: bool, device: torch.device) -> None:
    call = make_call((2, 3, 5), device, training=training)
    assert_as_torch(replace(call, weight=torch.full((1,), 1.5, device=device).expand(3)))


def test_eval_reads_strided_statistics(device: torch.device) -> None:
    call = make_call((2, 3, 5), device, training=False)
    views: dict[str, Any] = {name: strided(tensor)[1] for name, tensor in call.given(*STATISTICS).items()}
    ours = batch_norm(call.input, **views, weight=call.weight, bias=call.bias)
    assert_matches({"output": ours}, {"output": call.exact().run(torch_batch_norm)["output"]})


@in_both_modes
def test_version_of_statistics_is_not_bumped(training: bool, device: torch.device) -> None:
    call = make_call((2, 3, 5), device, training=training)
    statistics = call.given(*STATISTICS)
    versions = [tensor._version for tensor in statistics.values()]
    batch_norm(call.input.requires_grad_(), **statistics, weight=call.weight, bias=call.bias, training=training)
    assert [tensor._version for tensor in statistics.values()] == versions


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@in_both_modes
def test_without_gradients_the_rest_is_the_same(
    training: bool, context: Callable[[], Any], device: torch.device
) -> None:
    call = make_call((2, 3, 5), device, training=training)
    statistics = {name: tensor.clone() for name, tensor in call.given(*STATISTICS).items()}
    with context():
        y = batch_norm(call.input.requires_grad_(), **statistics, weight=call.weight, bias=call.bias, training=training)
    assert not y.requires_grad
    expected = call.exact().run(torch_batch_norm)
    assert_matches({"output": y} | statistics, {name: expected[name] for name in ("output", *STATISTICS)})


def test_inference_tensors_are_accepted(device: torch.device) -> None:
    with torch.inference_mode():
        call = make_call((2, 3, 5), device, backward=False, training=True)
        call.run(batch_norm)
    assert_matches(call.run(batch_norm), call.exact().run(torch_batch_norm))


EMPTY = {
    "batch": (0, 3, 4),
    "batch-2d": (0, 3),
    "batch-4d": (0, 3, 4, 4),
    "space": (2, 3, 0),
    "space-4d": (2, 3, 0, 4),
}


@in_both_modes
@pytest.mark.parametrize("left_out", [(), ("weight",), ("weight", "bias")], ids=["affine", "no-weight", "plain"])
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_empty_input_has_gradients_and_leaves_statistics(
    shape: tuple[int, ...], left_out: tuple[str, ...], training: bool, device: torch.device
) -> None:
    ours = assert_as_torch(make_call(shape, device, leave_out=left_out, training=training))
    assert ours["output"].shape == ours["grad_input"].shape == shape
    assert all(not ours[name].any() for name in ("grad_weight", "grad_bias") if name in ours)


@in_both_modes
@pytest.mark.parametrize("count", [0, 4], ids=["statistics-of-0", "statistics-of-4"])
def test_no_channels_return_the_input_unchanged(count: int, training: bool, device: torch.device) -> None:
    mean, var = torch.ones(count, device=device), torch.ones(count, device=device)
    y = batch_norm(torch.zeros(2, 0, 3, device=device), mean, var, training=training)
    assert y.shape == (2, 0, 3)
    assert torch.equal(mean, var)
    assert torch.equal(mean, torch.ones_like(mean))


def test_strided_statistics_in_inference_mode(device: torch.device) -> None:
    """They have no version counter to keep."""
    call = make_call((6, 3), device, training=True)
    with torch.inference_mode():
        ours, theirs = (torch.zeros(2, 3, 2, device=device) + 1 for _ in range(2))
        batch_norm(call.input, ours[0, :, 0], ours[1, :, 0], training=True)
        torch_batch_norm(call.input, theirs[0, :, 0], theirs[1, :, 0], training=True)
        torch.testing.assert_close(ours, theirs)


def test_expanded_statistics_are_torchs_own_affair(device: torch.device) -> None:
    """All channels in one place: whatever torch does is done, and no error comes after the computation."""
    call = make_call((6, 3), device, training=True)
    results = []
    for function in (batch_norm, torch_batch_norm):
        mean, var = torch.zeros(1, device=device).expand(3), torch.ones(1, device=device).expand(3)
        results.append((function(call.input, mean, var, training=True), mean, var))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_whole_numbers_as_scalars(device: torch.device) -> None:
    call = make_call((6, 3), device, training=True)
    for momentum, eps in ((1, 1), (0, 10**30)):
        results = (
            function(call.input, call.running_mean, call.running_var, training=True, momentum=momentum, eps=eps)
            for function in (batch_norm, torch_batch_norm)
        )
        torch.testing.assert_close(*results)
