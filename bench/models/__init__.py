"""Training and inference of whole networks: without batch norm, with torch's, with ours.

In each setting all providers start from the same weights and take turns on the same input.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.console import console
from bench.cudnn import cudnn
from bench.environment import gpu_facts
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device, stamp
from bench.mnist import at_most, positive
from bench.models import crew as crews
from bench.models import pictures, tables, tax
from bench.models.arms import precision
from bench.models.crew import Crew
from bench.models.measured import Bench, Comparison
from bench.models.reading import Images
from bench.models.rows import Row, failed
from bench.models.settings import Setting, add_choices, fill_in, settings
from bench.models.steps import LEARNING_RATE, MOMENTUM
from bench.timing import copy_bandwidth
from tritonbn import launch, planning
from tritonbn.store import user_folder
from tritonbn.tables import SHIPPED, path
from tritonbn.timing import SAMPLES, measuring

STEPS, FEW_STEPS = 60, 10
LISTS = ("model", "batch", "layout", "dtype", "mode", "provider")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_choices(parser)
    add("--steps", type=positive, metavar="N", help="timed, of each provider (default: 60; CPU: 10)")
    add("--tax", action="store_true", help="the BN tax: training at batch 16, 32, 64, 128, 256, 512")
    add("--budget", type=float, metavar="SECONDS", help="begin no setting that would end after so long, by the others")
    add("--ddp", action="store_true", help=f"processes that train together: {crews.COMMAND}")
    add("--data", type=Path, metavar="DIR", help="also with real images: folders train/CLASS/ and val/CLASS/")
    add("--workers", type=int, default=4, metavar="N", help="processes that read images (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--threads", type=positive, metavar="N", help="of the CPU (default: torch's)")
    add("--out", type=Path, metavar="DIR", default=Path("out/models"), help="for results (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 1 if one of our own rows failed."""
    device = pick_device(args.device)
    rank = crews.local_rank() if args.ddp else 0
    if args.ddp and device.type == "cuda":
        device = pick_device(f"cuda:{rank}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if args.threads is not None:
        at_most("--threads", args.threads, os.cpu_count() or 1, "threads, one per CPU")
        torch.set_num_threads(args.threads)
    if args.workers < 0:
        raise BenchError(f"--workers {args.workers}: expected 0 or more")
    if args.budget is not None and not args.budget >= 0:
        raise BenchError(f"--budget {args.budget}: expected seconds, 0 or more")
    fill_in(args, device.type == "cuda")
    chosen = settings(args)
    images = None if args.data is None else Images(args.data, args.workers)
    if images is not None:
        for setting in chosen:
            images.check(setting)
    out = writable_folder(args.out)
    if not args.ddp:
        return measure(args, chosen, Crew(), device, images, out)
    with crews.together(device) as crew:
        return measure(args, chosen, crew, device, images, out)


def measure(
    args: argparse.Namespace, chosen: Sequence[Setting], crew: Crew, device: torch.device, images: Images | None,
    out: Path,
) -> int:  # fmt: skip
    """All settings; the first process alone tells and writes."""
    console.quiet = crew.rank > 0
    steps = args.steps or (STEPS if device.type == "cuda" else FEW_STEPS)
    facts = machine(device) | gpu_facts(device)
    # cuDNN chooses among its kernels by measuring them, as people train.
    with measuring(device), cudnn(benchmark=device.type == "cuda"), progress(len(chosen)) as (tick, advance):
        facts["copy_gb_per_s"] = copy_bandwidth(device, SAMPLES if device.type == "cuda" else 3) / 1e9
        results = Results(facts, described(args, steps, crew, device, images), out, crew)
        introduce(results, device)
        bench = Bench(device, steps, crew, images, tick)
        deadline, longest = time.monotonic() + (math.inf if args.budget is None else args.budget), 0.0
        for setting in chosen:
            begun = time.monotonic()
            if crew.any(begun + longest >= deadline):
                results.left_out.append(str(setting))
                continue
            advance(str(setting))
            comparison = Comparison(setting, args.provider, bench)
            comparison.measure()
            results.add(list(comparison.rows.values()), comparison.with_data)
            longest = max(longest, time.monotonic() - begun)
    results.finish(draw=args.tax or len(args.batch) > 1)
    return 1 if failed(results.rows) else 0


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """(told what is done now, told which setting is next): a bar where somebody is looking."""
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    quiet = not console.is_terminal
    # Drawn between steps only: a thread that redraws would take its time from them.
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=quiet) as bar:
        task, name, begun = bar.add_task("", total=total), "", 0

        def tick(what: str) -> None:
            bar.update(task, description=f"{name}: {what}", refresh=True)

        def advance(setting: str) -> None:
            nonlocal name, begun
            name = setting
            bar.update(task, completed=begun)
            begun += 1

        yield tick, advance


class Results:
    """The content of models.json, written as it grows: a kill loses one setting."""

    def __init__(self, facts: dict[str, Any], described: dict[str, Any], out: Path, crew: Crew) -> None:
        self.facts, self.settings, self.out, self.crew = facts, described, out, crew
        self.rows: list[Row] = []
        self.with_data: list[Row] = []
        self.left_out: list[str] = []

    def add(self, rows: list[Row], with_data: list[Row]) -> None:
        self.rows += [row | stamp(self.facts) for row in rows]
        self.with_data += [row | stamp(self.facts) for row in with_data]
        tables.print_rows(rows)
        tables.print_with_data(with_data)
        self.write()

    def content(self) -> dict[str, Any]:
        return {
            "machine": self.facts, "settings": self.settings, "rows": self.rows, "tax": tax.lines(self.rows),
            "with_data": self.with_data, "left_out": self.left_out,
        }  # fmt: skip

    def write(self) -> None:
        if self.crew.rank == 0:
            write_json(self.out / "models.json", self.content())

    def finish(self, draw: bool) -> None:
        """The end of the output: the tax, what is missing, and where the files are."""
        self.write()
        if draw:
            tables.print_tax(tax.lines(self.rows), 1e9 * self.facts["copy_gb_per_s"])
        tables.print_failures(self.rows)
        for text in self.left_out:
            console.print(f"left out, the budget was spent: {text}", soft_wrap=True)
        if self.crew.rank == 0:
            written = [self.out / "models.json", *pictures.draw(self.content(), self.out)]
            console.print(f"\nWritten: {', '.join(map(str, written))}", soft_wrap=True)


def described(
    args: argparse.Namespace, steps: int, crew: Crew, device: torch.device, images: Images | None
) -> dict[str, Any]:
    return {
        "command": command(args),
        "steps": steps,
        "input": "random numbers" if images is None else f"random numbers; rows with data: {images.name}",
        "optimizer": f"SGD, learning rate {LEARNING_RATE}, momentum {MOMENTUM}, foreach",
        "precision": {dtype: precision(dtype, device) for dtype in args.dtype},
        "processes": crew.size,
        "plans": "measured on this GPU, as far as they were tuned" if tuned(device) else "of the model",
        "kernels_compared": device.type == "cuda" or launch.INTERPRETED,
    }


def tuned(device: torch.device) -> bool:
    """Whether there is a table of measured plans for it."""
    gpu = planning.device_of(device)
    return any(folder is not None and path(folder, gpu).exists() for folder in (user_folder(), SHIPPED))


def command(args: argparse.Namespace) -> str:
    """What gives the same rows elsewhere; no folder of this machine is in it."""
    listed = (f"--{name} {','.join(map(str, getattr(args, name)))}" for name in LISTS)
    single = (f"--{name} {getattr(args, name)}" for name in ("image", "steps") if getattr(args, name) is not None)
    flags = (f"--{name}" for name in ("training", "inference", "tax", "ddp") if getattr(args, name))
    return " ".join(["python -m bench models", *listed, *single, *flags, *(["--data DIR"] if args.data else [])])


def introduce(results: Results, device: torch.device) -> None:
    facts, chosen = results.facts, results.settings
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "tritonbn", "python"))
    place = facts["device"] if device.type == "cuda" else f"CPU ({facts['cpu']}, {facts['threads']} threads)"
    for line in (
        f"{place}; {versions}, commit {facts['commit'] or 'unknown'}",
        f"input: {chosen['input']}; {chosen['optimizer']}; {chosen['steps']} timed steps or more of each provider",
        *chosen["precision"].values(),
        "ms per step: median (quartiles); x torch: times as fast as torch in the same turns, median (quartiles) of "
        "rounds; torch-again is torch once more, its x the noise",
        "off fp32: how far the losses of the first steps, or the outputs, are from those in fp32, of the largest",
        *([] if device.type == "cuda" else [tables.INTERPRETED if chosen["kernels_compared"] else tables.SWAP_ONLY]),
    ):
        console.print(line, soft_wrap=True)
