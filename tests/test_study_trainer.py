"""A network of the Inception study in training: what a step does, and what is put back."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("PIL", reason="the benchmarks are an extra: pip install -e .[bench]")

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.cudnn import cudnn
from bench.images import Memory
from bench.study.augment import Pixels
from bench.study.recipe import Recipe, recipes
from bench.study.trainer import Norm, Options, Trainer, build, logits
from tritonbn import launch
from tritonbn.timing import measuring

OPTIONS = Options(width=0.05, classes=4, dtype="fp32", graph=False, block=10)
# Tiny steps: with a learning rate of 0.001 so narrow a network with batch norm is chaotic: in three steps a millionth
# of the weights becomes a tenth of the loss, and CUDA sums in no fixed order. So much L2 that it is seen in them.
RECIPES = recipes(Recipe(batch=8, learning_rate=2e-6, l2=5.0, decay=0.001))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench code, not kernels, is tested here."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


@pytest.fixture(scope="module")
def data(device: torch.device) -> Pixels:
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=chance, dtype=torch.uint8)
    return Pixels.of(Memory(images, torch.arange(40) % 4, []), device)


@pytest.fixture(autouse=True)
def one_stream(device: torch.device) -> Iterator[None]:
    with measuring(device), cudnn(allow_tf32=False):
        yield


def trainer(arm: str, data: Pixels, norm: Norm | None = None, options: Options = OPTIONS) -> Trainer:
    return Trainer(RECIPES[arm], norm, 1, data, options)


def test_all_begins_as_if_nothing_had_warmed_up(data: Pixels) -> None:
    made = trainer("BN-Baseline", data, "torch")
    fresh = build(RECIPES["BN-Baseline"], "torch", 1, 16, OPTIONS).state_dict()
    state = made.tensors()
    for name, tensor in fresh.items():
        assert torch.equal(state[name].cpu(), tensor), name
    momenta = [name for name in state if name.endswith(".momentum")]
    assert len(momenta) == len(list(made.network.parameters()))
    assert not any(state[name].any() for name in momenta)
    assert fresh["conv1.0.1.running_mean"].eq(0).all()
    torch.manual_seed(1)
    assert torch.equal(made.chance()["cpu"], torch.get_rng_state())


def moves(network: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """How far each parameter is from where it began."""
    start = dict(build(recipe, "torch" if recipe.batch_norm else None, 1, 16, OPTIONS).named_parameters())
    return {name: p.detach().cpu() - start[name].detach() for name, p in network.named_parameters()}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """A sign that flips in a nonlinearity shows in single parameters, an error in one of them or in all together."""
    errors = {name: float((ours[name] - move).norm()) for name, move in theirs.items()}
    lengths = {name: float(move.norm()) for name, move in theirs.items()}
    assert all(lengths.values())
    assert sum(error**2 for error in errors.values()) < 0.03**2 * sum(length**2 for length in lengths.values())
    assert all(error < 0.5 * lengths[name] for name, error in errors.items())


def reference(data: Pixels, steps: int) -> tuple[list[float], nn.Module]:
    """BN-x5 written down again: torch's optimizer with a number for a rate, L2 of the weights only."""
    recipe = RECIPES["BN-x5"]
    network: Any = build(recipe, "torch", 1, 16, OPTIONS)
    network.to(data.images.device, memory_format=torch.channels_last).train()
    stream = trainer("BN-x5", data, "torch").stream
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": recipe.l2}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=1e-5, momentum=0.9)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-5 * 0.001 ** (6 * step / 1000)
        places, factors = (drawn.to(data.images.device) for drawn in stream.draw(step))
        loss = cross_entropy(network(data.augmented(places, factors)), data.labels[places[0]])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, network


def test_step_is_forward_backward_and_sgd_with_the_schedule(data: Pixels) -> None:
    made = trainer("BN-x5", data, "torch", OPTIONS._replace(graph=True))
    found, _ = made.train(0, 6)
    expected, network = reference(data, 6)
    assert found == pytest.approx(expected, rel=1e-3)
    assert_alike(moves(made.network, RECIPES["BN-x5"]), moves(network, RECIPES["BN-x5"]))
    for name, tensor in network.named_buffers():
        torch.testing.assert_close(made.network.get_buffer(name), tensor, rtol=1e-2, atol=1e-3)
    assert float(made.rate) == pytest.approx(1e-5 * 0.001 ** (6 * 5 / 1000))


def test_ours_follows_torchs(data: Pixels) -> None:
    theirs, ours = trainer("BN-x5", data, "torch"), trainer("BN-x5", data, "tritonbn")
    assert ours.train(0, 4)[0] == pytest.approx(theirs.train(0, 4)[0], rel=1e-3)
    assert_alike(moves(ours.network, RECIPES["BN-x5"]), moves(theirs.network, RECIPES["BN-x5"]))


def test_blocks_leave_no_trace(data: Pixels) -> None:
    whole, _ = trainer("Inception", data).train(0, 9)
    made = trainer("Inception", data)
    first, _ = made.train(0, 4)
    logits(made.network, data)
    second, _ = made.train(4, 9)
    assert made.network.training
    assert [*first, *second] == pytest.approx(whole, rel=1e-6 if data.images.device.type == "cpu" else 1e-4)


def test_state_and_chance_can_be_put_back_and_both_matter(data: Pixels) -> None:
    """Without its chance, dropout draws other noise: the test fails if it is not saved."""
    made = trainer("Inception", data)
    made.train(0, 3)
    state, chance = {name: tensor.clone() for name, tensor in made.tensors().items()}, made.chance()
    expected, _ = made.train(3, 7)
    made.restore(state, chance)
    assert made.train(3, 7)[0] == pytest.approx(expected, rel=1e-6 if data.images.device.type == "cpu" else 1e-4)
    made.restore(state, trainer("Inception", data).chance())
    assert abs(made.train(3, 4)[0][0] - expected[0]) > 1e-4


def test_stopping_ends_after_the_step(data: Pixels) -> None:
    answers = iter([False, False, True])
    losses, seconds = trainer("BN-x5", data, "torch").train(0, 8, lambda: next(answers))
    assert len(losses) == 3
    assert seconds > 0


def test_bf16_keeps_parameters_and_loss_in_float32(data: Pixels) -> None:
    made = trainer("BN-x5", data, "tritonbn", OPTIONS._replace(dtype="bf16"))
    found, exact = made.train(0, 1)[0], trainer("BN-x5", data, "tritonbn").train(0, 1)[0]
    assert found == pytest.approx(exact, rel=0.05)
    assert found != exact
    assert {p.dtype for p in made.network.parameters()} == {torch.float32}


def test_same_seed_same_weights_in_all_arms(data: Pixels) -> None:
    def weights(arm: str, norm: Norm | None) -> list[Tensor]:
        network = build(RECIPES[arm], norm, 5, 16, OPTIONS)
        return [parameter for parameter in network.parameters() if parameter.dim() > 1]

    first = weights("Inception", None)
    assert len(first) == 70
    for arm, norm in (("BN-Baseline", "torch"), ("BN-x30", "tritonbn"), ("BN-x5-Sigmoid", "tritonbn")):
        for one, other in zip(first, weights(arm, norm), strict=True):  # type: ignore[arg-type]
            assert torch.equal(one, other)


def test_large_images_get_the_original_stem() -> None:
    for side, stride in ((64, (1, 1)), (65, (2, 2))):
        first = build(RECIPES["BN-x5"], None, 0, side, OPTIONS).get_submodule("conv1.0.0")
        assert isinstance(first, nn.Conv2d)
        assert first.stride == stride


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("norm", ["torch", "tritonbn"])
def test_captured_step_is_the_eager_one(data: Pixels, norm: Norm) -> None:
    recipe = replace(RECIPES["BN-Baseline"], dropout=0.0)
    eager, graph = (Trainer(recipe, norm, 1, data, OPTIONS._replace(graph=graph)) for graph in (False, True))
    assert graph.graph is not None
    assert eager.graph is None
    assert graph.train(0, 4)[0] == pytest.approx(eager.train(0, 4)[0], rel=1e-2)
    assert_alike(moves(graph.network, recipe), moves(eager.network, recipe))
    counters = [tensor for name, tensor in graph.tensors().items() if name.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {4}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replays_draw_other_noise_and_follow_the_generator(data: Pixels) -> None:
    made = trainer("Inception", data, options=OPTIONS._replace(graph=True))
    state, chance = {name: tensor.clone() for name, tensor in made.tensors().items()}, made.chance()
    first = made.train(0, 1)[0]
    made.restore(state, made.chance())
    assert abs(made.train(0, 1)[0][0] - first[0]) > 1e-4
    made.restore(state, chance)
    assert made.train(0, 1)[0] == pytest.approx(first, rel=1e-4)
