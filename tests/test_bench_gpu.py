"""The run on a GPU machine: its steps, and what becomes of a failure, without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.__main__ import main


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
    for step in gpu.steps(tmp_path, tmp_path):
        if step.command[1] == "bench":
            with pytest.raises(SystemExit) as stop:
                main([*step.command[2:], "--help"])
            assert stop.value.code == 0
