"""`python -m bench mnist`: what it prints and writes, and how it ends."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from rich.console import Console

import tritonbn
from bench import mnist, pictures, training
from bench.__main__ import main
from tests import idx_files
from tritonbn import launch

pytestmark = pytest.mark.usefixtures("without_kernels")

STEPS = 220
INTERPRETED = launch.INTERPRETED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files.write(tmp_path_factory.mktemp("mnist"), idx_files.contents())


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return ["mnist", "--data", str(folder), "--steps", "20", "--device", "cpu", "--out", str(out), *more]


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short whole run with two seeds."""
    out = tmp_path_factory.mktemp("out") / "deeper"
    assert main(command(folder, out, "--steps", str(STEPS), "--seeds", "2")) == 0
    return out


def test_json_says_everything(results: Path) -> None:
    content = json.loads((results / "mnist.json").read_text())
    assert {"machine", "settings", "data", "batch_norm_path", "check", "arms"} <= content.keys()
    assert {"device", "cpu", "threads", "python", "torch", "triton", "tritonbn", "commit"} <= content["machine"].keys()
    assert content["settings"] == {
        "steps": STEPS,
        "seeds": 2,
        "batch": 60,
        "learning_rate": 0.1,
        "optimizer": "SGD",
        "hidden": [100, 100, 100],
        "weight_std": 0.1,
        "eps": 1e-5,
        "momentum": 0.1,
        "evaluated_at": [100, 200, STEPS],
        "percentiles": [15, 50, 85],
    }
    assert content["kernels_compared"] is False
    assert [finding["passed"] for finding in content["check"]] == [True] * 3
    arms = content["arms"]
    assert [(row["arm"], row["seed"]) for row in arms] == [(arm, seed) for seed in (0, 1) for arm in training.ARMS]
    for each in arms:
        assert each.keys() == training.Row.__annotations__.keys() | {"gpu", "torch", "triton", "commit"}
        assert [step for step, _ in each["curve"]] == [100, 200, STEPS]
        assert each["test_accuracy"] == each["curve"][-1][1]
        assert each["steps_per_second"] == pytest.approx(STEPS / each["seconds"])
        assert each["images_per_second"] == pytest.approx(60 * each["steps_per_second"])
        assert len(each["first_losses"]) == 100
        assert len(each["percentiles"]) == 3
    assert arms[0]["step_time_to_none"] == [1, 1, 1]
    assert arms[1]["steps_to_90"] == 100
    assert arms[1]["test_accuracy"] > 95


def test_picture_and_nothing_else_is_left(results: Path) -> None:
    assert sorted(path.name for path in results.iterdir()) == ["mnist.json", "mnist.png"]
    assert (results / "mnist.png").read_bytes().startswith(b"\x89PNG")


def test_panels_show_what_they_say(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def panel(_: object, row: training.Row, title: str) -> None:
        drawn.append((row["arm"], row["seed"], title))

    monkeypatch.setattr(pictures, "percentile_panel", panel)
    pictures.mnist_panels(json.loads((results / "mnist.json").read_text())["arms"], "data", tmp_path / "a.png")
    assert drawn == [("none", 0, "(b) without batch norm"), ("tritonbn", 0, "(c) with tritonbn")]


def test_run_prints_what_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, tmp_path, "--steps", "1")) == 0
    said = capsys.readouterr().out
    title = "idx files other than the original MNIST, 1 step, 1 seed"
    for part in ("torch " + torch.__version__, "our batch norm: ", "steps/s", "nn.BatchNorm1d", "pass", "first step"):
        assert part in said
    for sentence in (title, "this checks the swap, not our kernels; their difference in speed is noise"):
        assert sentence in " ".join(said.split())
    assert "neither arrived" in said
    assert "FAIL" not in said


def run_in(terminal: Console, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command writes to the terminal."""
    monkeypatch.setattr(mnist, "console", terminal)
    assert main(arguments) == 0
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def test_bars_in_a_terminal(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, markup=False, highlight=False)
    said = run_in(terminal, command(folder, tmp_path, "--steps", "150", "--seeds", "2"), monkeypatch)
    before, _, _ = said.partition("steps/s")
    for progress in ("  0/300", "100/300", "150/300", "250/300", "300/300"):
        assert progress in before
    for accuracy in (row["test_accuracy"] for row in json.loads((tmp_path / "mnist.json").read_text())["arms"]):
        assert f"{accuracy:.2f}%" in before


def test_narrow_terminal_shortens_no_number(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), width=40, markup=False, highlight=False)
    said = run_in(terminal, command(folder, tmp_path, "--steps", "120"), monkeypatch)
    assert "…" not in said
    (line,) = [line for line in said.splitlines() if line.startswith(" tritonbn")]
    row = json.loads((tmp_path / "mnist.json").read_text())["arms"][2]
    low, median, high = row["step_time_to_none_quartiles"]
    assert line.split() == [
        "tritonbn",
        f"{row['steps_per_second']:.0f}",
        f"{row['images_per_second']:,.0f}",
        f"{median:.2f}",
        f"({low:.2f}-{high:.2f})",
        f"{row['test_accuracy']:.2f}%",
        f"{row['steps_to_90']}",
    ]


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="kernels need a GPU or TRITON_INTERPRET=1")
def test_kernels_follow_torch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", INTERPRETED)
    monkeypatch.setattr(training, "WARM_UP", 1)
    options = ("--steps", "3") if INTERPRETED else ("--steps", "120", "--device", "cuda")
    assert main(command(folder, tmp_path, *options)) == 0
    content = json.loads((tmp_path / "mnist.json").read_text())
    assert "Triton kernels" in content["batch_norm_path"]
    assert content["kernels_compared"] is True


def test_arm_that_strays_fails_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.eps = 1e-2
        return model

    monkeypatch.setattr(tritonbn, "convert", convert)
    assert main(command(folder, tmp_path)) == 1
    assert "FAIL" in capsys.readouterr().out
    assert not json.loads((tmp_path / "mnist.json").read_text())["check"][0]["passed"]


def test_arm_that_breaks_down_fails_and_is_still_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(model: nn.Module) -> nn.Module:
        nn.init.constant_(model[1].weight, float("nan"))  # type: ignore[index]
        return model

    monkeypatch.setattr(tritonbn, "convert", convert)
    assert main(command(folder, tmp_path)) == 1
    content = json.loads((tmp_path / "mnist.json").read_text(), parse_constant=pytest.fail)
    assert content["arms"][2]["first_losses"][0] is None
    assert (tmp_path / "mnist.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(("--data", "nowhere"), "nowhere: expected a folder, got nothing", id="data"),
        pytest.param(("--device", "nonsense"), "--device nonsense: expected cpu or cuda", id="device"),
        pytest.param(("--device", "meta"), "--device meta: expected cpu or cuda", id="device-kind"),
        pytest.param(("--device", "cuda:99"), "--device cuda:99: not available", id="gpu"),
        pytest.param(("--out", __file__), f"{__file__}: expected a folder, got a file", id="out"),
        pytest.param(("--out", f"{__file__}/deeper"), f"cannot write to {__file__}/deeper", id="out-in-a-file"),
        pytest.param(("--steps", "10000001"), "--steps 10000001: expected at most 10,000,000", id="steps"),
        pytest.param(("--threads", "100000"), "--threads 100000: expected at most", id="threads"),
    ],
)
def test_wrong_option_is_named_before_training(
    folder: Path, tmp_path: Path, more: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path, *more)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize("option", ["--steps", "--seeds", "--threads"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_numbers_are_whole_and_positive(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["mnist", f"{option}={value}"])
    assert stop.value.code == 2
    assert f"expected a whole number from 1, got {value}" in capsys.readouterr().err


def test_unknown_option_shows_the_commands_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["mnist", "--stepz", "3"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: python -m bench mnist ")
    assert "unrecognized arguments: --stepz 3" in said


def test_less_than_a_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = idx_files.write(tmp_path / "data", idx_files.contents(train=59))
    assert main(command(folder, tmp_path / "out")) == 2
    assert "at least 60 training images" in capsys.readouterr().err


def test_interruption_ends_with_130(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Arm, "block", interrupted)
    assert main(command(folder, tmp_path)) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_lists_the_commands() -> None:
    code = "import atexit, sys, bench.__main__ as command; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); command.main(['--help'])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mnist" in answer.stdout
    assert answer.stdout.endswith("False\n")
