"""BN-Inception without batch norm on real images: trains from Kaiming's weights, forgets its input with torch's own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

pytest.importorskip("sklearn", reason="its digits are real images: pip install -e .[bench]")

from sklearn.datasets import load_digits

from bench.networks.bn_inception import BLOCKS, bn_inception

BATCH = 32
CHANCE = 2.303  # loss of a network that knows nothing of ten classes


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """[1797, 3, 16, 16] with mean 0 and variance 1, in a fixed order; and their labels."""
    bunch = load_digits()
    images = interpolate(torch.from_numpy(bunch.images).float().unsqueeze(1), size=(16, 16), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    normalized = (images - images.mean()) / images.std()
    return normalized.expand(-1, 3, -1, -1)[order], torch.from_numpy(bunch.target).long()[order]


def network(torchs_weights: bool) -> nn.Sequential:
    built = bn_inception(0, batch_norm=False, stem="small", classes=10, width=0.25)
    if torchs_weights:
        torch.manual_seed(0)
        for layer in built.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
    return built


def losses(built: nn.Module, digits: tuple[Tensor, Tensor], steps: int) -> Iterator[float]:
    images, labels = digits
    optimizer = torch.optim.SGD(built.parameters(), lr=0.006, momentum=0.9)
    torch.manual_seed(0)
    for step in range(steps):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        loss = cross_entropy(built(images[batch]), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        yield loss.item()


def test_loss_falls_from_kaimings_weights_but_not_from_torchs(digits: tuple[Tensor, Tensor]) -> None:
    fell = list(losses(network(torchs_weights=False), digits, 50))
    assert sum(fell[-10:]) / 10 < 0.88 * CHANCE, fell
    stuck = list(losses(network(torchs_weights=True), digits, 50))
    assert abs(sum(stuck[-10:]) / 10 - CHANCE) < 0.05, stuck


@pytest.mark.parametrize("torchs_weights", [False, True], ids=["kaiming", "torch"])
def test_blocks_depend_on_the_image_with_kaimings_weights_only(
    digits: tuple[Tensor, Tensor], torchs_weights: bool
) -> None:
    built = network(torchs_weights)
    varying: dict[str, float] = {}
    for name in BLOCKS:
        layer = built.get_submodule(name)
        layer.register_forward_hook(lambda _, args, y, name=name: varying.update({name: float(y.std(0).mean())}))
    with torch.no_grad():
        built(digits[0][:16])
    if torchs_weights:
        assert varying["5b"] < 1e-5, varying
        assert varying["5b"] < 1e-3 * varying["3a"], varying
    else:
        assert varying["5b"] > 0.02, varying
