"""The networks of the benchmarks: are they the published ones, and do they train?"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.networks.bn_inception import bn_inception
from bench.networks.mobilenet import InvertedResidual, MobileNetV2, in_eights
from bench.networks.resnet import ResNet, resnet18, resnet50
from tests.parity import random

Build = Callable[..., nn.Module]


class Published(NamedTuple):
    build: Build
    options: dict[str, Any]
    parameters: int
    norms: int
    shapes: int  # different ones among the outputs of the batch norm layers
    millions: float  # of elements in those outputs, per image


SMALL = {"stem": "small", "classes": 10}
FULL_SIZE = {
    "resnet18": Published(resnet18, {}, 11_689_512, 20, 5, 2.48),
    "resnet50": Published(resnet50, {}, 25_557_032, 53, 12, 11.11),
    "mobilenet": Published(MobileNetV2, {}, 3_504_872, 52, 19, 6.68),
    "bn-inception": Published(bn_inception, {}, 11_285_224, 69, 21, 3.74),
    "bn-inception-without-bn": Published(bn_inception, {"batch_norm": False}, 11_275_208, 0, 0, 0.0),
    "bn-inception-small": Published(bn_inception, SMALL, 10_262_794, 69, 20, 0.83),
    "bn-inception-small-without-bn": Published(bn_inception, {**SMALL, "batch_norm": False}, 10_252_778, 0, 0, 0.0),
}
# What differs in them is what may break: kind of block, shortcut, bias, activation, stem.
TINY: dict[str, tuple[Build, dict[str, Any]]] = {
    "resnet18": (resnet18, {"width": 4}),
    "resnet50": (resnet50, {"width": 2}),
    "resnet50-from-shortcuts": (resnet50, {"width": 2, "zero_init_residual": True}),
    "mobilenet": (MobileNetV2, {"width": 0.2}),
    "bn-inception": (bn_inception, {"width": 0.05}),
    "bn-inception-without-bn": (bn_inception, {"width": 0.05, "batch_norm": False}),
    "bn-inception-baseline": (bn_inception, {"width": 0.05, "dropout": 0.4, "response_normalization": True}),
    "bn-inception-sigmoid": (bn_inception, {"width": 0.05, "activation": "sigmoid"}),
    "bn-inception-small": (bn_inception, {"width": 0.05, "stem": "small"}),
    "bn-inception-small-without-bn": (bn_inception, {"width": 0.05, "stem": "small", "batch_norm": False}),
}
CLASSES = 4


def on_meta(build: Build, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(**options)


def shapes_along(network: nn.Module, layers: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    """Channels and grid that each of `layers` gives for one image of size x size, by name."""
    seen: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.named_children():
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: tuple(output.shape[1:])}))
    network(torch.empty(2, 3, size, size, device="meta"))
    return seen


@pytest.mark.parametrize("full", FULL_SIZE.values(), ids=FULL_SIZE)
def test_sizes_are_the_published_ones(full: Published) -> None:
    network = on_meta(full.build, **full.options)
    assert sum(parameter.numel() for parameter in network.parameters()) == full.parameters
    seen: list[torch.Size] = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    size = 32 if full.options.get("stem") == "small" else 224
    logits = network(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, full.options.get("classes", 1000))
    assert (len(seen), len(set(seen))) == (full.norms, full.shapes)
    assert sum(shape[1:].numel() for shape in seen) / 1e6 == pytest.approx(full.millions, abs=0.005)


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def test_resnet50_has_torchvisions_names_in_their_order() -> None:
    names = list(on_meta(resnet50).state_dict())
    block = [f"{kind}{i}.{n}" for i in (1, 2, 3) for kind, ns in (("conv", ["weight"]), ("bn", NORM)) for n in ns]
    shortcut = ["downsample.0.weight", *(f"downsample.1.{n}" for n in NORM)]
    expected = ["conv1.weight", *(f"bn1.{n}" for n in NORM)]
    for layer, depth in enumerate((3, 4, 6, 3), start=1):
        for i in range(depth):
            expected += [f"layer{layer}.{i}.{name}" for name in [*block, *(shortcut if i == 0 else [])]]
    assert names == [*expected, "fc.weight", "fc.bias"]
    assert len(names) == 320


def test_resnet18_has_torchvisions_names_in_their_order() -> None:
    names = list(on_meta(resnet18).state_dict())
    assert len(names) == 122
    assert names[6:12] == ["layer1.0.conv1.weight", *(f"layer1.0.bn1.{n}" for n in NORM)]
    assert names[-3:] == ["layer4.1.bn2.num_batches_tracked", "fc.weight", "fc.bias"]
    shortcuts = [name for name in names if name.endswith("downsample.0.weight")]
    assert shortcuts == [f"layer{i}.0.downsample.0.weight" for i in (2, 3, 4)]


def test_resnet50_strides_in_the_3x3_convolution() -> None:
    strided = [n for n, m in on_meta(resnet50).named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    inner = [f"layer{i}.0.{name}" for i in (2, 3, 4) for name in ("conv2", "downsample.0")]
    assert strided == ["conv1", *inner]


def test_mobilenet_has_torchvisions_names_in_their_order() -> None:
    state = on_meta(MobileNetV2).state_dict()
    names = list(state)
    assert len(names) == 314
    assert names[:6] == ["features.0.0.weight", *(f"features.0.1.{n}" for n in NORM)]
    weights = [name for name in names if name.endswith("weight")]
    first = [f"features.1.conv.{i}.weight" for i in ("0.0", "0.1", "1", "2")]
    second = [f"features.2.conv.{i}.weight" for i in ("0.0", "0.1", "1.0", "1.1", "2", "3")]
    assert weights[2:12] == first + second
    assert names[-8:] == [
        "features.18.0.weight",
        *(f"features.18.1.{n}" for n in NORM),
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    assert state["features.2.conv.1.0.weight"].shape == (96, 1, 3, 3), "depthwise"
    assert state["features.18.0.weight"].shape == (1280, 320, 1, 1)


def test_mobilenet_shapes_are_those_of_its_table() -> None:
    network = on_meta(MobileNetV2)
    assert isinstance(network, MobileNetV2)
    stages = [shape for shape, _ in itertools.groupby(shapes_along(network, network.features, 224).values())]
    grids = [(32, 112), (16, 112), (24, 56), (32, 28), (64, 14), (96, 14), (160, 7), (320, 7), (1280, 7)]
    assert stages == [(channels, grid, grid) for channels, grid in grids]


def test_mobilenet_adds_its_input_where_the_shapes_agree_and_activates_nothing_after() -> None:
    blocks = [module for module in on_meta(MobileNetV2).modules() if isinstance(module, InvertedResidual)]
    assert len(blocks) == 17
    assert sum(block.residual for block in blocks) == 10
    assert {type(block.conv[-1]) for block in blocks} == {nn.BatchNorm2d}
    for block, adds in ((InvertedResidual(4, 4, 1, 6), True), (InvertedResidual(4, 5, 1, 6), False)):
        for parameter in block.conv[-1].parameters():
            nn.init.zeros_(parameter)
        image = random(2, 4, 5, 5).float()
        output = block(image)
        assert torch.equal(output, image if adds else torch.zeros_like(output))


@pytest.mark.parametrize(("width", "first", "last"), [(0.25, 8, 1280), (1.4, 48, 1792)])
def test_mobilenet_width_spares_the_last_convolution_below_one(width: float, first: int, last: int) -> None:
    state = on_meta(MobileNetV2, width=width).state_dict()
    assert state["features.0.0.weight"].shape[0] == first
    assert state["features.18.0.weight"].shape[0] == state["classifier.1.weight"].shape[1] == last


def test_widths_multiply_all_channels() -> None:
    inception, residual = on_meta(bn_inception, width=0.5), on_meta(resnet50, width=32)
    shapes = shapes_along(inception, inception, 224)
    assert {name: shapes[name][0] for name in WIDTHS} == {name: width // 2 for name, width in WIDTHS.items()}
    assert [shapes[name][0] for name in ("conv1", "conv2")] == [32, 96]
    assert shapes_along(residual, residual, 64)["layer4"] == (1024, 2, 2)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(3.2, 8), (12.0, 16), (24.0, 24), (11.9, 16), (27.9, 32), (28.0, 32), (35.9, 40), (45.0, 48), (43.9, 40)],
)
def test_mobilenet_widths_are_multiples_of_eight(channels: float, expected: int) -> None:
    assert in_eights(channels) == expected


@pytest.mark.parametrize("build", [resnet18, resnet50], ids=["18", "50"])
def test_resnet_shapes_are_those_of_its_table(build: Callable[[], ResNet]) -> None:
    network = on_meta(build)
    wide = 4 if build is resnet50 else 1
    seen = shapes_along(network, network, 224)
    assert seen["bn1"] == (64, 112, 112)
    assert seen["maxpool"] == (64, 56, 56)
    grids = [seen[f"layer{i}"] for i in (1, 2, 3, 4)]
    assert grids == [(64 * wide, 56, 56), (128 * wide, 28, 28), (256 * wide, 14, 14), (512 * wide, 7, 7)]


WIDTHS = {"3a": 256, "3b": 320, "3c": 576, "4a": 576, "4b": 576, "4c": 608, "4d": 608, "4e": 1056}
WIDTHS |= {"5a": 1024, "5b": 1024}


@pytest.mark.parametrize("batch_norm", [True, False], ids=["bn", "no-bn"])
@pytest.mark.parametrize(("stem", "size", "grid"), [("original", 224, 28), ("small", 32, 16)])
def test_bn_inception_shapes_are_those_of_figure_5(stem: str, size: int, grid: int, batch_norm: bool) -> None:
    network = on_meta(bn_inception, stem=stem, batch_norm=batch_norm)
    seen = shapes_along(network, network, size)
    before = [seen[name] for name in ("conv1", "pool1", "conv2", *(["pool2"] if stem == "original" else []))]
    if stem == "original":
        assert before == [(64, 112, 112), (64, 56, 56), (192, 56, 56), (192, 28, 28)]
    else:
        assert before == [(64, 32, 32), (64, 16, 16), (192, 16, 16)]
    for name, width in WIDTHS.items():
        grid //= 2 if name in ("3c", "4e") else 1
        assert seen[name] == (width, grid, grid), name
    assert seen["average"] == (1024, 1, 1)
    assert seen["linear"] == (1000,)


def test_bn_inception_pools_as_figure_5() -> None:
    network = on_meta(bn_inception)
    kinds = (nn.MaxPool2d, nn.AvgPool2d)
    pools = [(name, type(m), m.stride) for name, m in network.named_modules() if isinstance(m, kinds)]
    maxima = {"pool1": 2, "pool2": 2, "3c": 2, "4e": 2, "5b": 1}
    expected = [
        (name, nn.MaxPool2d, maxima[name]) if name in maxima else (name, nn.AvgPool2d, 1)
        for name in ("pool1", "pool2", *WIDTHS)
    ]
    assert [(name.split(".")[0], *rest) for name, *rest in pools] == expected


def test_bn_inception_has_a_nonlinearity_after_each_convolution_and_a_bias_or_batch_norm() -> None:
    for batch_norm, activation in itertools.product((True, False), ("relu", "sigmoid")):
        network = on_meta(bn_inception, batch_norm=batch_norm, activation=activation)
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sigmoid)
        order = [type(m) for m in network.modules() if isinstance(m, kinds)]
        nonlinearity = nn.ReLU if activation == "relu" else nn.Sigmoid
        assert order == [nn.Conv2d, *([nn.BatchNorm2d] if batch_norm else []), nonlinearity] * 69
        biases = [m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert biases == [not batch_norm] * 69


LIKE_GOOGLENET = "5, alpha=0.0001, beta=0.75, k=1.0"


BOTH = {"dropout": 0.4, "response_normalization": True}
NEITHER = {"dropout": 0.0, "response_normalization": False}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"batch_norm": False}, ["response1", "response2", "dropout"]),
        (BOTH, ["response1", "response2", "dropout"]),
        ({"dropout": 0.4}, ["dropout"]),
        ({"response_normalization": True}, ["response1", "response2"]),
        ({"batch_norm": False, "dropout": 0.0}, ["response1", "response2"]),
        ({"batch_norm": False, "response_normalization": False}, ["dropout"]),
        ({"batch_norm": False, **NEITHER}, []),
    ],
    ids=["bn", "original", "bn-baseline", "bn-dropout", "bn-lrn", "no-dropout", "no-lrn", "bare"],
)
@pytest.mark.parametrize("stem", ["original", "small"])
def test_bn_inception_regularizes_as_the_original(options: dict[str, Any], expected: list[str], stem: str) -> None:
    network = on_meta(bn_inception, stem=stem, **options)
    names = [name for name, _ in network.named_children()]
    extra = [name for name in names if isinstance(network.get_submodule(name), nn.LocalResponseNorm | nn.Dropout)]
    assert extra == expected
    place = {"response1": "pool1", "response2": "conv2", "dropout": "flatten"}
    for name in extra:
        described = "p=0.4, inplace=False" if name == "dropout" else LIKE_GOOGLENET
        assert network.get_submodule(name).extra_repr() == described
        assert names[names.index(name) - 1] == place[name]


def test_one_seed_gives_the_same_weights_with_and_without_batch_norm() -> None:
    one, same = (bn_inception(3, batch_norm, width=0.05).state_dict() for batch_norm in (True, False))
    other = bn_inception(4, width=0.05).state_dict()
    shared = [name for name, tensor in one.items() if tensor.dim() > 1]
    assert len(shared) == 70
    assert all(torch.equal(one[name], same[name]) for name in shared)
    assert not any(torch.equal(one[name], other[name]) for name in shared)


@pytest.mark.parametrize("batch_norm", [True, False], ids=["bn", "no-bn"])
def test_bn_inception_starts_from_kaimings_weights_and_zero_biases(batch_norm: bool) -> None:
    for module in bn_inception(0, batch_norm, width=0.25).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.std().item() == pytest.approx((2 / module.weight[0].numel()) ** 0.5, rel=0.1)
            assert module.bias is None or not module.bias.any()


def test_network_without_batch_norm_tells_images_apart_at_its_start() -> None:
    """Torch's own initialization leaves 1e-7 here: such a baseline would be a straw man."""
    network = bn_inception(0, batch_norm=False, stem="small", width=0.25)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = torch.nn.Sequential(*list(network.children())[:-4])(images)
    assert features.std(dim=0).mean() > 0.02


def test_residual_branches_start_at_zero_if_asked() -> None:
    for build, last in ((resnet18, "bn2"), (resnet50, "bn3")):
        for zero in (False, True):
            state = build(width=2, zero_init_residual=zero).state_dict()
            scales = {name: t for name, t in state.items() if "bn" in name and name.endswith("weight")}
            zeros = {name for name, scale in scales.items() if not scale.any()}
            assert zeros == {n for n in scales if n.startswith("layer") and last in n and zero}


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
def test_every_parameter_gets_a_finite_gradient_and_the_loss_falls(tiny: tuple[Build, dict[str, Any]]) -> None:
    """Four random images, one of each class, learnt by heart."""
    build, options = tiny
    torch.manual_seed(0)
    network = build(classes=CLASSES, **options)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its noise would hide a small fall
    images, labels = random(CLASSES, 3, 64, 64).float(), torch.arange(CLASSES)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = cross_entropy(network(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        gradients: dict[str, Tensor | None] = {name: p.grad for name, p in network.named_parameters()}
        assert not [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()]
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0], losses


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
def test_evaluation_treats_each_image_alone(tiny: tuple[Build, dict[str, Any]]) -> None:
    build, options = tiny
    network = build(classes=CLASSES, **options).eval()
    images = random(3, 3, 64, 64).float()
    with torch.no_grad():
        torch.testing.assert_close(network(images)[:1], network(images[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (bn_inception, {"activation": "tanh"}, r"activation: expected one of relu, sigmoid, got 'tanh'"),
        (bn_inception, {"stem": "tiny"}, r"stem: expected one of original, small, got 'tiny'"),
        (bn_inception, {"width": 0}, r"expected classes of at least 1 and width above 0, got 1000 and 0"),
        (bn_inception, {"classes": 0}, r"expected classes of at least 1 and width above 0, got 0 and 1\.0"),
        (bn_inception, {"dropout": 1.0}, r"expected dropout of at least 0 and below 1, got 1\.0"),
        (MobileNetV2, {"width": -0.5}, r"expected classes of at least 1 and width above 0, got 1000 and -0\.5"),
        (MobileNetV2, {"classes": 0}, r"expected classes of at least 1 and width above 0, got 0 and 1\.0"),
        (resnet18, {"width": 0}, r"expected classes and width of at least 1, got 1000 and 0"),
        (resnet50, {"classes": -1}, r"expected classes and width of at least 1, got -1 and 64"),
    ],
)
def test_impossible_options_raise(build: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(**options)
