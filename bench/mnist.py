"""The paper's MNIST experiment: without batch norm, with nn.BatchNorm1d, with tritonbn."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import agreement, mnist_data, pictures, report, training
from bench.console import console
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device
from bench.networks.mlp import HIDDEN, WEIGHT_STD
from bench.training import ARMS, BATCH, Arm, Row
from tritonbn import launch
from tritonbn.plan import Operation

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


def run(args: argparse.Namespace) -> int:
    out = writable_folder(args.out)
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    data = mnist_data.load(args.data)
    if len(data.train) < BATCH:
        raise BenchError(f"{data}: expected at least {BATCH} training images, one batch")
    facts, path = machine(device), path_of(device)
    introduce(facts, data, path)

    rows = train(data.to(device), args.steps, args.seeds)
    findings = agreement.check(rows)
    console.print(report.summary(rows), report.agreement(findings))
    results = {
        "machine": facts,
        "settings": settings(args),
        "data": {"name": data.name, "origin": data.origin, "train": len(data.train), "test": len(data.test)},
        "batch_norm_path": path,
        "check": [asdict(finding) | {"passed": finding.passed} for finding in findings],
        "arms": rows,
    }
    write_json(out / "mnist.json", results)
    pictures.mnist_panels(rows, str(data), out / "mnist.png")
    console.print(f"Written: {out / 'mnist.json'} and {out / 'mnist.png'}", soft_wrap=True)
    return 0 if all(finding.passed for finding in findings) else 1


def path_of(device: torch.device) -> str:
    """Which way the batch norm of the tritonbn arm goes."""
    if device.type == "cpu" and not launch.INTERPRETED:
        return "ATen reference (CPU tensors)"
    x = torch.empty(BATCH, HIDDEN[0], device=device)
    plans = [str(launch.plan_for(operation, x, torch.contiguous_format)) for operation in OPERATIONS]
    return "; ".join(["Triton kernels" + " in Triton's interpreter" * launch.INTERPRETED, *plans])


def introduce(facts: dict[str, Any], data: mnist_data.Mnist, path: str) -> None:
    where = facts["cpu"] if facts["device"] == "CPU" else f"{facts['device']}, {facts['cpu']}"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "tritonbn", "python"))
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    for name, text in (
        ("data", f"{data}, {data.origin}"),
        ("device", f"{where}, {threads}"),
        ("versions", f"{versions}, commit {facts['commit'] or 'unknown'}"),
        ("our batch norm", path),
    ):
        console.print(f"{name + ':':<16}{text}", soft_wrap=True)


def train(data: mnist_data.Mnist, steps: int, seeds: int) -> list[Row]:
    """All arms with all seeds, with a bar for each arm where somebody is looking."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]:>7}"),
        TimeRemainingColumn(),
    )
    # Drawn between blocks only: a thread that redraws would take its time from the arms.
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=quiet) as progress:
        tasks = {arm: progress.add_task(report.LABELS[arm], total=steps * seeds, accuracy="") for arm in ARMS}

        def advance(arm: Arm, count: int) -> None:
            progress.update(tasks[arm.name], advance=count, accuracy=f"{arm.accuracies[-1]:.2f}%", refresh=True)

        return [row for seed in range(seeds) for row in training.train_arms(data, seed, steps, advance)]


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
