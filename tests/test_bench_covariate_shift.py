"""`python -m bench study covariate-shift`: its measures against closed forms, the training unchanged, the command."""

import copy
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from rich.console import Console

from bench import drift, mnist, mnist_data, training
from bench.__main__ import main
from bench.study import landscape, watched
from bench.study.covariate_figures import DRIFT, SMOOTHNESS, Figure, figures
from bench.study.landscape import FACTORS
from tests import idx_files

pytestmark = pytest.mark.usefixtures("without_kernels")

RATE = 0.1
STEPS = 5
PARTS = ("none", "tritonbn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files.write(tmp_path_factory.mktemp("mnist"), idx_files.contents(train=150, test=40))


@pytest.fixture(scope="module")
def data(folder: Path) -> mnist_data.Mnist:
    return mnist_data.load(folder)


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short whole run with two seeds."""
    out = tmp_path_factory.mktemp("out")
    assert main(command(folder, out, "--seeds", "2")) == 0
    return out


def command(folder: Path, out: Path, *more: str) -> list[str]:
    options = ["--data", str(folder), "--steps", str(STEPS), "--seeds", "1", "--device", "cpu", "--out", str(out)]
    return ["study", "covariate-shift", *options, *more]


def test_landscape_of_a_quadratic_loss() -> None:
    """L = sum(a t^2) / 2 has the gradient a t; a step eta gives (1 - eta a) t and changes the gradient eta a^2 t."""
    a, b = torch.tensor([1.0, 3.0, 0.5]).double(), torch.tensor([[2.0], [4.0]]).double()
    t, u = torch.tensor([1.0, -2.0, 4.0]).double(), torch.tensor([[0.5], [-1.0]]).double()
    parameters = [t.clone().requires_grad_(), u.clone().requires_grad_()]

    def loss() -> Tensor:
        return ((a * parameters[0] ** 2).sum() + (b * parameters[1] ** 2).sum()) / 2

    found = landscape.landscape(loss, parameters, RATE)
    both, at = torch.cat([a, b[:, 0]]), torch.cat([t, u[:, 0]])
    along = [float((both * ((1 - eta * both) * at) ** 2).sum() / 2) for eta in (RATE * f for f in FACTORS)]
    length, bent = float((both * at).norm()), float((both**2 * at).norm())
    assert found.loss == pytest.approx(float((both * at**2).sum() / 2), rel=1e-12)
    assert found.gradient == pytest.approx(length, rel=1e-12)
    assert (found.loss_low, found.loss_high) == pytest.approx((min(along), max(along)), rel=1e-12)
    assert (found.change_low, found.change_high) == pytest.approx((0.05 * bent, 0.4 * bent), rel=1e-12)
    assert found.beta == pytest.approx(bent / length, rel=1e-12)
    assert torch.equal(parameters[0], t)
    assert torch.equal(parameters[1], u)


def test_beta_is_the_largest_over_the_steps() -> None:
    """L = t^3 / 3 at 1: over a step eta its gradient t^2 changes by 2 eta - eta^2, so that the shortest bends most."""
    t = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = landscape.landscape(lambda: (t**3).sum() / 3, [t], RATE)
    assert found.beta == pytest.approx(2 - RATE / 2, rel=1e-12)


def test_a_linear_loss_is_perfectly_smooth() -> None:
    t, slope = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.tensor([3.0, 0.0, 4.0]).double()
    found = landscape.landscape(lambda: (t * slope).sum(), [t], RATE)
    assert (found.change_high, found.beta) == (0, 0)
    assert found.loss_high - found.loss_low == pytest.approx(25 * RATE * (4 - 0.5))


def test_internal_shift_of_coupled_layers() -> None:
    """L = x y + y z: y's gradient, x + z, loses eta times that of x, then z's, which is y, eta times that of y."""
    values = [torch.tensor([v], dtype=torch.float64) for v in (1.0, 2.0, 3.0)]
    layers = [[v.clone().requires_grad_()] for v in values]
    (x,), (y,), (z,) = layers
    found = landscape.internal_shift(lambda: (x * y + y * z).sum(), layers, RATE)
    assert [shift.distance for shift in found] == pytest.approx([RATE * 2, RATE * (1 + 3)], rel=1e-12)
    assert [shift.cosine for shift in found] == pytest.approx([1, 1])
    assert all(torch.equal(layer, value) for (layer,), value in zip(layers, values, strict=True))


def test_internal_shift_turns_the_gradient() -> None:
    """L = sum(x y): y's gradient is x = (1, 0), and (1, 0) - eta (0, 10) = (1, -1) once x has moved against y."""
    x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, 0.0], [0.0, 10.0]))
    (found,) = landscape.internal_shift(lambda: (x * y).sum(), [[x], [y]], RATE)
    assert found == pytest.approx((1, math.sqrt(0.5)))


def test_wasserstein_distance() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()

    def between(a: Tensor, b: Tensor) -> list[float]:
        return watched.wasserstein(a.sort(0).values, b.sort(0).values).tolist()

    assert between(x, x[torch.randperm(50)]) == [0, 0, 0]
    assert between(x, x + torch.tensor([0.5, -2, 0])) == pytest.approx([0.5, 2, 0], abs=1e-12)
    assert between(x.abs(), 3 * x.abs()) == pytest.approx((2 * x.abs()).mean(0).tolist())


def test_drift_figures() -> None:
    """Medians over three units, of which the first moves by 1, 4 and 10, and widens from 1 to 2."""
    widths = torch.tensor([9.0, 1.0, 2.0]).view(3, 1)
    middles = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 4, 10]])
    percentiles = torch.stack([middles - widths / 2, middles, middles + widths / 2], dim=-1)
    found = drift.drift(percentiles, [100, 1000, 2000])  # the first does not count
    assert found == pytest.approx((4 / 1.5, 2, 1, 2))


def test_change_is_that_of_the_typical_unit_in_widths(data: mnist_data.Mnist) -> None:
    each = watched.Watched("none", 0, data)
    each.look()
    with torch.no_grad():
        first: Any = each.arm.network[0]
        first.bias += 3
    each.look()
    width = drift.width(each.percentiles[0][0])
    assert each.changes[0][0] == pytest.approx(float((3 / width).median()), rel=1e-4)
    assert each.changes[0][1] > 0


def test_the_order_of_the_images_is_no_change(data: mnist_data.Mnist) -> None:
    each = watched.Watched("tritonbn", 0, data)
    each.look()
    reverse = mnist_data.Split(data.train.images.flip(0), data.train.labels.flip(0))
    each.data = replace(data, train=reverse)
    each.look()
    assert each.changes[0] == pytest.approx([0, 0, 0], abs=1e-5)


def test_percentiles_are_of_every_sigmoid(data: mnist_data.Mnist) -> None:
    network = training.build("torch", 0).train()
    inputs = watched.sigmoid_inputs(copy.deepcopy(network), data.train.images)
    seen: list[Tensor] = []
    for layer in network:
        if isinstance(layer, nn.Sigmoid):
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(data.train.images)
    assert len(inputs) == 3
    torch.testing.assert_close(inputs, seen)
    assert [len(layer) for layer in watched.layers_of(network)] == [3, 3, 3, 2]


def test_looking_changes_no_bit_of_the_training(data: mnist_data.Mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    train = training.Arm.train

    def note(arm: training.Arm, *given: Any) -> list[Tensor]:
        losses = train(arm, *given)
        kept = seen.setdefault(arm.name, ([], arm))
        kept[0].extend(losses)
        return losses

    monkeypatch.setattr(training.Arm, "train", note)
    watched.watch(data, 3, STEPS, PARTS, lambda arm, count, loss: None)
    for name, (losses, arm) in seen.items():
        alone = training.Arm(name, 3, torch.device("cpu"))
        batches = training.shuffled(len(data.train), 3)
        expected = train(alone, data.train, [next(batches) for _ in range(STEPS)])
        assert len(losses) == STEPS
        assert torch.equal(torch.stack(losses), torch.stack(expected))
        torch.testing.assert_close(arm.network.state_dict(), alone.network.state_dict(), rtol=0, atol=0)
    assert seen.keys() == set(PARTS)


def test_looking_draws_no_random_number(data: mnist_data.Mnist) -> None:
    each = watched.Watched("tritonbn", 0, data)
    random = torch.get_rng_state()
    each.look()
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("steps", "last", "count"), [(1, 1, 2), (100, 100, 101), (250, 250, 126), (10_050, 10_000, 101)]
)
def test_moments(steps: int, last: int, count: int) -> None:
    times = watched.moments(steps)
    assert (times[0], times[-1], len(times)) == (0, last, count)
    assert len({b - a for a, b in zip(times, times[1:], strict=False)}) == 1  # noqa: RUF007
    assert sum(length for length, _ in watched.parts(steps)) == steps
    assert sum(look for _, look in watched.parts(steps)) == count


@pytest.mark.parametrize(
    ("without", "with_bn", "verdict"),
    [
        ([4, 6], [1, 3], "2.5 times less"),
        ([1, 3], [4, 6], "2.5 times more"),
        ([1, 3], [2, 6], "seeds overlap"),
        ([1, math.nan], [2, 6], "not finite"),
        ([1, 2], [0, 0], "nan times less"),
    ],
)
def test_verdict(without: list[float], with_bn: list[float], verdict: str) -> None:
    assert Figure("", "", "", without, with_bn).verdict == verdict


def test_figures_are_medians_of_what_counts(results: Path) -> None:
    rows = json.loads((results / "study-covariate-shift.json").read_text())["arms"]
    early, late = (f"{SMOOTHNESS}{when}" for when in (", first 1,000 steps", ", from step 1,000 on"))
    for row in rows:
        row["moments"] = [0, 400, 800, 1200, 1600, 2000]
        row["landscape"]["loss_low"], row["landscape"]["loss_high"] = [0.0] * 6, [9.0, 7, 8, 1, 2, 4 + row["seed"]]
    found = {(figure.explanation, figure.name): figure for figure in figures(rows)}
    assert found[early, "variation of the loss along the gradient"].without == [8, 8]
    assert found[late, "variation of the loss along the gradient"].without == [2, 2]
    change = rows[0]["layers"][2]["change"]
    assert found[DRIFT, "change in 400 steps, last hidden layer"].without[0] == sorted(change[3:])[1]
    assert [explanation for explanation, _ in found] == [DRIFT] * 9 + [early] * 7 + [late] * 7


def test_a_short_run_is_looked_at_as_a_whole(results: Path) -> None:
    rows = json.loads((results / "study-covariate-shift.json").read_text())["arms"]
    found = {figure.name: figure for figure in figures(rows)}
    assert {figure.explanation for figure in found.values()} == {DRIFT, SMOOTHNESS}
    beta = sorted(rows[0]["landscape"]["beta"])
    assert found["effective beta-smoothness"].without[0] == pytest.approx((beta[2] + beta[3]) / 2)


def test_json_says_everything(results: Path) -> None:
    content = json.loads((results / "study-covariate-shift.json").read_text())
    assert {"device", "torch", "commit"} <= content["machine"].keys()
    assert content["settings"]["norm"] == "tritonbn"
    assert content["settings"]["step_sizes"] == list(FACTORS)
    assert [(row["arm"], row["seed"]) for row in content["arms"]] == [(arm, seed) for seed in (0, 1) for arm in PARTS]
    for row in content["arms"]:
        assert row["moments"] == list(range(STEPS + 1))
        assert [len(layer["percentiles"]) for layer in row["layers"]] == [STEPS + 1] * 3
        assert all(len(values) == STEPS + 1 for values in row["landscape"].values())
        assert [len(layers) for layers in row["internal_shift"]["cosine"]] == [3] * (STEPS + 1)
        assert all(
            low <= high for low, high in zip(row["landscape"]["loss_low"], row["landscape"]["loss_high"], strict=True)
        )
    first = [row["landscape"]["loss"][0] for row in content["arms"]]
    assert first[0] != first[2], "the seeds look at different batches and weights"
    assert sorted(path.name for path in results.iterdir()) == [
        "study-covariate-shift.json",
        "study-covariate-shift.png",
    ]
    assert (results / "study-covariate-shift.png").read_bytes().startswith(b"\x89PNG")


def test_torch_instead_of_ours(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, tmp_path, "--norm", "torch")) == 0
    said = capsys.readouterr().out
    assert "\nbatch norm:     nn.BatchNorm1d\n" in said
    assert "idx files other than the original MNIST, 5 steps, 1 seed" in said
    content = json.loads((tmp_path / "study-covariate-shift.json").read_text())
    for figure in content["figures"]:  # whole lines, also where nobody knows how wide the terminal is
        (line,) = [line for line in said.splitlines() if line.startswith(f"{figure['name']} ")]
        assert line.endswith(figure["verdict"])
    assert [row["arm"] for row in content["arms"]] == ["none", "torch"]
    assert content["batch_norm_path"] == "nn.BatchNorm1d"


def test_bars_in_a_terminal(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=150, markup=False, highlight=False)
    monkeypatch.setattr(mnist, "console", terminal)
    assert main(command(folder, tmp_path)) == 0
    assert isinstance(terminal.file, io.StringIO)
    said = terminal.file.getvalue()
    assert "0/5" in said
    assert "5/5" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data", "nowhere"), "nowhere: expected a folder, got nothing"),
        (("--out", __file__), f"{__file__}: expected a folder, got a file"),
        (("--device", "cuda:99"), "--device cuda:99: not available"),
    ],
)
def test_wrong_option_is_named_before_training(
    folder: Path, tmp_path: Path, more: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_norm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "covariate-shift", "--norm", "layer"])
    assert stop.value.code == 2
    assert "invalid choice: 'layer'" in capsys.readouterr().err
