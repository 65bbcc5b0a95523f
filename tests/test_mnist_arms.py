"""The arms of the MNIST benchmark: the network, the training, and the check of one arm by another."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")

import tritonbn
from bench import agreement, drift, mnist_data, mnist_tables, training
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


def linear_weights(network: nn.Sequential) -> list[Tensor]:
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
    points = torch.tensor([0.15, 0.5, 0.85])
    torch.testing.assert_close(percentiles, inputs.quantile(points, dim=0).T.detach())


def test_warm_up_changes_nothing(data: mnist_data.Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WARM_UP", 1)
    arm = training.Arm("tritonbn", seed=0, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in arm.network.state_dict().items()}
    training.warm_up(arm, data.train)
    assert all(torch.equal(value, before[name]) for name, value in arm.network.state_dict().items())


class Event(NamedTuple):
    """One act of an arm in training."""

    act: str
    arm: str
    inside_the_clock: bool
    data: mnist_data.Split
    batches: Sequence[Tensor] = ()


def watched(data: mnist_data.Mnist, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What `train_arms` does in 600 steps: six blocks. Nothing is computed."""
    events: list[Event] = []
    clock: list[str] = []

    def timed(work: Callable[[], list[Tensor]], _: torch.device) -> tuple[list[Tensor], float]:
        clock.append("runs")
        return work(), float(len(clock.pop()))

    def train(arm: training.Arm, split: mnist_data.Split, batches: Sequence[Tensor]) -> list[Tensor]:
        events.append(Event("train", arm.name, bool(clock), split, batches))
        return [torch.tensor(1.0)]

    def accuracy(_: nn.Module, split: mnist_data.Split) -> float:
        events.append(Event("accuracy", events[-1].arm, bool(clock), split))
        return 50.0

    def probe(_: nn.Module, images: Tensor) -> Tensor:
        events.append(Event("probe", events[-1].arm, bool(clock), data.train))
        return torch.rand(100, 3)

    for name, replacement in {"timed": timed, "accuracy": accuracy, "probe": probe}.items():
        monkeypatch.setattr(training, name, replacement)
    monkeypatch.setattr(training.Arm, "train", train)
    training.train_arms(data, seed, 600, lambda *_: None)
    return events


def test_arms_are_treated_alike(data: mnist_data.Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    events = watched(data, 0, monkeypatch)
    warm_ups, blocks = events[:3], events[3:]
    assert [(each.act, each.arm, each.inside_the_clock) for each in warm_ups] == [
        ("train", arm, False) for arm in training.ARMS
    ]
    assert [len(each.batches) for each in warm_ups] == [10] * 3

    assert [each.act for each in blocks] == ["train", "accuracy", "probe"] * 18
    assert all(each.inside_the_clock == (each.act == "train") for each in blocks)
    assert all(each.data is (data.test if each.act == "accuracy" else data.train) for each in blocks)
    trained = [each for each in blocks if each.act == "train"]
    orders = [tuple(each.arm for each in trained[at : at + 3]) for at in range(0, 18, 3)]
    assert sorted(orders) == sorted(itertools.permutations(training.ARMS))
    expected = training.shuffled(len(data.train), 0)
    for at in range(0, 18, 3):
        batches = list(itertools.islice(expected, 100))
        for each in trained[at : at + 3]:
            assert len(each.batches) == 100
            assert all(map(torch.equal, each.batches, batches))

    others = [each for each in watched(data, 1, monkeypatch) if each.inside_the_clock]
    assert not torch.equal(others[0].batches[0], trained[0].batches[0])


def test_optimizer_is_the_papers() -> None:
    optimizer = training.Arm("none", seed=0, device=torch.device("cpu")).optimizer
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert [group[name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0, 0]


def finished(name: str, seed: int, seconds: list[float], accuracies: list[float]) -> training.Arm:
    """An arm as if it had been trained; percentiles -1, 0, 1."""
    arm = training.Arm(name, seed, torch.device("cpu"))
    arm.seconds, arm.accuracies, arm.first_losses = seconds, accuracies, [2.0]
    arm.percentiles = [torch.tensor([[-1.0, 0.0, 1.0]]).repeat(100, 1)] * len(seconds)
    return arm


def hand_made(seeds: int) -> list[training.Row]:
    """400 steps: nn.BatchNorm1d takes twice the time of no batch norm, tritonbn half; seed 1 is the worse one."""
    rows = []
    for seed in range(seeds):
        none = finished("none", seed, [1.0, 1.0, 1.0, 1.0 + 4 * seed], [10.0, 20.0, 30.0, 40.0 - 10 * seed])
        theirs = finished("torch", seed, [2 * value for value in none.seconds], [80.0, 89.99, 90.0, 96.0])
        ours = finished("tritonbn", seed, [value / 2 for value in none.seconds], [80.0, 95.0 - 5.5 * seed, 95.0, 97.0])
        rows += [training.row(arm, none, [100, 200, 300, 400]) for arm in (none, theirs, ours)]
    return rows


def test_row_by_hand() -> None:
    none, theirs, ours = hand_made(1)
    assert [each["step_time_to_none"] for each in (none, theirs, ours)] == [[1.0] * 4, [2.0] * 4, [0.5] * 4]
    assert theirs["step_time_to_none_quartiles"] == [2, 2, 2]
    assert [each["steps_to_90"] for each in (none, theirs, ours)] == [None, 300, 200]
    assert (theirs["seconds"], theirs["steps_per_second"], theirs["images_per_second"]) == (8, 50, 3000)
    assert (theirs["test_accuracy"], theirs["curve"][1]) == (96, [200, 89.99])
    assert ours["percentiles"][0] == [100, -1, 0, 1]


COLUMNS = ["arm", "steps/s", "images/s", "step time\n/ no BN", "test\naccuracy", "steps\nto 90%"]
ONE_SEED = [
    ["no batch norm", "100", "6,000", "1", "40.00%", "never"],
    ["nn.BatchNorm1d", "50", "3,000", "2.00 (2.00-2.00)", "96.00%", "300"],
    ["tritonbn", "200", "12,000", "0.50 (0.50-0.50)", "97.00%", "200"],
]
TWO_SEEDS = [
    ["no batch norm", "75\n(50-100)", "4,500", "1", "35.00%\n(30.00-40.00)", "never"],
    ["nn.BatchNorm1d", "38\n(25-50)", "2,250", "2.00\n(2.00-2.00)", "96.00%\n(96.00-96.00)", "300\n(300-300)"],
    ["tritonbn", "150\n(100-200)", "9,000", "0.50\n(0.50-0.50)", "97.00%\n(97.00-97.00)", "250\n(200-300)"],
]


@pytest.mark.parametrize("cells", [ONE_SEED, TWO_SEEDS], ids=["1", "2"])
def test_table_by_hand(cells: list[list[str]]) -> None:
    seeds = 1 if cells is ONE_SEED else 2
    table = mnist_tables.summary(hand_made(seeds), "Digits")
    assert table.title == ("Digits, 400 steps, 1 seed" if seeds == 1 else "Digits, 400 steps, 2 seeds: mean (range)")
    assert [column.header for column in table.columns] == COLUMNS
    assert [list(line) for line in zip(*(column.cells for column in table.columns), strict=True)] == cells


def test_typical_unit_has_the_median_shift() -> None:
    median = torch.tensor([[9.0, 9.0, 9.0], [0.0, 0.0, 0.0], [0.1, 5.0, 0.4]])  # [times, units]
    percentiles = torch.stack([median - 1, median, median + 1], dim=-1)
    assert drift.typical_unit(percentiles, [100, 1000, 1500]) == 2


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
        pytest.param({"steps_to_90": None}, [True, True, False], id="one-never"),
    ],
)
def test_check_can_fail(changes: dict[str, Any], passed: list[bool]) -> None:
    findings = agreement.check([row("none"), row("torch"), row("tritonbn", **changes)])
    assert [finding.passed for finding in findings] == passed


def test_check_wants_every_seed() -> None:
    rows = [row(arm, seed=seed) for seed in range(3) for arm in training.ARMS]
    rows[-1]["test_accuracy"] = 90.0
    assert [finding.passed for finding in agreement.check(rows)] == [True, False, True]


def test_never_is_no_agreement() -> None:
    never = [row(arm, steps=1, steps_to_90=None) for arm in training.ARMS]
    findings = agreement.check(never)
    assert [(finding.passed, finding.seen) for finding in findings] == [(True, [0]), (True, [0]), (None, [None])]
    assert "first step" in findings[0].what.split(", ")
    shown = [list(column.cells)[-1] for column in mnist_tables.agreement(findings, kernels_compared=True).columns]
    assert shown[2:] == ["-", "neither arrived"]
    (arrival,) = agreement.check([*never, *(row(arm, seed=1, steps=1) for arm in training.ARMS)])[2:]
    assert (arrival.passed, arrival.seen) == (True, [None, 0])
