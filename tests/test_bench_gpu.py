"""The run on a GPU machine: its steps, and what becomes of a failure, without a GPU."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench import gpu
from bench.__main__ import main, parse

ROOT = Path(gpu.__file__).parent.parent


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Pretend 9000")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "error: no GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("pretend")
def test_a_failing_step_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(out: Path, data: Path | None) -> list[gpu.Step]:
        return [
            gpu.Step("fails", ["-c", "print('why'); raise SystemExit(3)"], 60),
            gpu.Step("hangs", ["-c", "import time; print('on it', flush=True); time.sleep(60)"], 1),
            gpu.Step("works", ["-c", "print('done')"], 60),
        ]

    monkeypatch.setattr(gpu, "steps", steps)
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    for expected in ("exit 3", "why", "over 1 s", "on it", "ok", "done"):
        assert expected in printed
    assert (tmp_path / "works.log").read_text() == "done\n"
    assert json.loads((tmp_path / "machine.json").read_text())["device"] == "NVIDIA Pretend 9000"


def test_steps_are_commands_that_exist(tmp_path: Path) -> None:
    modules = []
    for _, module, *words in (step.command for step in gpu.steps(tmp_path / "out", tmp_path / "data")):
        modules.append(module)
        if module == "bench":
            args = parse(words)
            assert (args.out, args.data, args.device) == (tmp_path / "out", tmp_path / "data", "cuda")
        else:
            paths = [word.removeprefix("--ignore=") for word in words if "tests" in word]
            assert paths
            assert all((ROOT / path).exists() for path in paths)
    assert modules == ["pytest", "bench"]


def made(*words: str) -> list[str]:
    """What make would run, whichever make runs this test."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is missing")
    clean = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
    command = [make, "--dry-run", *words]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout.splitlines()


def test_make_gpu_takes_the_python_at_hand() -> None:
    assert [line.split() for line in made("VENV=", "PYTHON=python3", "gpu")] == [["python3", "-m", "bench", "gpu"]]


def test_make_bench_hands_on_its_arguments() -> None:
    assert made("bench", "ARGS=--data X")[-1].endswith(" -m bench mnist --data X")
