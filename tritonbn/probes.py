"""What a GPU does at most, one thing at a time: copies, a second reading that L2 serves, launches, barriers."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tritonbn.kernels.probes import barrier_kernel, copy_kernel, empty_kernel, read_kernel
from tritonbn.timing import SAMPLES, Timing, measure, slots_for

LAUNCH_SECONDS = 2e-6  # no kernel takes less
BARRIER_SECONDS = 0.5e-6  # none takes less
ROUNDS = 64  # barriers of one launch
BLOCK, WARPS = 4096, 8  # 128 bytes of each thread, in 128-bit loads

Times = dict[tuple[str, int], float]  # microseconds by what was measured, and bytes of a tensor


class Pair(NamedTuple):
    """x is read, y written, both fp32; sums are of tiles of x; zero is an int32."""

    x: Tensor
    y: Tensor
    sums: Tensor
    zero: Tensor


Work = Callable[[Pair], object]


class Probe(NamedTuple):
    """What is timed: work on tensors of `bytes`, of which `slots` take turns (None: as many as exceed L2 fourfold)."""

    what: str
    bytes: int
    work: Work
    slots: int | None = None
    least: float = LAUNCH_SECONDS  # seconds that it takes at the least, beside what the bytes do


def timed(probe: Probe, device: torch.device, l2_bytes: int, samples: int = SAMPLES) -> Timing:
    """The time of a probe; on CUDA within `measuring`. Raises what the work raises."""
    pairs = [pair(probe.bytes, device) for _ in range(probe.slots or slots_for(probe.bytes, l2_bytes))]
    least = max(LAUNCH_SECONDS, probe.least, 2 * probe.bytes / 1e13)
    return measure(lambda slot: probe.work(pairs[slot]), len(pairs), device, least, samples)


def pair(size: int, device: torch.device) -> Pair:
    """Tensors of `size` bytes; x is random, by a generator of its own: the user's stays as it is."""
    x = torch.empty(size // 4, device=device, dtype=torch.float32)
    x.normal_(generator=torch.Generator(device).manual_seed(0))
    sums = torch.empty(triton.cdiv(x.numel(), BLOCK), device=device, dtype=torch.float32)
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
    """`programs` that wait for each other, all of them on the GPU at a time."""
    together = {"launch_cooperative_grid": True} if programs > 1 else {}

    def work(p: Pair) -> None:
        barrier_kernel[(1, programs)](p.zero, rounds, num_warps=WARPS, **together)

    return work


LAUNCH = Probe("launch", 4, empty, slots=1)


def in_cache(size: int) -> Probe:
    return Probe("copy in L2", size, copy, slots=1)


def barriers(programs: int) -> list[Probe]:
    """A launch with and one without them: the difference is what they take."""
    return [
        Probe(f"{rounds} barriers of {programs}", 4, waiting(programs, rounds), 1, rounds * BARRIER_SECONDS)
        for rounds in (0, ROUNDS)
    ]


def passes(size: int, l2_bytes: int) -> list[Probe]:
    """A pass that reads and writes, alone and after a reading of the same tensor, in either order."""
    # Two at least: else the next call would find what this one, in reverse, wrote and read last.
    slots = max(2, slots_for(size, l2_bytes))
    works = {"one pass": copy, "read": read, "read, then pass": again(False), "read, then pass in reverse": again(True)}
    return [Probe(what, size, work, slots) for what, work in works.items()]


def cache_speed(times: Times) -> float | None:
    """Bytes per second that a copy within L2 reads and writes; None where none was timed."""
    return max((2e6 * size / us for (what, size), us in times.items() if what == "copy in L2"), default=None)


def barrier_us(times: Times, programs: int) -> float | None:
    """Microseconds of one: the difference that `ROUNDS` make."""
    without, with_them = (times.get((f"{rounds} barriers of {programs}", 4)) for rounds in (0, ROUNDS))
    return None if without is None or with_them is None else (with_them - without) / ROUNDS


def second_readings(times: Times, what: str) -> Iterator[tuple[int, float]]:
    """(bytes of a tensor, part of its second reading that L2 served), where all is known.

    A pass that reads and writes takes `one pass`; after a reading it takes less. Where all were served, it would take
    what writing does: half of it. So the part is 2 * (1 - second / one pass), from 0 to 1 but for noise.
    """
    for (name, size), both in times.items():
        alone, first = times.get(("one pass", size)), times.get(("read", size))
        if name == what and alone is not None and first is not None:
            yield size, 2 * (1 - (both - first) / alone)


def cache_share(times: Times, what: str, l2_bytes: int) -> float | None:
    """The part of L2 that a second pass finds; None where nothing was timed that says it."""
    # Of much larger tensors nothing is left, and noise of their times would be taken for a part of L2.
    served = [kept * size for size, kept in second_readings(times, what) if size <= 2 * l2_bytes]
    return max(served) / l2_bytes if served and l2_bytes else None
