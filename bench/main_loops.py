"""What a kernel's main loops keep busy in a multiprocessor (SM), for each element, beside the time that memory takes.

An estimate from machine code alone: no latency, no dependence between instructions, no bank conflicts; branches within
a loop, as for the ends of odd planes, count as if they were taken each time.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from bench.sass import Instruction, access_bits
from tritonbn.device import KNOWN, Device
from tritonbn.plan import Plan

WARP = 32


class Sm(NamedTuple):
    """What an SM does in a clock, in results of one thread, and what it holds.

    Results: CUDA C Programming Guide, throughput of native arithmetic instructions, by compute capability. Issue: four
    schedulers, a warp instruction each. Loads and stores: one warp's addresses and 128 bytes (the tuning guides).
    """

    major: int
    fp32: int  # add, multiply, fused multiply-add; integers are multiplied by half of the same units at least
    fp64: int
    shared_memory_per_multiprocessor: int  # bytes
    minor: int = 0
    multi_processor_count: int = 1
    integer: int = 64  # add, logic, shift, compare, minimum, select; packing of 16-bit floats is taken for one of these
    multiply: int = 64  # of integers, which also moves and shifts
    special: int = 16  # reciprocal, square root, exponential; conversions between types
    memory: int = 32
    issue: int = 4 * WARP


SMS = {"sm_80": Sm(8, 64, 32, 164 << 10), "sm_90": Sm(9, 128, 64, 228 << 10), "sm_100": Sm(10, 128, 64, 228 << 10)}
MEMORY_BYTES = 128  # that an SM loads or stores in a clock
# The GPUs there are figures of, by what their machine code is compiled for.
GPUS: dict[str, tuple[str, Device]] = {
    name: (target, next(device for device in KNOWN if name in device.name))
    for name, target in (("A100", "sm_80"), ("H100", "sm_90"), ("H200", "sm_90"), ("B200", "sm_100"))
}

# Units of an SM by the first letters of the instructions that they do. The rest (branches, barriers, uniform registers)
# only takes its turn to be issued.
_UNITS = {
    "fp32": "FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2",
    "multiply": "IMAD",
    "special": "MUFU|F2F(?!P)|F2I|I2F(?!P)|POPC|FRND",
    "fp64": "DADD|DMUL|DFMA|DSETP|DMNMX",
    "memory": "LDG|STG|LDS|STS|LDL|STL|LDC|ATOM|RED|SHFL",
    "integer": "IADD|LOP3|SHF|ISETP|LEA|SEL|PRMT|V?IMNMX|VIADD|PLOP3|IABS|BMSK|SGXT|FSETP|FMNMX|FSEL|F2FP|MOV|CSEL|P2R"
    "|R2P|FCHK|HSETP2|HMNMX2|VOTE|CS2R|BREV|FLO|I2FP",
}
_UNIT = re.compile("|".join(f"(?P<{unit}>{names})" for unit, names in _UNITS.items()))
_GLOBAL = re.compile(r"LDG|STG")
# Those that read full tensors twice, or sums and then the gradient.
_BOTH_PASSES = re.compile("^(cooperative_)?backward_kernel$")


class Loop(NamedTuple):
    """A main loop of a kernel, or all of it: what a warp does in an iteration."""

    whole: bool
    stores: bool  # a tile: else it only sums
    read: int  # bytes of tiles that a thread loads
    written: int  # that it stores
    bits: bool  # packed bits are loaded or stored, too
    units: dict[str, float]  # instructions by the unit that does them; issue: all of them; bytes: of loads and stores


def main_loops(code: Iterable[Instruction | str]) -> list[Loop]:
    """The innermost loops that load tiles: of those that store any the one that loads most, and of those that do not.

    All of the kernel where there is no such loop, because a program has one tile.
    """
    code = list(code)
    bodies = [body for body in _innermost(code) if any(i.tile == "load" and i.name.startswith("LDG") for i in body)]
    if not bodies:
        return [_loop([i for i in code if isinstance(i, Instruction) and i.name != "NOP"], whole=True)]
    loops: dict[bool, Loop] = {}
    for loop in map(_loop, bodies):
        if loop.stores not in loops or loop.read > loops[loop.stores].read:
            loops[loop.stores] = loop
    return list(loops.values())


def _innermost(code: list[Instruction | str]) -> list[list[Instruction]]:
    """What lies between a label and a branch back to it, without what holds another such range."""
    labels = {item: index for index, item in enumerate(code) if isinstance(item, str)}
    spans = []
    for index, item in enumerate(code):
        if isinstance(item, Instruction) and item.name.startswith("BRA") and item.target is not None:
            first = labels.get(item.target, index)
            if first < index:
                spans.append((first, index))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[item for item in code[first : last + 1] if isinstance(item, Instruction)] for first, last in inner]


def _loop(body: list[Instruction], whole: bool = False) -> Loop:
    """Within a loop all accesses to memory are of tiles, but for bits: the assembler moves some to other lines."""
    units: Counter[str] = Counter({"issue": len(body)})
    moved = {"LDG": 0, "STG": 0}
    bits = False
    for name, _, tile in body:
        if found := _UNIT.match(name):
            units[found.lastgroup or ""] += 1
        if re.match("LDG|STG|LDS|STS", name):
            units["bytes"] += WARP * access_bits(name) // 8
        if found := _GLOBAL.match(name):
            packed = access_bits(name) == 8
            bits = bits or packed
            if not packed and (tile or not whole):
                moved[found[0]] += access_bits(name) // 8
    units["fp32"] += units["multiply"]  # in the same pipe
    stores = moved["STG"] > 0 if whole else any(i.tile == "store" and i.name.startswith("STG") for i in body)
    return Loop(whole, stores, moved["LDG"], moved["STG"], bits, dict(units))


class Busy(NamedTuple):
    """What a loop costs for each element of the tensor."""

    instructions: float  # of a thread; those on padding of tiles count too
    bytes: float  # that memory moves if L2 has none of them
    unit: str  # of an SM, the busiest one
    clocks: float  # of that unit
    whole: bool  # of all of the kernel, whose sums, merges and barriers count too

    def ratio(self, device: Device) -> float:
        """Time of the busiest unit by time of memory: above 1, the loop is not bound by memory."""
        return self.clocks / (device.sms * device.clock) / (self.bytes / device.bandwidth)


def busy(loop: Loop, kernel: str, pointers: Iterable[str], plan: Plan, sm: Sm) -> Busy:
    """What a main loop of a kernel costs.

    pointers: the names of the arguments that are tensors. They say how many tensors the loop reads, and so of how many
    tiles an iteration is: loops are unrolled.
    """
    tile_bytes = plan.tile.BLOCK_R * plan.tile.BLOCK_L * plan.itemsize / (WARP * plan.num_warps)
    tensors = _tensors(loop, kernel, set(pointers))
    tiles = loop.read / (tensors * tile_bytes)  # of each tensor, in an iteration
    elements = tiles * tile_bytes / plan.itemsize * _filled(plan)
    clocks = {unit: n / getattr(sm, unit) for unit, n in loop.units.items() if unit != "bytes"}
    clocks["memory"] = max(clocks.get("memory", 0.0), loop.units.get("bytes", 0) / (WARP * MEMORY_BYTES))
    unit = max(clocks, key=lambda name: clocks[name])
    stores = 2 if plan.tile.ALIGN > 1 else 1  # of each tile: whole accesses, and parts at its ends
    stored = round(loop.written / (stores * tiles * tile_bytes))
    moved = (tensors + stored) * plan.itemsize + loop.bits / 8
    return Busy(loop.units["issue"] / elements, moved, unit, clocks[unit] / elements, loop.whole)


def _tensors(loop: Loop, kernel: str, pointers: set[str]) -> int:
    """Full tensors that a loop reads."""
    if not loop.stores and "dy_ptr" not in pointers:
        return 1  # statistics, of x
    if loop.stores and not loop.whole and "dresidual_ptr" in pointers and _BOTH_PASSES.match(kernel):
        return 2  # dresidual in place of dy and what derivatives take, and x
    return len(pointers & {"dy_ptr", "x_ptr", "other_ptr", "residual_ptr"})


def _filled(plan: Plan) -> float:
    """The part of the tiles' elements that are there: the rest is padding."""
    N, C, S = plan.shape
    return N * C * S / (plan.groups * plan.tiles * plan.tile.BLOCK_R * plan.tile.BLOCK_L)
