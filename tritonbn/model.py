"""Which plans there are for a problem, and which of them should take the least time, see `cost.py`.

The plan where nothing was measured: `tritonbn.tune` replaces what follows from the prediction by measurements of a
layer.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import inf
from operator import itemgetter

from tritonbn.choice import Choice, Path, Plan, Problem, build, cut
from tritonbn.cost import SM_REACH, WAITING, kind, programs_at_once, seconds, waits
from tritonbn.device import Device
from tritonbn.geometry import (
    BYTES_PER_THREAD,
    NARROW_BYTES_PER_THREAD,
    RESIDENT_BYTES,
    WARPS,
    geometry,
    power_of_two,
)

# So many percent of a wave of split reductions should have work.
FULL_WAVE = 95
# A cooperative grid starts when all of the GPU is free for it, and its measured factor is that of one shape: it must
# promise more than the prediction may be wrong by.
DOUBT = 1.1
# Most tiles of an elementwise program: enough to share the load of the channels' values, few enough to balance.
APPLY_TILES = 4
# Shared memory for the loads of a loop with stages, one of them maybe of a residual that was not there when they were
# measured: an A100 has 163 KiB, and reductions need some as well.
LARGEST_STAGES = 144 << 10
FIRST = 8  # plans of the first round of tuning, beside the best of each path
# What `neighbours` change beside the tile; a cooperative program has one tile, so that its splits follow.
TUNABLE: dict[Path, tuple[str, ...]] = {"split": ("splits", "apply_tiles"), "stream": ("splits", "slots")}


@lru_cache(maxsize=4096)
def best(problem: Problem, device: Device, path: Path | None = None, splits: int | None = None) -> Plan:
    """The plan that should take the least time, of those with the given path and splits.

    Of paths whose programs wait for each other only if they are asked for, or were measured on the device. Raises
    ValueError where the path cannot run the problem on the device.
    """
    if path is None:
        timed = [(seconds(plan, problem, device), plan) for plan in plans_for(problem, device, splits, waiting=False)]
        timed += _promising(problem, device, splits, min(time for time, _ in timed))
    else:
        plans = (plan for plan in plans_for(problem, device, splits) if plan.path == path)
        timed = [(seconds(plan, problem, device), plan) for plan in plans]
    if not timed:
        raise ValueError(f"path {path} cannot run {problem.operation} of {list(problem.shape)} on {device.name}")
    return min(timed, key=itemgetter(0))[1]


def _promising(problem: Problem, device: Device, splits: int | None, below: float) -> Iterator[tuple[float, Plan]]:
    """Plans whose programs wait for each other, of paths that were measured, that take less than `below` seconds.

    Each with its seconds, in which there is doubt.
    """
    if not (device.constants.waiting and device.cooperative) or problem.operation == "inference":
        return
    factors = {path: device.factors.get(kind(path, problem, device), inf) for path in WAITING}
    if DOUBT * min(factors.values()) * _least(problem, device, 1, 1, device.sms) >= below:
        return
    for least, choice in sorted(_cooperative(problem, device, splits), key=itemgetter(0)):
        if DOUBT * factors[choice.path] * least < below:  # else there is no need to build it
            for plan in _built(problem, [choice]):
                time = DOUBT * seconds(plan, problem, device)
                below = min(below, time)
                yield time, plan


def plans_for(problem: Problem, device: Device, splits: int | None = None, waiting: bool = True) -> Iterator[Plan]:
    """Plans of every path that can run the problem on the device; reductions of split ones have `splits` programs.

    waiting: also of paths whose programs wait for each other.
    """
    yield from _built(problem, _choices(problem, device, splits, waiting))


def _built(problem: Problem, choices: Iterable[Choice]) -> Iterator[Plan]:
    """The plans by those choices that can run the problem."""
    for choice in choices:
        try:
            yield build(problem, choice)
        except ValueError:
            continue


def first_round(problem: Problem, device: Device) -> list[Plan]:
    """What tuning begins with: the best plan of each path, then the best of all."""
    by_time = sorted(plans_for(problem, device), key=lambda plan: seconds(plan, problem, device))
    return [*{plan.path: plan for plan in reversed(by_time)}.values(), *[*dict.fromkeys(by_time)][:FIRST]]


def _choices(problem: Problem, device: Device, splits: int | None, waiting: bool) -> Iterator[Choice]:
    streamed, groups, tiles = _streamed(problem, device)
    yield streamed._replace(splits=splits or _splits(groups, tiles, device))
    if problem.operation == "inference":
        return
    yield streamed._replace(path="single")
    if (resident := _resident(problem)) is not None:
        yield resident
    if waiting and device.cooperative:
        yield from (choice for _, choice in _cooperative(problem, device, splits))


def _streamed(problem: Problem, device: Device, narrow: bool = False) -> tuple[Choice, int, int]:
    """Tiles of two 128-bit loads a thread; half where accesses are narrow or derivatives take exponentials.

    With the number of channel groups, and of tiles of each.
    """
    N, C, S = problem.view
    tile = geometry(N, C, S, problem.itemsize)[0]
    wide = tile.access * problem.itemsize >= 8 and not problem.costly and not narrow
    per_thread = BYTES_PER_THREAD if wide else NARROW_BYTES_PER_THREAD
    row_bytes = tile.BLOCK_L * problem.itemsize
    block_r = max(1, min(power_of_two(N // tile.FOLD), 32 * WARPS * per_thread // row_bytes))
    num_warps = max(1, min(WARPS, block_r * row_bytes // (32 * per_thread)))
    *_, groups, tiles = cut(problem, block_r, tile.BLOCK_L)
    apply_tiles = max(1, min(APPLY_TILES, tiles * groups // (4 * device.sms)))
    return Choice("split", block_r, tile.BLOCK_L, num_warps, 1, apply_tiles), groups, tiles


def _resident(problem: Problem) -> Choice | None:
    """One tile for all of a group's slice, in registers; None if it is too large."""
    tile = problem.geometry[0]
    block_l = power_of_two(problem.view[2] + tile.ALIGN - 1) if tile.GROUP == 1 else tile.BLOCK_L
    block_r = power_of_two(problem.rows)
    size = block_r * block_l * problem.itemsize
    narrow = tile.access * problem.itemsize < 8  # an address for each access: half as much
    if size > (RESIDENT_BYTES // 2 if narrow else RESIDENT_BYTES):
        return None
    per_thread = NARROW_BYTES_PER_THREAD if narrow or problem.operation == "backward" else BYTES_PER_THREAD
    num_warps = max(1, min(2 * WARPS, size // (32 * per_thread)))
    return Choice("single", block_r, block_l, num_warps)


def best_pair(problem: Problem, device: Device, path: Path | None, splits: int | None, training: bool) -> Plan:
    """The plan for the sum of two batch norms: single if a program keeps its share of all tensors, else split.

    path: if it is to be single or split; single only with statistics of the batch (`training`), where it can.
    """
    split = best(problem, device, "split", None if path == "single" else splits)
    if path == "split" or not training or problem.operation == "inference" or (choice := _resident(problem)) is None:
        return split
    plan = build(problem, choice)
    # More spills: of three tensors, and where a thread holds the values of several channels.
    narrow = problem.operation == "backward" or plan.tile.GROUP > 1 or problem.itemsize == 8
    most = RESIDENT_BYTES // 2 if narrow else RESIDENT_BYTES
    holds = plan.tile.BLOCK_R * plan.tile.BLOCK_L * problem.itemsize <= most
    pays = path == "single" or seconds(plan, problem, device) <= seconds(split, problem, device)
    return plan if holds and pays else split


def _cooperative(problem: Problem, device: Device, splits: int | None) -> Iterator[tuple[float, Choice]]:
    """All of the tensor in registers at a time; or as many channel groups as L2 holds.

    Each with seconds that its plan takes at the least.
    """
    # Tiles of several channels have more values per channel to keep: the backward's would spill, and those of fp64.
    tile = problem.geometry[0]
    narrow = problem.itemsize == 8 or (problem.operation == "backward" and tile.GROUP > 1) or tile.FOLD > 1
    choice, groups, tiles = _streamed(problem, device, narrow)
    most = 32 * WARPS * NARROW_BYTES_PER_THREAD
    if problem.geometry[0].SPAN > 1 and choice.block_l * problem.itemsize > most:  # one row is too much (17x17 planes)
        return
    programs = programs_at_once(choice.num_warps, device)
    if tiles > 1 and groups * tiles <= programs:
        yield _least(problem, device, groups, groups, tiles), choice._replace(path="cooperative", splits=tiles)
    # Plans do not know whether there are a residual and bits, which L2 holds meanwhile, too. In a model of L2 up to 9%
    # of a second pass is lost to them: for [256, 64, 56, 56] in 16 bits 2 us, and half as many slots cost 2 barriers.
    held = int(device.constants.l2_share * device.l2_bytes) // max(1, problem.operands * problem.data // groups)
    for slots in {1 << bit for bit in range(9)} | {groups}:
        share = splits or min(programs // slots, tiles)
        if slots <= min(held, groups) and slots * share <= programs and (share > 1 or splits):
            least = _least(problem, device, groups, slots, share)
            yield least, choice._replace(path="stream", slots=slots, splits=share)


def _least(problem: Problem, device: Device, groups: int, slots: int, splits: int) -> float:
    """Less than what is predicted where programs wait: L2 serves all second readings, and merges are short."""
    constants, rounds = device.constants, -(-groups // slots)
    reach = min(1.0, SM_REACH * slots * splits / device.sms)
    time = (problem.operands + 1) * problem.data / (constants.bandwidth * reach)
    return 1.5 * constants.launch + rounds * slots / groups * time + waits(rounds, slots) * constants.barrier


def _splits(groups: int, tiles: int, device: Device) -> int:
    """The fewest programs per group that fill whole waves: the last one merges what all of them found."""
    wave = 2 * device.sms
    most = min(tiles, max(4, 4 * wave // groups))
    fullest, use = 1, 0.0
    # Of the splits that need as many waves, the most use them best.
    for waves in range(-(-groups // wave), -(-groups * most // wave) + 1):
        splits = min(most, waves * wave // groups)
        if 100 * groups * splits >= FULL_WAVE * waves * wave:  # and so may fewer of them
            fewest = -(-FULL_WAVE * waves * wave // (100 * groups))
            return max(fewest, (waves - 1) * wave // groups + 1)
        if splits and groups * splits / (waves * wave) > use:
            fullest, use = splits, groups * splits / (waves * wave)
    return fullest


def check(plan: Plan, device: Device) -> Plan:
    """The plan, if the device can run it; else ValueError."""
    most = programs_at_once(plan.num_warps, device)
    tile, operands = plan.tile, 3 if plan.operation == "backward" else 2
    staged = tile.STAGES * operands * tile.BLOCK_R * tile.BLOCK_L * plan.itemsize
    if plan.operation == "inference" and plan.path != "split":
        raise ValueError(f"inference is the elementwise pass of path split, but got {plan.path}")
    if tile.STAGES > 1 and not tile.ONCE and staged > LARGEST_STAGES:
        raise ValueError(f"{tile.STAGES} stages take {staged} bytes of shared memory, more than {LARGEST_STAGES}")
    if plan.cooperative and not device.cooperative:
        raise ValueError(f"path {plan.path} waits for other programs, but {device.name} runs them one after another")
    if plan.cooperative and plan.grid[0] * plan.grid[1] > most:
        raise ValueError(
            f"path {plan.path} needs all of {plan.grid[0]} x {plan.grid[1]} programs at a time, "
            f"but {device.name} has room for {most}"
        )
    return plan


def neighbours(plan: Plan, problem: Problem, device: Device) -> Iterator[Plan]:
    """Plans that the device can run and that differ in one thing of those that matter to the path."""
    choice = plan.choice
    names = ["block_r", "block_l", "num_warps", *TUNABLE.get(plan.path, ())]
    values = ((name, getattr(choice, name)) for name in names)
    changes = [(name, changed) for name, value in values for changed in (2 * value, value // 2) if changed]
    if not plan.tile.ONCE:  # there is a loop
        changes += [("stages", stages) for stages in (1, 2, 3) if stages != choice.stages]
    found: dict[Plan, None] = {}
    for name, value in changes:
        changed = choice._replace(**{name: value})
        try:
            changed.check()
            found[check(build(problem, changed), device)] = None
        except ValueError:
            continue
    found.pop(plan, None)
    yield from sorted(found, key=lambda near: seconds(near, problem, device))
