"""What main loops keep busy, read from machine code that was written by hand: by value, without a compiler."""

import inspect
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

from bench import codegen, main_loops, sass
from bench.main_loops import GPUS, SMS, busy
from tritonbn.device import H200
from tritonbn.kernels import tiles
from tritonbn.plan import make_plan

# 256 lanes x 16 rows by 8 warps: 16 elements a thread, 32 bytes. Of 13 blocks of lanes 3136 / 256 = 12.25 are there.
PLAN = make_plan("forward", "planes", (256, 64, 3136), 2)
FILLED = 12.25 / 13


def line_of(function: Any) -> int:
    """A source line inside a function of kernels/tiles.py."""
    return inspect.getsourcelines(function.fn)[1] + 2


LOAD = f'//## File "/somewhere/tiles.py", line {line_of(tiles.load_tile)}'
STORE = f'//## File "/somewhere/tiles.py", line {line_of(tiles.store_tile)}'
OTHER = '//## File "/somewhere/normalize.py", line 7'


def code(*lines: str) -> str:
    """The lines as nvdisasm prints them: labels and comments as they are, instructions with addresses."""
    printed = []
    for index, line in enumerate(lines):
        plain = line.startswith(("//", ".L"))
        printed.append(f"\t{line}" if plain else f"        /*{16 * index:04x}*/              {line} ;   /* 0x0123 */")
    return "\n".join(printed)


NORMALIZE = code(
    "MOV R1, c[0x0][0x28]",
    LOAD, "LDG.E.128 R4, desc[UR4][R2.64]", OTHER, ".L_x_0:",
    LOAD, "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",
    OTHER, *["FFMA R4, R4, R5, R6"] * 8, "MUFU.EX2 R4, R4", "IMAD.U32 R4, R4, 0x10000, RZ", "LOP3.LUT R4, R4, R5, RZ",
    "UIADD3 UR4, UR4, 0x1, URZ",
    STORE, "@P1 STG.E.128 desc[UR4][R2.64], R4", OTHER, "VIADD R2, R2, 0x1", "ISETP.NE.AND P1, PT, R2, R3, PT",
    "@P1 BRA `(.L_x_0)", "EXIT", ".L_x_1:", "BRA `(.L_x_1)", "NOP", "NOP",
)  # fmt: skip


def test_labels_instructions_and_what_accesses_tiles() -> None:
    parsed = list(sass.parse(NORMALIZE))
    assert parsed[:4] == [
        sass.Instruction("MOV"), sass.Instruction("LDG.E.128", None, "load"), ".L_x_0",
        sass.Instruction("LDG.E.128", None, "load"),
    ]  # fmt: skip
    assert sass.Instruction("STG.E.128", None, "store") in parsed
    assert sass.Instruction("BRA", ".L_x_0") in parsed
    assert [sass.access_bits(name) for name in ("LDG.E.128.CONSTANT", "STG.E.U16", "LDG.E", "LDG.E.S8")] == [
        128, 16, 32, 8,
    ]  # fmt: skip


def test_a_loop_that_stores() -> None:
    """8 of a thread's 16 elements in an iteration of 17 instructions; padding counts."""
    (loop,) = main_loops.main_loops(sass.parse(NORMALIZE))
    assert loop[:5] == (False, True, 16, 16, False)
    assert loop.units == {
        "issue": 17, "fp32": 9, "multiply": 1, "special": 1, "integer": 3, "memory": 2, "bytes": 2 * 32 * 16,
    }  # fmt: skip
    cost = busy(loop, "normalize_kernel", ["x_ptr", "y_ptr", "mean_ptr"], PLAN, SMS["sm_90"])
    assert cost.instructions == pytest.approx(17 / 8 / FILLED)
    assert (cost.bytes, cost.unit, cost.whole) == (4, "memory", False)
    assert cost.clocks == pytest.approx(2 * 16 / 128 / 8 / FILLED)  # 128 bytes a clock to and from L1
    assert cost.ratio(H200) == pytest.approx(cost.clocks / (132 * 1.755e9) / (4 / 4.3e12))


def test_exponentials_keep_the_special_unit_busy_and_an_a100_has_half_of_the_fp32_units() -> None:
    special = NORMALIZE.replace("FFMA R4, R4, R5, R6", "MUFU.EX2 R4, R4")
    (loop,) = main_loops.main_loops(sass.parse(special))
    cost = busy(loop, "normalize_kernel", ["x_ptr", "y_ptr"], PLAN, SMS["sm_90"])
    assert cost.unit == "special"
    assert cost.clocks == pytest.approx(9 / 16 / 8 / FILLED)
    (loop,) = main_loops.main_loops(sass.parse(NORMALIZE))
    many = loop._replace(units=loop.units | {"fp32": 40, "issue": 50})
    for target, clocks in (("sm_80", 40 / 64), ("sm_90", 50 / 128)):
        cost = busy(many, "normalize_kernel", ["x_ptr", "y_ptr"], PLAN, SMS[target])
        assert cost.clocks == pytest.approx(clocks / 8 / FILLED)


def test_of_two_passes_each_main_loop_counts_and_only_innermost_ones() -> None:
    text = code(
        ".L_x_9:", ".L_x_0:", LOAD, "LDG.E.128 R4", "LDG.E.128 R8", OTHER, "FADD R4", "@P0 BRA `(.L_x_0)", ".L_x_1:",
        LOAD, "LDG.E.128 R4", OTHER, "LDG.E.U8 R9", "STG.E.U8 R9", STORE, "STG.E.128 R4", OTHER, "@P0 BRA `(.L_x_1)",
        ".L_x_2:", "LDG.E R4", "@P0 BRA `(.L_x_2)", "@P1 BRA `(.L_x_9)",
    )  # fmt: skip
    sums, stores = main_loops.main_loops(sass.parse(text))
    assert sums[:5] == (False, False, 32, 0, False)
    assert stores[:5] == (False, True, 16, 16, True)


def test_how_many_tensors_a_loop_reads_follows_from_the_kernel_and_its_pointers() -> None:
    """So its bytes for an element do, and of how many elements an iteration is."""
    sums = main_loops.Loop(False, False, 32, 0, False, {"issue": 100})
    stores = sums._replace(stores=True, written=16)

    def moved(loop: main_loops.Loop, kernel: str, *pointers: str) -> float:
        cost = busy(loop, kernel, [f"{name}_ptr" for name in pointers], PLAN, SMS["sm_90"])
        tensors = loop.read // 16 if cost.bytes > 2 else 1
        assert cost.instructions == pytest.approx(100 / (loop.read / 2 / tensors) / FILLED)
        return cost.bytes

    assert moved(sums, "forward_kernel", "x", "residual", "y") == 2, "statistics read x alone"
    assert moved(stores, "forward_kernel", "x", "residual", "y") == 6
    assert moved(stores._replace(bits=True), "normalize_kernel", "x", "residual", "y", "bits") == 6 + 1 / 8
    gradients = "dy", "x", "residual", "dx", "dresidual"
    assert moved(stores, "backward_kernel", *gradients) == 6, "dresidual and x again"
    assert moved(stores._replace(read=48), "gradient_sums_kernel", *gradients) == 8
    assert moved(sums, "backward_kernel", "dy", "x", "dx") == 4


def test_without_a_loop_all_of_the_kernel_counts() -> None:
    text = code(LOAD, "LDG.E.128 R4", OTHER, "LDG.E R5", "FADD R4", STORE, "STG.E.128 R4", OTHER, "NOP")
    (loop,) = main_loops.main_loops(sass.parse(text))
    assert loop[:5] == (True, True, 16, 16, False)
    assert loop.units["issue"] == 4
    assert busy(loop, "forward_kernel", ["x_ptr", "y_ptr"], PLAN, SMS["sm_90"]).whole


def test_each_gpu_is_compared_with_its_own_machine_code() -> None:
    assert {name: target for name, (target, _) in GPUS.items()} == {
        "A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100",
    }  # fmt: skip
    assert codegen.compared(None, "H200") == {"sm_90": H200}
    assert codegen.compared(None, "A100") == {"sm_80": GPUS["A100"][1]}
    assert codegen.compared("sm_90", "A100") == {"sm_90": GPUS["H100"][1]}
    named = {target: device and device.name for target, device in codegen.compared("all", "H200").items()}
    assert named == {
        "sm_80": "NVIDIA A100-SXM4-80GB", "sm_90": "NVIDIA H200", "sm_100": "NVIDIA B200", "gfx942": None,
    }  # fmt: skip
