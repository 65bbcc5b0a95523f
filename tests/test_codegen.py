"""What the compiler makes of the kernels, read from the machine code: no GPU is needed for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import codegen, machine_code
from bench.__main__ import main
from tritonbn import launch

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {
    "kernel", "path", "layout", "dtype", "shape", "target", "registers", "spills", "shared_bytes", "load_bits",
    "store_bits",
}  # fmt: skip
Rows = list[dict[str, Any]]


def compiled(folder: Path, *options: str) -> Rows:
    """The rows of `python -m bench codegen`, in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = folder / "rows.json"
    command = [sys.executable, "-m", "bench", "codegen", "--subset", "--json", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows: Rows = json.loads(output.read_text())
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("codegen")
    return compiled(folder, "--target", "all", "--dtype", "bf16") + compiled(folder, "--dtype", "fp32")


def test_every_kernel_compiles_for_every_target(rows: Rows) -> None:
    kernels = {"forward_kernel", "statistics_kernel", "normalize_kernel", "inference_kernel", "backward_kernel",
               "gradient_sums_kernel", "input_gradient_kernel"}  # fmt: skip
    for target in codegen.TARGETS:
        assert {row["kernel"] for row in rows if row["target"] == target} == kernels
    assert all(row.keys() >= FIELDS for row in rows)


def test_nothing_spills(rows: Rows) -> None:
    assert not [row for row in rows if row["spills"]]
    assert all(0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255) for row in rows)


def test_full_tensors_are_read_and_written_128_bits_at_a_time(rows: Rows) -> None:
    """All shapes of the subset allow it: 7x7 and 14x14 planes, [60, 100] rows, in 16 and 32 bits."""
    nvidia = [row for row in rows if row["target"] != "gfx942"]
    assert all(row["load_bits"] == 128 for row in nvidia)
    assert all(row["store_bits"] in (128, None) for row in nvidia)
    storing = {row["kernel"] for row in nvidia if row["store_bits"]}
    assert storing == {row["kernel"] for row in nvidia} - {"statistics_kernel"}


@pytest.mark.parametrize(
    ("line", "bits"),
    [("LDG.E.128.CONSTANT R4", 128), ("LDG.E.U16 R0", 16), ("LDG.E R0", 32), ("STG.E.64 [R2]", 64)],
)  # fmt: skip
def test_width_of_an_instruction(line: str, bits: int) -> None:
    assert machine_code._sass_bits(line.split()[0][3:]) == bits


def test_a_narrow_or_unrecognized_access_is_a_failure() -> None:
    row = {"load_bits": 128, "store_bits": None, "planned_bits": 128}
    assert not codegen._is_narrow(row)
    assert codegen._is_narrow(row | {"load_bits": 16})
    assert codegen._is_narrow(row | {"store_bits": 64})
    assert codegen._is_narrow(row | {"load_bits": None})


def test_under_the_interpreter_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert main(["codegen"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
