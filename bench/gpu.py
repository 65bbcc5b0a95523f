"""What needs a GPU, step by step: each step has a log and a time limit, and its failure costs no other.

The limits together are below ten minutes. Everything is written as it goes into one folder.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.console import console, print_columns
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, stamp
from bench.page.folders import RESULTS, content, folder
from bench.page.targets import FILES, lines_to_cross
from bench.pretend import NAME
from bench.scale import DRY, FIRST, FULL, QUICK, Scale
from bench.summary import HEAD

ROOT = Path(__file__).parent.parent
GRACE = 5  # seconds to finish what was interrupted: pytest names the failures so far
# What a command with --budget has of its limit to start, and to finish what it is at when the budget is spent.
START, FINISH = 8, 0.12
LEAST = 20  # seconds of a step: imports alone take a few, and what is not needed is for the steps that follow
# Files of tests that run on the CPU, or spend most of their time there; all others come first.
HOST_TESTS = (
    "architecture", "bench", "fold", "fusion", "launch", "mnist", "model", "networks", "plan", "swap", "tiles", "timm",
    "traffic",
)  # fmt: skip
AFTER_TUNING = ("ops-tuned", "models", "models-mnist", "mnist")
NO_TESTS = ("codegen",)  # of the compiler on any machine


class Step(NamedTuple):
    name: str
    command: list[str]  # of this Python
    limit: int  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results (default: bench/results/<gpu>)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's idx files (default: cached or downloaded)")
    steps = ",".join(FULL.shares)
    parser.add_argument("--steps", metavar="NAMES", help=f"some of {steps}, with the whole time for them")
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--quick", action="store_true", help="a little of everything in three minutes")
    less.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, the GPU is only pretended")


def run(args: argparse.Namespace) -> int:
    """Run the steps; 1 if any of them failed."""
    if not (args.dry_run or torch.cuda.is_available()):
        text = "no GPU: torch.cuda.is_available() is False; `make test` and `make bench` run without one, and --dry-run"
        raise BenchError(text)
    scale = scale_of(args)
    todo = names(args.steps, scale)
    gpu = NAME if args.dry_run else torch.cuda.get_device_name()
    default = Path("out/gpu") if args.dry_run else RESULTS / gpu.replace(" ", "-")
    out = writable_folder(args.out or default)
    facts = stamp(machine(torch.device("cpu")) | {"device": gpu})
    done = earlier(out / "steps.json", gpu)
    limits, end = {}, time.monotonic() + scale.total
    with terminable():
        for index, name in enumerate(todo):
            limits[name] = limit(scale, todo[index:], end - time.monotonic())
            step = Step(name, command(name, limits[name], out.resolve(), args, scale), limits[name])
            if name == "tune":
                shutil.rmtree(out / "plans", ignore_errors=True)  # of another commit, maybe
            if name == "ops-tuned" and not any((out / "plans").glob("*.json")):
                result, seconds, last = "not run", 0.0, "no plans were tuned"
            else:
                if name in AFTER_TUNING and (out / "no-plans" / "calibration").exists():  # it holds for them, too
                    shutil.copytree(out / "no-plans" / "calibration", out / "plans" / "calibration", dirs_exist_ok=True)
                result, seconds, last = execute(step, out / f"{name}.log", variables(name, out.resolve(), args, facts))
            # Results are committed: no folder of this machine in them.
            last = last.replace(f"{out.resolve()}/", "").replace(f"{ROOT}/", "")
            done[name] = {"result": result, "seconds": seconds, "last_line": last} | facts
            write_json(out / "steps.json", {"steps": [{"name": key} | row for key, row in done.items()]})
    summarize(out, facts["commit"], [(name, done[name], limits[name]) for name in todo])
    return 0 if all(done[name]["result"] == "ok" for name in todo) else 1


def scale_of(args: argparse.Namespace) -> Scale:
    return DRY if args.dry_run else QUICK if args.quick else FULL


def variables(name: str, out: Path, args: argparse.Namespace, facts: Mapping[str, Any]) -> dict[str, str]:
    """Of a step's environment."""
    # Plans are the model's until this run has tuned them; what the user's folder holds counts in neither case.
    found = {"TRITONBN_CACHE_DIR": str(out / ("plans" if name in AFTER_TUNING else "no-plans"))}
    # Results that were committed before are written anew: from then on the checkout would seem to be another one.
    found["TRITONBN_COMMIT"] = facts["commit"] or ""
    if args.dry_run:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def limit(scale: Scale, todo: Sequence[str], left: float) -> int:
    """Seconds of the next step: its share of what is left. What one does not need is for those that follow."""
    share = left * scale.shares[todo[0]] / sum(scale.shares[name] for name in todo)
    return max(1, int(min(left, max(LEAST, share))))


def summarize(out: Path, commit: str | None, ran: Sequence[tuple[str, dict[str, Any], int]]) -> None:
    """What became of the steps, and which lines were crossed by all that is in the folder."""
    lines = [["step", "result", "seconds", "limit", "last line"]]
    for name, row, most in ran:
        lines.append([name, row["result"], f"{row['seconds']:.0f}", str(most), row["last_line"]])
    console.print()
    print_columns(lines)
    try:
        found = folder(out, "")
    except BenchError as error:
        console.print(f"\nNo targets: {error}", soft_wrap=True)
        return
    console.print()
    for name in FILES:
        if name in found.files and (other := found.files[name]["machine"]["commit"]) != commit:
            console.print(f"{name}.json is of an earlier run, commit {other}", soft_wrap=True)
    print_columns([HEAD, *(target.cells for target in lines_to_cross(found))])


def names(chosen: str | None, scale: Scale) -> list[str]:
    """The steps of --steps in their order, each of which the run has; all without."""
    asked = [*scale.shares] if chosen is None else [name.strip() for name in chosen.split(",")]
    unknown = [name for name in asked if name not in scale.shares]
    if unknown:
        raise BenchError(f"--steps {chosen}: expected some of {', '.join(scale.shares)}; got {', '.join(unknown)}")
    return [name for name in scale.shares if name in asked]


def earlier(path: Path, gpu: str) -> dict[str, dict[str, Any]]:
    """By name, the steps that earlier runs into the same folder wrote; BenchError if they are of another GPU."""
    if not path.exists():
        return {}
    steps = content(path)["steps"]
    for step in steps:
        if step.get("gpu", gpu) != gpu:
            raise BenchError(f"{path}: expected results of {gpu}, got those of {step['gpu']}; choose another OUT")
    return {row["name"]: {key: row[key] for key in row if key != "name"} for row in steps}


def command(name: str, seconds: int, out: Path, args: argparse.Namespace, scale: Scale) -> list[str]:
    """The command of a step; one with a budget has time left to start and to finish."""
    bench = ["-m", "bench.pretend" if args.dry_run else "bench"]
    quick = ["--quick"] if args.quick else []
    budget = ["--budget", str(max(1, int((seconds - GRACE) * (1 - FINISH)) - START))]
    networks = [*bench, "models", "--device", "cuda", "--training"]
    match name:
        case "environment" | "bandwidth" | "calibrate":
            return [*bench, name, "--device", "cuda", *quick[: name == "bandwidth"], "--out", str(out)]
        case "tests" | "more-tests":
            # Some of all tests of kernels rather than all of some; what others set up, they set up once.
            rounds = ["--rounds", "8" if name == "tests" else "1"]
            return ["-m", "pytest", *pytest_options(args.dry_run), *budget, *rounds, *files_of(name, scale.tests)]
        case "ops":
            return [*bench, "ops", *scale.ops, *quick, *budget, "--out", str(out)]
        case "tune":
            kept = ["--out", str(out / "plans"), "--results", str(out)]
            return [*bench, "tune", "--again", *scale.tune, *budget, *kept]
        case "ops-tuned":
            return [*bench, "ops", *scale.ops, "--provider", "tritonbn", *quick, *budget, "--out", str(out / "tuned")]
        case "models":
            return [*networks, *scale.network, *budget, "--out", str(out)]
        case "models-mnist":
            return [*networks, *scale.mnist_network, *budget, "--out", str(out / "mnist")]
        case "mnist":
            data = ["--data", str(args.data.resolve())] if args.data else []
            return [*bench, "mnist", "--device", "cuda", "--steps", scale.mnist_steps, "--out", str(out), *data]
    return ["-m", "bench", "report", "--results", str(out if args.out or args.dry_run else RESULTS)]


def pytest_options(alone: bool) -> list[str]:
    """In parallel where pytest-xdist is there: most of the time goes into compiling kernels."""
    workers = min(16, os.cpu_count() or 1)
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") and not alone else []
    # A test that hangs is killed with all others at the limit: this has told which it was.
    hangs = ["-o", "faulthandler_timeout=45"]
    return ["-q", "--tb=short", "-p", "no:cacheprovider", *hangs, *parallel, "-p", "bench.pytest_budget"]


def files_of(name: str, few: Sequence[str] | None) -> list[str]:
    """The files of a step; only those whose names begin as one of `few`, if given."""
    files = {path.stem.removeprefix("test_"): str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py")}
    tests = {stem: path for stem, path in sorted(files.items()) if not stem.startswith(NO_TESTS)}
    if few is not None:
        return [path for stem, path in tests.items() if stem.startswith(tuple(few))]
    first = [stem for stem in tests if stem.startswith(FIRST)]
    device = first + [stem for stem in tests if stem not in first and not stem.startswith(HOST_TESTS)]
    return [tests[stem] for stem in (device if name == "tests" else [stem for stem in tests if stem not in device])]


@contextmanager
def terminable() -> Iterator[None]:
    """Within, a request to terminate ends the running step too: its processes are a group of their own.

    They can be interrupted even where this one cannot, as after `nohup make gpu &`: what is ignored is inherited.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute(step: Step, log: Path, variables: Mapping[str, str]) -> tuple[str, float, str]:
    """(ok, exit code or time-out; seconds; last line of the output); the output goes to `log`."""
    console.print(f"{step.name}: {' '.join(step.command)} > {log}", soft_wrap=True)
    start = time.perf_counter()
    with log.open("w") as output:
        code = finished([sys.executable, *step.command], output, step.limit, variables)
    result = "ok" if code == 0 else f"over {step.limit} s" if code is None else f"exit {code}"
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
    if result != "ok":
        console.print(*(f"  {line}" for line in [result, *lines[-15:]]), sep="\n", soft_wrap=True)
    return result, time.perf_counter() - start, lines[-1] if lines else ""


def finished(command: list[str], output: Any, limit: float, variables: Mapping[str, str] | None = None) -> int | None:
    """The exit code, None after `limit` seconds; nothing of the command's process group is left in either case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"  # what is killed has said so far what it had to say
    environment |= variables or {}
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    grace = min(GRACE, limit / 2)
    try:
        return process.wait(limit - grace)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process in the driver may not end at once
            process.wait(GRACE)
