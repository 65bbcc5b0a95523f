"""`make gpu DRY=1`: every step of the run on a GPU, on tiny shapes, where the GPU is only pretended."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import nn

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench import pretend, scale
from bench.measure import commit
from bench.pretend import NAME, Capture, Graph, Redirect
from tests import idx_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for the run itself")
def test_rehearsal(tmp_path: Path) -> None:
    """One test, for no worker must rehearse what another one does: started as a user starts it, then looked at."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is missing")
    data, out = idx_files.write(tmp_path / "data", idx_files.contents()), tmp_path / "out"
    ours = ("ARGS", "OUT", "QUICK", "DRY", "STEPS", "VENV", "PYTHON", "PYTEST_ADDOPTS", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours and "MAKE" not in name}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path), "COLUMNS": "60"}
    command = [make, "VENV=", f"PYTHON={sys.executable}", "gpu", "DRY=1", f"OUT={out}", f"ARGS=--data {data}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:] + logs
    steps_in_order_and_the_summary_last(done.stdout, read(out, "steps")["steps"])
    everything_in_one_folder(out)
    for name, parts in ROWS.items():
        for part in parts:
            each_row_says_where_it_is_from(read(out, name)[part])
    all_peers_timed_in_graphs(read(out, "ops"))
    plans_of_several_paths_timed_and_kept(read(out, "tune")["rows"], read(out, TABLE)["plans"])
    for name, mode in (("models", "eager"), ("mnist/models", "compile-graph")):
        all_arms_learn(read(out, name)["rows"], mode)
    page_has_all_sections((out / "README.md").read_text())


TABLE, CALIBRATION = "plans/pretended-GPU-0.1.0", "plans/calibration/pretended-GPU-0.1.0"
ROWS = {
    "steps": ["steps"], "bandwidth": ["rows"], "ops": ["rows", "wall"], "tuned/ops": ["rows", "wall"],
    "tune": ["rows"], "models": ["rows"], "mnist/models": ["rows"], "mnist": ["arms"],
}  # fmt: skip


def read(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


def steps_in_order_and_the_summary_last(output: str, steps: list[dict[str, Any]]) -> None:
    assert [step["name"] for step in steps] == [*scale.DRY.shares]
    assert {step["result"] for step in steps} == {"ok"}
    started, summary = output.split("\nstep ")
    begun = [line.partition(":")[0] for line in started.splitlines() if " > " in line]
    assert begun == [*scale.DRY.shares]
    last = summary.strip().splitlines()[-1]
    assert "the time that our batch norm adds" in last
    assert last.split()[-3:] == ["not", "measured", "-"]


def everything_in_one_folder(out: Path) -> None:
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    logs = {f"{name}.log" for name in scale.DRY.shares}
    tables = {f"{name}.json" for name in (*ROWS, TABLE, "machine", "calibration", CALIBRATION)}
    assert found >= logs | tables | {"README.md", "mnist.png", "models.png", "mnist/models.png"}
    assert not (ROOT / "bench" / "results" / NAME.replace(" ", "-")).exists()


def each_row_says_where_it_is_from(rows: list[dict[str, Any]]) -> None:
    here = {"gpu": NAME, "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    assert rows
    for row in rows:
        assert row.items() >= here.items()
        assert row.get("error") is None, row


def all_peers_timed_in_graphs(content: dict[str, Any]) -> None:
    rows = content["rows"]
    assert {row["provider"] for row in rows} >= {"tritonbn", "eager", "compile", "compile-max-autotune"}
    assert {row["direction"] for row in rows} == {"forward", "backward", "both"}
    assert {row["timed_by"] for row in rows} == {"graph"}
    assert {row["cold"] for row in rows} == {True}
    assert {row["timed_by"] for row in content["wall"]} == {"wall"}


def plans_of_several_paths_timed_and_kept(rows: list[dict[str, Any]], plans: dict[str, Any]) -> None:
    assert {row["path"] for row in rows} == {"single", "split"}
    assert {row["operation"] for row in rows} == {"forward", "backward"}
    assert all(row["us"] > 0 and row["predicted_us"] > 0 for row in rows)
    problems = {(row["operation"], row["layout"], *row["shape"]) for row in rows}
    for which in ("before", "after"):
        assert sum(row[which] for row in rows) == len(problems)
    assert len(plans) == len(problems)


def all_arms_learn(rows: list[dict[str, Any]], mode: str) -> None:
    """Captured steps too: a replay of nothing would not."""
    assert {row["mode"] for row in rows} == {mode}
    assert {row["provider"] for row in rows} == {"none", "torch", "torch-again", "tritonbn", "fused"}
    for row in rows:
        assert row["ms"] > 0
        assert row["agrees"] is not False
        assert row["first_losses"][-1] < row["first_losses"][0]


def page_has_all_sections(page: str) -> None:
    for title in ("Targets", "What ran", "What bounds every plan", "Paths", "Operators",
                  "Whole networks", "The network of the MNIST experiment", "The paper's MNIST experiment",
                  "Eager calls", "Machines, versions, commits"):  # fmt: skip
        assert f"# {title}" in page
    assert f"{NAME}: measured" in page


# The pretended GPU itself.


def captured(step: Any) -> Graph:
    graph = Graph()
    with Capture(graph):
        step()
    return graph


def test_a_replay_does_what_was_captured() -> None:
    """Views, writing in place, new tensors, and reading what an earlier call of the graph made."""
    x, total = torch.arange(6.0).view(2, 3), torch.zeros(3)
    kept: dict[str, torch.Tensor] = {}

    def step() -> None:
        y = (x.T[1:] * 2).relu()
        total.add_(y.sum() + x[0])
        kept["y"] = y

    graph = captured(step)
    torch.testing.assert_close(total, 24.0 + torch.tensor([0.0, 1, 2]))
    x.mul_(10)
    graph.replay()
    torch.testing.assert_close(kept["y"], torch.tensor([[20.0, 80.0], [40.0, 100.0]]))
    torch.testing.assert_close(total, 24.0 + 240 + 11 * torch.tensor([0.0, 1, 2]))
    assert Capture.current is None


def test_replayed_training_is_eager_training() -> None:
    def trained(replays: bool) -> list[float]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        x, losses, kept = torch.randn(8, 4), [], torch.zeros(())

        def step() -> None:
            loss = network(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.copy_(loss.detach())

        run = step
        for index in range(4):
            if index == 1 and replays:
                run = captured(step).replay
            else:
                run()
            losses.append(kept.item())
        return losses

    eager, replayed = trained(False), trained(True)
    assert replayed == pytest.approx(eager, rel=1e-6)
    assert eager[3] < eager[0]


def test_what_is_meant_for_the_gpu_lies_in_main_memory() -> None:
    with Redirect():
        device = torch.device("cuda", 0)
        assert device.type == "cuda", "its name is kept"
        for made in (torch.zeros(2, device=device), torch.ones(2).to("cuda:0"), torch.empty(2, device="cuda")):
            assert made.device == torch.device("cpu")
        assert nn.Linear(2, 2).to(device).weight.device.type == "cpu"
        assert torch.zeros(1, device="meta").is_meta
    generator = pretend.Generator(torch.device("cuda"))
    assert generator.device.type == "cpu"
    assert isinstance(generator, torch.Generator)
