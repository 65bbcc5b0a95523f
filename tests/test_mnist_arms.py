"""The arms of the MNIST benchmark: the network, the training, and the check of one arm by another."""

from typing import Any, cast

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")

import tritonbn
from bench import agreement, mnist_data, training
from bench.networks.mlp import last_sigmoid_input, mnist_mlp
from tests import idx_files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> mnist_data.Mnist:
    return mnist_data.load(idx_files.write(tmp_path_factory.mktemp("mnist"), idx_files.contents(train=120, test=40)))


@pytest.mark.parametrize(("batch_norm", "parameters"), [(False, 99_710), (True, 100_010)])
def test_network_is_the_papers(batch_norm: bool, parameters: int) -> None:
    network = mnist_mlp(seed=0, batch_norm=batch_norm)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    kinds = [nn.Linear, *[nn.BatchNorm1d] * batch_norm, nn.Sigmoid] * 3 + [nn.Linear]
    assert [type(layer) for layer in network] == kinds
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linears] == [784, 100, 100, 100]
    assert [layer.bias is None for layer in linears] == [batch_norm] * 3 + [False]
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.1, rel=0.1)
        assert linear.bias is None or not linear.bias.any()
    norms = [layer for layer in network if isinstance(layer, nn.BatchNorm1d)]
    assert {(norm.eps, norm.momentum, norm.num_features) for norm in norms} <= {(1e-5, 0.1, 100)}


def linear_weights(network: nn.Sequential) -> list[torch.Tensor]:
    return [layer.weight for layer in network if isinstance(layer, nn.Linear)]


def test_arms_start_from_the_same_weights() -> None:
    networks = {arm: training.build(arm, seed=3) for arm in training.ARMS}
    weights = {arm: linear_weights(network) for arm, network in networks.items()}
    for arm in training.ARMS:
        assert all(map(torch.equal, weights[arm], weights["none"]))
    assert not torch.equal(weights["none"][0], linear_weights(training.build("none", seed=4))[0])
    kinds = {arm: {type(layer) for layer in networks[arm]} for arm in training.ARMS}
    assert nn.BatchNorm1d in kinds["torch"]
    assert tritonbn.BatchNorm1d in kinds["tritonbn"]
    assert nn.BatchNorm1d not in kinds["tritonbn"]


def test_batches_are_epochs_without_repetition() -> None:
    batches = training.shuffled(150, seed=0)
    epochs = [torch.cat([next(batches), next(batches)]) for _ in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 120
    assert not torch.equal(*epochs)
    assert torch.equal(next(training.shuffled(150, seed=0)), epochs[0][:60])


def test_evaluation_steps() -> None:
    assert training.evaluation_steps(50) == [50]
    assert training.evaluation_steps(250) == [100, 200, 250]
    assert training.evaluation_steps(3000)[18:] == [1900, 2000, 2500, 3000]
    assert len(training.evaluation_steps(50_000)) == 20 + 96


@pytest.mark.parametrize("arm", training.ARMS)
def test_looking_changes_nothing(arm: str, data: mnist_data.Mnist) -> None:
    network = training.build(arm, seed=0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    percentiles = training.probe(network, data.train.images)
    training.accuracy(network, data.test)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    inputs = last_sigmoid_input(network)(data.train.images)
    assert percentiles.shape == (100, 3)
    torch.testing.assert_close(percentiles[:, 1], inputs.quantile(0.5, dim=0).detach())
    torch.testing.assert_close(percentiles[:, 2], inputs.quantile(0.85, dim=0).detach())


def test_warm_up_changes_nothing(data: mnist_data.Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WARM_UP", 1)
    arm = training.Arm("tritonbn", seed=0, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in arm.network.state_dict().items()}
    training.warm_up(arm, data.train)
    assert all(torch.equal(value, before[name]) for name, value in arm.network.state_dict().items())


def test_typical_unit_has_the_median_shift() -> None:
    median = torch.tensor([[9.0, 9.0, 9.0], [0.0, 0.0, 0.0], [0.1, 5.0, 0.4]])  # [times, units]
    percentiles = torch.stack([median - 1, median, median + 1], dim=-1)
    assert training.typical_unit(percentiles, [100, 1000, 1500]) == 2


def row(arm: str, **changes: Any) -> training.Row:
    values = {
        "arm": arm,
        "seed": 0,
        "steps": 300,
        "first_losses": [2.0, 1.0],
        "test_accuracy": 95.0,
        "curve": [[100, 80.0], [200, 91.0], [300, 95.0]],
        "steps_to_90": 200,
    }
    return cast(training.Row, values | changes)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        pytest.param({}, [True, True, True], id="equal"),
        pytest.param({"first_losses": [2.0, 1.00009]}, [True, True, True], id="loss-within"),
        pytest.param({"first_losses": [2.0, 1.0002]}, [False, True, True], id="loss-apart"),
        pytest.param({"first_losses": [float("nan"), 1.0]}, [False, True, True], id="loss-nan"),
        pytest.param({"test_accuracy": 95.4}, [True, True, True], id="accuracy-within"),
        pytest.param({"test_accuracy": 94.4}, [True, False, True], id="accuracy-apart"),
        pytest.param({"steps_to_90": 300}, [True, True, True], id="next-evaluation"),
        pytest.param({"steps_to_90": None}, [True, True, False], id="never"),
    ],
)
def test_check_can_fail(changes: dict[str, Any], passed: list[bool]) -> None:
    findings = agreement.check([row("none"), row("torch"), row("tritonbn", **changes)])
    assert [finding.passed for finding in findings] == passed


def test_check_wants_every_seed() -> None:
    rows = [row(arm, seed=seed) for seed in range(3) for arm in training.ARMS]
    rows[-1]["test_accuracy"] = 90.0
    assert [finding.passed for finding in agreement.check(rows)] == [True, False, True]
