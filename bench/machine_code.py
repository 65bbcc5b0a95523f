"""Registers, spills and access widths, read from machine code with the tools in Triton's package.

Widths are those of full-tensor accesses alone: instructions are attributed to source lines, and tiles are loaded and
stored in two functions of `kernels/tiles.py`.
"""

import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from tritonbn.kernels import tiles

Facts = dict[str, int | None]


def facts(asm: dict[str, Any]) -> Facts:
    """registers, spills, load_bits and store_bits (the narrowest full-tensor access, None if there is none)."""
    return read_amd(asm["amdgcn"]) if "amdgcn" in asm else read_nvidia(*disassemble(asm["cubin"]))


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code with source lines) as NVIDIA's tools print them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", path], text=True, stderr=subprocess.STDOUT)
        sass = subprocess.check_output([tools / "nvdisasm", "-c", "-g", path], text=True, stderr=subprocess.DEVNULL)
    return usage, sass


def read_nvidia(usage: str, sass: str) -> Facts:
    widths: dict[str, list[int]] = {"load": [], "store": []}
    function = None
    for line in sass.splitlines():
        if found := re.search(r'//## File "(.*?)", line (\d+)', line):
            function = _tile_function(found[1], int(found[2]))
        elif function and (found := re.search(r"\b(?:LDG|LDGSTS|STG)\b([\w.]*)", line)):
            widths[function].append(_sass_bits(found[1]))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {"registers": _number(r"REG:(\d+)", usage), "spills": spills, **_narrowest(widths)}


def _sass_bits(suffix: str) -> int:
    """.E.128 -> 128, .E.U16 -> 16, .E -> 32."""
    found = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", suffix)
    return int(found[1]) if found else 32


def read_amd(assembly: str) -> Facts:
    bits = {"ubyte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    widths: dict[str, list[int]] = {"load": [], "store": []}
    function = None
    for line in assembly.splitlines():
        if found := re.search(r"^\s*\.loc\s.*;\s*([\w./]+):(\d+):", line):
            if found[2] != "0":  # line 0: the compiler's own, inside whatever came before
                function = _tile_function(found[1], int(found[2]))
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


def _tile_function(file: str, line: int) -> str | None:
    """load, store, or neither: which of the two tile functions a source line belongs to."""
    if Path(file).name != "tiles.py":
        return None
    for name, function in (("load", tiles.load_tile), ("store", tiles.store_tile)):
        source, first = inspect.getsourcelines(function.fn)
        if first <= line < first + len(source):
            return name
    return None


def _narrowest(widths: dict[str, list[int]]) -> Facts:
    return {f"{name}_bits": min(found, default=None) for name, found in widths.items()}
