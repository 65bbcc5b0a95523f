"""What the compiler makes of the kernels, read from the machine code: no GPU is needed for it."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

from bench import codegen, machine_code
from bench.__main__ import main
from bench.main_loops import GPUS
from tritonbn import cost, launch, model
from tritonbn.choice import Problem
from tritonbn.device import H200
from tritonbn.kernels import tiles

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {
    "kernel", "epilogue", "path", "layout", "dtype", "shape", "target", "registers", "spills", "shared_bytes",
    "load_bits", "store_bits", "gpu", "instructions", "bytes", "unit", "ratio", "whole_kernel", "programs_per_sm",
}  # fmt: skip
Rows = list[dict[str, Any]]


def compiled(folder: Path, *options: str) -> Rows:
    """The rows of `python -m bench codegen`, in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = folder / "rows.json"
    command = [sys.executable, "-m", "bench", "codegen", "--json", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows: Rows = json.loads(output.read_text())
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("codegen")
    plain = "--shape", "256,512,7,7", "--epilogues", "none"
    rows = compiled(folder, "--target", "all", "--dtype", "bf16", "--shape", "60,100", *plain)
    rows += compiled(folder, "--dtype", "fp32", *plain)
    return rows + compiled(folder, "--dtype", "bf16", "--subset")


def test_every_kernel_compiles_for_every_target(rows: Rows) -> None:
    kernels = {"forward_kernel", "statistics_kernel", "normalize_kernel", "inference_kernel", "backward_kernel",
               "gradient_sums_kernel", "input_gradient_kernel", "cooperative_forward_kernel",
               "cooperative_backward_kernel"}  # fmt: skip
    pairs = {"pair_forward_kernel", "pair_normalize_kernel", "pair_inference_kernel", "pair_sums_kernel",
             "pair_gradient_kernel", "pair_backward_kernel"}  # fmt: skip
    for target in codegen.TARGETS:
        assert {row["kernel"] for row in rows if row["target"] == target} == kernels | pairs
    for epilogue, more in (("-", pairs), ("relu", set()), ("add + relu", pairs)):
        assert {row["kernel"] for row in rows if row["epilogue"] == epilogue} == kernels | more
    assert all(row.keys() >= FIELDS for row in rows)


def test_nothing_spills(rows: Rows) -> None:
    assert not [row for row in rows if row["spills"]]
    assert all(0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255) for row in rows)


def test_split_reductions_leave_room_for_two_programs_per_sm(rows: Rows) -> None:
    """Plans count on it: 65536 registers, 256 threads a program. Those that store dx too may take a few more.

    Those with an epilogue, and of two batch norms, take more where one row of lanes is a tile, as in 17x17 planes: the
    channels' values take as many registers as the data there.
    """
    reductions = [row for row in rows if row["path"] == "split" and row["num_warps"] == 8]
    sums = "statistics_kernel", "gradient_sums_kernel", "pair_sums_kernel"
    reductions = [row for row in reductions if row["kernel"] in sums]
    for row in reductions:
        wide = row["kernel"] == "pair_sums_kernel" and row["shape"][2:] == [17, 17]
        if row["store_bits"] is None and not wide:
            assert row["registers"] <= 128, row
    assert {row["target"] for row in reductions} == set(codegen.TARGETS)


def test_sums_of_rows_take_little_shared_memory(rows: Rows) -> None:
    """What warps have left of their lanes, not the tile: Triton would move all of that for an axis more."""
    sums = "statistics_kernel", "gradient_sums_kernel"
    found = [row for row in rows if row["kernel"] in sums and row["layout"] == "rows" and row["path"] == "split"]
    found = [row for row in found if row["target"] != "gfx942" and row["shape"][2:] == [7, 7]]
    assert found
    assert all(row["shared_bytes"] <= 8192 for row in found)


def test_programs_that_wait_for_each_other_leave_room_for_two_per_sm(rows: Rows) -> None:
    waiting = [row for row in rows if row["kernel"].startswith("cooperative") and row["target"] != "gfx942"]
    assert all(row["registers"] * 32 * row["num_warps"] <= 65536 // 2 for row in waiting)
    assert {row["path"] for row in waiting} == {"cooperative", "stream"}


def test_full_tensors_are_read_and_written_128_bits_at_a_time(rows: Rows) -> None:
    """All shapes of the subset allow it: 7x7 and 14x14 planes, [60, 100] rows, in 16 and 32 bits."""
    nvidia = [row for row in rows if row["target"] != "gfx942"]
    assert all(row["load_bits"] == 128 for row in nvidia)
    assert all(row["store_bits"] in (128, None) for row in nvidia)
    storing = {row["kernel"] for row in nvidia if row["store_bits"]}
    assert storing == {row["kernel"] for row in nvidia} - {"statistics_kernel"}


def of_large_planes(rows: Rows, kernel: str) -> dict[str, Any]:
    (row,) = (
        row for row in rows
        if (row["kernel"], row["target"], row["dtype"], row["epilogue"], row["path"], row["layout"], row["shape"])
        == (kernel, "sm_90", "bf16", "-", "split", "planes", [256, 64, 56, 56]) and row["store_bits"] in STORES[kernel]
    )  # fmt: skip
    return row


# Gradient sums that store dx too are those of given statistics.
STORES = {"statistics_kernel": (None,), "gradient_sums_kernel": (None,), "normalize_kernel": (128,)}
# Instructions of threads for an element; 12.25 of 13 blocks of lanes are no padding.
MEASURED = {"statistics_kernel": cost.STATISTICS, "gradient_sums_kernel": cost.GRADIENT_SUMS,
            "normalize_kernel": cost.NORMALIZE}  # fmt: skip


@pytest.mark.parametrize("kernel", list(MEASURED))
def test_the_cost_of_plans_has_the_instructions_that_kernels_have(rows: Rows, kernel: str) -> None:
    """To 15%: kernels change, and so do compilers. If this fails, put the new ones into `tritonbn/cost.py`."""
    row = of_large_planes(rows, kernel)
    problem = Problem("backward" if kernel == "gradient_sums_kernel" else "forward", "planes", (256, 64, 3136), 2)
    expected = MEASURED[kernel].of(model.best(problem, H200, "split"), problem)
    assert row["instructions"] * 12.25 / 13 == pytest.approx(expected, rel=0.15)


def test_batch_norm_alone_is_bound_by_memory(rows: Rows) -> None:
    """On an H200. A B200 has half as much bandwidth again for each instruction that it issues."""
    for row in rows:
        if row["target"] == "sm_90" and not row["whole_kernel"] and row["epilogue"] == "-":
            assert 0 < row["ratio"] < codegen.CLOSE, row
    row = of_large_planes(rows, "statistics_kernel")
    assert (row["gpu"], row["bytes"], row["unit"], row["whole_kernel"]) == ("NVIDIA H200", 2, "issue", False)
    assert {row["gpu"] for row in rows} == {*(device.name for _, device in GPUS.values())} - {
        "NVIDIA H100 80GB HBM3",
    } | {None}
    assert all((row["gpu"] is None) == (row["target"] == "gfx942") == (row["ratio"] is None) for row in rows)


def test_programs_per_multiprocessor_follow_from_registers_and_shared_memory(rows: Rows) -> None:
    for row in rows:
        if row["target"] != "gfx942":
            by_registers = 65536 // (32 * row["num_warps"] * -(-row["registers"] // 8) * 8)
            assert 1 <= row["programs_per_sm"] <= by_registers, row
    assert of_large_planes(rows, "normalize_kernel")["programs_per_sm"] >= 4


def test_the_table_fits_a_screen(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the width of long shapes, and the column of targets if there are several."""
    few = [row for row in rows if row["target"] == "sm_90" and row["dtype"] == "bf16"]
    codegen.print_table(few)
    codegen.print_bound(few)
    table, bound = capsys.readouterr().out.split("On an NVIDIA H200 not memory-bound")
    lines = table.splitlines()
    assert lines[0].split() == [
        "kernel", "epilogue", "path", "layout", "type", "shape", "bits", "regs", "/SM", "instr", "of", "memory",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 100
    assert len(lines) == len(few) + 1
    assert sum("*" in line for line in lines) == sum(row["whole_kernel"] for row in few) > 0
    assert "close to it (above 0.8 of memory's time)" in bound


def line_of(function: Any) -> int:
    """A source line inside a function of kernels/tiles.py."""
    return inspect.getsourcelines(getattr(function, "fn", function))[1] + 2


def test_machine_code_of_nvidia_is_read() -> None:
    load, store = line_of(tiles.load_tile), line_of(tiles.store_tile)
    code = f"""
        //## File "/somewhere/tiles.py", line {load}
            /*0010*/  @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
            /*0020*/      LDG.E.64.STRONG.GPU R8, desc[UR4][R2.64] ;
        //## File "/somewhere/tiles.py", line {store}
            /*0030*/      STG.E.U16 desc[UR4][R2.64], R4 ;
        //## File "/somewhere/statistics.py", line {load}
            /*0040*/      LDG.E R4, desc[UR4][R2.64] ;
            /*0050*/      STL [R1+0x4], R4 ;
            /*0060*/      LDL.LU R4, [R1+0x4] ;
    """
    expected = {"registers": 40, "spills": 2, "load_bits": 64, "store_bits": 16}
    assert machine_code.read_nvidia(" REG:40 STACK:8", code) == expected
    with pytest.raises(ValueError, match="REG"):
        machine_code.read_nvidia("no such thing", code)


def test_machine_code_of_amd_is_read() -> None:
    load, store = line_of(tiles.load_tile), line_of(tiles.store_tile)
    assembly = f"""
        .loc 2 {load} 20 ; tiles.py:{load}:20 @[ normalize.py:1:1 ]
        global_load_dwordx4 v[4:7], v[2:3], off
        .loc 2 0 20 is_stmt 0 ; tiles.py:0:20
        buffer_load_dwordx2 v[4:5], v2, s[0:3], 0 offen
        .loc 2 {store} 4 ; tiles.py:{store}:4
        global_store_short v[2:3], v4, off
        .loc 1 7 4 ; normalize.py:7:4
        global_load_dword v4, v[2:3], off
    .vgpr_count:     52
    .vgpr_spill_count: 3
    """
    expected = {"registers": 52, "spills": 3, "load_bits": 64, "store_bits": 16}
    assert machine_code.read_amd(assembly) == expected
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        machine_code.read_amd(assembly.replace("vgpr_spill_count", "vgpr_spilled"))


def test_bad_options_fail_before_compiling(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    (tmp_path / "file").write_text("")
    assert main(["codegen", "--json", str(tmp_path / "file" / "rows.json")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["codegen", "--workers", "0"])
    assert stop.value.code == 2


def test_a_narrow_or_unrecognized_access_is_a_failure() -> None:
    row = {"load_bits": 128, "store_bits": None, "planned_bits": 128, "target": "sm_90"}
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
