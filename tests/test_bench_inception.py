"""`python -m bench study inception`: what it prints and writes, and how it ends."""

import io
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from rich.console import Console

import tritonbn
from bench.__main__ import main
from bench.cudnn import cudnn
from bench.study import inception_progress, inception_runs, trainer
from bench.study.inception_runs import Row
from tests import image_folders

pytestmark = pytest.mark.usefixtures("without_kernels")

STEPS, BATCH = 12, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folders.write(tmp_path_factory.mktemp("images"))


def command(folder: Path, out: Path, *more: str) -> list[str]:
    small = ["--width", "0.05", "--image", "16", "--batch", str(BATCH), "--threads", "1", "--device", "cpu"]
    run = ["--steps", str(STEPS), "--evaluate", "5", "--seeds", "1", "--out", str(out)]
    return ["study", "inception", "--data", str(folder), *small, *run, *more]


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole short run of the paper's five arms; ours and torch's batch norm; a file that is no image."""
    root = tmp_path_factory.mktemp("damaged") / "colours"
    shutil.copytree(folder, root)
    (root / "train" / "red" / "zzz.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more than a beginning")
    out = tmp_path_factory.mktemp("out") / "deeper"
    assert main(command(root, out, "--norm", "torch", "--norm", "tritonbn")) == 0
    return out


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "study-inception.json").read_text())
    return found


def test_json_says_everything(results: Path) -> None:
    found = content(results)
    assert {"device", "cpu", "threads", "python", "torch", "triton", "tritonbn", "commit"} <= found["machine"].keys()
    assert found["machine"]["device"] == "CPU"
    settings = found["settings"]
    expected = {"steps": STEPS, "evaluate": 5, "checkpoint": None, "width": 0.05, "dtype": "fp32", "graph": False}
    assert {name: settings[name] for name in expected} == expected
    assert settings["recipes"]["BN-x30"]["learning_rate"] == 30 * settings["recipes"]["Inception"]["learning_rate"]
    assert settings["same_data"] is False
    data = found["data"]
    assert (data["train"], data["val"], data["classes"]) == (48, 24, ["blue", "green", "red"])
    assert len(data["skipped"]) == 1
    assert "zzz.jpg" in data["skipped"][0]
    runs = found["runs"]
    arms = ("BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid")
    expected_runs = [("Inception", None), *((arm, norm) for arm in arms for norm in ("torch", "tritonbn"))]
    assert [(row["arm"], row["norm"]) for row in runs] == expected_runs
    for row in runs:
        assert row.keys() == Row.__annotations__.keys()
        assert [point["step"] for point in row["curve"]] == [5, 10, STEPS]
        assert [point["seconds"] for point in row["curve"]][-1] == row["seconds"] > 0
        assert len(row["ms_per_step"]) == 3
        assert all(0 <= point["accuracy"] <= 100 and point["top5"] is None for point in row["curve"])
    assert "Inception-x5" in settings["recipes"]


def test_statistics_agree_where_they_must(results: Path) -> None:
    """Folded, the network gives the same answers; without batch norm there is nothing to fold."""
    for row in content(results)["runs"]:
        found = row["inference"]
        if row["arm"] == "Inception":
            assert found is None
            continue
        assert (found["same_answers"], found["batches"]) == (100, STEPS)
        assert found["folded"] == found["population"]


def test_arms_learn_and_both_batch_norms_start_alike(results: Path) -> None:
    rows = {(row["arm"], row["norm"]): row for row in content(results)["runs"]}
    first = [rows["BN-Baseline", norm]["curve"][0]["loss"] for norm in ("torch", "tritonbn")]
    assert first[0] == pytest.approx(first[1], rel=1e-2)
    assert first[0] != rows["Inception", None]["curve"][0]["loss"]


def test_only_results_are_left(results: Path) -> None:
    assert sorted(path.name for path in results.iterdir()) == ["runs", "study-inception.json", "study-inception.png"]
    assert (results / "study-inception.png").read_bytes().startswith(b"\x89PNG")
    assert not list(results.rglob(".*"))


def test_same_results_on_the_page(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "cpu", ignore=shutil.ignore_patterns("runs"))
    assert main(["report", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    found = content(results)
    data = f"colours, 16x16, {found['data']['train']} training and {found['data']['val']} validation images"
    assert f"{data}; 12 steps, 1 seed; fp32 on a CPU, network of width 0.05." in text
    assert "Left out, as it cannot be read: 1 file." in text
    assert "![accuracy over steps and over seconds](cpu/study-inception.png)" in text
    assert f"| cpu/study-inception.json | `{found['command']}` |" in text
    line = next(line for line in text.splitlines() if line.startswith("| BN-x5, tritonbn |"))
    (ours,) = [one for one in found["lines"] if (one["arm"], one["norm"]) == ("BN-x5", "tritonbn")]
    assert f"| {ours['best'][0]:.2f}% | {ours['best_step'][0]} |" in line
    assert "| BN-x5, tritonbn | 14.8x fewer steps, the fewest |" in text
    assert "Operators" not in text


def test_command_in_the_file_repeats_it(folder: Path, tmp_path: Path) -> None:
    more = ["--arm", "BN-x5", "--without", "decay", "--lr", "0.01", "--same-data", "--dtype", "bf16", "--steps", "2"]
    assert main(command(folder, tmp_path / "a", *more)) == 0
    first = content(tmp_path / "a")
    words = first["command"].split()[3:]
    words[words.index("DIR")] = str(folder)
    assert main([*words, "--out", str(tmp_path / "b"), "--threads", "1", "--device", "cpu"]) == 0
    second = content(tmp_path / "b")
    assert first["settings"] == second["settings"]
    assert first["settings"]["recipes"]["BN-x5"]["decay"] == first["settings"]["recipes"]["Inception"]["decay"]
    assert first["settings"]["same_data"] is True
    losses = [[point["loss"] for point in found["runs"][0]["curve"]] for found in (first, second)]
    assert losses[0] == losses[1]


def test_divergence_is_recorded_and_the_others_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path, "--lr", "1e5", "--arm", "Inception", "--arm", "BN-Baseline")) == 0
    first, second = content(tmp_path)["runs"]
    assert first["arm"] == "Inception"
    assert 1 <= first["diverged_at"] <= 5, "the step itself, not the end of its block"
    assert first["curve"] == []
    assert second["arm"] == "BN-Baseline"
    said = capsys.readouterr().out
    assert f"Inception, seed 0: step 5 of 12, diverged at step {first['diverged_at']}" in said
    assert "target: none" in said


def test_sweep_tells_what_works(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, tmp_path, "--sweep", "--steps", "4", "--evaluate", "4")) == 0
    found = json.loads((tmp_path / "study-inception-sweep.json").read_text())
    rates = [one["learning_rate"] for one in found["tried"]]
    assert all(2.5 < large / small < 3.5 for small, large in itertools.pairwise(rates))
    assert [row["norm"] for row in found["runs"]] == [None] * len(rates)
    assert re.search(r"Best: |No learning rate works", capsys.readouterr().out)


def test_bars_in_a_terminal(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=110, markup=False, highlight=False)
    monkeypatch.setattr(inception_progress, "console", terminal)
    assert main(command(folder, tmp_path, "--arm", "BN-x5", "--seeds", "2", "--steps", "4", "--evaluate", "2")) == 0
    assert isinstance(terminal.file, io.StringIO)
    said = terminal.file.getvalue()
    for progress in ("BN-x5, tritonbn", "0/8", "2/8", "6/8", "8/8"):
        assert progress in said
    assert f"{content(tmp_path)['runs'][0]['curve'][0]['accuracy']:.2f}%" in said


def test_folding_that_fails_fails_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fold(model: torch.nn.Module) -> torch.nn.Module:
        torch.nn.init.normal_(model.get_submodule("linear").weight)  # type: ignore[arg-type]
        return model

    monkeypatch.setattr(tritonbn, "fold", fold)
    assert main(command(folder, tmp_path, "--arm", "BN-x5", "--steps", "2")) == 1
    assert "FAIL: folded, the network answers otherwise: BN-x5, tritonbn, seed 0" in capsys.readouterr().out
    assert content(tmp_path)["runs"]


def test_statistics_are_compared_in_float32_and_not_in_tf32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, logits = [], trainer.logits

    def noted(*args: Any) -> torch.Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return logits(*args)

    monkeypatch.setattr(inception_runs, "logits", noted)
    with cudnn(allow_tf32=True):
        assert main(command(folder, tmp_path, "--arm", "BN-x5", "--steps", "2")) == 0
        assert torch.backends.cudnn.allow_tf32
    assert allowed == [True, False, False, False], "training as it is, then moving averages, population, folded"


def empty(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def other_class(root: Path) -> None:
    (root / "val" / "red").rename(root / "val" / "rouge")


def too_few(root: Path) -> None:
    for path in (root / "train").rglob("*.png"):
        if path.name > "001.png":
            path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, "train: expected a folder per class, got an empty folder"),
        (other_class, "expected the same classes in train and val; only in train: red; only in val: rouge"),
        (too_few, "train: expected at least 8 images, one batch; got 6"),
        (shutil.rmtree, "expected a folder, got nothing"),
    ],
    ids=["empty", "classes", "few", "nowhere"],
)
def test_bad_data_is_named(
    folder: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    damage(root)
    assert main(command(root, tmp_path / "out")) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.out == ""
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--out", __file__), f"{__file__}: expected a folder, got a file"),
        (("--device", "cuda:99"), "--device cuda:99: not available"),
        (("--steps", "10000001"), "--steps 10000001: expected at most 10,000,000"),
        (("--threads", "100000"), "--threads 100000: expected at most"),
        (("--batch", "1"), "--batch 1: expected at least 2 images"),
    ],
)
def test_wrong_option_is_named_before_anything_is_read(
    folder: Path, tmp_path: Path, more: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path, *more)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--steps", "0", "expected a whole number from 1, got 0"),
        ("--lr", "0", "expected a number above 0, got 0"),
        ("--lr", "nan", "expected a number above 0, got nan"),
        ("--l2", "-1", "expected a number from 0, got -1"),
        ("--decay", "1.5", "expected a number above 0, at most 1, got 1.5"),
        ("--momentum", "1", "expected a number from 0, below 1, got 1"),
        ("--width", "x", "expected a number above 0, got x"),
        ("--arm", "BN-x7", "invalid choice: 'BN-x7'"),
        ("--without", "dropout", "invalid choice: 'dropout'"),
    ],
)
def test_impossible_values_are_refused(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "inception", "--data", "x", f"{option}={value}"])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_help_names_the_modifications(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "inception", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no-dropout: no dropout (otherwise 40%)" in said
    assert "goes on where it was" in said


def test_blocks_end_where_there_is_something_to_do() -> None:
    pace = inception_runs.Pace(steps=50, evaluate=20, checkpoint=15)
    assert [pace.end(step) for step in (0, 14, 15, 20, 30, 45)] == [15, 15, 20, 30, 40, 50]
    assert pace.block == 15
    assert [pace.due(step, 99.0) for step in (14, 15, 20, 30)] == [False, True, False, True]


def test_without_a_number_checkpoints_wait_until_there_is_something_to_lose() -> None:
    pace = inception_runs.Pace(steps=50, evaluate=20, checkpoint=None)
    assert [pace.end(step) for step in (0, 20, 40)] == [20, 40, 50]
    assert [pace.due(20, seconds) for seconds in (19.9, 20.0)] == [False, True]
