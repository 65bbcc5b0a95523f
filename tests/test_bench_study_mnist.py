"""`python -m bench study mnist`: bands both ways, what is said of a run, and seeds that are not trained twice."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from matplotlib.figure import Figure

from bench import mnist_data, training
from bench.__main__ import main
from bench.study import expected, kept, mnist_picture, mnist_words
from bench.training import ARMS, Row
from tests import idx_files
from tritonbn import launch

pytestmark = pytest.mark.usefixtures("without_kernels")

STEPS = 110


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files.write(tmp_path_factory.mktemp("mnist"), idx_files.contents(train=300, test=50))


def command(folder: Path, out: Path, *more: str) -> list[str]:
    options = ["--data", str(folder), "--steps", str(STEPS), "--seeds", "1", "--device", "cpu", "--out", str(out)]
    return ["study", "mnist", *options, *more]


def trained(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """The seeds that are trained from now on; the run is interrupted at one of them."""
    seeds: list[int] = []
    real = training.train_arms

    def note(data: Any, seed: int, *given: Any) -> list[Row]:
        if seed == stop_at:
            raise KeyboardInterrupt
        seeds.append(seed)
        return real(data, seed, *given)

    monkeypatch.setattr(training, "train_arms", note)
    return seeds


def row(arm: str, seed: int, *, curve: dict[int, float]) -> Row:
    """A row with this curve, as of a full run."""
    final = curve[max(curve)]
    made = {
        "arm": arm, "seed": seed, "steps": max(curve), "test_accuracy": final, "steps_to_90": 500 + seed,
        "curve": [[step, percent] for step, percent in sorted(curve.items())],
        "drift": {"shift": 1.0, "growth": 2.0, "width_first": 3.0, "width_last": 4.0},
    }  # fmt: skip
    return cast(Row, made)


CURVES = {
    "none": {1_000: 50.0, 4_500: 90.0, 5_000: 90.5, 10_000: 94.0, 12_000: 95.0, 50_000: 96.9},
    "torch": {700: 90.0, 1_000: 91.0, 5_000: 94.0, 6_500: 95.0, 10_000: 96.0, 50_000: 97.4},
}
CURVES["tritonbn"] = CURVES["torch"]


def as_expected(seeds: int = 3, **other: dict[int, float]) -> list[Row]:
    """Rows in the middle of every band, but for points of some arms."""
    return [row(arm, seed, curve=CURVES[arm] | other.get(arm, {})) for seed in range(seeds) for arm in ARMS]


def outside(rows: list[Row]) -> list[tuple[str, str]]:
    return [(finding.what, finding.arm) for finding in expected.check(rows) if not finding.inside]


def test_a_run_as_expected_is_inside() -> None:
    found = expected.check(as_expected())
    assert len(found) == 3 * (4 + 2) + 2
    assert outside(as_expected()) == []
    assert [finding.seen for finding in found][-2:] == [[pytest.approx(0.5)]] * 2


@pytest.mark.parametrize(
    ("arm", "points", "what"),
    [
        ("none", {1_000: 34.9}, {"accuracy at 1,000"}),
        ("none", {1_000: 68.1}, {"accuracy at 1,000"}),
        ("torch", {5_000: 93.2}, {"accuracy at 5,000"}),
        ("tritonbn", {10_000: 96.8}, {"accuracy at 10,000"}),
        ("torch", {50_000: 97.81}, {"accuracy at 50,000", "gain at 50,000, mean of 3 seeds"}),
        ("tritonbn", {50_000: 97.1}, {"gain at 50,000, mean of 3 seeds"}),
        ("none", {4_500: 0, 5_000: 89.8}, {"first with 90%"}),
        ("torch", {700: 89.0, 1_000: 89.9}, {"first with 90%"}),
        ("tritonbn", {4_000: 95.1}, {"first with 95%"}),
        ("none", {1_000: float("nan")}, {"accuracy at 1,000"}),
    ],
)
def test_each_band_can_be_missed(arm: str, points: dict[int, float], what: set[str]) -> None:
    rows = as_expected(3, **{arm: points})
    assert {(found, who) for found, who in outside(rows)} == {(each, arm) for each in what}


def test_one_seed_outside_is_enough_and_never_is_outside() -> None:
    rows = as_expected()
    rows[4] = row("torch", 1, curve=CURVES["torch"] | {1_000: 92.1})
    assert outside(rows) == [("accuracy at 1,000", "torch")]
    rows[4] = row("torch", 1, curve=dict.fromkeys(CURVES["torch"], 89.0))
    assert ("first with 90%", "torch") in outside(rows)


def test_gain_needs_three_seeds() -> None:
    assert not [finding for finding in expected.check(as_expected(seeds=2)) if finding.unit == "points"]


@pytest.mark.parametrize(
    ("data", "steps", "reason"),
    [
        ("MNIST", 50_000, ""),
        ("scikit-learn's digits", 50_000, "the values expected are for MNIST, not for scikit-learn's digits"),
        ("MNIST", 20_000, "the values expected are for 50,000 steps, not for 20,000"),
    ],
)
def test_nothing_is_expected_of_other_data_and_lengths(data: str, steps: int, reason: str) -> None:
    assert expected.inapplicable([row("none", 0, curve={steps: 90.0})], data) == reason


def test_findings_in_words() -> None:
    lines = list(mnist_words.finding_lines(expected.check(as_expected(torch={1_000: 92.5}))))
    assert lines[0] == ["accuracy at 1,000", "no batch norm", "50.00 (50.00-50.00)", "35.00-68.00 %", "yes"]
    assert lines[6] == ["accuracy at 1,000", "nn.BatchNorm1d", "92.50 (92.50-92.50)", "89.50-92.00 %", "NO"]
    assert lines[10] == ["first with 90%", "nn.BatchNorm1d", "700 (700-700)", "step 500-1,000", "yes"]


def test_notes_hold_what_was_seen() -> None:
    first, second, third = mnist_words.notes(as_expected())
    assert "501 (500-502) without batch norm" in first
    assert "+0.50 points" in first
    assert "depends on the setting" in second
    assert "more stable, not constant" in third
    assert "1805.11604" in third


def test_bands_decide_the_exit_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "DATA", "idx files other than the original MNIST")
    monkeypatch.setattr(expected, "STEPS", STEPS)
    monkeypatch.setattr(expected, "ARRIVAL", {})
    anything = (0, 100)
    monkeypatch.setattr(expected, "ACCURACY", {100: (anything, anything)})
    assert main(command(folder, tmp_path)) == 0
    monkeypatch.setattr(expected, "ACCURACY", {100: (anything, (101, 102))})
    assert main(command(folder, tmp_path)) == 1
    content = json.loads((tmp_path / "study-mnist.json").read_text())
    assert [finding["inside"] for finding in content["expected"]["findings"]] == [True, False, False]


def test_run_says_what_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, tmp_path)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Not compared: the values expected are for MNIST, not for idx files other than the original MNIST." in said
    assert "this checks the swap, not our kernels" in said
    assert "growth: largest width / smallest" in said
    content = json.loads((tmp_path / "study-mnist.json").read_text())
    assert content["expected"] == {
        "not_applicable": "the values expected are for MNIST, not for idx files other than the original MNIST",
        "findings": [],
    }
    assert content["settings"]["steps"] == STEPS
    assert [machine["seed"] for machine in content["machines"]] == [0]
    assert [each["arm"] for each in content["arms"]] == list(ARMS)
    assert (tmp_path / "study-mnist.png").read_bytes().startswith(b"\x89PNG")


def test_finished_seeds_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert trained(patch, stop_at=1) == []
        assert main(command(folder, tmp_path, "--seeds", "3")) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["study-mnist"]
    assert [path.name for path in (tmp_path / "study-mnist").iterdir()] == ["seed-0.json"]
    seeds = trained(monkeypatch)
    assert main(command(folder, tmp_path, "--seeds", "3")) == 0
    assert seeds == [1, 2]
    unbroken = tmp_path / "unbroken"
    assert main(command(folder, unbroken, "--seeds", "3")) == 0
    parts, whole = (json.loads((out / "study-mnist.json").read_text())["arms"] for out in (tmp_path, unbroken))
    for name in ("arm", "seed", "curve", "first_losses", "percentiles", "drift"):
        assert [each[name] for each in parts] == [each[name] for each in whole]
    assert f"from {tmp_path / 'study-mnist' / 'seed-0.json'}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "90"), "kept by a run with steps 110 instead of 90: expected the same settings"),
        (("--data", "other"), "kept by a run with data_sha256 '"),
    ],
)
def test_other_settings_are_refused(
    folder: Path, tmp_path: Path, more: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(command(folder, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "study-mnist.json").read_bytes()
    idx_files.write(tmp_path / "other", idx_files.contents(train=301, test=50))
    monkeypatch.chdir(tmp_path)
    seeds = trained(monkeypatch)
    assert main(command(folder, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert seeds == []
    assert (tmp_path / "out" / "study-mnist.json").read_bytes() == before


def test_other_kernels_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the results would say that kernels ran, of seeds without them."""
    assert main(command(folder, tmp_path)) == 0
    monkeypatch.setattr(launch, "INTERPRETED", not launch.INTERPRETED)
    seeds = trained(monkeypatch)
    assert main(command(folder, tmp_path)) == 2
    assert "kept by a run with batch_norm_path 'ATen reference (CPU tensors)' instead" in capsys.readouterr().err
    assert seeds == []


@pytest.mark.parametrize("text", ["", "[]", '{"identity": {}}', '{"identity": 3, "result": {}}'])
def test_broken_file_is_named(folder: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study-mnist" / "seed-0.json"
    path.parent.mkdir()
    path.write_text(text)
    assert main(command(folder, tmp_path)) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == text


def test_one_pixel_or_label_is_other_data(folder: Path) -> None:
    digests = set()
    for part in ("", "images", "labels"):
        data = mnist_data.load(folder)
        if part:
            getattr(data.test, part)[-1] = 1 - getattr(data.test, part)[-1]
        digests.add(kept.digest(data))
    assert len(digests) == 3


def test_what_is_kept_is_what_was_written(tmp_path: Path) -> None:
    path, result = tmp_path / "deeper" / "a.json", {"loss": [0.1, float("inf")]}
    assert kept.read(path, {"steps": 1}) is None
    kept.write(path, {"steps": 1}, result)
    assert kept.read(path, {"steps": 1}) == result


def test_picture_has_means_bands_and_the_target() -> None:
    rows = as_expected(seeds=2)
    rows[3] = row("none", 1, curve={step: percent - 1 for step, percent in CURVES["none"].items()})
    axes = Figure().subplots()
    mnist_picture.accuracy_panel(axes, rows)
    target, *lines = axes.lines
    assert list(np.asarray(target.get_ydata())) == [90, 90]
    assert len(lines) == 3 * (2 + 1)
    mean = np.asarray(lines[2].get_ydata())
    np.testing.assert_allclose(mean, np.array(list(CURVES["none"].values())) - 0.5)
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (49, 96.9)
