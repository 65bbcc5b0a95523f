"""batch_norm under torch.func, meta and fake tensors, tensor subclasses and torch.compile."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import batch_norm as torch_batch_norm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import tritonbn
from tests.parity import (
    STATISTICS,
    Call,
    assert_matches,
    assert_same_error,
    channels_last,
    formats,
    in_both_modes,
    make_call,
    random,
)
from tritonbn import BatchNorm1d, tickets
from tritonbn.activations import IDENTITY, Activation
from tritonbn.autograd import keeps_bits
from tritonbn.functional import batch_norm
from tritonbn.plan import forced


def transformed(function: Callable[..., Tensor], training: bool, call: Call) -> Callable[..., Tensor]:
    """(x, w, b) -> y with the statistics of the call; none in training, where they would be written."""
    statistics = (None, None) if training else (call.running_mean, call.running_var)
    return lambda x, w, b: function(x, *statistics, w, b, training)


def flat(results: Any) -> dict[str, Tensor]:
    """All tensors of a nested tuple, numbered."""
    leaves = torch.utils._pytree.tree_leaves(results)
    return {str(index): leaf.detach() for index, leaf in enumerate(leaves)}


def tangents(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(random(*tensor.shape, seed=20 + i).to(tensor) for i, tensor in enumerate(arguments))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "jvp": lambda f, args: jvp(f, args, tangents(args)),
    "vjp": lambda f, args: vjp(f, *args)[1](tangents(args)[0]),
    "grad": lambda f, args: grad(lambda *a: f(*a).sin().sum(), argnums=(0, 1, 2))(*args),
    "jacrev": lambda f, args: jacrev(f, argnums=(0, 1))(*args),
    "jacfwd": lambda f, args: jacfwd(f, argnums=(0, 1))(*args),
    "hessian": lambda f, args: hessian(lambda *a: f(*a).sin().sum(), argnums=(0, 1))(*args),
    "per-sample-grad": lambda f, args: vmap(
        grad(lambda w, b, x: f(x[None], w, b).sin().sum(), argnums=(0, 1)), in_dims=(None, None, 0)
    )(args[1], args[2], args[0]),
    "vmap-over-inputs": lambda f, args: vmap(f, in_dims=(0, None, None))(stacked(args[0]), *args[1:]),
    "vmap-over-last-dimension": lambda f, args: vmap(f, in_dims=(3, None, None), out_dims=1)(
        stacked(args[0], dim=3), *args[1:]
    ),
    "vmap-over-parameters": lambda f, args: vmap(f, in_dims=(None, 0, 0))(args[0], stacked(args[1]), stacked(args[2])),
    "vmap-over-everything": lambda f, args: vmap(f)(*(stacked(tensor) for tensor in args)),
}


def stacked(tensor: Tensor, dim: int = 0) -> Tensor:
    return torch.stack([tensor, tensor * 2 - 1], dim)


@in_both_modes
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms(
    transform: Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any],
    training: bool,
    device: torch.device,
) -> None:
    call = make_call((2, 2, 3), device)

    def run(function: Callable[..., Tensor], call: Call) -> dict[str, Tensor]:
        arguments = tuple(call.given("input", "weight", "bias").values())
        return flat(transform(transformed(function, training, call), arguments))

    assert_matches(run(batch_norm, call), run(torch_batch_norm, call.exact()))


def test_vmap_with_batched_statistics_updates_each(device: torch.device) -> None:
    def run(function: Callable[..., Tensor], call: Call) -> dict[str, Tensor]:
        mean, var = (stacked(tensor) for tensor in call.given(*STATISTICS).values())
        y = vmap(lambda x, m, v: function(x, m, v, training=True))(stacked(call.input), mean, var)
        return {"y": y, "mean": mean, "var": var}

    call = make_call((2, 3, 4), device)
    assert_matches(run(batch_norm, call), run(torch_batch_norm, call.exact()))


def test_vmap_with_shared_statistics_raises_as_torch(device: torch.device) -> None:
    def run(function: Callable[..., Tensor]) -> Tensor:
        call = make_call((2, 3, 4), device)
        shared = call.given(*STATISTICS)
        return vmap(lambda x: function(x, **shared, training=True))(stacked(call.input))

    assert_same_error(partial(run, batch_norm), partial(run, torch_batch_norm))


def test_grad_over_a_training_module_raises_as_torch(device: torch.device) -> None:
    def run(kind: type[torch.nn.Module]) -> Any:
        module = kind(3, device=device)
        x = random(4, 3).to(device, torch.float32)
        return grad(lambda p: functional_call(module, p, (x,)).sum())(dict(module.named_parameters()))

    assert_same_error(partial(run, tritonbn.BatchNorm1d), partial(run, torch.nn.BatchNorm1d))


def test_grad_over_a_module_in_eval(device: torch.device) -> None:
    def run(kind: type[torch.nn.Module], dtype: torch.dtype) -> dict[str, Tensor]:
        module = kind(3, device=device, dtype=dtype).eval()
        x = random(4, 3).to(device, dtype)
        result: dict[str, Tensor] = grad(lambda p: functional_call(module, p, (x,)).sin().sum())(
            dict(module.named_parameters())
        )
        return result

    assert_matches(run(tritonbn.BatchNorm1d, torch.float32), run(torch.nn.BatchNorm1d, torch.float64))


def without_values(function: Callable[..., Tensor], x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Output and input gradient of a call on tensors that hold no values."""
    mean, var, weight, bias = (torch.ones(3, device=x.device) for _ in range(4))
    leaf = x.detach().requires_grad_()
    y = function(leaf, mean, var, weight, bias, training)
    return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


def assert_like(ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    """Shape, dtype and device of torch's; the format of x or torch's: 2.13 loses it in some gradients."""
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert formats(ours) in (formats(x), formats(theirs))


@in_both_modes
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [nullcontext, FakeTensorMode], ids=["meta", "fake"])
def test_tensors_without_values_have_shape_dtype_and_format(
    context: Callable[[], Any],
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    training: bool,
    device: torch.device,
) -> None:
    where = device if context is FakeTensorMode else torch.device("meta")
    with context():
        x = layout(torch.empty(2, 3, 4, 4, dtype=dtype, device=where))
        ours = without_values(batch_norm, x, training)
        theirs = without_values(torch_batch_norm, x, training)
    for mine, other in zip(ours, theirs, strict=True):
        assert_like(mine, other, x)
        assert mine.dtype == dtype


def test_cumulative_module_under_fake_tensors(device: torch.device) -> None:
    with FakeTensorMode():
        module = tritonbn.BatchNorm2d(3, momentum=None, device=device)
        y = module(torch.empty(2, 3, 4, 4, device=device))
    assert y.shape == (2, 3, 4, 4)


class Tagged(Tensor):
    """A tensor subclass that keeps its type through every torch function."""


@in_both_modes
def test_tensor_subclass_is_kept(training: bool, device: torch.device) -> None:
    call = make_call((4, 3), device, training=training)
    x = call.input.as_subclass(Tagged)
    y = batch_norm(x, **call.given(*STATISTICS, "weight", "bias"), training=training)
    assert type(y) is Tagged
    expected = make_call((4, 3), device, training=training).exact().run(torch_batch_norm)["output"]
    assert_matches({"y": y.as_subclass(Tensor)}, {"y": expected})


def test_parameter_that_is_a_subclass_decides_the_type(device: torch.device) -> None:
    call = make_call((4, 3), device)
    assert call.weight is not None
    y = batch_norm(call.input, None, None, call.weight.as_subclass(Tagged), training=True)
    assert type(y) is Tagged


def test_function_mode_sees_one_call(device: torch.device) -> None:
    names: list[str] = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    call = make_call((4, 3), device)
    with Log():
        batch_norm(call.input, None, None, training=True)
    assert names[0] == "batch_norm"


def test_device_context_does_not_interfere(device: torch.device) -> None:
    call = make_call((4, 3), device, backward=False, training=True)
    expected = call.exact().run(torch_batch_norm)
    with torch.device("meta"):
        ours = call.run(batch_norm)
    assert_matches(ours, expected)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["planes", "rows"])
@in_both_modes
def test_compiled_function(training: bool, layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(batch_norm, backend="aot_eager", fullgraph=True)
    call = make_call((2, 3, 4, 3), device, training=training)
    call = replace(call, input=layout(call.input))
    ours = call.run(compiled)
    assert_matches(ours, call.exact().run(torch_batch_norm))
    assert formats(ours["output"]) == formats(call.input)


def test_compiled_function_with_dynamic_sizes(device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(batch_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 4, 6):
        call = make_call((size, 3, size + 2), device, training=True)
        assert_matches(call.run(compiled), call.exact().run(torch_batch_norm))


def test_compiled_function_raises_on_one_value_per_channel(device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(batch_norm, backend="aot_eager")
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        compiled(torch.zeros(1, 3, device=device), None, None, training=True)


def test_traced_program_is_torchs(device: torch.device) -> None:
    """It must run where we are not installed."""
    x = torch.randn(6, 3, device=device)
    module = BatchNorm1d(3).to(device).eval()
    traced = torch.jit.trace(module, x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), module(x))
    assert "aten::batch_norm" in str(traced.graph)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "arrange",
    [lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(0, 2)],
    ids=["planes", "rows", "strided"],
)
@pytest.mark.parametrize("activation", [IDENTITY, Activation("relu"), Activation("silu")], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_operators_keep_their_contract(
    arrange: Callable[[Tensor], Tensor],
    training: bool,
    with_residual: bool,
    activation: Activation,
    device: torch.device,
) -> None:
    """torch's own check: schema, fake results, autograd registration, and all of it traced by AOTAutograd."""
    x = arrange(torch.randn(3, 4, 3, 5, device=device)).detach().requires_grad_()
    weight, bias = (torch.rand(4, device=device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device) if training else None
    momentum = None if training and activation == IDENTITY else 0.1  # None: the average over all batches
    residual = torch.randn_like(x, requires_grad=True) if with_residual else None
    keep_bits = keeps_bits(residual, activation)
    forward = x, weight, bias, residual, mean, var, counter, training, momentum, 1e-5, *activation, True, keep_bits
    torch.library.opcheck(torch.ops.tritonbn.batch_norm.default, forward)
    with torch.no_grad():
        _, bits, mean, rstd = torch.ops.tritonbn.batch_norm(*forward)
    dy = torch.randn(3, 4, 3, 5, device=device)
    kept = residual if activation.name == "silu" else None
    saved = (None if t is None else t.detach() for t in (x, weight, bias, kept, bits if keep_bits else None))
    wanted = [True, True, False, kept is not None or keep_bits]
    given = dy, *saved, mean, rstd, training, *activation, 1e-5, torch.float32, wanted
    torch.library.opcheck(torch.ops.tritonbn.batch_norm_backward.default, given)


def test_statistics_keep_their_version_under_a_dispatch_mode(device: torch.device) -> None:
    """A forward under the mode, then the backward of an earlier one: torch's update is no in-place change."""
    x = torch.randn(6, 3, device=device, requires_grad=True)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    first = batch_norm(x, mean, var, training=True)
    with FlopCounterMode(display=False):
        batch_norm(x, mean, var, training=True)
    first.sum().backward()  # type: ignore[no-untyped-call]


def test_compiled_code_hands_operators_the_statistics_themselves(device: torch.device) -> None:
    """Inductor's: nothing is copied there and back."""
    module = tritonbn.BatchNorm2d(4, momentum=None).to(device)
    x = torch.randn(3, 4, 3, 3, device=device, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    _, (forward, *_) = run_and_get_code(lambda: compiled(x).sum().backward())
    body = forward[forward.index("def call(") : forward.index("return (")]
    assert body.count("torch.ops.tritonbn.batch_norm.default(") == 1
    assert not [word for word in ("clone", "copy_", "empty_strided", "cpp_fused", "triton_") if word in body]
    assert module.num_batches_tracked is not None
    assert module.num_batches_tracked.item() == 1


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_compiled_code_of_any_size(activation: str, device: torch.device) -> None:
    """Inductor's: how many bits there are is not known when it is compiled, so the residual is kept."""
    module = tritonbn.BatchNormAct1d(3, activation).to(device)
    plain = tritonbn.BatchNormAct1d(3, activation).to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for N in (4, 7):
        x, r = (torch.randn(N, 3, device=device, requires_grad=True) for _ in range(2))
        found, true = (torch.autograd.grad(m(x, r).sin().sum(), (x, r)) for m in (compiled, plain))
        for mine, theirs in zip(found, true, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_transforms_in_compiled_code_see_torchs_operations(device: torch.device) -> None:
    def mapped(x: Tensor) -> Tensor:
        result: Tensor = vmap(lambda v: batch_norm(v, None, None, training=True))(x)
        return result

    x = torch.randn(2, 6, 3, device=device)
    compiled = torch.compile(mapped, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mapped(x))


def test_operators_check_what_they_are_given(device: torch.device) -> None:
    x, mean, var = torch.randn(4, 3, device=device), torch.zeros(3, device=device), torch.ones(3, device=device)

    def call(residual: Tensor | None, momentum: float | None = 0.1, eps: float = 1e-5) -> None:
        rest = mean, var, None, True, momentum, eps, *IDENTITY, False, False
        torch.ops.tritonbn.batch_norm(x, None, None, residual, *rest)

    with pytest.raises(ValueError, match="residual should have the shape of the input"):
        call(x[:2])
    with pytest.raises(ValueError, match="residual should have the dtype of the input"):
        call(x.half())
    for bad in ({"eps": 0.0}, {"eps": -1.0}, {"momentum": None}):
        with pytest.raises(RuntimeError, match="torch refuses it"):
            call(None, **bad)
    bits = torch.zeros(1, dtype=torch.uint8, device=device)
    given = x, x, None, None, None, bits, mean, var, True, "relu", 0.0, 0.0, 1e-5, torch.float32, [True] * 3 + [False]
    with pytest.raises(RuntimeError, match=r"expected 2 bytes of bits .*, got 1"):
        torch.ops.tritonbn.batch_norm_backward(*given)
    assert not mean.any()


def test_operators_have_the_memory_of_eager_calls(device: torch.device) -> None:
    """Nothing is zeroed for a call of theirs."""
    x = torch.randn(40, 5, device=device, requires_grad=True)
    with forced("split", splits=2):
        batch_norm(x, None, None, training=True).sum().backward()  # type: ignore[no-untyped-call]
        before = {key: kept.data_ptr() for key, kept in tickets._pool.items()}
        with FlopCounterMode(display=False):
            batch_norm(x, None, None, training=True).sum().backward()  # type: ignore[no-untyped-call]
    assert {key: kept.data_ptr() for key, kept in tickets._pool.items()} == before
