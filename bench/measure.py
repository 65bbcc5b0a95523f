"""How things are measured, and on which machine."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import tritonbn
from bench.errors import BenchError

Result = TypeVar("Result")


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """The result and the seconds it took, the work still queued on the device included."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pick_device(name: str | None) -> torch.device:
    """The named device, by default the GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BenchError(f"--device {name}: expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"--device {name}: expected cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise BenchError(f"--device {name}: not available, torch {torch.__version__} sees {count} GPUs")
    return device


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure means nothing without."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "tritonbn": tritonbn.__version__,
        "commit": commit(),
    }


def stamp(facts: dict[str, Any]) -> dict[str, Any]:
    """What each row of results says of where it is from; facts: those of `machine`."""
    return {"gpu": facts["device"], "torch": facts["torch"], "triton": facts["triton"], "commit": facts["commit"]}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """$TRITONBN_COMMIT, for copies without history; else the checkout's commit, with -dirty where files differ from it.

    None where nobody knows.
    """
    if told := os.environ.get("TRITONBN_COMMIT"):
        return told
    root = Path(__file__).resolve().parent.parent
    ours = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}  # a repository around a copy is another one
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=root, env=ours, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
