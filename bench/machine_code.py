"""Registers, spills and access widths, read from machine code with the tools in Triton's package.

Widths are those of full-tensor accesses alone: instructions are attributed to source lines, and tiles are loaded and
stored in two functions of `kernels/tiles.py`.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from bench import main_loops, sass

Facts = dict[str, int | None]


def facts(asm: dict[str, Any]) -> tuple[Facts, list[main_loops.Loop]]:
    """registers, spills, load_bits and store_bits (the narrowest full-tensor access, None if there is none).

    And the main loops, of NVIDIA's code alone.
    """
    if "amdgcn" in asm:
        return read_amd(asm["amdgcn"]), []
    usage, code = disassemble(asm["cubin"])
    return read_nvidia(usage, code), main_loops.main_loops(sass.parse(code))


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code with source lines) as NVIDIA's tools print them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", path], text=True, stderr=subprocess.STDOUT)
        sass = subprocess.check_output([tools / "nvdisasm", "-c", "-g", path], text=True, stderr=subprocess.DEVNULL)
    return usage, sass


def read_nvidia(usage: str, code: str) -> Facts:
    widths: dict[str, list[int]] = {"load": [], "store": []}
    spills = 0
    for instruction in sass.parse(code):
        if isinstance(instruction, sass.Instruction):
            spills += re.match(r"(LDL|STL)\b", instruction.name) is not None
            if instruction.tile and re.match(r"(LDG|LDGSTS|STG)\b", instruction.name):
                widths[instruction.tile].append(sass.access_bits(instruction.name))
    return {"registers": _number(r"REG:(\d+)", usage), "spills": spills, **_narrowest(widths)}


def read_amd(assembly: str) -> Facts:
    bits = {"ubyte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    widths: dict[str, list[int]] = {"load": [], "store": []}
    function = None
    for line in assembly.splitlines():
        if found := re.search(r"^\s*\.loc\s.*;\s*([\w./]+):(\d+):", line):
            if found[2] != "0":  # line 0: the compiler's own, inside whatever came before
                function = sass.tile_function(found[1], int(found[2]))
        elif function and (found := re.search(r"\b(?:global|buffer|flat)_(load|store)_([a-z0-9]+)", line)):
            widths[found[1]].append(bits[found[2]])
    registers, spills = (_number(rf"\.{key}:\s+(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": registers, "spills": spills, **_narrowest(widths)}


def _number(pattern: str, text: str) -> int:
    """The number found; it must be there, for none at all would read as no spills."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return int(found[1])


def _narrowest(widths: dict[str, list[int]]) -> Facts:
    return {f"{name}_bits": min(found, default=None) for name, found in widths.items()}
