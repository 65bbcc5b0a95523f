"""What needs a GPU, step by step: each step has a log and a time limit, and its failure costs no other."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from bench.console import console
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine


class Step(NamedTuple):
    name: str
    command: list[str]
    limit: int  # seconds


def steps(out: Path, data: Path | None) -> list[Step]:
    """In the order in which they run; results first needed come first."""
    source = [] if data is None else ["--data", str(data)]
    needs_none = "--ignore=tests/test_codegen.py"
    return [
        Step("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", needs_none, "tests"], 600),
        Step("mnist", ["-m", "bench", "mnist", "--device", "cuda", "--steps", "5000", "--out", str(out), *source], 180),
    ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results (default: bench/results/<gpu>)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's idx files (default: cached or downloaded)")


def run(args: argparse.Namespace) -> int:
    """Run the steps; 1 if any of them failed."""
    if not torch.cuda.is_available():
        raise BenchError("no GPU: torch.cuda.is_available() is False; `make test` and `make bench` run without one")
    name = torch.cuda.get_device_name().replace(" ", "-")
    out = writable_folder(args.out or Path(__file__).parent / "results" / name)
    write_json(out / "machine.json", machine(torch.device("cuda")))
    done = [(step, *execute(step, out / f"{step.name}.log")) for step in steps(out, args.data)]
    table = Table("step", "result", "seconds", "last line", box=None)
    for step, result, seconds, last in done:
        table.add_row(step.name, result, f"{seconds:.0f}", last)
    console.print(table)
    return 0 if all(result == "ok" for _, result, _, _ in done) else 1


def execute(step: Step, log: Path) -> tuple[str, float, str]:
    """(ok, exit code or time-out; seconds; last line of the output); the output goes to `log`."""
    console.print(f"{step.name}: {' '.join(step.command)} > {log}", soft_wrap=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.perf_counter()
    with log.open("w") as output:
        try:
            code = subprocess.run(
                [sys.executable, *step.command], stdout=output, stderr=subprocess.STDOUT, timeout=step.limit,
                check=False, env=environment, cwd=Path(__file__).parent.parent,
            ).returncode  # fmt: skip
            result = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            result = f"over {step.limit} s"
    lines = log.read_text().split("\n")
    return result, time.perf_counter() - start, next((line for line in reversed(lines) if line.strip()), "")
