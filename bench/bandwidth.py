"""What bounds every plan: copies, a second reading that L2 serves, launches, barriers; beside what the model assumes.

`tritonbn/model.py` predicts times from a few constants. Here each is measured, on the GPU at hand.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bench.console import console, print_columns
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device, stamp
from bench.probes import barrier_kernel, copy_kernel, empty_kernel, read_kernel
from bench.rows import LAUNCH_SECONDS, survived
from bench.timing import copy_bandwidth, l2_bytes
from tritonbn import launch, model, planning
from tritonbn.timing import SAMPLES, measure, measuring, slots_for

MIB = 1 << 20
COPIES = (1, 4, 16, 64, 256, 1024)  # MiB of a tensor
# Around the size of L2: a tensor, and as much that is written, are in it or are not.
READ_TWICE = (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 256)
IN_CACHE = (1, 2, 4, 8)
ROUNDS = 64
BARRIER_SECONDS = 0.5e-6  # none takes less
BLOCK, WARPS = 4096, 8  # 128 bytes of each thread, in 128-bit loads

Row = dict[str, Any]
Times = dict[tuple[str, int], float]  # microseconds by what was measured, and bytes


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
        yield attempt(bench, "copy", size * bench.unit, torchs_copy)
    if not (launch.INTERPRETED or bench.device.type == "cuda"):
        console.print("only copies by torch: Triton's kernels need a GPU, or TRITON_INTERPRET=1", soft_wrap=True)
        return
    for size in IN_CACHE:
        yield attempt(bench, "copy in L2", size * bench.unit, copy, slots=1)
    yield attempt(bench, "launch", 4, empty)
    # In the interpreter no program could wait for another one.
    for programs in (1,) if launch.INTERPRETED else (bench.sms, 2 * bench.sms):
        for rounds in (0, ROUNDS):
            work, least = waiting(programs, rounds), rounds * BARRIER_SECONDS
            yield attempt(bench, f"{rounds} barriers of {programs}", 4, work, slots=1, least=least)
    for size in () if quick else READ_TWICE:
        for what, work in (("one pass", copy), ("read", read), ("read, then pass", again(False)),
                           ("read, then pass in reverse", again(True))):  # fmt: skip
            # Two at least: else the next call would find what this one, in reverse, wrote and read last.
            yield attempt(bench, what, size * bench.unit, work, max(2, slots_for(size * bench.unit, bench.l2_bytes)))


class Pair(NamedTuple):
    """x is read, y written, both fp32; sums are of tiles of x; zero is an int32."""

    x: Tensor
    y: Tensor
    sums: Tensor
    zero: Tensor


Work = Callable[[Pair], object]


def attempt(
    bench: Bench, what: str, size: int, work: Work, slots: int | None = None, least: float = LAUNCH_SECONDS
) -> Row:
    """A row; of as many tensors in turns as exceed L2 fourfold unless `slots` are given. bytes: of one tensor.

    least: seconds that it takes at the least, beside what the bytes do.
    """
    row: Row = {"what": what, "bytes": size, "us": None, "us_low": None, "us_high": None, "timed_by": None,
                "error": None}  # fmt: skip
    try:
        pairs = [pair(size, bench.device) for _ in range(slots or slots_for(size, bench.l2_bytes))]
        least = max(LAUNCH_SECONDS, least, 2 * size / 1e13)
        found = measure(lambda slot: work(pairs[slot]), len(pairs), bench.device, least, bench.samples)
        row["us"], row["us_low"], row["us_high"], row["timed_by"] = found
    except Exception as error:  # the rest is worth having
        row["error"] = survived(error, bench.device)
    return row


def pair(size: int, device: torch.device) -> Pair:
    x = torch.empty(size // 4, device=device).normal_()
    sums = torch.empty(triton.cdiv(x.numel(), BLOCK), device=device)
    return Pair(x, torch.empty_like(x), sums, torch.zeros(1, dtype=torch.int32, device=device))


def torchs_copy(p: Pair) -> None:
    p.y.copy_(p.x)


def copy(p: Pair, reverse: bool = False) -> None:
    copy_kernel[p.sums.shape](p.x, p.y, p.x.numel(), BLOCK=BLOCK, REVERSE=reverse, num_warps=WARPS)


def read(p: Pair) -> None:
    read_kernel[p.sums.shape](p.x, p.sums, p.x.numel(), BLOCK=BLOCK, num_warps=WARPS)


def again(reverse: bool) -> Work:
    """As batch norm in two launches does: all is read, and then read again and written."""

    def work(p: Pair) -> None:
        read(p)
        copy(p, reverse)

    return work


def empty(p: Pair) -> None:
    empty_kernel[(1,)](p.zero, num_warps=WARPS)


def waiting(programs: int, rounds: int) -> Work:
    together = {"launch_cooperative_grid": True} if programs > 1 else {}

    def work(p: Pair) -> None:
        barrier_kernel[(1, programs)](p.zero, rounds, num_warps=WARPS, **together)

    return work


def constants(rows: list[Row], copy_gb_per_s: float, bench: Bench) -> dict[str, dict[str, float | None]]:
    """What the model assumes of this GPU, and what the rows say."""
    times = times_of(rows)
    fastest = max((2e-3 * size / us for (what, size), us in times.items() if what == "copy in L2"), default=None)
    device = planning.device_of(bench.device)
    found = {
        "copy, GB/s": (device.bandwidth / 1e9, copy_gb_per_s),
        "copy in L2 / copy": (model.L2_SPEED, fastest and fastest / copy_gb_per_s),
        "launch in a graph, us": (1e6 * model.LAUNCH, times.get(("launch", 4))),
        "barrier, us": (1e6 * model.BARRIER, barrier(times, 2 * bench.sms)),
    }
    for order, what in (("forward", "read, then pass"), ("reverse", "read, then pass in reverse")):
        # Of much larger tensors nothing is left, and noise of their times would be taken for a part of L2.
        served = [kept * size for size, kept in second_readings(times, what) if size <= 2 * bench.l2_bytes]
        share = max(served) / bench.l2_bytes if served and bench.l2_bytes else None
        found[f"part of L2 that a second pass finds, {order}"] = (model.L2_SHARE, share)
    return {name: {"assumed": assumed, "measured": value} for name, (assumed, value) in found.items()}


def barrier(times: Times, programs: int) -> float | None:
    """Microseconds of one: the difference that `ROUNDS` make."""
    without, with_them = (times.get((f"{rounds} barriers of {programs}", 4)) for rounds in (0, ROUNDS))
    return None if without is None or with_them is None else (with_them - without) / ROUNDS


def times_of(rows: list[Row]) -> Times:
    return {(row["what"], row["bytes"]): row["us"] for row in rows if row["us"]}


def second_readings(times: Times, what: str) -> Iterator[tuple[int, float]]:
    """(bytes of a tensor, part of its second reading that L2 served), where all is known.

    A pass that reads and writes takes `one pass`; after a reading it takes less. Where all were served, it would take
    what writing does: half of it. So the part is 2 * (1 - second / one pass), from 0 to 1 but for noise.
    """
    for (name, size), both in times.items():
        alone, first = times.get(("one pass", size)), times.get(("read", size))
        if name == what and alone is not None and first is not None:
            yield size, 2 * (1 - (both - first) / alone)


def line(row: Row) -> str:
    time = row["error"] or f"{row['us']:.2f} us ({row['us_low']:.2f}-{row['us_high']:.2f}), by {row['timed_by']}"
    return f"{row['what']}, {row['bytes'] / MIB:g} MiB: {time}" if row["bytes"] > 4 else f"{row['what']}: {time}"


def digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
