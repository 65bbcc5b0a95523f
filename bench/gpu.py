"""What needs a GPU, step by step: each step has a log and a time limit, and its failure costs no other.

The limits together are below ten minutes. Everything is written as it goes into one folder.
"""

import argparse
import importlib.util
import os
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
from bench.measure import machine
from bench.page.folders import RESULTS, content

ROOT = Path(__file__).parent.parent
# Seconds of all steps together; the rest up to ten and three minutes is for what is around them.
TOTAL, QUICK_TOTAL = 525, 165
# The share of each step, in the order in which they run, of all that are chosen. Zero: not in a quick run.
SHARES = {
    "tests": 100, "more-tests": 50, "ops": 130, "tune": 40, "ops-tuned": 35, "models": 100, "mnist": 40, "report": 30,
}  # fmt: skip
QUICK_SHARES = {
    "tests": 35, "more-tests": 0, "ops": 40, "tune": 18, "ops-tuned": 17, "models": 25, "mnist": 15, "report": 15,
}  # fmt: skip
GRACE = 5  # seconds to finish what was interrupted: pytest names the failures so far
# Of a limit, what a command with --budget has to start, and to finish what it is at when the budget is spent.
START, FINISH = 10, 0.15
# Files of tests that run on the CPU, or spend most of their time there; all others come first.
HOST_TESTS = (
    "architecture", "bench", "fold", "fusion", "launch", "mnist", "model", "networks", "plan", "swap", "tiles", "timm",
    "traffic",
)  # fmt: skip
QUICK_TESTS = ("semantics", "torch_suite", "determinism")
NO_TESTS = ("codegen",)  # of the compiler on any machine


class Step(NamedTuple):
    name: str
    command: list[str]  # of this Python
    limit: int  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results (default: bench/results/<gpu>)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's idx files (default: cached or downloaded)")
    parser.add_argument("--quick", action="store_true", help="a little of everything in three minutes")
    parser.add_argument("--steps", metavar="NAMES", help=f"some of {','.join(SHARES)}, with the whole time for them")


def run(args: argparse.Namespace) -> int:
    """Run the steps; 1 if any of them failed."""
    if not torch.cuda.is_available():
        raise BenchError("no GPU: torch.cuda.is_available() is False; `make test` and `make bench` run without one")
    chosen = names(args.steps, QUICK_SHARES if args.quick else SHARES)
    out = writable_folder(args.out or RESULTS / torch.cuda.get_device_name().replace(" ", "-"))
    done = earlier(out / "steps.json")
    facts = machine(torch.device("cuda")) | gpu_facts()
    write_json(out / "machine.json", facts)
    todo = steps(out.resolve(), args, chosen)
    with terminable():
        for step in todo:
            # The user's table is left out of it: plans are the model's until this run has tuned them.
            plans = out.resolve() / ("plans" if step.name == "ops-tuned" else "no-plans")
            result, seconds, last = execute(step, out / f"{step.name}.log", {"TRITONBN_CACHE_DIR": str(plans)})
            # Results are committed: no folder of this machine in them.
            last = last.replace(f"{out.resolve()}/", "").replace(f"{ROOT}/", "")
            done[step.name] = {"result": result, "seconds": seconds, "last_line": last, "commit": facts["commit"]}
            write_json(out / "steps.json", {"steps": [{"name": name} | row for name, row in done.items()]})
    lines = [["step", "result", "seconds", "limit", "last line"]]
    for step in todo:
        row = done[step.name]
        lines.append([step.name, row["result"], f"{row['seconds']:.0f}", str(step.limit), row["last_line"]])
    print_columns(lines)
    return 0 if all(done[step.name]["result"] == "ok" for step in todo) else 1


def names(chosen: str | None, shares: Mapping[str, int]) -> list[str]:
    """The steps of --steps, each of which the run has; all without."""
    possible = [name for name, share in shares.items() if share]
    asked = possible if chosen is None else [name.strip() for name in chosen.split(",")]
    unknown = [name for name in asked if name not in possible]
    if unknown:
        raise BenchError(f"--steps {chosen}: expected some of {', '.join(possible)}; got {', '.join(unknown)}")
    return asked


def earlier(path: Path) -> dict[str, dict[str, Any]]:
    """By name, the steps that earlier runs into the same folder wrote."""
    if not path.exists():
        return {}
    return {row["name"]: {key: row[key] for key in row if key != "name"} for row in content(path)["steps"]}


def gpu_facts() -> dict[str, Any]:
    """What the GPU and its software are, beside `bench.measure.machine`. Memory and cache in bytes."""
    found = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{found.major}.{found.minor}",
        "sms": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver": driver(),
    }


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def steps(out: Path, args: argparse.Namespace, chosen: Sequence[str]) -> list[Step]:
    """The chosen steps in their order. The time of those that are left out is given to the others."""
    shares = QUICK_SHARES if args.quick else SHARES
    wanted = {name: share for name, share in shares.items() if name in chosen}
    seconds = (QUICK_TOTAL if args.quick else TOTAL) / sum(wanted.values())
    limits = {name: int(share * seconds) for name, share in wanted.items()}
    return [Step(name, command(name, limit, out, args), limit) for name, limit in limits.items()]


def command(name: str, limit: int, out: Path, args: argparse.Namespace) -> list[str]:
    """The command of a step; one with a budget has time left to start and to finish."""
    budget = ["--budget", str(int(limit * (1 - FINISH)) - START)]
    quick = ["--quick"] if args.quick else []
    headline = ["--set", "resnet50-256", "--dtype", "bf16"]
    if name in ("tests", "more-tests"):
        return ["-m", "pytest", *pytest_options(), *files_of(name, args.quick)]
    if name == "ops":
        return ["-m", "bench", "ops", *headline, "--set", "mnist", *quick, *budget, "--out", str(out)]
    if name == "tune":
        return ["-m", "bench", "tune", "--set", "resnet50-256", *budget, "--out", str(out / "plans")]
    if name == "ops-tuned":
        ours = ["--provider", "tritonbn"]
        return ["-m", "bench", "ops", *headline, *ours, *quick, *budget, "--out", str(out / "tuned")]
    if name == "models":
        network = ["--model", "resnet50", "--batch", "256", "--dtype", "bf16", "--layout", "channels_last"]
        modes = ["--training", "--mode", "eager" if args.quick else "eager,graph,compile"]  # measured in this order
        steps = ["--steps", "20" if args.quick else "40"]
        return ["-m", "bench", "models", "--device", "cuda", *network, *modes, *steps, *budget, "--out", str(out)]
    if name == "mnist":
        data = ["--data", str(args.data.resolve())] if args.data else []
        training = ["--device", "cuda", "--steps", "1000" if args.quick else "5000"]
        return ["-m", "bench", "mnist", *training, "--out", str(out), *data]
    return ["-m", "bench", "report", "--results", str(out if args.out else RESULTS)]


def pytest_options() -> list[str]:
    """In parallel where pytest-xdist is there: most of the time goes into compiling kernels."""
    workers = min(12, os.cpu_count() or 1)
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    # A test that hangs is killed with all others at the limit: this has told which it was.
    return ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=45", *parallel]


def files_of(name: str, quick: bool) -> list[str]:
    """The files of a step; in a quick run the few that say most."""
    files = {path.stem.removeprefix("test_"): str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py")}
    tests = {stem: path for stem, path in sorted(files.items()) if not stem.startswith(NO_TESTS)}
    if quick:
        return [path for stem, path in tests.items() if stem in QUICK_TESTS]
    first = [stem for stem in tests if stem.startswith(QUICK_TESTS)]
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
