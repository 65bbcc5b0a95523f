"""The Inception study interrupted: what is kept, what goes on, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench.__main__ import main
from bench.study import trainer
from bench.study.checkpoint import Saved, Store
from bench.study.inception_runs import Stop
from tests import image_folders

pytestmark = pytest.mark.usefixtures("without_kernels")

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("Inception", "BN-x5")  # dropout's noise in the one, running statistics in the other
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folders.write(tmp_path_factory.mktemp("images"))


def command(folder: Path, out: Path, *more: str) -> list[str]:
    small = ["--width", "0.05", "--image", "16", "--batch", "8", "--threads", "1", "--device", "cpu"]
    run = ["--steps", str(STEPS), "--evaluate", "8", "--checkpoint", "4", "--seeds", "1", "--out", str(out)]
    return ["study", "inception", "--data", str(folder), *small, *run, *(f"--arm={arm}" for arm in ARMS), *more]


def curves(out: Path) -> list[Any]:
    """All that is the same when repeated: everything but time."""
    runs = json.loads((out / "study-inception.json").read_text())["runs"]
    for row in runs:
        del row["seconds"], row["ms_per_step"]
        for point in row["curve"]:
            del point["seconds"]
    return list(runs)


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    out = tmp_path_factory.mktemp("unbroken")
    assert main(command(folder, out)) == 0
    return curves(out)


def started(folder: Path, out: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-m", "bench", *command(folder, out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_goes_on_with_the_same_curve(
    folder: Path, tmp_path: Path, number: signal.Signals, unbroken: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    process = started(folder, tmp_path)
    wait_for(tmp_path / "runs" / "BN-x5-tritonbn-0.pt", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert not (tmp_path / "study-inception.json").exists()
    if number == signal.SIGINT:
        assert (process.returncode, errors) == (130, "interrupted\n")
    else:
        assert process.returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "runs" / "BN-x5-tritonbn-0.pt", weights_only=True)
    assert 0 < saved["step"] < STEPS
    assert torch.load(tmp_path / "runs" / "Inception-none-0.pt", weights_only=True)["finished"]
    assert main(command(folder, tmp_path)) == 0
    assert curves(tmp_path) == unbroken
    assert "Inception, seed 0: step 24 of 24" in capsys.readouterr().out


class Killed(BaseException):
    """As sudden as it gets within a process."""


@pytest.fixture
def broken_off(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Killed in step 15 of the first arm, whose last checkpoint is of step 12 then: between evaluations."""
    with monkeypatch.context() as patch:
        step, calls = trainer.Trainer.step, iter(range(1000))

        def step_or_die(self: trainer.Trainer) -> None:
            if next(calls) == 15:  # one step warmed up
                raise Killed
            step(self)

        patch.setattr(trainer.Trainer, "step", step_or_die)
        with pytest.raises(Killed):
            main(command(folder, tmp_path))
    return tmp_path


def steps_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From which step each block begins from here on."""
    starts: list[int] = []
    train = trainer.Trainer.train

    def noted(self: trainer.Trainer, start: int, *rest: Any) -> Any:
        starts.append(start)
        return train(self, start, *rest)

    monkeypatch.setattr(trainer.Trainer, "train", noted)
    return starts


def test_at_most_the_work_since_the_last_checkpoint_is_lost(
    folder: Path, broken_off: Path, unbroken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = steps_made(monkeypatch)
    assert main(command(folder, broken_off)) == 0
    assert starts[0] == 12
    assert starts.count(0) == 1, "the second arm only"
    assert curves(broken_off) == unbroken


def test_finished_runs_are_not_repeated_and_seeds_and_arms_may_be_added(
    folder: Path, broken_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(folder, broken_off)) == 0
    starts, before = steps_made(monkeypatch), (broken_off / "study-inception.json").read_bytes()
    assert main(command(folder, broken_off)) == 0
    assert starts == []
    assert (broken_off / "study-inception.json").read_bytes() == before
    assert main(command(folder, broken_off, "--arm=BN-Baseline", "--seeds", "2")) == 0
    assert starts.count(0) == 4, "BN-Baseline with both seeds, the others with the second"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [cut, flip, empty, another])
def test_damaged_checkpoint_is_named_and_its_run_begins_anew(
    folder: Path,
    broken_off: Path,
    damage: Callable[[Path], None],
    unbroken: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = broken_off / "runs" / "Inception-none-0.pt"
    damage(path)
    starts = steps_made(monkeypatch)
    assert main(command(folder, broken_off)) == 0
    assert starts[0] == 0
    said = capsys.readouterr().out
    assert f"warning: {path} cannot be read (" in said
    assert "): this run begins anew" in said
    assert curves(broken_off) == unbroken


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "50"), "steps 24 there, 50 now"),
        (("--lr", "0.5"), "recipes Inception learning_rate"),
        (("--width", "0.06"), "width 0.05 there, 0.06 now"),
        (("--without", "decay"), "recipes BN-x5 decay"),
        (("--image", "8"), "data side 16 there, 8 now"),
    ],
)
def test_other_settings_are_refused(
    folder: Path, broken_off: Path, more: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in broken_off.rglob("*.*")}
    assert main(command(folder, broken_off, *more)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Choose another --out, or delete" in said
    assert {path: path.read_bytes() for path in broken_off.rglob("*.*")} == before


def test_other_pixels_are_other_settings(
    folder: Path, broken_off: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = image_folders.write(tmp_path_factory.mktemp("other") / folder.name, train=17)
    assert main(command(other, broken_off)) == 2
    said = capsys.readouterr().err
    assert "data train 48 there, 51 now" in said
    assert "data sha256" in said


def test_store_returns_what_it_was_given(tmp_path: Path) -> None:
    store = Store(tmp_path, {"a": 1})
    state = {"x": torch.arange(4.0)}
    given = Saved(finished=False, step=3, row={"seed": 0}, losses=[0.1, float("nan")], state=state, chance={})
    assert store.load("run") is None
    store.save("run", given)
    found = Store(tmp_path, {"a": 1}).load("run")
    assert found is not None
    assert torch.equal(found["state"]["x"], state["x"])
    assert str(found["losses"]) == "[0.1, nan]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "settings.json"]


def test_asked_twice_it_stops_at_once() -> None:
    stop = Stop()
    assert not stop()
    stop.ask(signal.SIGINT, None)
    assert stop()
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT, None)
