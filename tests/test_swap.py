"""convert, revert and report: what changes class, what survives it, and what is left alone and why."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn

import tritonbn
from tests.launches import recorded
from tests.parity import assert_matches, random
from tritonbn.report import SwapRow

PAIRS = {
    "1d": (nn.BatchNorm1d, tritonbn.BatchNorm1d),
    "2d": (nn.BatchNorm2d, tritonbn.BatchNorm2d),
    "3d": (nn.BatchNorm3d, tritonbn.BatchNorm3d),
}
OURS = tuple(ours for _, ours in PAIRS.values())


@pytest.fixture(autouse=True)
def _full_precision_convolutions() -> Iterator[None]:
    """cuDNN would compute them in TF32, whose errors are larger than the differences that matter here."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


class Block(nn.Module):
    """A residual block: two convolutions and two batch norms, a third of each where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride != 1:
            shrink = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(shrink, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual_network() -> nn.Sequential:
    """ResNet-18's plan with 2 to 5 channels: 20 batch norm layers, [N, 3, 8, 8] -> [N, 4]."""
    torch.manual_seed(0)
    widths = [(2, 2, 1), (2, 2, 1), (2, 3, 2), (3, 3, 1), (3, 4, 2), (4, 4, 1), (4, 5, 1), (5, 5, 1)]
    stem = [nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return nn.Sequential(*stem, *(Block(*width) for width in widths), *head)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def float_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def train(model: nn.Module, device: torch.device, steps: int, optimizer: Any = None, first: int = 0) -> list[float]:
    """SGD on random 8x8 images of four classes; the losses."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(first, first + steps):
        x = random(4, 3, 8, 8, seed=step).to(device, dtype)
        loss = nn.functional.cross_entropy(model(x), torch.arange(4, device=device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_residual_network_trains_as_with_torchs(device: torch.device) -> None:
    theirs = residual_network().to(device)
    ours = copy.deepcopy(theirs)
    exact = copy.deepcopy(theirs).double()
    assert tritonbn.convert(ours) is ours
    assert [type(m) for m in norms(ours)] == [tritonbn.BatchNorm2d] * 20

    exact_losses = train(exact, device, 3)
    torch.testing.assert_close(train(theirs, device, 3), exact_losses, rtol=1e-4, atol=1e-5)
    with recorded() as kernels:
        torch.testing.assert_close(train(ours, device, 3), exact_losses, rtol=1e-4, atol=1e-5)
    assert len(kernels) >= 3 * 20 * 2, "each layer, forward and backward, in each step"
    state = ours.state_dict()
    for name, tensor in exact.state_dict().items():
        torch.testing.assert_close(state[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-4, msg=name)

    tritonbn.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    x = random(4, 3, 8, 8, seed=9).to(device, torch.float32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)


def test_state_dicts_of_converted_and_original_load_strictly_both_ways() -> None:
    theirs, ours = residual_network(), tritonbn.convert(residual_network())
    train(theirs, torch.device("cpu"), 1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_tensors(ours, theirs)
    other = residual_network()
    other.load_state_dict(ours.state_dict(), strict=True)
    assert_same_tensors(other, theirs)


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    """Equal names, order, metadata and bits."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert mine._metadata == theirs._metadata  # type: ignore[attr-defined]
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(("theirs", "ours"), PAIRS.values(), ids=PAIRS)
def test_bare_module_changes_class_and_back(theirs: type[nn.Module], ours: type[nn.Module]) -> None:
    module = theirs(3)
    assert tritonbn.convert(module) is module
    assert type(module) is ours
    assert tritonbn.revert(module) is module
    assert type(module) is theirs


@pytest.mark.parametrize("swap", [tritonbn.convert, tritonbn.revert], ids=["convert", "revert"])
def test_swapping_twice_is_swapping_once(swap: Callable[[nn.Module], nn.Module]) -> None:
    model = swap(residual_network())
    types = [type(m) for m in model.modules()]
    assert [type(m) for m in swap(model).modules()] == types


def test_model_without_batch_norm_is_returned_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert tritonbn.convert(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU]


@pytest.mark.parametrize("swap", [tritonbn.convert, tritonbn.revert, tritonbn.report])
@pytest.mark.parametrize(
    ("given", "name"),
    [(None, "NoneType"), ([nn.BatchNorm1d(2)], "list"), (nn.BatchNorm1d, "type"), (torch.ones(2), "Tensor")],
    ids=["none", "list", "class", "tensor"],
)
def test_what_is_no_module_raises(swap: Callable[[Any], object], given: object, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^expected torch\.nn\.Module, got {name}$"):
        swap(given)


def test_tensors_flags_and_attributes_survive() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, eps=0.5, momentum=None), nn.BatchNorm2d(3, affine=False))
    model.append(nn.BatchNorm3d(3, track_running_stats=False, dtype=torch.bfloat16))
    model[0].eval()
    vars(model[1])["note"] = "kept"
    model[2].weight.requires_grad_(False)
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = [dict(vars(m)) for m in model]
    text = repr(model)
    tritonbn.convert(model)
    assert all(isinstance(m, OURS) for m in model)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert [dict(vars(m)) for m in model] == attributes
    assert repr(model) == text


def test_hooks_survive_both_ways(device: torch.device) -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.BatchNorm1d(3)).to(device)
    model[0].register_forward_pre_hook(lambda m, args: calls.append("before"))
    model[0].register_forward_hook(lambda m, args, output: calls.append("after"))
    model[0].register_full_backward_hook(lambda m, gx, gy: calls.append("backward"))
    x = random(4, 3).to(device, torch.float32).requires_grad_()
    for swap in (tritonbn.convert, tritonbn.revert):
        calls.clear()
        torch.autograd.backward(swap(model)(x).sum())
        assert calls == ["before", "after", "backward"]


def test_optimizer_made_before_keeps_working(device: torch.device) -> None:
    theirs = residual_network().to(device)
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (theirs, ours)]
    train(theirs, device, 2, optimizers[0])
    train(ours, device, 1, optimizers[1])
    tritonbn.convert(ours)
    train(ours, device, 1, optimizers[1], first=1)
    state = float_state(theirs)
    for name, tensor in float_state(ours).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-4, msg=name)


def test_shared_module_stays_shared_and_references_elsewhere_stay_valid(device: torch.device) -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"one": norm, "other": nn.Sequential(norm)}).to(device)
    tritonbn.convert(model)
    assert model["one"] is norm
    assert type(norm) is tritonbn.BatchNorm1d
    assert next(iter(model["other"].children())) is norm
    assert [row.name for row in tritonbn.report(model).rows] == ["one"]
    norm(random(4, 3).to(device, torch.float32))
    assert model["one"].num_batches_tracked == 1


def test_converted_copy_leaves_the_original_alone() -> None:
    theirs = residual_network()
    tritonbn.convert(copy.deepcopy(theirs))
    assert not any(isinstance(m, OURS) for m in theirs.modules())


class UsersNorm(nn.BatchNorm2d):
    """A subclass whose forward we cannot know."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class UsersNormOnOurs(tritonbn.BatchNorm2d):
    """A subclass of ours."""


def parametrized() -> nn.Module:
    module = nn.BatchNorm2d(3)
    parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def with_own_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda input: input
    return module


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.BatchNorm2d(3))


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "users-subclass": (
        lambda: UsersNorm(3),
        f"{__name__}.UsersNorm",
        "subclass of torch.nn.BatchNorm2d: its forward may differ",
    ),
    "users-subclass-of-ours": (
        lambda: UsersNormOnOurs(3),
        f"{__name__}.UsersNormOnOurs",
        "subclass of tritonbn.BatchNorm2d: its forward may differ",
    ),
    "parametrized": (
        parametrized,
        "torch.nn.utils.parametrize.ParametrizedBatchNorm2d",
        "parametrized torch.nn.BatchNorm2d: convert before parametrizing",
    ),
    "sync": (
        lambda: nn.SyncBatchNorm(3),
        "torch.nn.SyncBatchNorm",
        "reduces its statistics over processes",
    ),
    "lazy": (
        nn.LazyBatchNorm2d,
        "torch.nn.LazyBatchNorm2d",
        "not materialized yet: run a batch through the model, then convert",
    ),
    "own-forward": (
        lambda: with_own_forward(nn.BatchNorm2d(3)),
        "torch.nn.BatchNorm2d",
        "its forward was replaced on this instance",
    ),
    "own-forward-on-ours": (
        lambda: with_own_forward(tritonbn.BatchNorm2d(3)),
        "tritonbn.BatchNorm2d",
        "its forward was replaced on this instance",
    ),
    "scripted": (
        scripted,
        "torch.jit._script.RecursiveScriptModule(BatchNorm2d)",
        "scripted: its code is fixed",
    ),
}


@pytest.mark.parametrize(("make", "kind", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
@pytest.mark.parametrize("swap", [tritonbn.convert, tritonbn.revert], ids=["convert", "revert"])
def test_left_alone_and_said_why(
    swap: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], kind: str, why: str
) -> None:
    model = nn.Sequential(make())
    before = type(model[0])
    assert tritonbn.report(model).rows == (SwapRow("0", kind, "left alone", why),)
    swap(model)
    # What convert changed is torch's again, also if somebody replaced the forward since.
    assert type(model[0]) is (nn.BatchNorm2d if before is tritonbn.BatchNorm2d and swap is tritonbn.revert else before)
    (row,) = tritonbn.report(model).rows
    assert (row.status, row.why) == ("left alone", why)


NOT_BATCH_NORM: dict[str, Callable[[], nn.Module]] = {
    "instance-norm": lambda: nn.InstanceNorm2d(3),
    "lazy-instance-norm": lambda: nn.LazyInstanceNorm2d(),
    "layer-norm": lambda: nn.LayerNorm(3),
    "group-norm": lambda: nn.GroupNorm(1, 3),
    "linear": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("make", NOT_BATCH_NORM.values(), ids=NOT_BATCH_NORM)
def test_what_is_no_batch_norm_is_neither_touched_nor_listed(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    kind = type(model[0])
    tritonbn.convert(model)
    assert type(model[0]) is kind
    assert tritonbn.report(model).rows == ()


def test_lazy_module_converts_once_materialized(device: torch.device) -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(device=device))
    model(random(2, 3, 4, 4).to(device, torch.float32))
    tritonbn.convert(model)
    assert type(model[0]) is tritonbn.BatchNorm2d
    model(random(2, 3, 4, 4).to(device, torch.float32))
    assert model[0].num_batches_tracked == 2


def mixed_model() -> nn.ModuleDict:
    return nn.ModuleDict({"bn": nn.BatchNorm1d(2), "done": tritonbn.BatchNorm3d(2), "sync": nn.SyncBatchNorm(2)})


def test_report_counts_and_prints_a_table() -> None:
    report = tritonbn.report(mixed_model())
    assert (report.replaced, report.convertible, report.left_alone) == (1, 1, 1)
    assert str(report).splitlines() == [
        "module  type                    status       fused with  why",
        "bn      torch.nn.BatchNorm1d    convertible  -           convert makes it tritonbn.BatchNorm1d",
        "done    tritonbn.BatchNorm3d    replaced     -           revert makes it torch.nn.BatchNorm3d",
        "sync    torch.nn.SyncBatchNorm  left alone   -           reduces its statistics over processes",
        "3 found: 1 replaced, 0 fused, 1 convertible, 1 left alone",
    ]
    assert str(report) == str(tritonbn.report(mixed_model()))


def test_report_follows_the_model_and_does_not_change_it() -> None:
    model = mixed_model()
    before = [type(m) for m in model.modules()]
    old = tritonbn.report(model)
    assert [type(m) for m in model.modules()] == before
    tritonbn.convert(model)
    assert [row.status for row in old.rows] == ["convertible", "replaced", "left alone"]
    assert [row.status for row in tritonbn.report(model).rows] == ["replaced", "replaced", "left alone"]
    tritonbn.revert(model)
    assert [row.status for row in tritonbn.report(model).rows] == ["convertible", "convertible", "left alone"]


def test_report_of_a_bare_module_and_of_none() -> None:
    assert "(the model itself)  tritonbn.BatchNorm1d  replaced" in str(tritonbn.report(tritonbn.BatchNorm1d(2)))
    assert str(tritonbn.report(nn.Linear(2, 2))).startswith("no batch norm modules")


def test_report_is_frozen() -> None:
    report = tritonbn.report(mixed_model())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = ()  # type: ignore[misc]


def test_compiled_model_runs_ours_after_converting(device: torch.device) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.BatchNorm1d(3)).to(device)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = random(4, 3).to(device, torch.float32)
    first = compiled(x)
    assert tritonbn.convert(compiled) is compiled
    assert type(model[0]) is tritonbn.BatchNorm1d
    assert_matches({"output": compiled(x).detach()}, {"output": first.detach().double()})
    assert model[0].num_batches_tracked == 2


def test_sync_batch_norm_takes_over_our_tensors() -> None:
    model = tritonbn.convert(nn.Sequential(nn.BatchNorm2d(3, momentum=None).eval(), nn.BatchNorm1d(3, affine=False)))
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    sync: Any = nn.SyncBatchNorm
    synced = sync.convert_sync_batchnorm(model)
    assert [type(m) for m in synced] == [nn.SyncBatchNorm] * 2
    assert {name: id(tensor) for name, tensor in synced.state_dict(keep_vars=True).items()} == tensors
    assert synced[0].momentum is None
    assert [m.training for m in synced] == [False, True]


def test_update_bn_recomputes_our_statistics(device: torch.device) -> None:
    theirs = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    models = [AveragedModel(model) for model in (theirs, tritonbn.convert(copy.deepcopy(theirs)))]
    batches = [random(2, 3, 3, 3, seed=seed).to(device, torch.float32) for seed in range(3)]
    for model in models:
        update_bn(batches, model)
    assert_matches(float_state(models[1]), {name: t.double() for name, t in float_state(models[0]).items()})
    norm = models[1].module.get_submodule("0")
    assert isinstance(norm, tritonbn.BatchNorm2d)
    assert norm.num_batches_tracked == 3
    assert norm.momentum == 0.1


def test_fusion_with_a_convolution_keeps_the_output(device: torch.device) -> None:
    conv, norm = nn.Conv2d(3, 4, 3).to(device), tritonbn.BatchNorm2d(4).to(device)
    x = random(2, 3, 5, 5).to(device, torch.float32)
    norm(conv(x))
    fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=1e-4, atol=1e-4)
