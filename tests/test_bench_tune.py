"""`python -m bench tune`: what it prints without a GPU, what it refuses, and what it does with what a tuner finds."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

from bench import files, tune
from bench.__main__ import main
from tests import results
from tritonbn import planning, store, tables, tuning
from tritonbn.choice import Problem
from tritonbn.device import H200, Device
from tritonbn.layers import Layer
from tritonbn.version import __version__

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


Out = Callable[[], str]


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Out:
    """What was printed on stdout since the last call."""
    return lambda: capsys.readouterr().out


def test_without_a_gpu_the_plans_are_shown() -> None:
    """In a process of its own, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "tune", "--shape", "60,100", "--dtype", "fp32"], capture_output=True,
        text=True, check=False, cwd=ROOT, env=dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, empty, *table = done.stdout.splitlines()
    assert first == (
        "no GPU: nothing can be timed here. Plans for an H200 with the times that the model predicts, in us:"
    )
    assert (empty, table) == (
        "",
        [
            "operation  layout  shape     predicted  first   others",
            "backward   rows    60x100x1  5.0        single  split 8.9, cooperative 8.2, stream 8.2",
            "forward    rows    60x100x1  4.9        single  split 9.0, cooperative 8.3, stream 8.3",
        ],
    )


def rows(text: str) -> list[list[str]]:
    return [re.split("  +", line) for line in text.splitlines()[3:]]


def test_what_is_shown_is_what_was_asked_for(no_gpu: None, out: Out) -> None:
    assert main(["tune", "--shape", "256,64,56,56", "--shape", "32,64,14,14", "--layout", "nchw"]) == 0
    assert [row[:5] for row in rows(out())] == [
        ["backward", "planes", "256x64x3136", "119.2", "split"],
        ["forward", "planes", "256x64x3136", "71.6", "split"],
        ["backward", "planes", "32x64x196", "5.4", "single"],
        ["forward", "planes", "32x64x196", "5.3", "single"],
    ]
    assert main(["tune", "--shape", "256,64,56,56", "--layout", "channels_last", "--dtype", "fp16"]) == 0
    assert [row[:3] for row in rows(out())] == [
        ["backward", "rows", "802816x64x1"], ["forward", "rows", "802816x64x1"],
    ]  # fmt: skip
    assert main(["tune"]) == 0
    found = rows(out())
    assert len(found) == 48, "12 shapes, two layouts, two operations"
    assert found[0][:3] == ["backward", "planes", "256x64x12544"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "error: --device cpu: plans are measured on a GPU"),
        (["--device", "cuda"], r"error: --device cuda: not available, torch .* sees 0 GPUs"),
        (["--device", "x"], "error: --device x: expected cpu or cuda"),
        (["--shape", "60,100", "--layout", "nchw"], "error: --layout nchw: no shape that was asked for has it"),
        (["--budget", "0"], "argument --budget: expected a positive number of seconds, got 0"),
        (["--budget", "nan"], "argument --budget: expected a positive number of seconds, got nan"),
        (["--budget", "inf"], "argument --budget: expected a positive number of seconds, got inf"),
        (["--budget", "soon"], "argument --budget: expected a positive number of seconds, got soon"),
        (["--shape", "60"], "argument --shape: expected N,C or N,C,L or N,C,H,W"),
        (["--set", "lenet"], "argument --set: invalid choice: 'lenet'"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--agian"], "unrecognized arguments: --agian"),
    ],
)
def test_bad_options(options: list[str], message: str, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(["tune", *options])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err)


def test_layers_are_all_that_was_asked_for() -> None:
    def asked(**options: Any) -> list[Layer]:
        given = {"set": None, "shape": None, "dtype": None, "layout": None} | options
        return tune.layers(argparse.Namespace(**given))

    plain, last = torch.contiguous_format, torch.channels_last
    assert asked(shape=[(4, 8, 2, 2), (6, 9)], dtype=["bf16", "fp32"]) == [
        Layer((4, 8, 2, 2), torch.bfloat16, plain),
        Layer((4, 8, 2, 2), torch.float32, plain),
        Layer((4, 8, 2, 2), torch.bfloat16, last),
        Layer((4, 8, 2, 2), torch.float32, last),
        Layer((6, 9), torch.bfloat16, plain),
        Layer((6, 9), torch.float32, plain),
    ]
    assert asked(set=["mnist"]) == [Layer((60, 100), torch.bfloat16, plain)]
    assert asked(shape=[(4, 8, 2, 2, 2)], layout=["channels_last"])[0].memory_format is torch.channels_last_3d


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    """A GPU that is there, and on which streams take 10 us, all else 20."""

    def tune_layers(layers: Any, device: Any, *, again: bool, folder: Any, **options: Any) -> Any:
        assert device == CUDA

        def timer(problem: Problem, layer: Layer) -> Any:
            return lambda plan: 10.0 if plan.path == "stream" else 20.0

        work = tuning.problems(layers, H200, again)
        return tuning.tune_problems(work, H200, timer, folder, **options)

    monkeypatch.setenv("TRITONBN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "pick_device", lambda name: CUDA)
    monkeypatch.setattr(planning, "device_of", lambda device: H200)
    monkeypatch.setattr(tuning, "tune_layers", tune_layers)
    tables.forget()
    return H200


@pytest.mark.parametrize("given", [True, False])
def test_what_was_found_is_printed_and_written(given: bool, gpu: Device, tmp_path: Path, out: Out) -> None:
    folder = tmp_path / "new" / "folder" if given else tmp_path / "cache"
    shapes = ["--shape", "256,64,56,56", "--layout", "nchw", "--shape", "60,100"]
    with_layout = [*shapes, "--layout", "nc", *(["--out", str(folder)] if given else [])]
    assert main(["tune", *with_layout]) == 0
    file = folder / f"NVIDIA-H200-{__version__}.json"
    lines = out().splitlines()
    assert lines[:5] + lines[9:] == [
        "0/4 backward [256, 64, 56, 56]",
        "1/4 forward [256, 64, 56, 56]",
        "2/4 backward [60, 100]",
        "3/4 forward [60, 100]",
        "4/4 4 problems tuned",
        "4 problems measured, 4 plans replaced",
        f"Written: {file}",
    ]
    for line, problem, path in zip(
        lines[5:9], ("backward planes [256, 64, 3136]", "forward planes [256, 64, 3136]", "backward rows [60, 100, 1]",
                     "forward rows [60, 100, 1]"), ("split", "split", "single", "single"), strict=True,
    ):  # fmt: skip
        found = rf"{re.escape(problem)} x 2 bytes: 20.0 -> 10.0 us \(stream, was {path}; \d+ timed, 0 dropped\)"
        assert re.fullmatch(found, line)
    held = json.loads(file.read_text())
    assert held["gpu"] == "NVIDIA H200"
    assert len(held["plans"]) == 4
    assert {row["path"] for row in held["plans"].values()} == {"stream"}
    assert main(["tune", *with_layout]) == 0
    assert out().splitlines() == [
        "0/0 0 problems tuned",
        "0 problems measured, 0 plans replaced",
        "Nothing was left to measure: --again measures what the tables know",
    ]
    assert main(["tune", *with_layout, "--again"]) == 0
    assert "4 problems measured, 0 plans replaced" in out()


def test_all_plans_that_were_timed_are_written(gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"device": "GPU", "torch": "2", "triton": "3", "commit": "abc"}
    monkeypatch.setattr(tune, "machine", lambda device: here)
    results, counts, write = tmp_path / "results", list[int](), files.write_json

    def note(path: Path, content: Any) -> None:
        write(path, content)
        counts.append(len(content["rows"]))

    monkeypatch.setattr(tune, "write_json", note)
    shape = ["--shape", "256,64,56,56", "--layout", "nchw"]
    assert main(["tune", *shape, "--out", str(tmp_path / "plans"), "--results", str(results)]) == 0
    content = json.loads((results / "tune.json").read_text())
    assert content["machine"] == here
    assert counts == [len([row for row in content["rows"] if row["operation"] == "backward"]), len(content["rows"])], (
        "written with each problem"
    )
    for operation, before in (("forward", "split"), ("backward", "split")):
        mine = [row for row in content["rows"] if row["operation"] == operation]
        assert {row["path"] for row in mine} >= {"split", "stream", "single"}
        assert {(row["path"], row["us"]) for row in mine} <= {("stream", 10.0), ("split", 20.0), ("single", 20.0)}
        assert [row["path"] for row in mine if row["before"]] == [before]
        assert [row["path"] for row in mine if row["after"]] == ["stream"]
        (model_plan,) = (row for row in mine if row["before"])
        assert model_plan["predicted_us"] == pytest.approx({"forward": 71.6, "backward": 119.2}[operation], abs=0.05)
        assert all(row.items() >= {"gpu": "GPU", "torch": "2", "triton": "3", "commit": "abc"}.items() for row in mine)
        assert all(row["shape"] == [256, 64, 3136] for row in mine)


def test_page_shows_paths_beside_predictions(tmp_path: Path) -> None:
    same = {
        "operation": "forward",
        "layout": "planes",
        "shape": [2, 3, 4],
        "itemsize": 2,
        "before": False,
        "after": False,
    }
    rows = [
        same | {"path": "split", "us": 12.0, "predicted_us": 9.0, "before": True},
        same | {"path": "split", "us": 11.0, "predicted_us": 9.5},
        same | {"path": "single", "us": 8.0, "predicted_us": 10.0, "after": True},
        same | {"path": "stream", "us": None, "predicted_us": 7.0},
    ]
    results.write(tmp_path / "gpu", tune={"machine": results.MACHINE, "rows": rows})
    assert main(["report", "--results", str(tmp_path)]) == 0
    lines = (tmp_path / "README.md").read_text().splitlines()
    expected = "forward | planes | 2x3x4, 16 bits | 8.0 (10.0) | - | - | 11.0 (9.5) | split 12.0 | single 8.0"
    assert f"| {expected} |" in lines


def test_a_budget_that_is_spent(gpu: Device, monkeypatch: pytest.MonkeyPatch, out: Out) -> None:
    now = iter(range(0, 100, 5))  # each look at the clock takes 5 s: compiling ahead does, then tuning
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert main(["tune", "--shape", "60,100", "--budget", "12"]) == 0
    assert "1 problems measured, 1 plans replaced" in out()
    assert main(["tune", "--shape", "60,100", "--budget", "10"]) == 0
    assert out().splitlines() == ["0/1 0 problems tuned", "0 problems measured, 0 plans replaced"]


def test_folders_that_cannot_be(gpu: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(["tune", "--shape", "60,100", "--out", str(file)]) == 2
    assert f"{file}: expected a folder, got a file" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "user_folder", lambda: None)
        assert main(["tune", "--shape", "60,100"]) == 2
    assert "error: no folder for the table: --out DIR, or set TRITONBN_CACHE_DIR" in capsys.readouterr().err
