"""PyTorch's own samples of batch norm (OpInfo, ModuleInfo with its error inputs) on ours, compared with torch.

The OpInfo of batch norm has no error inputs (torch 2.13): the wrong calls of the function are written here.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as forward_mode
from torch.nn.functional import batch_norm as torch_batch_norm

import tritonbn
from tests.parity import STATISTICS, Call, assert_matches, assert_same_error, make_call, raised_by, random
from tritonbn.functional import batch_norm

MODULES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: tritonbn.BatchNorm1d,
    nn.BatchNorm2d: tritonbn.BatchNorm2d,
    nn.BatchNorm3d: tritonbn.BatchNorm3d,
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def torch_database() -> SimpleNamespace | None:
    """The OpInfo and the ModuleInfos of batch norm; None where torch's test requirements are missing.

    Importing them sets a hypothesis profile and forbids setting torch.backends flags for the whole process:
    both are put back, or other tests would depend on this file being collected.
    """
    profile = hypothesis.settings.get_current_profile_name()
    flags = "__allow_nonbracketed_mutation_flag"
    allowed = getattr(torch.backends, flags)
    try:
        from torch.testing._internal.common_methods_invocations import op_db  # noqa: PLC0415
        from torch.testing._internal.common_modules import module_db  # noqa: PLC0415
    except ImportError:
        return None
    finally:
        hypothesis.settings.load_profile(profile)
        setattr(torch.backends, flags, allowed)
    return SimpleNamespace(
        op=next(op for op in op_db if op.name == "nn.functional.batch_norm"),
        modules=[info for info in module_db if info.module_cls in MODULES],
    )


DATABASE = torch_database()
needs_database = pytest.mark.skipif(
    DATABASE is None, reason="torch.testing._internal needs expecttest, which is not installed"
)


def op_samples(dtype: torch.dtype, device: str) -> list[Any]:
    """torch's 12 samples of batch_norm; the same values every time."""
    torch.manual_seed(0)
    return list(DATABASE.op.sample_inputs(device, dtype)) if DATABASE else []


OP_SAMPLES = [
    pytest.param(index, id=f"{index}-{tuple(sample.input.shape)}-{sample.kwargs}".replace(" ", ""))
    for index, sample in enumerate(op_samples(torch.float32, "cpu"))
]


@needs_database
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", OP_SAMPLES)
def test_op_sample(index: int, dtype: torch.dtype, device: torch.device) -> None:
    sample = op_samples(dtype, device.type)[index]
    grad = random(*sample.input.shape, seed=7).to(device, dtype)
    per_channel: dict[str, Any] = dict(zip((*STATISTICS, "weight", "bias"), sample.args, strict=True))
    call = Call(sample.input, **per_channel, grad=grad, options=sample.kwargs)
    assert_matches(call.run(batch_norm), call.exact().run(torch_batch_norm))


def module_inputs(info: Any, *, training: bool, device: str) -> list[Any]:
    """torch's inputs of one module class; the same values every time."""
    torch.manual_seed(0)
    return list(info.module_inputs_func(info, device, torch.float32, requires_grad=True, training=training))


MODULE_INPUTS = [
    pytest.param(info, index, training, id=f"{info.module_cls.__name__}-{sample.desc}-training={training}")
    for info in (DATABASE.modules if DATABASE else [])
    for training in (True, False)
    for index, sample in enumerate(module_inputs(info, training=training, device="cpu"))
]


@needs_database
@pytest.mark.parametrize(("info", "index", "training"), MODULE_INPUTS)
def test_module_input(info: Any, index: int, training: bool, device: torch.device) -> None:
    sample = module_inputs(info, training=training, device=device.type)[index]
    arguments = sample.constructor_input
    ours = MODULES[info.module_cls](*arguments.args, **arguments.kwargs, device=device).train(training)
    theirs = info.module_cls(*arguments.args, **arguments.kwargs, device=device).train(training).double()
    ours_result, theirs_result = (run_module(module, sample.forward_input.args[0]) for module in (ours, theirs))
    assert_matches(ours_result, theirs_result)


def run_module(module: nn.Module, input: Tensor) -> dict[str, Tensor]:
    """Two forwards and one backward in the module's dtype: output, gradients and the state afterwards."""
    dtype = next((tensor.dtype for tensor in module.parameters()), torch.float32)
    dtype = next((tensor.dtype for tensor in module.buffers() if tensor.is_floating_point()), dtype)
    leaf = input.detach().to(dtype).requires_grad_()
    module(leaf)
    output = module(leaf)
    parameters = dict(module.named_parameters())
    grad = random(*output.shape, seed=7).to(output)
    gradients = torch.autograd.grad(output, [leaf, *parameters.values()], grad)
    names = [f"grad_{name}" for name in ("input", *parameters)]
    state = {name: tensor.clone() for name, tensor in module.named_buffers() if tensor.is_floating_point()}
    count = getattr(module, "num_batches_tracked", None)
    counts = {} if count is None else {"num_batches_tracked": count.double()}
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True)), **state, **counts}


@needs_database
@pytest.mark.parametrize("info", DATABASE.modules if DATABASE else [], ids=lambda info: info.module_cls.__name__)
def test_module_error_input(info: Any, device: torch.device) -> None:
    errors = info.module_error_inputs_func(info, device, torch.float32, requires_grad=True, training=True)
    assert len(errors) == 2
    for error in errors:
        given = error.module_error_input

        def call(kind: type[nn.Module], given: Any = given) -> object:
            module = kind(*given.constructor_input.args, **given.constructor_input.kwargs, device=device)
            return module(*given.forward_input.args)

        with pytest.raises(error.error_type, match=error.error_regex):
            call(MODULES[info.module_cls])
        assert_same_error(partial(call, MODULES[info.module_cls]), partial(call, info.module_cls))


def ones(count: int, **kwargs: Any) -> Callable[[torch.device], Tensor]:
    """A [count] tensor on a device known only later."""
    return lambda device: torch.ones(count, **{"device": device, **kwargs})


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[torch.device], Tensor]:
    """An input on a device known only later."""
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


# What differs from batch_norm(x [4, 3], mean, var, weight, bias, training=...); a callable gets the device.
WRONG_CALLS: dict[str, dict[str, Any]] = {
    "one-value-per-channel": {"input": zeros(1, 3), "training": True},
    "one-value-per-channel-4d": {"input": zeros(1, 3, 1, 1), "training": True},
    "eps-zero-in-training": {"eps": 0.0, "training": True},
    "eps-negative-in-training": {"eps": -1.0, "training": True},
    "eps-negative-in-eval": {"eps": -1.0},
    **{
        f"{name}-{count}-of-3-{'training' if training else 'eval'}": {name: ones(count), "training": training}
        for name in ("running_mean", "running_var", "weight", "bias")
        for count in (4, 1)
        for training in (True, False)
    },
    "no-running-mean-in-eval": {"running_mean": None},
    "no-running-var-in-eval": {"running_var": None},
    "no-statistics-in-eval": {"running_mean": None, "running_var": None},
    "only-running-mean-in-training": {"running_var": None, "training": True},
    "only-running-var-in-training": {"running_mean": None, "training": True},
    "one-dimension-in-training": {"input": zeros(3), "training": True},
    "one-dimension-in-eval": {"input": zeros(3)},
    "momentum-none": {"momentum": None},
    "momentum-string": {"momentum": "0.1"},
    "eps-string": {"eps": "tiny"},
    "eps-none": {"eps": None},
    "training-int": {"training": 1},
    "training-none": {"training": None},
    "input-none": {"input": None, "training": True},
    "input-none-in-eval": {"input": None},
    "input-list": {"input": [[1.0, 2.0, 3.0]], "training": True},
    "input-list-in-eval": {"input": [[1.0, 2.0, 3.0]]},
    "weight-list": {"weight": [1.0, 1.0, 1.0]},
    "weight-number": {"weight": 1.0},
    "running-mean-number": {"running_mean": 0.0},
    "no-channels-with-weight": {"input": zeros(2, 0), "weight": ones(0), "bias": None, "training": True},
    "no-channels-with-weight-in-eval": {"input": zeros(2, 0), "weight": ones(0), "bias": None},
    # Two things wrong: which one is reported is the order of the checks.
    "order-batch-size-before-eps": {"input": zeros(1, 3), "eps": 0.0, "training": True},
    "order-eps-before-dtype": {"input": zeros(4, 3, dtype=torch.int32), "eps": 0.0, "training": True},
    "order-batch-size-before-sizes": {"input": zeros(1, 3), "weight": ones(4), "training": True},
    "order-mean-before-var": {"running_mean": ones(4), "running_var": ones(5)},
    "order-mean-defined-before-var-size": {"running_mean": None, "running_var": ones(5)},
    "order-statistics-before-weight": {"running_var": ones(5), "weight": ones(4)},
    "order-weight-before-bias": {"weight": ones(4), "bias": ones(5)},
    "order-sizes-before-both-or-none": {"running_var": None, "weight": ones(4), "training": True},
    "order-sizes-before-dtype": {"input": zeros(4, 3, dtype=torch.int32), "weight": ones(4)},
}

# Which kernel refuses these, and in what words, differs from device to device.
WRONG_KINDS: dict[str, dict[str, Any]] = {
    **{
        f"{str(dtype).removeprefix('torch.')}-{'training' if training else 'eval'}": {
            "input": zeros(4, 3, dtype=dtype),
            "training": training,
        }
        for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
        for training in (True, False)
    },
    **{
        f"{name}-on-meta-{'training' if training else 'eval'}": {
            name: ones(3, device="meta"),
            "training": training,
        }
        for name in ("weight", "bias", "running_mean", "running_var")
        for training in (True, False)
    },
}


def wrong_call(changes: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a good call with `changes` made; the tensors are new each time."""
    good = {name: ones(3) for name in ("running_mean", "running_var", "weight", "bias")}
    arguments = {"input": zeros(4, 3), **good, "training": False, **changes}
    return {name: value(device) if callable(value) else value for name, value in arguments.items()}


def statistics_untouched(arguments: dict[str, Any]) -> bool:
    """Whether the statistics of a wrong call still are the ones they began with."""
    tensors = [arguments[name] for name in STATISTICS if isinstance(arguments[name], Tensor)]
    return all(bool((tensor == 1).all()) for tensor in tensors if tensor.device.type != "meta")


@pytest.mark.parametrize("changes", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call_raises_as_torch(changes: dict[str, Any], device: torch.device) -> None:
    ours, theirs = wrong_call(changes, device), wrong_call(changes, device)
    assert_same_error(lambda: batch_norm(**ours), lambda: torch_batch_norm(**theirs))
    assert statistics_untouched(ours)


@pytest.mark.parametrize("changes", WRONG_KINDS.values(), ids=WRONG_KINDS)
def test_wrong_dtype_or_device_raises_as_torch(changes: dict[str, Any], device: torch.device) -> None:
    ours, theirs = wrong_call(changes, device), wrong_call(changes, device)
    expected = raised_by(lambda: torch_batch_norm(**theirs))
    raised = raised_by(lambda: batch_norm(**ours))
    assert expected is not None
    assert raised is not None
    if device.type == "cpu":
        assert raised == expected
    else:
        assert issubclass(raised[0], RuntimeError)
    assert statistics_untouched(ours)  # though torch 2.13 itself writes them before it refuses a tensor on meta


@pytest.mark.parametrize("learned", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_statistics_that_require_grad_raise(training: bool, name: str, learned: str, device: torch.device) -> None:
    def call(function: Callable[..., Tensor]) -> Tensor:
        arguments = wrong_call({"training": training}, device)
        arguments[name].requires_grad_()
        arguments[learned].requires_grad_()
        return function(**arguments)

    assert_same_error(lambda: call(batch_norm), lambda: call(torch_batch_norm))
    with torch.no_grad():
        call(batch_norm)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_statistics_that_require_grad_alone_as_torch(training: bool, device: torch.device) -> None:
    def call(function: Callable[..., Tensor]) -> Tensor:
        arguments = wrong_call({"training": training}, device)
        arguments["running_mean"].requires_grad_()
        return function(**arguments)

    assert raised_by(lambda: call(batch_norm)) == raised_by(lambda: call(torch_batch_norm))


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_with_tangents_raise_in_eval(name: str, device: torch.device) -> None:
    make_dual: Any = forward_mode.make_dual

    def call(function: Callable[..., Tensor]) -> Tensor:
        arguments = wrong_call({}, device)
        with forward_mode.dual_level():
            for dual in ("input", name):
                tensor = arguments[dual]
                arguments[dual] = make_dual(tensor, torch.ones_like(tensor))
            return function(**arguments)

    assert_same_error(lambda: call(batch_norm), lambda: call(torch_batch_norm))


MIXED_DTYPES = {
    f"{input}-{parameters}-{statistics}": (input, parameters, statistics)
    for input in ("float32", "float64", "float16", "bfloat16")
    for parameters in ("float32", "float64", "float16", "bfloat16")
    for statistics in ("float32", "float64", "float16", "bfloat16")
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtypes", MIXED_DTYPES.values(), ids=MIXED_DTYPES)
def test_mixed_dtypes_accepted_and_rejected_as_torch(
    dtypes: tuple[str, str, str], training: bool, device: torch.device
) -> None:
    input, parameters, statistics = (getattr(torch, name) for name in dtypes)
    call = make_call((4, 3, 5), device, dtype=input, training=training)

    def arguments() -> dict[str, Any]:
        tensors = {name: tensor.clone().to(parameters) for name, tensor in call.given("weight", "bias").items()}
        tensors |= {name: tensor.clone().to(statistics) for name, tensor in call.given(*STATISTICS).items()}
        return tensors

    ours, theirs = arguments(), arguments()
    refused = raised_by(lambda: torch_batch_norm(call.input, **theirs, training=training))
    raised = raised_by(lambda: batch_norm(call.input, **ours, training=training))
    assert (raised is None) == (refused is None), raised or refused
    if raised is None:
        mixed = Call(call.input, **ours, grad=call.grad, options=call.options)
        results = mixed.run(batch_norm)
        assert results["output"].dtype == results["grad_input"].dtype == input
        assert results["grad_weight"].dtype == results["grad_bias"].dtype == parameters
        assert_matches(results, mixed.exact().run(torch_batch_norm))
    else:
        assert raised[1], "an error without a text"
        before = arguments()
        assert all(torch.equal(ours[name], before[name]) for name in ours)
