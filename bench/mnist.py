"""The paper's MNIST experiment: without batch norm, with nn.BatchNorm1d, with tritonbn."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import agreement, mnist_data, mnist_tables, pictures, training
from bench.console import console
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device, stamp
from bench.networks.mlp import HIDDEN, WEIGHT_STD
from bench.training import ARMS, BATCH, Arm, Row
from tritonbn import launch, planning
from tritonbn.plan import Operation

MOST_STEPS = 10_000_000  # half a day at the least
OPERATIONS: tuple[Operation, ...] = ("forward", "backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="MNIST's idx files, gz or not (default: cached or downloaded)",
    )
    add("--steps", type=positive, default=20_000, help="of 60 images (default: %(default)s; paper: 50000)")
    add(
        "--seeds",
        type=positive,
        default=1,
        help="number of runs, each with its own seed (default: %(default)s)",
    )
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--threads", type=positive, default=1, help="of the CPU; more gain little here (default: %(default)s)")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("out/mnist"),
        help="for results (default: %(default)s)",
    )


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return value


def at_most(option: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise BenchError(f"{option} {value}: expected at most {limit:,} {what}")


class Job(NamedTuple):
    """Where a run writes, computes and reads."""

    out: Path
    device: torch.device
    data: mnist_data.Mnist  # on the CPU
    facts: dict[str, Any]
    kernels: bool  # whether the tritonbn arm runs our kernels
    path: str

    @property
    def content(self) -> dict[str, Any]:
        """What a file of results says of it."""
        data = self.data
        return {
            "machine": self.facts,
            "data": {"name": data.name, "origin": data.origin, "train": len(data.train), "test": len(data.test)},
            "batch_norm_path": self.path,
        }


def prepare(args: argparse.Namespace, ours: bool = True) -> Job:
    """Check the options, set the threads, load the data, and say what there is, `ours` being the batch norm or not."""
    at_most("--steps", args.steps, MOST_STEPS, "steps")
    at_most("--threads", args.threads, os.cpu_count() or 1, "threads, one per CPU")
    out = writable_folder(args.out)
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    data = mnist_data.load(args.data)
    if len(data.train) < BATCH:
        raise BenchError(f"{data}: expected at least {BATCH} training images, one batch")
    facts, kernels = machine(device), device.type == "cuda" or launch.INTERPRETED
    path = path_of(device) if kernels else "ATen reference (CPU tensors)"
    path = path if ours else "nn.BatchNorm1d"
    introduce(facts, data, "our batch norm" if ours else "batch norm", path)
    return Job(out, device, data, facts, kernels, path)


def run(args: argparse.Namespace) -> int:
    job = prepare(args)
    out, data = job.out, job.data
    rows = train(data.to(job.device), args.steps, range(args.seeds))
    findings = agreement.check(rows)
    # Uncropped: a terminal too narrow for a table breaks its lines instead of losing their ends.
    console.print(mnist_tables.summary(rows, data.name), mnist_tables.agreement(findings, job.kernels), crop=False)
    results = job.content | {
        "settings": settings(args),
        "kernels_compared": job.kernels,
        "check": [asdict(finding) | {"passed": finding.passed} for finding in findings],
        "arms": [row | stamp(job.facts) for row in rows],
    }
    write_json(out / "mnist.json", results)
    pictures.mnist_panels(rows, str(data), out / "mnist.png")
    console.print(f"Written: {out / 'mnist.json'} and {out / 'mnist.png'}", soft_wrap=True)
    return 1 if any(finding.passed is False for finding in findings) else 0


def path_of(device: torch.device) -> str:
    """Which kernels the tritonbn arm runs, and how."""
    x = torch.empty(BATCH, HIDDEN[0], device=device)
    plans = [str(planning.plan_for(operation, x)) for operation in OPERATIONS]
    return "; ".join(["Triton kernels" + " in Triton's interpreter" * launch.INTERPRETED, *plans])


def introduce(facts: dict[str, Any], data: mnist_data.Mnist, norm: str, path: str) -> None:
    where = facts["cpu"] if facts["device"] == "CPU" else f"{facts['device']}, {facts['cpu']}"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "tritonbn", "python"))
    for name, text in (
        ("data", f"{data}, {data.origin}"),
        ("device", f"{where}, {mnist_tables.counted(facts['threads'], 'thread')}"),
        ("versions", f"{versions}, commit {facts['commit'] or 'unknown'}"),
        (norm, path),
    ):
        console.print(f"{name + ':':<16}{text}", soft_wrap=True)


def train(data: mnist_data.Mnist, steps: int, seeds: Sequence[int]) -> list[Row]:
    """All arms with all seeds, with a bar for each arm where somebody is looking."""
    with bars("accuracy") as progress:
        tasks = {
            arm: progress.add_task(mnist_tables.LABELS[arm], total=steps * len(seeds), accuracy="") for arm in ARMS
        }

        def advance(arm: Arm, count: int) -> None:
            progress.update(tasks[arm.name], advance=count, accuracy=f"{arm.accuracies[-1]:.2f}%", refresh=True)

        return [row for seed in seeds for row in training.train_arms(data, seed, steps, advance)]


def bars(field: str) -> Progress:
    """Bars of steps, each with a field of its own, on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[{field}]:>7}}"),
        TimeRemainingColumn(),
    )
    # Drawn between blocks only: a thread that redraws would take its time from the arms.
    return Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "steps": args.steps,
        "seeds": args.seeds,
        "batch": BATCH,
        "learning_rate": training.LEARNING_RATE,
        "optimizer": "SGD",
        "hidden": list(HIDDEN),
        "weight_std": WEIGHT_STD,
        "eps": 1e-5,
        "momentum": 0.1,
        "evaluated_at": training.evaluation_steps(args.steps),
        "percentiles": list(training.PERCENTILES),
    }
