"""Networks by name, ours and others', and any network without its batch norm."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.errors import BenchError
from bench.networks import zoo
from bench.networks.bare import without_batch_norm
from bench.networks.bn_inception import bn_inception
from bench.networks.mobilenet import MobileNetV2
from bench.networks.resnet import resnet18, resnet50
from tests.parity import random

# Parameters at 1000 classes, in thousands, and batch norm layers.
OTHERS = {
    "torchvision/resnet50": (25_557, 53),
    "torchvision/densenet121": (7_979, 121),
    "torchvision/mobilenet_v2": (3_505, 52),
    "torchvision/mobilenet_v3_large": (5_483, 46),
    "torchvision/efficientnet_b0": (5_289, 49),
    "torchvision/regnet_y_400mf": (4_344, 53),
    "torchvision/inception_v3": (23_835, 94),
    "torchvision/vgg16_bn": (138_366, 13),
    "timm/resnet50": (25_557, 53),
    "timm/mobilenetv3_large_100": (5_483, 46),
}


def norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def batch(name: str, size: int = 2) -> Tensor:
    kind = zoo.network(name)
    side = kind.side and min(kind.side, 64)
    return random(size, kind.features, *([side, side] if side else [])).float()


@pytest.mark.parametrize("name", zoo.OWN)
@pytest.mark.parametrize("bare", [False, True], ids=["bn", "bare"])
def test_every_network_goes_forward_and_back(name: str, bare: bool) -> None:
    torch.manual_seed(0)
    kind = zoo.network(name)
    network, x = kind.build(kind.classes), batch(name)
    if bare:
        network = without_batch_norm(network, x)
        assert not norms(network)
    logits = network(x)
    assert logits.shape == (2, kind.classes)
    torch.autograd.backward(cross_entropy(logits, torch.tensor([1, 0])))
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_others_have_the_published_sizes(name: str) -> None:
    try:
        kind = zoo.network(name)
    except BenchError as error:
        pytest.skip(str(error))
    network = kind.build(kind.classes)
    parameters, layers = OTHERS[name]
    assert sum(p.numel() for p in network.parameters()) / 1000 == pytest.approx(parameters, abs=1)
    assert len(norms(network)) == layers
    assert kind.side == (299 if "inception" in name else 224)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_networks_of_others_run_without_batch_norm(name: str) -> None:
    try:
        kind = zoo.network(name)
    except BenchError as error:
        pytest.skip(str(error))
    network = without_batch_norm(kind.build(10), batch(name))
    assert not norms(network)
    assert network(batch(name)).isfinite().all()


@pytest.mark.parametrize(
    "error", [ImportError("no such module"), RuntimeError("operator torchvision::nms\nis unknown")]
)
def test_libraries_that_cannot_be_imported_are_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """torchvision made for another torch raises RuntimeError."""

    class Broken(ModuleType):
        def find_spec(self, name: str, *_: object) -> None:
            if name in zoo.THEIRS:
                raise error

    for name in zoo.THEIRS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken("broken"), *sys.meta_path])
    for name in ("torchvision/resnet50", "timm/resnet50"):
        with pytest.raises(
            BenchError, match=f"--model {name}: expected .* got: {str(error).splitlines()[0]}; pip install"
        ):
            zoo.network(name)


def test_torchs_seed_gives_the_weights() -> None:
    for name in ("bn-inception-small", "mnist-mlp"):
        kind, found = zoo.network(name), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(next(iter(kind.build(kind.classes).parameters())))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


def test_mnist_has_ten_classes() -> None:
    with pytest.raises(BenchError, match="expected 10 classes, got 4"):
        zoo.network("mnist-mlp").build(4)


def test_without_batch_norm_is_the_network_that_never_had_it() -> None:
    options = {"stem": "small", "classes": 7, "width": 0.1}
    bare = without_batch_norm(bn_inception(3, **options))  # type: ignore[arg-type]
    never = bn_inception(3, batch_norm=False, dropout=0.0, response_normalization=False, **options)  # type: ignore[arg-type]
    images = random(2, 3, 32, 32).float()
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == {
        name: tensor.shape for name, tensor in never.state_dict().items()
    }
    torch.testing.assert_close(bare(images), never(images), rtol=0, atol=0)


def test_original_keeps_its_batch_norm() -> None:
    network = resnet18(width=4).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    bare = without_batch_norm(network, random(2, 3, 32, 32).float())
    assert all(module.training for module in [*network.modules(), *bare.modules()])
    assert list(before) == list(network.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not without_batch_norm(network.eval()).training


@pytest.mark.parametrize(
    "network", [resnet50(width=8), MobileNetV2(width=0.35)], ids=["resnet50", "mobilenet"]
)  # fmt: skip
def test_layers_get_a_bias_and_outputs_of_deviation_one(network: nn.Module) -> None:
    """Their own initialization would let the values of MobileNet vanish, and those of ResNet grow."""
    images = random(4, 3, 64, 64).float()
    bare, raw = without_batch_norm(network, images), without_batch_norm(network)
    seen: dict[str, float] = {}
    for name, module in bare.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            assert not module.bias.any()
            module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: y.std().item()}))
    bare.eval()(images)
    assert len(seen) == len(norms(network))
    assert list(seen.values()) == pytest.approx([1.0] * len(seen), rel=1e-2)
    weights = {name: tensor for name, tensor in raw.named_parameters() if tensor.dim() > 1}
    assert all(torch.equal(tensor, network.get_parameter(name)) for name, tensor in weights.items())


def test_bias_of_a_layer_that_has_one_is_kept() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2))
    first = network[0]
    assert isinstance(first, nn.Linear)
    bare = without_batch_norm(network)
    assert torch.equal(bare.get_parameter("0.bias"), first.bias)
    assert [type(module) for module in bare] == [nn.Linear, nn.Identity, nn.ReLU, nn.Identity]
