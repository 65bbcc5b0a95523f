"""`python -m bench overhead`: every case starts the kernels that it is said to, and is compared with another run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

from bench import overhead
from bench.errors import BenchError
from bench.stub import stubbed
from tritonbn import launch
from tritonbn.timing import Quartiles

ROOT = Path(__file__).resolve().parent.parent


def measured(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """overhead.json and the output of a short run, in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "overhead", "--device", "cpu", "--blocks", "3", "--calls", "2"]
    done = subprocess.run(
        [*command, "--out", str(folder), *options], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "overhead.json").read_text())
    return found, done.stdout


def test_a_run_and_one_compared_with_it(tmp_path: Path) -> None:
    first, _ = measured(tmp_path / "first")
    assert [row["launches"] for row in first["rows"]] == [1, 2, 2, 4, 1, 1, 1, 1, 2, 3]
    assert (first["stubbed"], first["before"], first["blocks"], first["calls"]) == (True, None, 3, 2)
    assert {"cpu", "commit", "torch", "triton"} <= first["machine"].keys()
    for row in first["rows"]:
        assert row["us"].keys() >= {"torch", "jit", "ours"}
        assert ("unfused" in row["us"]) == ("fused" in row["case"] or "the same" in row["case"])
        assert all(0 < us["low"] <= us["median"] <= us["high"] for us in row["us"].values())
        assert (row["parts_us"] is not None) == ("no_grad" in row["us"])
    second, output = measured(tmp_path / "second", "--before", str(tmp_path / "first" / "overhead.json"))
    assert second["before"] == first["machine"]
    assert [row["before"] for row in second["rows"]] == [row["us"]["ours"] for row in first["rows"]]
    assert f"{second['rows'][0]['before']['median']:.1f} (" in output


def test_parts_are_differences() -> None:
    figures = {name: Quartiles(0, us, 99) for name, us in
               {"ours": 20.0, "no_grad": 13.0, "inner": 9.0, "no_launch": 5.0}.items()}  # fmt: skip
    assert overhead.parts(figures) == {"checks and plan": 4.0, "autograd": 7.0, "allocation": 5.0, "launch": 4.0}
    assert overhead.parts({"ours": figures["ours"]}) is None


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [], "machine": {}', '{"rows": [{"case": "x"}], "machine": {}}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="expected the JSON of this command"):
        overhead.earlier(path)
    with pytest.raises(BenchError, match="expected the JSON of this command"):
        overhead.earlier(tmp_path / "absent.json")


def test_the_interpreter_has_no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(BenchError, match="unset TRITON_INTERPRET"), stubbed():
        pass
