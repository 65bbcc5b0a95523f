"""What bounds every plan: copies, a second reading that L2 serves, launches, barriers; beside what the model assumes.

`tritonbn/cost.py` predicts times from a few constants. Here each is measured, on the GPU at hand.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.console import console, print_columns
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device, stamp
from bench.rows import survived
from bench.timing import copy_bandwidth, l2_bytes
from tritonbn import launch, planning, probes
from tritonbn.device import Constants
from tritonbn.probes import Probe, Times
from tritonbn.timing import SAMPLES, measuring

MIB = 1 << 20
COPIES = (1, 4, 16, 64, 256, 1024)  # MiB of a tensor
# Around the size of L2: a tensor, and as much that is written, are in it or are not.
READ_TWICE = (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 256)
IN_CACHE = (1, 2, 4, 8)

Row = dict[str, Any]


class Bench(NamedTuple):
    device: torch.device
    samples: int
    l2_bytes: int
    sms: int
    unit: int  # bytes of what is called a MiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("out/bandwidth"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="no second readings")
    parser.add_argument("--device", help="cuda, or cpu to try it (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 1 if something could not be measured."""
    device = pick_device(args.device)
    out = writable_folder(args.out) / "bandwidth.json"
    facts, cuda = machine(device), device.type == "cuda"
    bench = Bench(
        device, SAMPLES if cuda else 3, l2_bytes(device),
        torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1, MIB if cuda else MIB >> 8,
    )  # fmt: skip
    rows: list[Row] = []
    with measuring(device):
        facts["copy_gb_per_s"] = copy_bandwidth(device, bench.samples) / 1e9
        for row in measured(bench, args.quick):
            rows.append(row | stamp(facts))
            console.print(line(row), soft_wrap=True)
            found = constants(rows, facts["copy_gb_per_s"], bench)
            write_json(out, {"machine": facts, "rows": rows, "constants": found})
    print_columns(
        [("constant of the model", "assumed", "measured")]
        + [(name, f"{each['assumed']:.4g}", digits(each["measured"])) for name, each in found.items()]
    )
    console.print(f"Written: {out}", soft_wrap=True)
    return 1 if any(row["error"] for row in rows) else 0


def measured(bench: Bench, quick: bool) -> Iterator[Row]:
    """Each as soon as it is."""
    for size in COPIES:
        yield attempt(bench, Probe("copy", size * bench.unit, probes.torchs_copy))
    if not (launch.INTERPRETED or bench.device.type == "cuda"):
        console.print("only copies by torch: Triton's kernels need a GPU, or TRITON_INTERPRET=1", soft_wrap=True)
        return
    chosen = [*(probes.in_cache(size * bench.unit) for size in IN_CACHE), probes.LAUNCH]
    # In the interpreter no program could wait for another one.
    for programs in (1,) if launch.INTERPRETED else (bench.sms, 2 * bench.sms):
        chosen += probes.barriers(programs)
    for size in () if quick else READ_TWICE:
        chosen += probes.passes(size * bench.unit, bench.l2_bytes)
    for probe in chosen:
        yield attempt(bench, probe)


def attempt(bench: Bench, probe: Probe) -> Row:
    """A row. bytes: of one tensor."""
    row: Row = {"what": probe.what, "bytes": probe.bytes, "us": None, "us_low": None, "us_high": None,
                "timed_by": None, "error": None}  # fmt: skip
    try:
        found = probes.timed(probe, bench.device, bench.l2_bytes, bench.samples)
        row["us"], row["us_low"], row["us_high"], row["timed_by"] = found
    except Exception as error:  # the rest is worth having
        row["error"] = survived(error, bench.device)
    return row


def constants(rows: list[Row], copy_gb_per_s: float, bench: Bench) -> dict[str, dict[str, float | None]]:
    """What the model assumes of this GPU, and what the rows say."""
    times, assumed = times_of(rows), Constants(planning.device_of(bench.device).bandwidth)
    cache = probes.cache_speed(times)
    found = {
        "copy, GB/s": (assumed.bandwidth / 1e9, copy_gb_per_s),
        "copy in L2 / copy": (assumed.l2_speed, cache and cache / 1e9 / copy_gb_per_s),
        "launch in a graph, us": (1e6 * assumed.launch, times.get(("launch", 4))),
        "barrier, us": (1e6 * assumed.barrier, probes.barrier_us(times, 2 * bench.sms)),
    }
    for order, what in (("forward", "read, then pass"), ("reverse", "read, then pass in reverse")):
        share = probes.cache_share(times, what, bench.l2_bytes)
        found[f"part of L2 that a second pass finds, {order}"] = (assumed.l2_share, share)
    return {name: {"assumed": value, "measured": measured} for name, (value, measured) in found.items()}


def times_of(rows: list[Row]) -> Times:
    return {(row["what"], row["bytes"]): row["us"] for row in rows if row["us"]}


def line(row: Row) -> str:
    time = row["error"] or f"{row['us']:.2f} us ({row['us_low']:.2f}-{row['us_high']:.2f}), by {row['timed_by']}"
    return f"{row['what']}, {row['bytes'] / MIB:g} MiB: {time}" if row["bytes"] > 4 else f"{row['what']}: {time}"


def digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
