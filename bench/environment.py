"""The machine that all results of a run are from: the GPU, its driver, versions, and what is not there."""

import argparse
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.console import console, print_columns
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device, version

# What the steps of `python -m bench gpu` use, and what happens without it.
PACKAGES = {
    "numpy": "images and plots cannot be made",
    "pytest": "there are no tests",
    "pytest-xdist": "tests run one after the other, and most of them not within the time",
    "pytest-benchmark": "`pytest bench/` measures nothing",
    "hypothesis": "tests that search for counterexamples are skipped",
    "expecttest": "torch's own tests of batch norm are skipped",
    "rich": "there are no benchmarks",
    "matplotlib": "there are no plots",
    "scikit-learn": "MNIST needs --data DIR or a network",
    "torchvision": "its networks cannot be measured",
    "timm": "its networks cannot be measured",
}
# By our names, those of nvidia-smi. Of the clocks the highest: those of an idle GPU say nothing.
QUERIED = {
    "driver": "driver_version", "power_limit_w": "power.limit", "sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.max.memory", "temperature_c": "temperature.gpu", "memory_used_mib": "memory.used",
    "ecc": "ecc.mode.current",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="for machine.json (default: it is printed only)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Print what there is, and write it if it was asked for."""
    device = pick_device(args.device)
    packages = {name: version(name) for name in PACKAGES}
    facts = machine(device) | gpu_facts(device) | {"packages": packages}
    if args.out is not None:
        write_json(writable_folder(args.out) / "machine.json", facts)
    print_columns([(name, str(value)) for name, value in facts.items() if name != "packages"])
    console.print(", ".join(f"{name} {found}" for name, found in packages.items() if found), soft_wrap=True)
    for name, found in packages.items():
        if found is None:
            console.print(f"without {name}: {PACKAGES[name]}", soft_wrap=True)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "commit"))
    console.print(f"{facts['device']}, {versions}", soft_wrap=True)
    return 0


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What a GPU and its software are, beside `bench.measure.machine`; of a CPU nothing. Memory and cache in bytes."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{found.major}.{found.minor}",
        "sms": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        **queried(f"GPU-{found.uuid}"),
    }


def queried(gpu: str) -> dict[str, str | None]:
    """What nvidia-smi says of a GPU, or of the first one where it does not know that; None where it says nothing."""
    query = f"--query-gpu={','.join(QUERIED.values())}"
    for which in ([f"--id={gpu}"], []):
        command = ["nvidia-smi", *which, query, "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        cells = [cell.strip() for cell in next(iter(answer.splitlines()), "").split(",")]
        if len(cells) == len(QUERIED):
            return {name: None if cell == "[N/A]" else cell for name, cell in zip(QUERIED, cells, strict=True)}
    return dict.fromkeys(QUERIED)
