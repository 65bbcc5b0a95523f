"""How much is fused in whole networks, and that they train as before."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tritonbn
from bench.networks.bn_inception import bn_inception
from bench.networks.mlp import mnist_mlp
from bench.networks.mobilenet import MobileNetV2
from bench.networks.resnet import resnet18, resnet50
from tests.fusing import converted, fusions
from tritonbn import launch


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole networks take long in it; here torch computes what is fused."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


# Batch norms, those fused with an activation, an add, both; the rest are added to another one or returned.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (lambda: resnet18(width=4, classes=5), {"relu": 9, "add + relu": 8, "": 3}),
    "resnet50": (lambda: resnet50(width=4, classes=5), {"relu": 33, "add + relu": 16, "": 4}),
    "mobilenet-v2": (lambda: MobileNetV2(width=0.5, classes=5), {"relu6": 35, "add": 10, "": 7}),
    "bn-inception": (lambda: bn_inception(width=0.05, classes=5), {"relu": 69}),
}


@pytest.mark.parametrize(("make", "counts"), NETWORKS.values(), ids=NETWORKS)
def test_network_is_fused_and_computes_the_same(make: Callable[[], nn.Module], counts: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = make().double()
    ours = converted(model)
    rows = tritonbn.report(ours).rows
    assert {steps: sum(row.fused == steps for row in rows) for steps in counts} == counts
    assert len(rows) == sum(counts.values())
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        with fusions() as seen:
            torch.manual_seed(1)
            mine = ours.train(mode)(x)
        assert {steps: seen.count(steps) for steps in counts} == counts
        torch.manual_seed(1)
        theirs = model.train(mode)(x)
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)
        if mode:
            for y in (mine, theirs):
                torch.autograd.backward(y.sin().sum())
    gradients = [[p.grad for p in one.parameters()] for one in (ours, model)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), model.state_dict())
    folded = tritonbn.fold(copy.deepcopy(ours))
    assert {row.status for row in tritonbn.report(folded).rows} == {"folded"}
    torch.testing.assert_close(folded(x), model(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("make", [lambda: resnet18(width=4, classes=5), lambda: MobileNetV2(width=0.1, classes=5)])
def test_compiled_networks_stay_fused(make: Callable[[], nn.Module]) -> None:
    torch.compiler.reset()
    ours = tritonbn.convert(make().double().eval(), fuse=True)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), fusions() as seen:
        expected = ours(x)
        eager = list(seen)
        seen.clear()
        mine = torch.compile(ours, backend="eager", fullgraph=True)(x)
    assert seen == eager
    torch.testing.assert_close(mine, expected)


def test_report_of_a_fused_network() -> None:
    model = nn.Sequential(*list(resnet18(width=4, classes=5).children())[:2], nn.Identity(), nn.ReLU())
    model.append(resnet18(width=4, classes=5).layer2)
    before = [
        "module            type                  status       fused with  why",
        "1                 torch.nn.BatchNorm2d  convertible  -           convert makes it tritonbn.BatchNorm2d; "
        "convert(fuse=True) fuses relu",
    ]
    assert str(tritonbn.report(model)).splitlines()[:2] == before
    assert str(tritonbn.report(tritonbn.convert(model, fuse=True))).splitlines() == [
        "module            type                  status    fused with  why",
        "1                 tritonbn.BatchNorm2d  replaced  relu        revert makes it torch.nn.BatchNorm2d",
        "4.0.bn1           tritonbn.BatchNorm2d  replaced  relu        revert makes it torch.nn.BatchNorm2d",
        "4.0.bn2           tritonbn.BatchNorm2d  replaced  add + relu  revert makes it torch.nn.BatchNorm2d",
        "4.0.downsample.1  tritonbn.BatchNorm2d  replaced  -           revert makes it torch.nn.BatchNorm2d; "
        "self.relu(self.bn1(self.conv1(x))) runs before it is used (resnet.py:31)",
        "4.1.bn1           tritonbn.BatchNorm2d  replaced  relu        revert makes it torch.nn.BatchNorm2d",
        "4.1.bn2           tritonbn.BatchNorm2d  replaced  add + relu  revert makes it torch.nn.BatchNorm2d",
        "6 found: 6 replaced, 5 fused, 0 convertible, 0 left alone",
    ]


def test_networks_without_anything_to_fuse_stay_as_they_are() -> None:
    model = tritonbn.convert(bn_inception(batch_norm=False, width=0.05, classes=5), fuse=True)
    assert not any("forward" in vars(module) for module in model.modules())
    assert tritonbn.report(tritonbn.convert(mnist_mlp(0, True), fuse=True)).fused == 3


TORCHVISION = {
    "resnet18": 17,
    "mobilenet_v2": 45,
    "mobilenet_v3_small": 0,
    "densenet121": 0,
    "googlenet": 0,
    "efficientnet_b0": 0,
    "shufflenet_v2_x0_5": 0,
    "regnet_y_400mf": 0,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, **options).double()
    ours = converted(model)
    assert tritonbn.report(ours).fused >= max(1, TORCHVISION[name])
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        torch.manual_seed(1)
        mine = ours.train(mode)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(mine, model.train(mode)(x), rtol=1e-6, atol=1e-6)
