"""What a call costs before the GPU has anything to do: microseconds of CPU per call, on any machine.

Without a GPU, a driver that does nothing takes the place of CUDA's (`bench/stub.py`) and CPU tensors those of a GPU, on
which torch's own batch norm computes. The driver, about 3 us a launch, is in no figure then. Shapes are as small as the
path allows, so that allocations are those of a caching allocator. Containers are called fused and not: what fusing one
costs, or saves, is the difference. The tables after those are of `bench/callers.py`: callers that call in other ways.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

import tritonbn
from bench import callers_timed
from bench.console import console
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device, synchronize
from bench.mnist import positive
from bench.mnist_tables import uncut
from bench.stub import StubDriver, stubbed
from tritonbn import handles, launch
from tritonbn.functional import batch_norm
from tritonbn.plan import forced
from tritonbn.planning import plan_for
from tritonbn.timing import Quartiles, quartiles

TORCH = torch.nn.functional.batch_norm
Call = Callable[[], torch.Tensor]
Work = Callable[[], object]


class Case(NamedTuple):
    """A call, the same by torch, and the path that it is made to take."""

    name: str
    shape: tuple[int, int]
    path: Any
    make: Callable[["Inputs"], tuple[Work, ...]]  # ours, torch's; of containers also ours without fusion


class Inputs:
    """Tensors of one case: x, residual and g [N, C], parameters and statistics [C], all float32."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        C = shape[1]
        self.device = device
        self.x = torch.randn(shape, device=device, requires_grad=True)
        self.residual = torch.randn(shape, device=device, requires_grad=True)
        self.g = torch.randn(shape, device=device)
        self.w, self.b = torch.ones(C, device=device, requires_grad=True), torch.zeros(C, device=device)
        self.b.requires_grad_()
        self.mean, self.var = torch.zeros(C, device=device), torch.ones(C, device=device)
        self.C = C


def _function(t: Inputs) -> tuple[Call, Call]:
    given = t.x, t.mean, t.var, t.w, t.b, True
    return lambda: batch_norm(*given), lambda: TORCH(*given)


def _backward(t: Inputs) -> tuple[Work, Work]:
    ours, theirs = _function(t)
    inputs = t.x, t.w, t.b

    def both_ways(call: Call) -> Work:
        return lambda: torch.autograd.grad(call(), inputs, t.g)

    return both_ways(ours), both_ways(theirs)


def _inference(t: Inputs) -> tuple[Call, Call]:
    given = t.x.detach(), t.mean, t.var, t.w.detach(), t.b.detach()
    return lambda: batch_norm(*given), lambda: TORCH(*given)


def _module(t: Inputs) -> tuple[Call, Call]:
    ours, theirs = tritonbn.BatchNorm1d(t.C, device=t.device), torch.nn.BatchNorm1d(t.C, device=t.device)
    return lambda: ours(t.x), lambda: theirs(t.x)


def _epilogue(t: Inputs) -> tuple[Call, Call]:
    ours, theirs = tritonbn.BatchNormAct1d(t.C, device=t.device), torch.nn.BatchNorm1d(t.C, device=t.device)
    return lambda: ours(t.x, t.residual), lambda: torch.relu(theirs(t.x) + t.residual)


class Residual(nn.Module):
    """ResNet's basic block without its convolutions: two batch norms, and one in the shortcut if it has layers."""

    def __init__(self, channels: int, layers: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Identity(), nn.Identity(), nn.ReLU(inplace=True)
        self.bn1, self.bn2 = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)
        self.shortcut = nn.Sequential(nn.Identity(), nn.BatchNorm1d(channels)) if layers else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, C] -> [N, C]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        result: torch.Tensor = self.relu(out)
        return result


def _container(model: nn.Module, x: torch.Tensor) -> tuple[Call, ...]:
    made = model.to(x.device)
    fused, swapped = (tritonbn.convert(copy.deepcopy(made), fuse=fuse) for fuse in (True, False))
    return lambda: fused(x), lambda: made(x), lambda: swapped(x)


def _sequential(t: Inputs) -> tuple[Call, ...]:
    return _container(nn.Sequential(nn.Identity(), nn.BatchNorm1d(t.C), nn.ReLU(inplace=True)), t.x)


def _residual(t: Inputs) -> tuple[Call, ...]:
    return _container(Residual(t.C, False), t.x)


def _with_shortcut(t: Inputs) -> tuple[Call, ...]:
    return _container(Residual(t.C, True), t.x)


SMALL, LONG = (60, 100), (512, 32)
CASES = [
    Case("batch_norm", SMALL, "single", _function),
    Case("batch_norm and backward", SMALL, "single", _backward),
    Case("batch_norm", LONG, "split", _function),
    Case("batch_norm and backward", LONG, "split", _backward),
    Case("batch_norm, inference", SMALL, None, _inference),
    Case("BatchNorm1d", SMALL, "single", _module),
    Case("BatchNormAct1d, relu, residual", SMALL, "single", _epilogue),
    Case("fused Sequential: bn, relu", SMALL, "single", _sequential),
    Case("fused block: bn, relu, bn, add, relu", SMALL, "single", _residual),
    Case("the same, bn in its shortcut", SMALL, "single", _with_shortcut),
]


def by_jit(
    kernel: Any, grid: tuple[int, ...], plan: Any, *args: Any, launches: Any = None, which: Any = None, **constants: Any
) -> None:
    """A launch as Triton does it."""
    kernel[grid](*args, T=plan.tile, **constants, **handles.options(plan))


def nothing(kernel: Any, grid: tuple[int, ...], plan: Any, *args: Any, **constants: Any) -> None:
    """No launch."""


@contextmanager
def launching(start: Callable[..., None] | None) -> Iterator[None]:
    """Within, `start` launches; None: the library's own."""
    real = launch._launch
    launch._launch = start or real
    try:
        yield
    finally:
        launch._launch = real


class Variant(NamedTuple):
    """One figure of a case: what is called, how it launches, whether autograd records it."""

    name: str
    call: Work
    start: Callable[..., None] | None = None
    grad: bool = True


def variants(case: Case, device: torch.device) -> list[Variant]:
    """What is timed for a case; for the function also with parts left out, from whose differences `parts` are."""
    t = Inputs(case.shape, device)
    ours, theirs, *unfused = case.make(t)
    found = [Variant("torch", theirs), Variant("jit", ours, by_jit), Variant("ours", ours)]
    found += [Variant("unfused", call) for call in unfused]
    if case.make is _function:
        x, w, b = t.x.detach(), t.w.detach(), t.b.detach()
        with forced(case.path):
            plan = plan_for("forward", x)

        def inner() -> object:
            return launch.forward(x, None, w, b, t.mean, t.var, None, 0.1, 1e-5, planned=plan)

        found += [
            Variant("no_grad", ours, grad=False),
            Variant("inner", inner, grad=False),
            Variant("no_launch", inner, nothing, grad=False),
        ]
    return found


def measure(case: Case, device: torch.device, blocks: int, calls: int) -> dict[str, Quartiles]:
    """Microseconds per call of each variant: `blocks` blocks of `calls` calls, the variants in turn."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    todo = variants(case, device)
    seen: dict[str, list[float]] = {variant.name: [] for variant in todo}
    with forced(case.path):
        for block in range(-2, blocks):  # two to warm up and to compile
            for variant in todo:
                with launching(variant.start), torch.set_grad_enabled(variant.grad):
                    synchronize(device)
                    start = clock()
                    for _ in range(calls):
                        variant.call()
                    spent = clock() - start
                if block >= 0:
                    seen[variant.name].append(1e6 * spent / calls)
    return {name: quartiles(values) for name, values in seen.items()}


def parts(figures: dict[str, Quartiles]) -> dict[str, float] | None:
    """Medians of what a call of the function is made of, as differences; None where they were not measured."""
    if "inner" not in figures:
        return None
    total, no_grad, inner, no_launch = (figures[name].median for name in ("ours", "no_grad", "inner", "no_launch"))
    return {
        "checks and plan": no_grad - inner, "autograd": total - no_grad, "allocation": no_launch,
        "launch": inner - no_launch,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu (stubbed driver) or cuda; default: the GPU if there is one")
    parser.add_argument("--blocks", type=positive, default=41, help="blocks that the quartiles are of")
    parser.add_argument("--calls", type=positive, default=200, help="calls of a block; a GPU queues 1000 launches")
    parser.add_argument("--before", type=Path, metavar="FILE", help="overhead.json of another commit, to compare with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for overhead.json (default: none is written)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the cases of callers, a list of their rows")


def run(args: argparse.Namespace) -> int:
    """Measure all cases, print the table, write the JSON."""
    device = pick_device(args.device)
    before = earlier(args.before) if args.before else None
    if args.out:
        writable_folder(args.out)
    if args.json:
        writable_folder(args.json.parent)
    torch.set_num_threads(1)
    stubs = device.type != "cuda"
    with stubbed() if stubs else nullcontext() as stub:
        rows = [row(case, device, stub, args.blocks, args.calls) for case in CASES]
        called = callers_timed.rows(device, stub, args.blocks, args.calls)
    for found in rows:
        found["before"] = None if before is None else before["rows"].get(found["case"])
    for table in [*tables(rows), *callers_timed.tables(called)]:
        console.print(table, soft_wrap=True)
    if args.json:
        write_json(args.json, called)
    if args.out:
        content = {
            "unit": "microseconds per call, of the CPU (stubbed) or of time; quartiles over blocks",
            "stubbed": stubs, "blocks": args.blocks, "calls": args.calls, "machine": machine(device),
            "before": None if before is None else before["machine"], "rows": rows,
        }  # fmt: skip
        write_json(args.out / "overhead.json", content)
    return 0


def row(case: Case, device: torch.device, stub: StubDriver | None, blocks: int, calls: int) -> dict[str, Any]:
    """One line of the tables and of the JSON."""
    figures = measure(case, device, blocks, calls)
    return {
        "case": f"{case.name} {list(case.shape)}" + (f" {case.path}" if case.path else ""),
        "launches": None if stub is None else launches(case, device, stub),
        "us": {name: figure._asdict() for name, figure in figures.items()},
        "parts_us": parts(figures),
    }


def launches(case: Case, device: torch.device, stub: StubDriver) -> int:
    """How many kernels a call of ours starts: none, and the figures would mean nothing."""
    call, *_ = case.make(Inputs(case.shape, device))
    before = stub.count
    with forced(case.path):
        call()
    if stub.count == before:
        raise BenchError(f"{case.name}: expected launches, got none")
    return stub.count - before


def earlier(path: Path) -> dict[str, Any]:
    """The machine of another overhead.json, and by case its figure of our call."""
    try:
        content = json.loads(path.read_text())
        rows = {found["case"]: found["us"]["ours"] for found in content["rows"]}
        return {"machine": content["machine"], "rows": rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"--before {path}: expected the JSON of this command, got {error!r}") from None


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """What a call costs, and what it is made of."""
    titles = {"torch": "torch", "before": "before", "jit": "ours by JIT", "unfused": "unfused", "ours": "ours"}
    whole = Table("case", "launches", *titles.values(), box=None, title="us per call: median (quartiles)")
    made_of = Table("case", box=None, title="of which, by difference of medians, us")
    for found in rows:
        figures = {**found["us"], "before": found["before"]}
        cells = [_cell(figures.get(name)) for name in titles]
        whole.add_row(found["case"], str(found["launches"] or "-"), *cells)
        if found["parts_us"]:
            if len(made_of.columns) == 1:
                for name in found["parts_us"]:
                    made_of.add_column(name, justify="right")
            made_of.add_row(found["case"], *(f"{us:.1f}" for us in found["parts_us"].values()))
    return [uncut(whole, 0), uncut(made_of, 0)]


def _cell(figure: dict[str, float] | None) -> str:
    return "-" if figure is None else f"{figure['median']:.1f} ({figure['low']:.1f}-{figure['high']:.1f})"
