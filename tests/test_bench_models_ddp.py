"""`torchrun -m bench models --ddp`: two processes on the CPU, connected by gloo."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench.gpu import finished

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

ROOT = Path(__file__).parent.parent
OPTIONS = ("--ddp", "--model", "mnist-mlp", "--batch", "8", "--dtype", "fp32", "--steps", "2", "--device", "cpu")
# In one of the processes, building or running one arm fails.
FAILING = """
import os, sys
from bench.__main__ import main
from bench.models import arms

build = arms.network_of

def network_of(name, begin):
    if name == "tritonbn" and os.environ["RANK"] == "1":
        raise ValueError("only here")
    return build(name, begin)

arms.network_of = network_of
sys.exit(main(["models", *sys.argv[1:]]))
"""


def torchrun(out: Path, *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """What two processes write, and what they say; outside Triton's interpreter."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    log = out.with_name("log")
    with log.open("w") as output:
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ended = finished([*command, *OPTIONS, "--out", str(out)], output, 120, variables)
    printed = log.read_text()
    assert (ended != 0) is (code != 0), printed
    found: dict[str, Any] = json.loads((out / "models.json").read_text())
    return found, printed


def test_two_processes_train_together(tmp_path: Path) -> None:
    content, printed = torchrun(
        tmp_path, "-m", "bench", "models", "--mode", "eager,graph", "--provider", "torch,tritonbn"
    )
    eager = [row for row in content["rows"] if row["mode"] == "eager"]
    assert [(row["direction"], row["provider"]) for row in eager][:4] == [
        ("training", "torch"), ("training", "torch-again"), ("training", "tritonbn"), ("inference", "torch"),
    ]  # fmt: skip
    for row in eager:
        assert row["error"] is None
        assert row["processes"] == 2
        assert row["images_per_second"] == pytest.approx(2 * 8 * 1000 / row["ms"])
        assert row["agrees"]
    graph = {row["error"] for row in content["rows"] if row["mode"] == "graph"}
    assert graph == {"not here: CUDA graphs need a GPU"}
    assert content["settings"]["processes"] == 2
    assert printed.count("mnist-mlp, training, batch 8, 2 processes, nc, fp32, eager") == 1, "one of them speaks"
    assert printed.count("Written: ") == 1


def test_a_failure_in_one_process_is_one_in_all(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    content, printed = torchrun(
        tmp_path / "out", str(script), "--training", "--provider", "torch,tritonbn,fused", code=1
    )
    rows = {row["provider"]: row for row in content["rows"]}
    assert rows["tritonbn"]["error"] == "it failed in another process"
    assert rows["tritonbn"]["ms"] is None
    assert all(row["ms"] > 0 for name, row in rows.items() if name != "tritonbn")
    assert "FAILED: tritonbn" in printed
