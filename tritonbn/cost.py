"""How long a plan should take, and what bounds it: memory, L2, latency, the issue of instructions, or launches.

A pass over a tensor takes what the slowest of memory, L2, loads that are waited for, and instructions takes. Launches,
barriers, merges and the sums within a program (`fold` in `kernels/tiles.py`) come on top. The constants are those of
the device: estimates, or what `tritonbn.calibrate` measured, with the factors by which each kind of plans missed its
prediction.
"""

from collections.abc import Iterator
from math import ceil
from typing import Literal, NamedTuple

from tritonbn.choice import Path, Plan, Problem
from tritonbn.device import Constants, Device

Bound = Literal["memory", "L2", "latency", "issue", "launch"]
Part = tuple[float, Bound]  # seconds, and what takes them

# Seconds until a load from memory, or from L2, returns.
LATENCY = 700e-9
L2_LATENCY = 300e-9
# One SM can take so many times its share of the bandwidth.
SM_REACH = 1.5
# Most kernels take 128 registers at most (`python -m bench codegen`): that many warps per SM.
WARPS_PER_SM = 16
# Instructions of threads that an SM issues in a clock: four schedulers, one warp of 32 each.
WARP = 32
ISSUE = 4 * WARP
# The sums within a program: seconds of a shuffle between threads of a warp and the addition after it (24 clocks), and
# of a round through shared memory: store, barrier, load. Estimates, to be replaced by measurements.
SHUFFLE = 14e-9
SHARED_ROUND = 70e-9
WAITING: tuple[Path, ...] = ("cooperative", "stream")  # paths whose programs wait for each other
# The part of L2 that is assumed to be of use to a second pass; what is measured scales the whole of it.
ASSUMED_SHARE: float = Constants._field_defaults["l2_share"]
# The part of L2 that a second pass in exactly the reverse order finds, where it was full: what is written meanwhile
# does not always take the place of what was found already, since it may go to other sets.
REVERSED = 0.8
MOST_SHARES = 64  # of a second pass that are told apart


class Instructions(NamedTuple):
    """Instructions of a thread for each element of a tile, padding included, in one pass."""

    element: float
    access: float  # of each load and store, for all elements that it holds
    odd: float  # of planes that are read from an aligned start before them
    costly: float = 0.0  # of an activation whose derivative takes exponentials
    short: float = 0.0  # the same where it is rounded to 16 bits

    def of(self, plan: Plan, problem: Problem) -> float:
        """What an element takes by a plan."""
        odd = self.odd * (plan.tile.ALIGN > 1)
        costly = (self.short if problem.itemsize == 2 else self.costly) * problem.costly
        return self.element + self.access / plan.tile.access + odd + costly


# By `python -m bench codegen` (Triton 3.7.1, sm_90), rows of path split without epilogue, in bf16: `instr` times the
# part of tiles that is no padding, of 56x56 planes (0.94), which are read eight elements at a time, and of 35x35 planes
# of an odd number of channels (0.96), which are read one at a time; they give fp32, four at a time, to a tenth. odd is
# what 35x35 planes take more that are read from an aligned start, two of five tiles at an edge; costly and short, what
# silu adds to 56x56 planes. The plan of a forward is the same whatever its activation, so that of none is taken.
STATISTICS = Instructions(6.1, 12.7, 0.2)
NORMALIZE = Instructions(4.6, 21.9, 1.6)
GRADIENT_SUMS = Instructions(6.2, 19.1, 1.9, 24.1, 9.4)
INPUT_GRADIENT = Instructions(7.7, 28.8, 2.4, 24.3, 9.2)


def kind(path: Path, problem: Problem, device: Device) -> str:
    """What a measured factor holds for: path, layout and direction, apart for what L2 holds with what is written."""
    size = (problem.operands + 1) * problem.data
    return f"{path}/{problem.layout}/{problem.operation}/{'L2' if size <= device.l2_bytes else 'memory'}"


def seconds(plan: Plan, problem: Problem, device: Device) -> float:
    """The time that a plan should take on the device, between other kernels: predicted, times what was measured."""
    time = predicted(plan, problem, device)
    return time * device.factors.get(kind(plan.path, problem, device), 1.0) if device.factors else time


def predicted(plan: Plan, problem: Problem, device: Device) -> float:
    """The time that a plan should take by the constants of the device, without its factors."""
    return sum(time for time, _ in _parts(plan, problem, device))


def bound(plan: Plan, problem: Problem, device: Device) -> Bound:
    """What most of the predicted time goes to; launch: to launches and barriers."""
    totals: dict[Bound, float] = {}
    for time, what in _parts(plan, problem, device):
        totals[what] = totals.get(what, 0.0) + time
    return max(totals, key=lambda what: totals[what])


def programs_at_once(num_warps: int, device: Device) -> int:
    """Programs that are on the device at a time."""
    return device.sms * max(1, WARPS_PER_SM // num_warps)


def waits(rounds: int, slots: int) -> float:
    """Rounds that are waited for: while one slot waits, the programs of others work, if there are any."""
    return rounds if slots == 1 else 1 + (rounds - 1) / 2


def _parts(plan: Plan, problem: Problem, device: Device) -> Iterator[Part]:
    """What the predicted time is the sum of."""
    constants = device.constants
    yield constants.launch, "launch"
    if plan.operation == "inference":
        programs = plan.groups * plan.apply_splits
        pass_ = _Pass(problem.data, 0, problem.data, programs, plan.apply_tiles, NORMALIZE.of(plan, problem))
        yield pass_.part(plan, device)
    elif plan.path == "split":
        yield from _split(plan, problem, device)
    else:
        yield from _one_launch(plan, problem, device)


def _split(plan: Plan, problem: Problem, device: Device) -> Iterator[Part]:
    """All of two launches but the first."""
    read, write = problem.operands * problem.data, problem.data
    sums, apply = _both(plan, problem)
    programs, apply_programs = plan.groups * plan.splits, plan.groups * plan.apply_splits
    waves = ceil(programs / programs_at_once(plan.num_warps, device))
    hits = found_again(read, write, plan.splits if waves == 1 else plan.apply_splits, _cache(device))
    yield _Pass(read, 0, 0, programs, plan.reduce_tiles, sums).part(plan, device)
    yield LATENCY + _merge(plan) + waits(waves, 2) * folds(plan, programs, device), "latency"
    yield device.constants.launch, "launch"
    yield _Pass(read - hits, hits, write, apply_programs, plan.apply_tiles, apply).part(plan, device)


def _one_launch(plan: Plan, problem: Problem, device: Device) -> Iterator[Part]:
    """All of one launch but its start."""
    constants, together = device.constants, plan.path in WAITING
    read, write = problem.operands * problem.data, problem.data
    sums, apply = _both(plan, problem)
    at_once = programs_at_once(plan.num_warps, device)
    programs = (plan.slots if together else plan.groups) * plan.splits
    again = 0.0 if plan.tile.ONCE else read * (1 - 1 / plan.reduce_tiles)
    live = min(programs, at_once) * read / (plan.groups * plan.splits)
    hits = again * min(1.0, REVERSED * _cache(device) / live)  # what each program reads, in reverse
    rounds = ceil(plan.groups / plan.slots) if together else ceil(programs / at_once)
    tiles = plan.reduce_tiles * (rounds if together else 1)
    uneven = rounds * plan.slots / plan.groups if together else 1.0
    if rounds == 1:  # all reduce, then all write
        passes = [
            _Pass(read, 0, 0, programs, tiles, sums),
            _Pass(again - hits, hits, write, programs, tiles, apply),
        ]
    else:  # some reduce while others write
        passes = [_Pass(read + again - hits, hits, write, programs, 2 * tiles, (sums + apply) / 2)]
    for pass_ in passes:
        time, what = pass_.part(plan, device)
        yield uneven * time, what
    exposed = waits(rounds, plan.slots if together else 2)
    if together:
        yield constants.launch / 2 + exposed * constants.barrier, "launch"
        yield exposed * (_merge(plan) + folds(plan, programs, device)), "latency"
    else:
        yield exposed * folds(plan, programs, device), "latency"


class _Pass(NamedTuple):
    """A pass over tensors: bytes read from memory and from L2 and written, by so many programs of so many tiles."""

    read: float
    hits: float
    written: float
    programs: int
    tiles: int  # of a program
    instructions: float  # of a thread, for an element

    def part(self, plan: Plan, device: Device) -> Part:
        """What it takes: memory, or L2, or the loads that each program waits for, two tiles at a time, or issue."""
        bandwidth = device.constants.bandwidth
        reach = min(1.0, SM_REACH * self.programs / device.sms)
        waves = ceil(self.programs / programs_at_once(plan.num_warps, device))
        busiest = ceil(self.programs / device.sms)  # an SM has so many programs, and each warp one scheduler
        lanes = min(ISSUE, WARP * plan.num_warps * busiest)
        values = busiest * self.tiles * plan.tile.BLOCK_R * plan.tile.BLOCK_L
        parts: tuple[Part, ...] = (
            ((self.read + self.written) / (bandwidth * reach), "memory"),
            ((self.read + self.hits + self.written) / (device.constants.l2_speed * bandwidth), "L2"),
            (ceil(waves * self.tiles / 2) * LATENCY, "latency"),
            (values * self.instructions / (lanes * device.clock), "issue"),
        )
        return max(parts)


def _both(plan: Plan, problem: Problem) -> tuple[float, float]:
    """Instructions of the pass that sums and of the one that writes."""
    passes = (GRADIENT_SUMS, INPUT_GRADIENT) if plan.operation == "backward" else (STATISTICS, NORMALIZE)
    sums, apply = (each.of(plan, problem) for each in passes)
    return sums, apply


def _merge(plan: Plan) -> float:
    """Seconds that a program takes to merge the partial results of all."""
    return ceil(plan.splits / plan.merge_block) * 2 * L2_LATENCY


def folds(plan: Plan, programs: int, device: Device) -> float:
    """Seconds of the sums within each of so many programs: the mean of the first tile, then two sums at a time.

    The backward has only the latter.
    """
    together = min(ceil(programs / device.sms), max(1, WARPS_PER_SM // plan.num_warps))  # on an SM
    each = (2,) if plan.operation == "backward" else (1, 2)
    return sum(_fold(plan, sums, device.clock / together) for sums in each)


def _fold(plan: Plan, sums: int, clock: float) -> float:
    """Seconds to sum so many tiles over lanes and rows at a time: within threads, within warps, then across them.

    Latencies of shuffles and of shared memory, and what is issued, clock: so many times a second. Those are additions
    in a thread, and 32 words a clock to and from shared memory. Bank conflicts are not counted.
    """
    tile = plan.tile
    if tile.GROUP == 1:
        shuffles, words = 5 + (plan.num_warps - 1).bit_length(), plan.num_warps
    else:
        rows = max(1, WARP * tile.access // tile.BLOCK_L)  # of a tile that a warp has at a time
        shuffles = (rows - 1).bit_length() + (5 if tile.SPAN > 1 else 0)
        words = tile.ROW_WARPS * (tile.BLOCK_L + tile.BLOCK_G * tile.BLOCK_F)
    clocks = sums * (tile.BLOCK_R * tile.BLOCK_L / ISSUE + words / WARP)
    return shuffles * SHUFFLE + SHARED_ROUND + clocks / clock


def _cache(device: Device) -> float:
    """Bytes of L2 that what is read and written has for itself."""
    return device.l2_bytes * min(1.0, device.constants.l2_share / ASSUMED_SHARE)


def found_again(read: float, written: float, shares: int, cache: float) -> float:
    """Bytes that a second pass in reverse finds in a cache of so many bytes after a first one read all of them.

    The first pass has worked on all shares of the tensor at a time, and left the end of each in the cache. The second
    takes one share after the other. What it finds of a share makes room for what it writes; beyond that, what is
    written displaces what is left of the others. The constants follow from a model of L2 that was fed with the accesses
    of the kernels: it finds the same within 5 percent of what is read.
    """
    if shares == 1:
        return min(read, REVERSED * cache) if read > cache else read
    resident, hits = min(read, cache), 0.0
    shares = min(shares, MOST_SHARES)
    for left in range(shares, 0, -1):
        found = resident / left
        hits += found
        resident -= found + max(0.0, written / shares - found)
        if resident <= 0:
            break
    return hits
