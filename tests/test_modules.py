"""BatchNorm1d/2d/3d against torch's: construction, state, forward in every mode, and tools for modules."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import tritonbn
from tests.launches import recorded
from tests.parity import assert_matches, assert_same_error, raised_by, random

# ours, torch's, a shape that it accepts
KINDS = {
    "1d-flat": (tritonbn.BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    "1d": (tritonbn.BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    "2d": (tritonbn.BatchNorm2d, nn.BatchNorm2d, (2, 3, 4, 3)),
    "3d": (tritonbn.BatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
}
Kind = tuple[type[_BatchNorm], type[_BatchNorm], tuple[int, ...]]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "large-eps-and-momentum": {"eps": 0.5, "momentum": 0.9},
    "cumulative": {"momentum": None},
    "momentum-zero": {"momentum": 0.0},
    "momentum-int": {"momentum": 1},
    "not-affine": {"affine": False},
    "not-tracking": {"track_running_stats": False},
    "not-tracking-cumulative": {"track_running_stats": False, "momentum": None},
    "neither": {"affine": False, "track_running_stats": False},
}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:  # not yet on torch 2.11
    OPTIONS["no-bias"] = {"bias": False}
all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
one_per_class = pytest.mark.parametrize("kind", list(KINDS.values())[1:], ids=list(KINDS)[1:])
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def pair(kind: Kind, device: torch.device, **options: Any) -> tuple[_BatchNorm, _BatchNorm]:
    """Ours in float32 and torch's in float64, with the same random parameters and statistics."""
    ours, theirs = kind[0](3, **options), kind[1](3, **options)
    for seed, (name, tensor) in enumerate(ours.state_dict().items()):
        if name != "num_batches_tracked":
            tensor.copy_(random(3, seed=seed + 10, low=0.5))
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device, torch.float64)


def batch(kind: Kind, device: torch.device, seed: int = 0) -> Tensor:
    """[*, 3, ...] float32 input of the kind's shape."""
    return random(*kind[2], seed=seed).to(device, torch.float32)


def float_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal keys, order, metadata and counters; statistics and parameters equal within rounding."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert mine._metadata == other._metadata  # type: ignore[attr-defined]
    assert_matches(float_state(ours), float_state(theirs))
    assert mine.get("num_batches_tracked") == other.get("num_batches_tracked")


@one_per_class
def test_signature_bases_and_metadata_are_torchs(kind: Kind) -> None:
    ours, theirs, _ = kind
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__name__ == theirs.__name__
    assert ours._version == theirs._version == 2
    assert ours.__constants__ == theirs.__constants__


@one_per_class
@all_options
def test_construction_prints_and_stores_as_torch(kind: Kind, options: dict[str, Any]) -> None:
    ours, theirs = kind[0](3, **options), kind[1](3, **options)
    assert repr(ours) == repr(theirs)
    assert_same_state(ours, theirs)
    assert [type(p) for p in ours.parameters()] == [type(p) for p in theirs.parameters()]


def test_negative_number_of_channels_raises_as_torch() -> None:
    assert_same_error(lambda: tritonbn.BatchNorm2d(-1), lambda: nn.BatchNorm2d(-1))


@all_kinds
@all_options
def test_training_then_eval_follows_torch(kind: Kind, options: dict[str, Any], device: torch.device) -> None:
    ours, theirs = pair(kind, device, **options)
    for step in range(2):
        results = [
            step_of(module, batch(kind, device, seed=step).to(dtype))
            for module, dtype in ((ours, torch.float32), (theirs, torch.float64))
        ]
        assert_matches(*results)
    assert_same_state(ours, theirs)
    results = [
        step_of(module.eval(), batch(kind, device, seed=9).to(dtype))
        for module, dtype in ((ours, torch.float32), (theirs, torch.float64))
    ]
    assert_matches(*results)
    assert_same_state(ours, theirs)


def step_of(module: nn.Module, input: Tensor) -> dict[str, Tensor]:
    """Output of one forward, and the gradients of its weighted sum in the input and the parameters."""
    leaf = input.clone().requires_grad_()
    parameters = dict(module.named_parameters())
    with recorded() as kernels:
        output = module(leaf)
        grad = random(*output.shape, seed=5).to(output)
        gradients = torch.autograd.grad(output, [leaf, *parameters.values()], grad)
    ours = isinstance(module, (tritonbn.BatchNorm1d, tritonbn.BatchNorm2d, tritonbn.BatchNorm3d))
    assert bool(kernels) == (ours and input.numel() > 0), kernels
    return {"output": output.detach(), **dict(zip(["input", *parameters], gradients, strict=True))}


def stop_tracking(module: _BatchNorm) -> None:
    module.track_running_stats = False


def drop_counter(module: _BatchNorm) -> None:
    module.num_batches_tracked = None


def drop_statistics(module: _BatchNorm) -> None:
    module.running_mean = module.running_var = None


def drop_running_var(module: _BatchNorm) -> None:
    module.running_var = None


def drop_weight(module: _BatchNorm) -> None:
    module.weight = None  # type: ignore[assignment]


def outcome(module: nn.Module, input: Tensor) -> tuple[object, dict[str, Tensor]]:
    """What one forward raises, and what it returns."""
    outputs: list[Tensor] = []
    error = raised_by(lambda: outputs.append(module(input).detach()))
    return error, {str(index): output for index, output in enumerate(outputs)}


LATER = {
    "tracking-turned-off": (stop_tracking, {}),
    "counter-removed": (drop_counter, {}),
    "counter-removed-cumulative": (drop_counter, {"momentum": None}),
    "statistics-removed": (drop_statistics, {}),
    "one-statistic-removed": (drop_running_var, {}),
    "weight-removed": (drop_weight, {}),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("change", "options"), LATER.values(), ids=LATER)
def test_attributes_changed_later_act_as_in_torch(
    change: Callable[[_BatchNorm], None], options: dict[str, Any], training: bool, device: torch.device
) -> None:
    ours, theirs = pair(KINDS["2d"], device, **options)
    for module in (ours, theirs):
        change(module)
        module.train(training)
    x = batch(KINDS["2d"], device)
    expected, output = outcome(theirs, x.double())
    error, ours_output = outcome(ours, x)
    assert error == expected
    assert_matches(ours_output, output)
    assert_matches(float_state(ours), float_state(theirs))


WRONG_DIMENSIONS = {
    "1d-too-few": (tritonbn.BatchNorm1d, nn.BatchNorm1d, (3,)),
    "1d-too-many": (tritonbn.BatchNorm1d, nn.BatchNorm1d, (2, 3, 4, 5)),
    "2d-too-few": (tritonbn.BatchNorm2d, nn.BatchNorm2d, (2, 3, 4)),
    "2d-too-many": (tritonbn.BatchNorm2d, nn.BatchNorm2d, (2, 3, 4, 5, 6)),
    "3d-too-few": (tritonbn.BatchNorm3d, nn.BatchNorm3d, (2, 3, 4, 5)),
    "3d-too-many": (tritonbn.BatchNorm3d, nn.BatchNorm3d, (2, 3, 4, 5, 6, 7)),
}


def assert_refused(ours: nn.Module, theirs: nn.Module, input: Callable[[], object], *, counted: int) -> None:
    """Both raise the same; ours keeps its state, except for the batch counter where torch has counted too."""
    before = copy.deepcopy(ours.state_dict())
    assert_same_error(lambda: ours(input()), lambda: theirs(input()))
    after = ours.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in float_state(ours))
    assert after["num_batches_tracked"] == theirs.state_dict()["num_batches_tracked"] == counted


@pytest.mark.parametrize("kind", WRONG_DIMENSIONS.values(), ids=WRONG_DIMENSIONS)
def test_wrong_dimensions_raise_and_are_not_counted(kind: Kind, device: torch.device) -> None:
    ours, theirs, shape = kind
    modules = (ours(3, device=device), theirs(3, device=device))
    assert_refused(*modules, partial(torch.zeros, shape, device=device), counted=0)


REFUSED_AFTER_COUNTING = {
    "one-value-per-channel": ((1, 3, 1, 1), torch.float32),
    "other-number-of-channels": ((2, 4, 3, 3), torch.float32),
    "one-channel-does-not-broadcast": ((2, 1, 3, 3), torch.float32),
    "integers": ((2, 3, 3, 3), torch.int32),
}


@pytest.mark.parametrize(("shape", "dtype"), REFUSED_AFTER_COUNTING.values(), ids=REFUSED_AFTER_COUNTING)
def test_input_refused_by_the_function_is_counted(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if dtype is torch.int32 and device.type != "cpu":
        pytest.skip("which kernel refuses integers, and in what words, differs from device to device")
    modules = (tritonbn.BatchNorm2d(3, device=device), nn.BatchNorm2d(3, device=device))
    assert_refused(*modules, partial(torch.ones, shape, dtype=dtype, device=device), counted=1)


@pytest.mark.parametrize("input", [None, [[1.0]], 3.0], ids=["none", "list", "number"])
def test_input_that_is_no_tensor_raises_as_torch(input: object) -> None:
    assert_refused(tritonbn.BatchNorm1d(3), nn.BatchNorm1d(3), lambda: input, counted=0)


def test_half_module_refuses_float_input_as_torch(device: torch.device) -> None:
    x = batch(KINDS["2d"], device)
    ours, theirs = (kind(3, device=device).half() for kind in KINDS["2d"][:2])
    if raised_by(lambda: theirs(x)) is None:
        pytest.skip("torch accepts half parameters with float input on this device")
    with pytest.raises(RuntimeError):
        ours(x)


CASTS: dict[str, tuple[Callable[[nn.Module], object], torch.dtype]] = {
    "half": (nn.Module.half, torch.float16),
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
    "double": (nn.Module.double, torch.float64),
    "float-with-half-input": (nn.Module.float, torch.float16),
    "float-with-bfloat16-input": (nn.Module.float, torch.bfloat16),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
def test_casting_moves_parameters_and_statistics_only(
    cast: Callable[[nn.Module], object], dtype: torch.dtype, device: torch.device
) -> None:
    ours, theirs = pair(KINDS["2d"], device)
    cast(ours)
    assert ours.num_batches_tracked is not None
    assert ours.num_batches_tracked.dtype == torch.int64
    theirs.load_state_dict(ours.state_dict())
    x = batch(KINDS["2d"], device).to(dtype)
    results = step_of(ours, x)
    assert results["output"].dtype == results["input"].dtype == dtype
    assert results["weight"].dtype == ours.weight.dtype
    assert_matches(results, step_of(theirs, x.double()))
    assert_same_state(ours, theirs)


@one_per_class
@all_options
def test_state_dict_loads_strictly_both_ways(kind: Kind, options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, torch.device("cpu"), **options)
    ours, theirs = kind[0](3, **options), theirs.float()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, theirs)
    theirs = kind[1](3, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(ours, theirs)


# Keys left out of a full state dict, its version, and the options of the module that loads it.
CHECKPOINTS: dict[str, tuple[tuple[str, ...], int | None, dict[str, Any]]] = {
    "version-1-without-counter": (("num_batches_tracked",), 1, {}),
    "no-version-without-counter": (("num_batches_tracked",), None, {}),
    "version-2-without-counter": (("num_batches_tracked",), 2, {}),
    "without-weight": (("weight",), 2, {}),
    "into-not-affine": ((), 2, {"affine": False}),
    "into-not-tracking": ((), 2, {"track_running_stats": False}),
    "version-1-into-meta": (("num_batches_tracked",), 1, {"device": "meta"}),
}


@pytest.mark.parametrize(("left_out", "version", "options"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_odd_checkpoints_load_or_raise_as_in_torch(
    left_out: tuple[str, ...], version: int | None, options: dict[str, Any]
) -> None:
    def load(kind: type[_BatchNorm]) -> tuple[str, dict[str, int]]:
        state = nn.BatchNorm1d(3).state_dict()
        for name in left_out:
            del state[name]
        state._metadata[""]["version"] = version  # type: ignore[attr-defined]
        module = kind(3, **options)
        error = raised_by(lambda: module.load_state_dict(state, assign=options.get("device") == "meta"))
        return str(error), {name: int(tensor.sum()) for name, tensor in module.state_dict().items()}

    assert load(tritonbn.BatchNorm1d) == load(nn.BatchNorm1d)


def through_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_file,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@one_per_class
def test_copies_are_ours_and_independent(copied: Callable[[nn.Module], Any], kind: Kind, device: torch.device) -> None:
    ours, _ = pair(kind, device)
    other = copied(ours)
    assert type(other) is type(ours)
    assert_same_state(other, ours)
    other(batch(kind, device))
    assert ours.num_batches_tracked == 0
    assert other.num_batches_tracked == 1


def test_buffers_and_parameters_stay_the_same_objects(device: torch.device) -> None:
    ours, _ = pair(KINDS["2d"], device)
    before = {name: id(tensor) for name, tensor in ours.state_dict(keep_vars=True).items()}
    ours(batch(KINDS["2d"], device)).sum().backward()
    ours.reset_running_stats()
    ours.reset_parameters()
    assert {name: id(tensor) for name, tensor in ours.state_dict(keep_vars=True).items()} == before
    assert_same_state(ours, nn.BatchNorm2d(3, device=device))


def test_statistics_are_shared_with_other_processes_memory() -> None:
    ours = tritonbn.BatchNorm1d(3).share_memory()
    alias: Any = ours.running_mean
    ours(batch(KINDS["1d"], torch.device("cpu")))
    assert alias.is_shared()
    assert bool(alias.any())


@pytest.mark.parametrize("by", ["argument", "context"])
def test_module_made_on_meta_runs_after_materializing(by: str, device: torch.device) -> None:
    if by == "context":
        with torch.device("meta"):
            ours = tritonbn.BatchNorm2d(3)
    else:
        ours = tritonbn.BatchNorm2d(3, device="meta")
    assert {tensor.device.type for tensor in ours.state_dict().values()} == {"meta"}
    assert ours(torch.zeros(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)
    ours.to_empty(device=device)
    ours.reset_parameters()
    theirs = nn.BatchNorm2d(3, device=device, dtype=torch.float64)
    x = batch(KINDS["2d"], device)
    assert_matches(step_of(ours, x), step_of(theirs, x.double()))
    assert_same_state(ours, theirs)


def test_zero_batch_is_counted_and_leaves_statistics_alone(device: torch.device) -> None:
    ours = tritonbn.BatchNorm2d(3, device=device)
    results = step_of(ours, torch.zeros(0, 3, 4, 4, device=device))
    assert results["output"].shape == results["input"].shape == (0, 3, 4, 4)
    assert not results["weight"].any()
    assert ours.num_batches_tracked == 1
    assert_matches(float_state(ours), float_state(nn.BatchNorm2d(3, device=device)))


def test_functional_call_updates_the_given_statistics(device: torch.device) -> None:
    ours, theirs = pair(KINDS["2d"], device)
    x = batch(KINDS["2d"], device)
    given = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    before = copy.deepcopy(ours.state_dict())
    output = functional_call(ours, given, (x,))
    assert_matches({"output": output.detach()}, {"output": theirs(x.double()).detach()})
    assert_matches({"mean": given["running_mean"]}, {"mean": theirs.state_dict()["running_mean"]})
    assert given["num_batches_tracked"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_ensemble_of_stacked_modules_in_eval(device: torch.device) -> None:
    models = [pair(KINDS["2d"], device)[seed].float().eval() for seed in (0, 1)]
    x = batch(KINDS["2d"], device)
    parameters, buffers = stack_module_state([copy.deepcopy(models[0]), copy.deepcopy(models[0])])
    outputs = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    assert_matches({"one": outputs[1].detach()}, {"one": models[1].double()(x.double()).detach()})


def test_parametrized_weight_is_used(device: torch.device) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    ours, theirs = pair(KINDS["2d"], device)
    for module in (ours, theirs):
        parametrize.register_parametrization(module, "weight", Doubled())
    x = batch(KINDS["2d"], device)
    assert_matches(step_of(ours, x), step_of(theirs, x.double()))


def test_hooks_see_input_output_and_gradients(device: torch.device) -> None:
    def events(module: Any, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
        seen: list[tuple[str, tuple[int, ...]]] = []

        def note(name: str, value: Any) -> None:
            seen.append((name, value[0].shape if isinstance(value, tuple) else value.shape))

        module.register_forward_pre_hook(lambda m, args: note("before", args))
        module.register_forward_hook(lambda m, args, output: note("after", output))
        module.register_full_backward_hook(lambda m, gx, gy: note("backward", gx))
        module.register_full_backward_pre_hook(lambda m, gy: note("before backward", gy))
        for name, parameter in module.named_parameters():
            parameter.register_hook(partial(note, name))
        module(x.requires_grad_()).sum().backward()
        return seen

    ours, theirs = pair(KINDS["2d"], device)
    x = batch(KINDS["2d"], device)
    assert sorted(events(ours, x)) == sorted(events(theirs, x.detach().double()))


def test_frozen_parameters_get_no_gradient(device: torch.device) -> None:
    ours, _ = pair(KINDS["2d"], device)
    x = batch(KINDS["2d"], device)
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    ours(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert ours.weight.grad is ours.bias.grad is None


def test_apply_reaches_ours_as_a_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 3), tritonbn.BatchNorm1d(3))
    found: list[nn.Module] = []
    model.apply(lambda m: found.extend([m] if isinstance(m, nn.BatchNorm1d) else []))
    assert found == [model[1]]


def test_fx_keeps_ours_as_a_leaf_that_runs(device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), tritonbn.BatchNorm2d(3)).to(device)
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert model[1].num_batches_tracked == 0
    x = batch(KINDS["2d"], device)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=0)
    assert model[1].num_batches_tracked == 1


def test_fx_trace_of_a_bare_module_raises_as_torch() -> None:
    assert_same_error(lambda: fx.symbolic_trace(tritonbn.BatchNorm2d(3)), lambda: fx.symbolic_trace(nn.BatchNorm2d(3)))


@all_kinds
def test_compiled_training_then_eval(kind: Kind, device: torch.device) -> None:
    torch.compiler.reset()
    ours, theirs = pair(kind, device)
    ours.compile(backend="aot_eager", fullgraph=True)
    for step in range(2):
        x = batch(kind, device, seed=step)
        assert_matches(step_of(ours, x), step_of(theirs, x.double()))
    assert_same_state(ours, theirs)
    x = batch(kind, device, seed=9)
    assert_matches(step_of(ours.eval(), x), step_of(theirs.eval(), x.double()))
    assert_same_state(ours, theirs)


def test_compiled_cumulative_average_breaks_the_graph_and_is_right(device: torch.device) -> None:
    torch.compiler.reset()
    ours, theirs = pair(KINDS["2d"], device, momentum=None)
    ours.compile(backend="aot_eager")
    for step in range(2):
        x = batch(KINDS["2d"], device, seed=step)
        assert_matches(step_of(ours, x), step_of(theirs, x.double()))
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_exported_program_keeps_names_and_values(training: bool, device: torch.device) -> None:
    ours, _ = pair(KINDS["2d"], device)
    ours.train(training)
    x = batch(KINDS["2d"], device)
    program = torch.export.export(ours, (x,))
    assert list(program.state_dict) == list(ours.state_dict())
    exported = program.module()
    assert_matches({"output": exported(x).detach()}, {"output": ours(x).detach().double()})
    assert_matches(float_state(exported), float_state(ours))
