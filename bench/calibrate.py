"""The constants behind the plans, measured on the GPU at hand: `tritonbn.calibrate` from the command line."""

import argparse
import time
from pathlib import Path

import torch

import tritonbn
from bench.console import console, print_columns
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device
from tritonbn import planning
from tritonbn.device import Constants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("out/calibrate"), help="default: %(default)s")
    parser.add_argument("--device", help="cuda or cuda:N (default: cuda)")


def run(args: argparse.Namespace) -> int:
    """Measure, keep in the user's folder, write and print."""
    device = pick_device(args.device)
    if device.type != "cuda":
        raise BenchError(f"--device {args.device}: plans are measured on a GPU")
    out = writable_folder(args.out) / "calibration.json"
    begun = time.perf_counter()
    found, took = tritonbn.calibrate(device), time.perf_counter() - begun
    write_json(out, {"machine": machine(device), "seconds": took, "constants": content(found)})
    print_columns([("constant", "assumed", "measured"), *lines(found, device)])
    console.print(f"calibrated in {took:.1f} s, written: {out}", soft_wrap=True)
    return 0


def content(constants: Constants) -> dict[str, object]:
    return constants._asdict() | {"factors": dict(constants.factors)}


def lines(found: Constants, device: torch.device) -> list[tuple[str, str, str]]:
    """Each constant beside what is assumed, and the factors by which paths miss their predictions."""
    assumed = Constants(planning.device_of(device).bandwidth)
    values = zip(Constants._fields[:5], assumed[:5], found[:5], strict=True)
    factors = [(f"time by prediction, {kind}", "1", f"{factor:.3g}") for kind, factor in found.factors]
    return [*((name, f"{old:.4g}", f"{new:.4g}") for name, old, new in values), *factors]
