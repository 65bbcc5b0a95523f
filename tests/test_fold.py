"""fold: what goes into the layer before, what does not and why, and that outputs stay."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tritonbn
from tests.fusing import CHANNELS, converted, convolution, images, net, norm
from tests.parity import random
from tritonbn.fold import Folded


def used(model: Any, *shape: int) -> Any:
    """In float64 and evaluation mode, with running statistics of data."""
    model = model.double()
    for seed in range(3):
        model(random(*(shape or (2, CHANNELS, 4, 4)), seed=seed))
    return model.eval()


def statuses(model: nn.Module) -> list[str]:
    return [row.status for row in tritonbn.report(model).rows]


LAYERS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv1d": (lambda: [nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)], (4, 2, 5)),
    "conv2d": (lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)], (2, 2, 5, 5)),
    "conv2d-without-bias": (lambda: [nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)], (2, 2, 5, 5)),
    "conv2d-groups-padding": (lambda: [nn.Conv2d(4, 4, 3, groups=2, padding=2), nn.BatchNorm2d(4)], (2, 4, 5, 5)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (2, 2, 3, 3, 3)),
    "transposed": (lambda: [nn.ConvTranspose2d(2, 3, 3, stride=2), nn.BatchNorm2d(3)], (2, 2, 3, 3)),
    "linear": (lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3)], (5, 4)),
    "linear-without-bias": (lambda: [nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)], (5, 4)),
    "norm-without-weights": (lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)], (5, 4)),
    "ours": (lambda: [nn.Conv2d(2, 3, 1), tritonbn.BatchNorm2d(3)], (2, 2, 5, 5)),
    "ours-with-activation": (lambda: [nn.Conv2d(2, 3, 1), tritonbn.BatchNormAct2d(3, "silu")], (2, 2, 5, 5)),
    "twice": (lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)], (5, 4)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_folded_into_the_layer_before(make: Callable[[], list[nn.Module]], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = used(nn.Sequential(*make()), *shape)
    state = copy.deepcopy(model.state_dict())
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded"] * (len(model) // 2)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(random(*shape)), model(random(*shape)))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def forward(self: Any, x: Tensor) -> Any:
    y = self.relu(self.bn(self.conv(x)))
    return self.relu(self.bn2(self.conv2(y)) + x)


@pytest.mark.parametrize("prepare", [copy.deepcopy, tritonbn.convert, converted], ids=["torch", "converted", "fused"])
def test_residual_block(prepare: Callable[[Any], Any]) -> None:
    model = used(prepare(net(forward)))
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded", "folded"]
    assert "forward" not in vars(folded)
    torch.testing.assert_close(folded(images()), model(images()))


def test_norm_with_activation_and_residual() -> None:
    model = used(net(lambda self, x: self.bn(self.conv(x), x), bn=tritonbn.BatchNormAct2d(CHANNELS)))
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded", "convertible"]
    torch.testing.assert_close(folded(images()), model(images()))


def test_what_is_left_stays_fused() -> None:
    def both(self: Any, x: Tensor) -> Any:
        return self.relu(self.bn2(self.relu(self.bn(self.conv(x)))))

    model = used(converted(net(both)))
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded", "replaced"]
    assert tritonbn.report(folded).rows[1].fused == "relu"
    assert vars(folded)["forward"].module is folded
    torch.testing.assert_close(folded(images()), model(images()))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, output: None)
    return module


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(convolution(), "weight", nn.Identity())


def conv_twice(self: Any, x: Tensor) -> Any:
    return self.bn(self.conv(x)) + self.conv(x)


def conv_used_twice(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.bn(y) + y


def weight_read(self: Any, x: Tensor) -> Any:
    return self.bn(self.conv(x)) + self.conv.weight.mean()


MORE_THAN_ONCE = "not folded: it, or the layer before it, is used more than once"
NO_LAYER = "not folded: its input is not what one convolution or linear layer returns"
NOT_FOLDED: dict[str, tuple[Callable[[], Any], str]] = {
    "norm-first": (lambda: net(lambda self, x: self.bn(x)), NO_LAYER),
    "activation-between": (lambda: net(lambda self, x: self.bn(self.conv(x).relu())), NO_LAYER),
    "output-used-twice": (lambda: net(conv_used_twice), NO_LAYER),
    "conv-called-twice": (lambda: net(conv_twice), MORE_THAN_ONCE),
    "weight-read": (lambda: net(weight_read), MORE_THAN_ONCE),
    "norm-called-twice": (
        lambda: net(lambda self, x: self.bn(self.conv(self.bn(self.conv2(x))))),
        MORE_THAN_ONCE,
    ),
    "two-names": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), **dict.fromkeys(("conv", "same"), convolution())),
        MORE_THAN_ONCE,
    ),
    "parametrized": (lambda: net(lambda self, x: self.bn(self.conv(x)), conv=parametrized()), NO_LAYER),
    "hook-on-conv": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), conv=hooked(convolution())),
        "not folded: a hook watches it or the layer before it",
    ),
    "hook-on-norm": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), bn=hooked(norm())),
        "not folded: a hook watches it or the layer before it",
    ),
    "no-statistics": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), bn=nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
        "not folded: it has no running statistics",
    ),
    "transposed-groups": (
        lambda: net(
            lambda self, x: self.bn(self.conv(x)), conv=nn.ConvTranspose2d(CHANNELS, CHANNELS, 1, groups=CHANNELS)
        ),
        NO_LAYER,
    ),
    "data-dependent": (
        lambda: net(lambda self, x: self.bn(self.conv(x)) if x.sum() < 1e9 else x),
        "not folded: no forward that can be followed calls it",
    ),
}


@pytest.mark.parametrize(("make", "why"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_not_folded_and_said_why(make: Callable[[], Any], why: str) -> None:
    model = used(make())
    folded = tritonbn.fold(model)
    row = next(row for row in tritonbn.report(folded).rows if row.name == "bn")
    assert row.folds == why
    torch.testing.assert_close(folded(images()), model(images()))


def test_shared_parameter_is_not_folded() -> None:
    model = net(lambda self, x: self.bn(self.conv(x)))
    model.conv2.weight = model.conv.weight
    assert tritonbn.report(used(model)).rows[0].folds == MORE_THAN_ONCE


def test_linear_with_more_dimensions_is_refused_once_folded() -> None:
    model = used(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 5, 4)
    folded = tritonbn.fold(model)
    model(random(2, 3, 4))
    with pytest.raises(ValueError, match=r"^folded for 2D input \(got 3D input\)$"):
        folded(random(2, 3, 4))


def test_training_mode_raises_with_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval(), nn.SyncBatchNorm(2))
    with pytest.raises(ValueError, match=r"evaluation mode, call model.eval\(\) first: 1, 3$"):
        tritonbn.fold(model)


@pytest.mark.parametrize(("given", "name"), [(None, "NoneType"), ([nn.Linear(1, 1)], "list")], ids=["none", "list"])
def test_what_is_no_module_raises(given: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^expected torch\.nn\.Module, got {name}$"):
        tritonbn.fold(given)


def test_report_before_and_after() -> None:
    model = used(nn.Sequential(convolution(), norm(), nn.ReLU(), norm()))
    assert [row.folds for row in tritonbn.report(model).rows] == ["fold() folds it into 0", NO_LAYER]
    folded = tritonbn.fold(model)
    assert str(tritonbn.report(folded)).splitlines() == [
        "module  type                  status       fused with  why",
        "1       tritonbn.fold.Folded  folded       -           into 0",
        f"3       torch.nn.BatchNorm2d  convertible  -           convert makes it tritonbn.BatchNorm2d; {NO_LAYER}",
        "2 found: 0 replaced, 0 fused, 1 convertible, 0 left alone, 1 folded",
    ]
    assert repr(folded[1]) == "Folded(into=0)"
    assert isinstance(folded[1], Folded)
    assert not folded[1].training
