"""Plans by measurement for the layers of a network: `tritonbn.tune` from the command line."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from bench.ahead import compile_ahead, of_tuning
from bench.console import console, print_columns
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device, stamp
from bench.problem import CHANNELS_LAST, DTYPES, LAYOUTS, layouts_of
from bench.shapes import SETS, shape
from tritonbn import cost, model, planning, store, tables, tuning
from tritonbn.device import H200, Device
from tritonbn.layers import Layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--set", action="append", choices=[*SETS], help="layers of a network; repeatable (default: resnet50-256)")
    add("--shape", action="append", type=shape, metavar="N,C,H,W", help="a shape of your own instead; repeatable")
    add("--dtype", action="append", choices=[*DTYPES], help="repeatable (default: bf16)")
    add("--layout", action="append", choices=LAYOUTS, help="repeatable (default: all that a shape has)")
    add("--again", action="store_true", help="also what the tables know already")
    add("--budget", type=seconds, metavar="SECONDS", help="begin no problem after so long; the heaviest come first")
    add("--out", type=Path, metavar="DIR", help="for the table (default: the user's cache folder)")
    add("--results", type=Path, metavar="DIR", help="for tune.json: all plans that were timed, and predictions")
    add("--device", help="cuda or cuda:N (default: cuda; without one, the plans that would be timed)")


def run(args: argparse.Namespace) -> int:
    """Tune, write the table and print what was found."""
    chosen = list(dict.fromkeys(layers(args)))
    if not chosen:
        raise BenchError(f"--layout {' '.join(args.layout)}: no shape that was asked for has it")
    if args.device is None and not torch.cuda.is_available():
        return without_gpu(chosen)
    device = pick_device(args.device)
    if device.type != "cuda":
        raise BenchError(f"--device {args.device}: plans are measured on a GPU")
    folder = args.out or store.user_folder()
    if folder is None:
        raise BenchError("no folder for the table: --out DIR, or set TRITONBN_CACHE_DIR")
    for path in (folder, *([args.results] if args.results else [])):
        writable_folder(path)
    begun = time.monotonic()
    work = tuning.problems(chosen, planning.device_of(device), args.again)
    launches = (each for what, layer in work.items() for each in of_tuning(what, layer, planning.device_of(device)))
    compile_ahead(launches, (args.budget or inf) / 2)
    budget = None if args.budget is None else max(0.0, args.budget - (time.monotonic() - begun))
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tuning", total=None)

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)
            if not console.is_terminal:
                console.print(f"{done}/{total} {text}", soft_wrap=True)

        found = tuning.tune_layers(
            chosen,
            device,
            again=args.again,
            folder=folder,
            budget=budget,
            progress=show,
            keep=kept(args.results, device),
        )
    for result in found:
        console.print(str(result), soft_wrap=True)
    faster = sum(result.after != result.before for result in found)
    console.print(f"{len(found)} problems measured, {faster} plans replaced", soft_wrap=True)
    file = tables.path(folder, planning.device_of(device))
    if found:
        console.print(f"{'Written' if file.exists() else 'Not written'}: {file}", soft_wrap=True)
    elif args.budget is None:
        console.print("Nothing was left to measure: --again measures what the tables know", soft_wrap=True)
    return 0


def kept(results: Path | None, device: torch.device) -> Callable[[tuning.Tuned], None] | None:
    """Writes tune.json anew with each result."""
    if results is None:
        return None
    facts, rows = machine(device), list[dict[str, Any]]()

    def keep(result: tuning.Tuned) -> None:
        rows.extend(row | stamp(facts) for row in rows_of(result, planning.device_of(device)))
        write_json(results / "tune.json", {"machine": facts, "rows": rows})

    return keep


def rows_of(result: tuning.Tuned, device: Device) -> Iterator[dict[str, Any]]:
    """A row for each plan that was tried; us is null for those that spill or do not fit the GPU."""
    problem = result.problem
    for plan, us in result.times:
        yield {
            "operation": problem.operation, "layout": problem.layout, "shape": list(problem.shape),
            "itemsize": problem.itemsize, "path": plan.path, "plan": str(replace(plan, estimator=None)), "us": us,
            "predicted_us": 1e6 * cost.seconds(plan, problem, device), "before": plan == result.before,
            "after": plan == result.after,
        }  # fmt: skip


def seconds(text: str) -> float:
    """For argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def layers(args: argparse.Namespace) -> list[Layer]:
    """The inputs of the layers that were asked for."""
    shapes = args.shape or [layer.shape for name in args.set or ["resnet50-256"] for layer in SETS[name]()]
    return [
        Layer(sizes, DTYPES[dtype], CHANNELS_LAST[len(sizes)] if layout == "channels_last" else torch.contiguous_format)
        for sizes in shapes
        for layout in layouts_of(sizes)
        if layout in (args.layout or LAYOUTS)
        for dtype in args.dtype or ["bf16"]
    ]


def without_gpu(chosen: list[Layer]) -> int:
    """The plan of each path and its prediction: what tuning would begin with."""
    console.print(
        "no GPU: nothing can be timed here. Plans for an H200 with the times that the model predicts, in us:\n",
        soft_wrap=True,
    )
    lines = [["operation", "layout", "shape", "predicted", "first", "others"]]
    for problem in tuning.problems(chosen, H200, again=True):
        times: dict[str, float] = {}
        for plan in model.plans_for(problem, H200):
            times[plan.path] = min(times.get(plan.path, inf), cost.seconds(plan, problem, H200))
        first = model.best(problem, H200).path
        others = ", ".join(f"{path} {1e6 * time:.1f}" for path, time in times.items() if path != first)
        sizes = "x".join(map(str, problem.shape))
        lines.append([problem.operation, problem.layout, sizes, f"{1e6 * times[first]:.1f}", first, others])
    print_columns(lines)
    return 0
