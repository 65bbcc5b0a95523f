"""timm's BatchNormAct2d: with timm where it is installed, else with a stand-in of the same interface."""

import copy
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonbn
from tests.fusing import CHANNELS, assert_trains_alike, converted, fused_in, images, net

NAMES = ("timm", "timm.layers", "timm.layers.norm_act")


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's does, in the names that timm uses."""

    def __init__(self, num_features: int, act_layer: Any = nn.ReLU, drop_layer: Any = None) -> None:
        super().__init__(num_features)
        self.drop = drop_layer() if drop_layer else nn.Identity()
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        y = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)
        z: Tensor = self.act(self.drop(y))
        return z


@pytest.fixture(autouse=True, scope="module")
def stand_in() -> Iterator[None]:
    """timm, or the class above under its name."""
    try:
        import timm.layers.norm_act  # noqa: F401, PLC0415
    except ImportError:
        modules = {name: ModuleType(name) for name in NAMES}
        modules[NAMES[-1]].BatchNormAct2d = BatchNormAct2d  # type: ignore[attr-defined]
        sys.modules.update(modules)
        yield
        for name in NAMES:
            del sys.modules[name]
    else:
        yield


def norm_act(**options: Any) -> Any:
    torch.manual_seed(0)
    module = sys.modules[NAMES[-1]].BatchNormAct2d(CHANNELS, **options)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    return module


def test_becomes_ours_and_back() -> None:
    model = nn.Sequential(norm_act())
    before = dict(vars(model[0]))
    kind = type(model[0])
    tritonbn.convert(model)
    assert type(model[0]).__module__ == "tritonbn.timm"
    assert isinstance(model[0], kind)
    tritonbn.revert(model)
    assert type(model[0]) is kind
    assert vars(model[0]) == before


def test_act_is_fused_and_drop_is_kept() -> None:
    for options, expected in (({}, "relu"), ({"act_layer": nn.SiLU}, "silu"), ({"drop_layer": nn.Dropout2d}, "")):
        model = nn.Sequential(norm_act(**options)).double()
        ours = tritonbn.convert(copy.deepcopy(model))
        assert fused_in(ours, images()) == [expected]
        assert tritonbn.report(ours).rows[0].fused == expected
        assert_trains_alike(ours, model, images())


def test_hooks_on_its_parts_are_called() -> None:
    for part in ("act", "drop"):
        model = nn.Sequential(norm_act()).double()
        ours = tritonbn.convert(copy.deepcopy(model))
        for one in (model, ours):
            one[0].get_submodule(part).register_forward_hook(lambda m, args, output: output * 2)
        assert fused_in(ours, images()) == [""]
        assert "a hook watches it" in tritonbn.report(ours).rows[0].alone
        assert_trains_alike(ours, model, images())


def test_is_part_of_a_chain_where_it_is_only_batch_norm() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.relu(self.bn(x) + x)

    plain = net(forward, bn=norm_act(act_layer=nn.Identity))
    assert fused_in(converted(plain), images()) == ["add + relu"]
    assert_trains_alike(converted(plain), plain, images())
    acting = net(forward, bn=norm_act())
    assert fused_in(converted(acting), images()) == ["relu"]
    assert_trains_alike(converted(acting), acting, images())
    late = converted(plain)
    late.bn.act = nn.Sigmoid()
    assert fused_in(late, images()) == ["sigmoid"]


def test_pickle_and_fold() -> None:
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), norm_act()).double()
    model(images())
    model.eval()
    ours = tritonbn.convert(copy.deepcopy(model))
    again = pickle.loads(pickle.dumps(ours))
    assert type(again[1]) is type(ours[1])
    folded = tritonbn.fold(ours)
    assert tritonbn.report(folded).rows[0].status == "folded"
    for one in (ours, again, folded):
        torch.testing.assert_close(one(images()), model(images()))


def test_models_of_timm() -> None:
    timm = pytest.importorskip("timm")
    if not hasattr(timm, "create_model"):
        pytest.skip("timm is a stand-in")
    for name in ("resnet18", "efficientnet_b0", "mobilenetv3_small_100", "densenet121"):
        torch.manual_seed(0)
        model = timm.create_model(name).double()
        ours = tritonbn.convert(copy.deepcopy(model), fuse=True)
        assert tritonbn.report(ours).fused > 0
        model.eval(), ours.eval()
        x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(ours(x), model(x))


@pytest.mark.parametrize("ours", [False, True])
def test_recalibrated_without_its_dropout(ours: bool) -> None:
    """The second norm sees what the first lets through in evaluation."""
    model: Any = nn.Sequential(norm_act(drop_layer=nn.Dropout2d), nn.BatchNorm2d(CHANNELS)).double()
    plain = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.BatchNorm2d(CHANNELS)).double()
    plain[0].load_state_dict(model[0].state_dict())
    given = [images(seed=seed) for seed in range(3)]
    for each in (tritonbn.convert(model) if ours else model, plain):
        tritonbn.recalibrate(each, given)
    for mine, theirs in ((model[0], plain[0]), (model[1], plain[2])):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-9)
    assert model[0].drop.training
