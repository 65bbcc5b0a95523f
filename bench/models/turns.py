"""Warm-up until times are stable, then turns: what else the machine does hits all arms alike."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import synchronize, timed
from bench.models.crew import Crew
from bench.models.steps import Clock, Work
from tritonbn.timing import Quartiles, quartiles

Failed = Callable[[str, Exception], None]


class Pace(NamedTuple):
    """How many steps."""

    group: int  # of warm-up, before times are compared
    most: int  # groups of warm-up
    together: int  # groups of warm-up with other processes
    stable: float  # by so much the median of a group may differ from that of the group before
    lead: int  # of each turn, not timed: the device was idle before
    block: int  # of each turn, timed


CUDA = Pace(group=10, most=8, together=3, stable=0.03, lead=1, block=5)
# No clocks and no tuners to wait for.
CPU = Pace(group=2, most=1, together=1, stable=math.inf, lead=0, block=1)


def pace_of(device: torch.device) -> Pace:
    return CUDA if device.type == "cuda" else CPU


class WarmUp(NamedTuple):
    first_s: float  # the first step: compilers and tuners run in it
    seconds: float  # of all
    steps: int
    stable: bool | None  # None where nobody asks


def warm_up(work: Work, device: torch.device, together: bool = False) -> WarmUp:
    """The first step, and then groups of steps until two in a row have the same median.

    Together with other processes a fixed number of groups: steps wait for each other, and all must make the same.
    """
    pace = pace_of(device)
    _, first = timed(work.step, device)
    total, groups, before, stable = first, 0, math.inf, False
    while (groups < pace.together) if together else (groups < pace.most and not stable):
        clock = Clock(device)
        _, seconds = timed(lambda clock=clock: repeat(work, pace.group, clock), device)  # type: ignore[misc]
        median = whole(clock.milliseconds(work.marks)).median().item()
        stable = abs(median / before - 1) <= pace.stable
        total, groups, before = total + seconds, groups + 1, median
    return WarmUp(first, total, 1 + groups * pace.group, stable if math.isfinite(pace.stable) else None)


def repeat(work: Work, steps: int, clock: Clock) -> None:
    for _ in range(steps):
        work.step(clock.mark)


def whole(parts: Tensor) -> Tensor:
    """The time of each step, [steps], from that of its parts."""
    return parts.sum(dim=1)


def take_turns(
    works: dict[str, Work], steps: int, device: torch.device, crew: Crew, failed: Failed
) -> Iterator[dict[str, Tensor]]:
    """After each round the milliseconds [block, parts] that the steps of every arm took in it.

    Each round begins with another arm. There are so many that every arm makes `steps` steps or more. An arm that fails
    in any process is taken out of `works`, and named to `failed`.
    """
    pace = pace_of(device)
    for start in range(-(-steps // pace.block)):
        found = {}
        for name in rotated(list(works), start):
            times, error = turn(works[name], pace, device)
            if crew.any(times is None):
                del works[name]
                failed(name, error or RuntimeError("it failed in another process"))
            elif times is not None:
                found[name] = crew.slowest(times)
        yield found


def rotated(names: list[str], by: int) -> list[str]:
    """The same order, from another name on."""
    first = by % max(1, len(names))
    return names[first:] + names[:first]


def turn(work: Work, pace: Pace, device: torch.device) -> tuple[Tensor | None, Exception | None]:
    """The milliseconds of a block of steps, or why there are none. Nobody waits between the steps."""
    clock = Clock(device)
    try:
        synchronize(device)
        for _ in range(pace.lead):
            work.step()
        repeat(work, pace.block, clock)
        synchronize(device)
    except Exception as error:
        return None, error.with_traceback(None)  # which would keep tensors alive
    return clock.milliseconds(work.marks), None


def ratios(ours: list[Tensor], theirs: list[Tensor]) -> Quartiles:
    """How many times as fast as theirs ours is, round by round: the quotient of the medians of each."""
    pairs = zip(theirs, ours, strict=True)
    return quartiles([(whole(their).median() / whole(our).median()).item() for their, our in pairs])
