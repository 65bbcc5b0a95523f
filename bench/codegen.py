"""What the compiler makes of every kernel: registers, access widths, and what it keeps busy, for any GPU, anywhere.

The launches are the library's own, recorded on meta tensors, so the table shows what would run.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from math import gcd, inf
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import machine_code, main_loops
from bench.console import console, print_columns
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.main_loops import GPUS, SMS, Busy
from bench.mnist import positive
from bench.shapes import shape as sizes_of
from bench.shapes import shapes_of
from tritonbn import handles, launch, pair_launch
from tritonbn.activations import IDENTITY, NAMES, Activation, resolve
from tritonbn.autograd import keeps_bits
from tritonbn.device import Device
from tritonbn.occupancy import resident_programs
from tritonbn.plan import Path as PlanPath
from tritonbn.plan import Plan, forced

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
            torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip

CLOSE = 0.8  # of memory's time: what else takes time will not fit beside it
SHAPE_SETS = "resnet50-256", "awkward"
SUBSET = [
    (60, 100),
    (256, 1024, 14, 14),
    (256, 512, 7, 7),
    (256, 64, 56, 56),
    (4096, 2, 49),
    (32, 192, 17, 17),
]
# Rows, whole planes and groups of planes.
FEW = [(60, 100), (256, 64, 56, 56), (256, 512, 7, 7)]


class Epilogue(NamedTuple):
    """What follows batch norm in the same kernels."""

    activation: Activation = IDENTITY
    residual: bool = False

    def __str__(self) -> str:
        parts = ["add"] * self.residual + [str(self.activation)] * (self.activation != IDENTITY)
        return " + ".join(parts) or "-"


PLAIN = Epilogue()
COMMON = [Epilogue(resolve("relu")), Epilogue(resolve("relu"), True)]
EVERY = [Epilogue(resolve(name), residual) for name in NAMES for residual in (False, True)]


class Launch(NamedTuple):
    """One recorded launch: its kernel by name, so that worker processes can find it, and its compile-time side."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


class Case(NamedTuple):
    """A launch, and the problem that it came from."""

    launch: Launch
    plan: Plan
    dtype: str
    shape: tuple[int, ...]
    epilogue: Epilogue


def cases(shapes: list[tuple[int, ...]], dtypes: list[str], epilogues: list[Epilogue]) -> Iterator[Case]:
    """Every launch of forward, backward, inference and frozen backward, in both layouts where there are two."""
    for shape in shapes:
        formats = [torch.contiguous_format]
        if len(shape) > 3 and shape[1] > 1:
            formats.append(torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
        for memory_format in formats:
            for dtype in dtypes:
                for epilogue in epilogues:
                    for recorded, plan in record(shape, DTYPES[dtype], memory_format, epilogue):
                        yield Case(recorded, plan, dtype, shape, epilogue)


def record(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, epilogue: Epilogue = PLAIN
) -> Iterator[tuple[Launch, Plan]]:
    """The launches for one input, both paths where the plan would take one launch and two are possible."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    w, b, mean, var = torch.empty((4, shape[1]), dtype=parameter, device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")
    activation = epilogue.activation
    residual = x if epilogue.residual else None
    keep_bits = keeps_bits(residual, activation)
    needs_residual = residual if activation != IDENTITY and not keep_bits else None
    calls: list[tuple[Launch, Plan]] = []
    bits: torch.Tensor | None = None

    def backward(training: bool, *wanted: bool) -> None:
        saved = launch.Saved(x, w, b, needs_residual, bits, mean, var)
        with_residual = epilogue.residual and activation != IDENTITY
        launch.backward(x, saved, training, activation, parameter, (*wanted, with_residual))  # type: ignore[arg-type]

    with recording(calls):
        for path in get_args(PlanPath):
            with forced(path), suppress(ValueError):  # not all paths can run all shapes
                _, bits, _, _ = launch.forward(x, residual, w, b, mean, var, counter, 0.1, 1e-5, activation, keep_bits)
            with forced(path), suppress(ValueError):
                backward(True, True, True, True)
        launch.inference(x, residual, w, b, mean, var, 1e-5, activation, keep_bits, keep=True)
        backward(False, True, True, True)
        backward(False, True, False, False)
        if epilogue.residual or epilogue == PLAIN:
            pairs(x, pair_launch.Norm(x, w, b, mean, var, counter, 0.1, 1e-5), activation)
    yield from dict.fromkeys(calls)


def pairs(x: torch.Tensor, norm: pair_launch.Norm, activation: Activation) -> None:
    """Launch the sum of two batch norms, which is added where a residual would be."""
    needs_z = activation != IDENTITY and not activation.two_valued
    assert norm.running_mean is not None
    assert norm.running_var is not None
    kept = pair_launch.Kept(x, norm.weight, norm.bias if needs_z else None, norm.running_mean, norm.running_var)
    dtypes = (norm.running_mean.dtype,) * 2
    paths: tuple[PlanPath, PlanPath] = "single", "split"
    for path in paths:
        with forced(path), suppress(ValueError):
            _, bits, *_ = pair_launch.forward(norm, norm, activation, activation.two_valued)
        with forced(path), suppress(ValueError):
            pair_launch.backward(x, kept, kept, bits, True, activation, dtypes, (True,) * 6)
    pair_launch.inference(norm, norm, activation, activation.two_valued, keep=True)
    for wanted in ((True,) * 6, (True, False, False) * 2):
        pair_launch.backward(x, kept, kept, bits, False, activation, dtypes, wanted)


@contextmanager
def recording(calls: list[tuple[Launch, Plan]]) -> Iterator[None]:
    """Within, launches are written down instead of started."""

    def note(
        kernel: Any, grid: Any, plan: Plan, *args: Any, launches: Any = None, which: Any = None, **constants: Any
    ) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        fixed = {name: None for name, value in values.items() if value is None} | {"T": plan.tile} | constants
        signature = tuple((name, _kind(value)) for name, value in values.items() if name not in fixed)
        calls.append(
            (Launch(kernel.__name__, signature, tuple(fixed.items()), tuple(handles.options(plan).items())), plan)
        )

    real = launch._launch
    launch._launch = note
    try:
        yield
    finally:
        launch._launch = real


def _kind(value: torch.Tensor | float | int) -> str:
    """The type that Triton gives an argument at launch; sizes are not specialized."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp64"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_for(recorded: Launch, target: str) -> tuple[dict[str, int | None], list[main_loops.Loop]]:
    """registers, spills, shared_bytes, load_bits and store_bits (the narrowest full-tensor access), and main loops."""
    kernel = _kernels()[recorded.kernel]
    signature = dict(recorded.signature) | {name: "constexpr" for name, _ in recorded.constants}
    at = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(at(name),): value for name, value in recorded.constants},
        attrs={(at(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")},
    )
    options = dict(recorded.options)
    if TARGETS[target].backend == "hip":
        options.pop("maxnreg", None)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    facts, loops = machine_code.facts(compiled.asm)
    return facts | {"shared_bytes": compiled.metadata.shared}, loops


def _kernels() -> dict[str, Any]:
    here = vars(launch) | vars(pair_launch)
    return {name: value for name, value in here.items() if name.endswith("_kernel")}


def rows(chosen: list[Case], gpus: dict[str, Device | None], workers: int) -> Iterator[dict[str, Any]]:
    """A row per case and target of `gpus`; equal compilations are done once."""
    wanted = list(dict.fromkeys((case.launch, target) for case in chosen for target in gpus))
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(compile_for, *zip(*wanted, strict=True), chunksize=4)
        quiet = not console.is_terminal
        facts = dict(zip(wanted, track(results, "compiling", len(wanted), console=console, disable=quiet), strict=True))
    for case in chosen:
        for target, gpu in gpus.items():
            found, loops = facts[case.launch, target]
            yield {
                "kernel": case.launch.kernel, "epilogue": str(case.epilogue), "path": case.plan.path,
                "layout": case.plan.layout, "dtype": case.dtype,
                "shape": list(case.shape), "target": target, "registers": found["registers"],
                "spills": found["spills"], "shared_bytes": found["shared_bytes"], "load_bits": found["load_bits"],
                "store_bits": found["store_bits"], "planned_bits": case.plan.access_bits,
                "sample_bits": sample_bits(case),
                "geometry": case.plan.geometry, "num_warps": case.plan.num_warps,
                **busiest(case, gpu, target, found, loops),
            }  # fmt: skip


def busiest(
    case: Case, gpu: Device | None, target: str, found: dict[str, Any], loops: list[main_loops.Loop]
) -> dict[str, Any]:
    """Of the main loop that keeps an SM busy longest beside what it moves, and programs that an SM holds; or None."""
    if gpu is None:
        return dict.fromkeys(("gpu", "instructions", "bytes", "unit", "ratio", "whole_kernel", "programs_per_sm"))
    pointers = [name for name, kind in case.launch.signature if kind.startswith("*")]
    costs = [main_loops.busy(loop, case.launch.kernel, pointers, case.plan, SMS[target]) for loop in loops]
    worst: Busy = max(costs, key=lambda cost: cost.ratio(gpu))
    programs = resident_programs(found["registers"], found["shared_bytes"], case.plan.num_warps, SMS[target])
    return {
        "gpu": gpu.name, "instructions": worst.instructions, "bytes": worst.bytes, "unit": worst.unit,
        "ratio": worst.ratio(gpu), "whole_kernel": worst.whole, "programs_per_sm": programs,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=[*TARGETS, "all"], help="what to compile for (default: that of --gpu)")
    parser.add_argument("--gpu", choices=[*GPUS], default="H200", help="whose memory the machine code is compared with")
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="all")
    parser.add_argument("--subset", action="store_true", help="a few telling shapes instead of all")
    parser.add_argument("--shape", action="append", type=sizes_of, metavar="N,C,H,W", help="yours instead; repeatable")
    parser.add_argument(
        "--epilogues",
        choices=["none", "common", "every"],
        default="common",
        help="with ReLU and add + ReLU too, or with every activation on a few shapes",
    )
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if any row spills or accesses memory in narrower pieces than its plan says."""
    if launch.INTERPRETED:
        raise BenchError("codegen compiles the kernels: unset TRITON_INTERPRET")
    if args.json:
        writable_folder(args.json.parent)
    gpus = compared(args.target, args.gpu)
    dtypes = list(DTYPES) if args.dtype == "all" else [args.dtype]
    every = SUBSET if args.subset else [sizes for name in SHAPE_SETS for sizes in shapes_of(name)]
    shapes, few = args.shape or every, args.shape or FEW
    chosen = list(cases(shapes, dtypes, [PLAIN]))
    if args.epilogues != "none":
        chosen += cases(few if args.subset else shapes, dtypes, COMMON)
    if args.epilogues == "every":
        chosen += cases(few, dtypes, [epilogue for epilogue in EVERY if epilogue not in (PLAIN, *COMMON)])
    found = list(rows(chosen, gpus, args.workers))
    print_table(found)
    spilling, narrow = [row for row in found if row["spills"]], [row for row in found if _is_narrow(row)]
    unused = [row for row in found if row["planned_bits"] < row["sample_bits"]]
    console.print(
        f"{len(found)} rows, {len({c.launch for c in chosen}) * len(gpus)} compilations: {len(spilling)} spill; "
        f"{len(narrow)} access memory in narrower pieces than planned; {len(unused)} are planned narrower than samples "
        "are aligned (odd planes too long to be read several at a time)",
        soft_wrap=True,
    )
    print_bound(found)
    if args.json:
        write_json(args.json, found)
    return 1 if spilling or narrow else 0


def compared(target: str | None, gpu: str) -> dict[str, Device | None]:
    """Targets to compile for, each with the GPU that its machine code is compared with: `gpu`, or else a known one."""
    own, device = GPUS[gpu]
    targets = list(TARGETS) if target == "all" else [target or own]
    first = dict(reversed(GPUS.values()))  # of each target the one that is named first
    return {name: device if name == own else first.get(name) for name in targets}


def sample_bits(case: Case) -> int:
    """Bits of the widest access for which the start of every sample is aligned, in a tensor that is."""
    N, C, S = case.plan.shape
    values = N * S if C == 1 else C * S
    return 8 * case.plan.itemsize * gcd(values, 16 // case.plan.itemsize)


def _is_narrow(row: dict[str, Any]) -> bool:
    if row["load_bits"] is None:  # every kernel loads tiles: their code was not recognized
        return True
    if row["target"] == "gfx942":  # 64 threads share what 32 do elsewhere: the smallest tiles have less for each
        return False
    return any(bits is not None and bits < row["planned_bits"] for bits in (row["load_bits"], row["store_bits"]))


# Names of columns and of units that are shorter in the table than in the rows, so that a line fits a screen.
SHORT = {"dtype": "type", "registers": "regs", "programs_per_sm": "/SM", "instructions": "instr", "ratio": "of memory"}
UNITS = {"integer": "int", "multiply": "mul", "special": "sfu", "memory": "lsu"}


def print_table(found: list[dict[str, Any]]) -> None:
    """One line a row: kernel and case; bits of its narrowest access to a tensor; registers, and + spills; programs that
    an SM holds; of its main loop the instructions per element, and the busiest unit's time as a part of memory's. A
    kernel of one tile has no loop: * is all of it.

    All else is in the rows of --json.
    """
    several = len({row["target"] for row in found}) > 1
    names = ["kernel", "epilogue", "path", "layout", "dtype", "shape", *["target"] * several, "bits", "registers",
             "programs_per_sm", "instructions", "ratio"]  # fmt: skip
    lines = [[SHORT.get(name, name) for name in names]]
    lines += [[_cell(row, name) for name in names] for row in found]
    print_columns(lines, [index for index, row in enumerate(found, 1) if row["spills"] or _is_narrow(row)])


def _cell(row: dict[str, Any], name: str) -> str:
    """What the table shows of a row."""
    if name == "kernel":
        return str(row[name]).removesuffix("_kernel").replace("cooperative", "coop")
    if name == "epilogue":
        return str(row[name]).replace(" ", "")
    if name == "path":
        return str(row[name]).replace("cooperative", "coop")
    if name == "shape":
        return "x".join(map(str, row[name]))
    if name == "bits":
        return str(min((bits for bits in (row["load_bits"], row["store_bits"]) if bits is not None), default="-"))
    if name == "registers":
        return f"{row[name]}+{row['spills']}" if row["spills"] else str(row[name])
    if row[name] is None:
        return "-"
    if name == "ratio":
        return f"{row[name]:.2f} {UNITS.get(row['unit'], row['unit'])}"
    return f"{row[name]:.1f}{'*' * row['whole_kernel']}" if name == "instructions" else str(row[name])


def print_bound(found: list[dict[str, Any]]) -> None:
    """What is not bound by memory, or hardly: kernel, epilogue, dtype and geometry, with the highest ratio of each.

    Of kernels with a loop: what the others take is a few microseconds, and mostly that of a launch.
    """
    highest: dict[tuple[str, ...], float] = {}
    for row in found:
        if row["ratio"] is not None and not row["whole_kernel"]:
            what = *(_cell(row, name) for name in ("kernel", "epilogue", "dtype")), row["geometry"], row["gpu"]
            highest[what] = max(row["ratio"], highest.get(what, 0.0))
    for gpu in dict.fromkeys(what[-1] for what in highest):
        for low, high, says in ((1.0, inf, "not memory-bound"), (CLOSE, 1.0, "close to it")):
            there = {what: ratio for what, ratio in highest.items() if what[-1] == gpu and low < ratio <= high}
            names = [f"{' '.join(what[:-1])} {there[what]:.2f}" for what in sorted(there, key=there.get, reverse=True)]  # type: ignore[arg-type]
            text = f"On an {gpu} {says} (above {low:g} of memory's time): {'; '.join(names) or 'nothing'}"
            console.print(text, soft_wrap=True)
