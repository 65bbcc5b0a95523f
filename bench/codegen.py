"""What the compiler makes of every kernel: registers, spills and access widths, for any GPU, on any machine.

The launches are the library's own, recorded on meta tensors, so the table shows what would run.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import machine_code
from bench.console import console, print_columns
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.mnist import positive
from bench.shapes import shape as sizes_of
from bench.shapes import shapes_of
from tritonbn import handles, launch, pair_launch
from tritonbn.activations import IDENTITY, NAMES, Activation, resolve
from tritonbn.autograd import keeps_bits
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

SHAPE_SETS = "resnet50-256", "awkward"
SUBSET = [
    (60, 100),
    (256, 1024, 14, 14),
    (256, 512, 7, 7),
    (256, 64, 56, 56),
    (4096, 2, 49),
    (32, 192, 17, 17),
    (32, 192, 28, 28),
]
# Rows, whole planes and groups of planes.
FEW = [(60, 100), (256, 256, 56, 56), (256, 512, 7, 7)]


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


def compile_for(recorded: Launch, target: str) -> dict[str, int | None]:
    """registers, spills, shared_bytes, load_bits and store_bits (the narrowest full-tensor access) on `target`."""
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
    return machine_code.facts(compiled.asm) | {"shared_bytes": compiled.metadata.shared}


def _kernels() -> dict[str, Any]:
    here = vars(launch) | vars(pair_launch)
    return {name: value for name, value in here.items() if name.endswith("_kernel")}


def rows(chosen: list[Case], targets: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """A row per case and target; equal compilations are done once."""
    wanted = list(dict.fromkeys((case.launch, target) for case in chosen for target in targets))
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(compile_for, *zip(*wanted, strict=True), chunksize=4)
        quiet = not console.is_terminal
        facts = dict(zip(wanted, track(results, "compiling", len(wanted), console=console, disable=quiet), strict=True))
    for case in chosen:
        for target in targets:
            found = facts[case.launch, target]
            yield {
                "kernel": case.launch.kernel, "epilogue": str(case.epilogue), "path": case.plan.path,
                "layout": case.plan.layout, "dtype": case.dtype,
                "shape": list(case.shape), "target": target, "registers": found["registers"],
                "spills": found["spills"], "shared_bytes": found["shared_bytes"], "load_bits": found["load_bits"],
                "store_bits": found["store_bits"], "planned_bits": case.plan.access_bits,
                "sample_bits": sample_bits(case),
                "geometry": case.plan.geometry, "num_warps": case.plan.num_warps,
            }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="sm_90", help="GPU to compile for")
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
    targets = list(TARGETS) if args.target == "all" else [args.target]
    dtypes = list(DTYPES) if args.dtype == "all" else [args.dtype]
    every = SUBSET if args.subset else [sizes for name in SHAPE_SETS for sizes in shapes_of(name)]
    shapes, few = args.shape or every, args.shape or FEW
    chosen = list(cases(shapes, dtypes, [PLAIN]))
    if args.epilogues != "none":
        chosen += cases(few if args.subset else shapes, dtypes, COMMON)
    if args.epilogues == "every":
        chosen += cases(few, dtypes, [epilogue for epilogue in EVERY if epilogue not in (PLAIN, *COMMON)])
    found = list(rows(chosen, targets, args.workers))
    print_table(found)
    spilling, narrow = [row for row in found if row["spills"]], [row for row in found if _is_narrow(row)]
    unused = [row for row in found if row["planned_bits"] < row["sample_bits"]]
    console.print(
        f"{len(found)} rows, {len({c.launch for c in chosen}) * len(targets)} compilations: {len(spilling)} spill; "
        f"{len(narrow)} access memory in narrower pieces than planned; {len(unused)} are planned narrower than samples "
        "are aligned (odd planes too long to be read several at a time)",
        soft_wrap=True,
    )
    if args.json:
        write_json(args.json, found)
    return 1 if spilling or narrow else 0


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


def print_table(found: list[dict[str, Any]]) -> None:
    """One line a row, whatever the width of the terminal."""
    names = ["kernel", "epilogue", "path", "layout", "dtype", "shape", "target", "registers", "spills", "shared_bytes",
             "load_bits", "store_bits", "planned_bits", "sample_bits"]  # fmt: skip
    lines = [names]
    for row in found:
        cells = row | {"shape": "x".join(map(str, row["shape"]))}
        lines.append(["-" if cells[name] is None else str(cells[name]) for name in names])
    print_columns(lines, [index for index, row in enumerate(found, 1) if row["spills"] or _is_narrow(row)])
