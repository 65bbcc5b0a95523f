"""How much is fused in whole networks, and that they train as before."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


# Batch norms, those fused with an activation, an add, both (a shortcut's with that which it is added to); the rest are
# returned.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (lambda: resnet18(width=4, classes=5), {"relu": 9, "add + relu": 11}),
    "resnet50": (lambda: resnet50(width=4, classes=5), {"relu": 33, "add + relu": 20}),
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
        "4.0.bn2           tritonbn.BatchNorm2d  replaced  add + relu  revert makes it torch.nn.BatchNorm2d; "
        "in the same pass as 4.0.downsample.1",
        "4.0.downsample.1  tritonbn.BatchNorm2d  replaced  add + relu  revert makes it torch.nn.BatchNorm2d; "
        "in the same pass as 4.0.bn2",
        "4.1.bn1           tritonbn.BatchNorm2d  replaced  relu        revert makes it torch.nn.BatchNorm2d",
        "4.1.bn2           tritonbn.BatchNorm2d  replaced  add + relu  revert makes it torch.nn.BatchNorm2d",
        "6 found: 6 replaced, 6 fused, 0 convertible, 0 left alone",
    ]


def test_networks_without_anything_to_fuse_stay_as_they_are() -> None:
    model = tritonbn.convert(bn_inception(batch_norm=False, width=0.05, classes=5), fuse=True)
    assert not any("forward" in vars(module) for module in model.modules())
    assert tritonbn.report(tritonbn.convert(mnist_mlp(0, True), fuse=True)).fused == 3


class DoubleConvolution(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        block = [[nn.Conv2d(n, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(True)] for n in (before, after)]
        super().__init__(*block[0], *block[1])


class UNet(nn.Module):
    """Down, up again, and what was on the way down beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([DoubleConvolution(3, 4), DoubleConvolution(4, 8)])
        self.middle = DoubleConvolution(8, 8)
        self.up = nn.ModuleList([DoubleConvolution(16, 4), DoubleConvolution(8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for block, skip in zip(self.up, reversed(kept), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return x


def generator() -> nn.Module:
    widths = (3, 8, 4)
    blocks = [
        [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks[0], *blocks[1], nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh())


def discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True),
        nn.Conv2d(4, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, True), nn.Flatten(), nn.LazyLinear(1),
    )  # fmt: skip


SMALL: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "u-net": (UNet, {"relu": 10}),
    "generator": (generator, {"relu": 2}),
    "discriminator": (discriminator, {"leaky_relu(0.2)": 1}),
}


@pytest.mark.parametrize(("make", "counts"), SMALL.values(), ids=SMALL)
def test_other_blocks_are_fused_and_folded(make: Callable[[], nn.Module], counts: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    model(x)
    ours = converted(model)
    rows = tritonbn.report(ours).rows
    assert {steps: sum(row.fused == steps for row in rows) for steps in counts} == counts
    assert len(rows) == sum(counts.values())
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), model.train(mode)(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tritonbn.fold(ours, x)(x), model(x), rtol=1e-9, atol=1e-9)


# Batch norms of a network and how many of them are fused.
TORCHVISION = {
    "resnet18": (20, 20), "resnet50": (53, 53), "wide_resnet50_2": (53, 53), "resnext50_32x4d": (53, 53),
    "mobilenet_v2": (52, 45), "mobilenet_v3_small": (34, 29), "mobilenet_v3_large": (46, 41), "densenet121": (121, 121),
    "googlenet": (57, 57), "efficientnet_b0": (49, 33), "efficientnet_v2_s": (110, 72), "shufflenet_v2_x0_5": (56, 37),
    "regnet_y_400mf": (53, 49), "mnasnet0_5": (52, 45), "vgg11_bn": (8, 8),
}  # fmt: skip
TIMM = {
    "resnet18": (20, 20), "resnet50d": (55, 55), "seresnet50": (53, 33), "efficientnet_b0": (49, 42),
    "mobilenetv3_small_100": (34, 29), "densenet121": (121, 121), "regnety_002": (44, 40), "hrnet_w18_small": (91, 75),
    "dla34": (37, 33), "res2net50_26w_4s": (85, 85), "cspresnet50": (55, 51), "cspdarknet53": (67, 67),
    "repvgg_a0": (61, 22), "ghostnet_100": (80, 34), "dpn68": (72, 72), "ese_vovnet19b_dw": (23, 23),
    "xception41": (84, 36), "inception_v4": (149, 149), "inception_resnet_v2": (204, 204), "mobileone_s0": (226, 85),
}  # fmt: skip


def assert_fused_and_the_same(model: nn.Module, counts: tuple[int, int], size: int = 64) -> None:
    """As many are fused as the report says, in the report and at a call, and the outputs are equal."""
    ours = converted(model.double())
    report = tritonbn.report(ours)
    assert (len(report.rows), report.fused) == counts
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    for mode in (True, False):
        torch.manual_seed(1)
        with fusions() as seen:
            mine = ours.train(mode)(x)
        assert not mode or sum(map(bool, seen)) == report.fused
        torch.manual_seed(1)
        torch.testing.assert_close(mine, model.train(mode)(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    options: dict[str, bool] = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    options |= {"init_weights": False} if name == "vgg11_bn" else {}
    assert_fused_and_the_same(getattr(models, name)(weights=None, **options), TORCHVISION[name])


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    assert_fused_and_the_same(timm.create_model(name), TIMM[name], 128 if "inception" in name else 64)
