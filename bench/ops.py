"""The operation alone, forward and backward, against every other batch norm at hand, on the layers of networks.

On each problem all providers get the same inputs, are checked against float64, and are timed cold, in CUDA graphs.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from bench import ops_tables, preview, wall
from bench.ahead import compile_ahead, of_problem
from bench.codegen import Launch
from bench.console import console
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device
from bench.problem import DIRECTIONS, DTYPES, EPILOGUES, LAYOUTS, Problem, layouts_of
from bench.providers import PROVIDERS, Provider
from bench.rows import Bench, rows_of
from bench.shapes import SETS, Layer, shape
from bench.summary import OURS, Row, failures, fill_ratios, group
from bench.timing import copy_bandwidth, l2_bytes
from tritonbn.plan import Path as PlanPath
from tritonbn.plan import forced
from tritonbn.timing import SAMPLES, measuring

CUSTOM = "custom"
IMAGES = ("bn", "bn+add+relu", "bn+relu", "bn+silu")
# What follows batch norm in a set, if it is not what follows it in networks for images.
FOLLOWING = {"mnist": ("bn", "bn+sigmoid")}
HEADLINES = ("bn", "bn+add+relu", "bn+sigmoid")  # before all other epilogues
QUICK_SETS, QUICK_DTYPES = ("resnet50-256", "mnist"), ("bf16",)
WALL_DTYPES = {"mnist": "fp32"}  # as it is trained; else bf16


class Unit(NamedTuple):
    """A problem, and the providers that are measured on it one after the other."""

    problem: Problem
    providers: list[Provider]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--set", action="append", choices=[*SETS], help="layers of a network; repeatable (default: all)")
    add("--shape", action="append", type=shape, metavar="N,C,H,W", help="a shape of your own instead; repeatable")
    add("--dtype", action="append", choices=[*DTYPES], help="repeatable (default: all, bf16 first)")
    add("--layout", action="append", choices=LAYOUTS, help="repeatable (default: all that a shape has)")
    add("--epilogue", action="append", choices=[*EPILOGUES], help="repeatable (default: those of the set)")
    add("--direction", action="append", choices=DIRECTIONS, help="repeatable (default: all)")
    add("--provider", action="append", choices=[*PROVIDERS], help="repeatable (default: all at hand)")
    add("--path", choices=get_args(PlanPath), help="make our kernels take this path")
    add("--quick", action="store_true", help="ResNet-50 and MNIST in bf16, the headline epilogues, no max-autotune")
    add("--budget", type=float, metavar="SECONDS", help="start nothing new after so long; the important comes first")
    add("--out", type=Path, metavar="DIR", help="for ops.json (default: bench/results/<gpu>, out/ops on the CPU)")
    add("--device", help="cuda, or cpu to try the benchmark itself (default: cuda; without one, plans only)")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 1 if one of our own rows has an error."""
    defaults(args)
    if args.device is None and not torch.cuda.is_available():
        return without_gpu(args)
    device = pick_device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    facts = machine(device)
    gpu = facts["device"].replace(" ", "-")
    default = Path(__file__).parent / "results" / gpu if device.type == "cuda" else Path("out/ops")
    out = writable_folder(args.out or default) / "ops.json"
    absent = {name: reason for name in args.provider if (reason := PROVIDERS[name].missing(device))}
    chosen = [PROVIDERS[name] for name in args.provider if name not in absent]
    begun = time.monotonic()
    compile_ours(args, device)
    with measuring(device):
        samples = SAMPLES if device.type == "cuda" else 3
        bench = Bench(device, facts, copy_bandwidth(device, samples), l2_bytes(device), samples, args.path)
        facts |= {"copy_gb_per_s": bench.bandwidth / 1e9, "l2_bytes": bench.l2_bytes, "peers_absent": absent}
        introduce(facts)
        results = measure_all(args, chosen, bench, out, begun)
    ops_tables.print_summary(results.rows, results.wall)
    for text, number in Counter(results.left_out).items():
        console.print(f"left out, the budget was spent: {text}, {number} problems", soft_wrap=True)
    console.print(f"Written: {out}", soft_wrap=True)
    return 1 if failures(results.rows + results.wall) else 0


def defaults(args: argparse.Namespace) -> None:
    """Fill in what was not chosen."""
    args.shape = args.shape or []
    if args.set is None:
        args.set = [] if args.shape else [*(QUICK_SETS if args.quick else SETS)]
    args.dtype = args.dtype or [*(QUICK_DTYPES if args.quick else DTYPES)]
    args.layout = args.layout or [*LAYOUTS]
    args.direction = args.direction or [*DIRECTIONS]
    args.provider = args.provider or [name for name, p in PROVIDERS.items() if not (args.quick and p.stage == 2)]


def compile_ours(args: argparse.Namespace, device: torch.device) -> None:
    """Our kernels, in the order in which they will be needed, for a quarter of the budget at most."""
    if device.type != "cuda" or OURS not in args.provider:
        return
    launches: list[Launch] = []
    with forced(args.path) if args.path else nullcontext():
        for unit in units(problems(args), [PROVIDERS[OURS]]):
            with suppress(ValueError):  # a path that cannot run it, as its rows will say
                launches += of_problem(unit.problem, device)
    compile_ahead(launches, (args.budget or math.inf) / 4)


class Results:
    """The content of ops.json, written as it grows: a kill loses next to nothing."""

    def __init__(self, facts: dict[str, Any], out: Path) -> None:
        self.facts, self.out = facts, out
        self.rows: list[Row] = []
        self.wall: list[Row] = []
        self.left_out: list[str] = []
        self._next_write = 0.0

    def write(self) -> None:
        fill_ratios(self.rows)
        fill_ratios(self.wall)
        content = {"machine": self.facts, "rows": self.rows, "wall": self.wall, "left_out": self.left_out}
        write_json(self.out, content)

    def write_if_cheap(self) -> None:
        """Unless writing would take more than a twentieth of the time."""
        start = time.monotonic()
        if start >= self._next_write:
            self.write()
            self._next_write = time.monotonic() + 20 * (time.monotonic() - start)


def measure_all(args: argparse.Namespace, chosen: Sequence[Provider], bench: Bench, out: Path, begun: float) -> Results:
    """Eager calls first, then all units in their order, until the budget, which `begun` then, is spent."""
    results = Results(bench.facts, out)
    deadline = begun + (math.inf if args.budget is None else args.budget)
    stages = {provider.name: provider.stage for provider in chosen}
    compilers = [name for name in wall.PROVIDERS if stages.get(name) == 1 and not args.quick]
    at_once = [name for name in wall.PROVIDERS if stages.get(name) == 0]
    calls = list(wall_problems(args))
    try:
        for problem in calls:
            if time.monotonic() < deadline:
                results.wall += wall.wall_rows(problem, at_once, bench)
                results.write_if_cheap()
            else:
                results.left_out.append(f"{problem.kind} (eager calls)")
        for problem, providers in units(problems(args), chosen):
            if time.monotonic() < deadline:
                for rows in rows_of(problem, providers, args.direction, bench):
                    ops_tables.print_rows(rows)
                    results.rows += rows
                results.write_if_cheap()
            else:
                results.left_out.append(f"{problem.kind} ({', '.join(provider.name for provider in providers)})")
        # Once more, with those that compile in turns with the others: it takes longer than all other calls.
        for problem in calls if compilers else ():
            if time.monotonic() < deadline:
                again = wall.wall_rows(problem, [*at_once, *compilers], bench)
                results.wall = [row for row in results.wall if problem_of(row) != problem_of(again[0])] + again
                results.write_if_cheap()
            else:
                results.left_out.append(f"{problem.kind} (eager calls beside {', '.join(compilers)})")
    finally:
        results.write()
    return results


def problem_of(row: Row) -> tuple[object, ...]:
    """What the rows of eager calls that take turns have in common."""
    return group(row)[:-1]


def layers(args: argparse.Namespace) -> list[tuple[str, Layer]]:
    """(set, layer), of sets as they are named."""
    named = [(name, layer) for name in args.set for layer in SETS[name]()]
    return [(CUSTOM, Layer(sizes)) for sizes in args.shape] + named


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    for name, layer in layers(args):
        for epilogue in args.epilogue or FOLLOWING.get(name, IMAGES):
            if args.quick and not args.epilogue and epilogue not in HEADLINES:
                continue
            for layout in layouts_of(layer.shape):
                if layout in args.layout:
                    for dtype in args.dtype:
                        yield Problem(name, layer, layout, dtype, epilogue)


def units(chosen: Iterator[Problem] | Sequence[Problem], providers: Sequence[Provider]) -> list[Unit]:
    """What is measured, the most important first: by dtype, headlines, set; within a set compilers after all others.

    Then by epilogue and by the layers' share of the network's traffic. What tunes for long comes last for a dtype.
    """
    sets, dtypes, epilogues = [CUSTOM, *SETS], [*DTYPES], [*EPILOGUES]
    found = []
    for problem in chosen:
        for stage in sorted({provider.stage for provider in providers}):
            mine = [p for p in providers if p.stage == stage and p.takes(problem)]
            order = (
                dtypes.index(problem.dtype), stage == 2, problem.epilogue not in HEADLINES, sets.index(problem.set),
                stage, epilogues.index(problem.epilogue), -problem.layer.count * problem.tensor_bytes,
            )  # fmt: skip
            if mine:
                found.append((order, Unit(problem, mine)))
    return [unit for _, unit in sorted(found, key=lambda pair: pair[0])]


def wall_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """The smallest layer of each set: there, launches are what is waited for."""
    for name in ["mnist"] if args.quick else args.set:
        layer = min(SETS[name](), key=lambda layer: layer.numel)
        for epilogue in FOLLOWING.get(name, ("bn+relu",)):
            yield Problem(name, layer, layouts_of(layer.shape)[0], WALL_DTYPES.get(name, "bf16"), epilogue)


def introduce(facts: dict[str, Any]) -> None:
    console.print(
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit'] or 'unknown'}; "
        f"a copy moves {facts['copy_gb_per_s']:.0f} GB/s, read and written, the L2 cache holds "
        f"{facts['l2_bytes'] / 1e6:.0f} MB",
        soft_wrap=True,
    )
    for name, reason in facts["peers_absent"].items():
        console.print(f"without {name}: {reason}", soft_wrap=True)


def without_gpu(args: argparse.Namespace) -> int:
    """Plans and bytes instead of times."""
    text = "no GPU: nothing can be timed here. What would run on an H200, and the least it must move:\n"
    console.print(text, soft_wrap=True)
    args.dtype, args.epilogue = args.dtype[:1], args.epilogue or ["bn"]
    preview.show(problems(args))
    console.print(
        "\nus: of the floor, forward and backward, at the bandwidth of a copy.\n"
        "What the compiler makes of the kernels: python -m bench codegen"
    )
    return 0
