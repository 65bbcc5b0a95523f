"""What runs for a given problem, and why: layout, path, tile and splits as one frozen value.

Pure Python: no tensors, no CUDA. `print(make_plan("forward", "planes", (256, 64, 3136), 2))` answers on any machine.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, get_args

from tritonbn import model, tables
from tritonbn.choice import GRID_LIMIT, Choice, Estimate, Layout, Operation, Path, Plan, Problem, build
from tritonbn.device import H200, Device
from tritonbn.traffic import Operands, bytes_moved, floor_bytes

# Shared memory for the loads of a loop with stages, one of them maybe of a residual that was not there when they were
# measured: an A100 has 163 KiB, and reductions need some as well.
LARGEST_STAGES = 144 << 10

__all__ = ["Device", "Layout", "Operation", "Path", "Plan", "fits", "forced", "make_plan"]


class _Forced(NamedTuple):
    path: Path | None = None
    splits: int | None = None
    choice: Choice | None = None


_forced = _Forced()


class forced:
    """Context in which every plan takes `path` and its reductions `splits` programs per channel group, or `choice`.

    For tests and measurements; of the whole process, because autograd runs backwards in threads of its own. A plan that
    cannot take the path raises ValueError; one launch with given statistics (inference) has no paths to choose from.
    """

    def __init__(self, path: Path | None = None, splits: int | None = None, choice: Choice | None = None) -> None:
        if path is not None and path not in get_args(Path):
            raise ValueError(f"path must be one of {', '.join(get_args(Path))}, but got {path!r}")
        if splits is not None and not 1 <= splits <= GRID_LIMIT:
            raise ValueError(f"splits must be from 1 to {GRID_LIMIT}, but got {splits}")
        self._new = _Forced(path, splits, choice)

    def __enter__(self) -> None:
        global _forced
        self._old, _forced = _forced, self._new
        tables.changed()

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._old
        tables.changed()


def fits(N: int, C: int, S: int) -> bool:
    """Whether 32-bit indices inside a program suffice for [N, C, S]; offsets into the tensor have 64 bits anyway."""
    one_plane = N * S if C == 1 else S
    return C < 1 << 28 and one_plane < 1 << 30 and N * S < (1 << 31) - (1 << 20)


def make_plan(
    operation: Operation,
    layout: Layout,
    shape: tuple[int, int, int],
    itemsize: int,
    device: Device = H200,
    costly: bool = False,
    tuned: bool = True,
) -> Plan:
    """The plan for `operation` on `[N, C, S]` with elements of `itemsize` bytes.

    Rows have their channels contiguous (S = 1; N counts all values of a channel), planes their S positions. `costly`
    is a backward that computes exponentials for each element. Measured plans are taken from tables if `tuned`, the rest
    from a model. Raises ValueError where a forced path cannot run it.
    """
    return _make_plan(Problem(operation, layout, shape, itemsize, costly), device, _forced, tuned, tables.written())


def independent(problem: Problem, device: Device) -> Plan:
    """The plan of which no program needs another one, whatever is forced or measured: it runs anywhere."""
    return model.best(problem, replace(device, cooperative=False, clusters=False))


def check(plan: Plan, device: Device) -> Plan:
    """The plan, if the device can run it; else ValueError."""
    most = model.programs_at_once(plan.num_warps, device)
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
    if plan.ctas > 1 and not device.clusters:
        raise ValueError(f"programs of {plan.ctas} CTAs need a GPU and a Triton that reduce across them")
    return plan


@lru_cache(maxsize=4096)
def _make_plan(problem: Problem, device: Device, force: _Forced, tuned: bool, written: int) -> Plan:
    plan, source = _chosen(problem, device, force, tuned)
    moved, floor = bytes_moved(plan, Operands()), floor_bytes(plan, Operands())
    seconds = model.seconds(plan, problem, device)
    return replace(plan, estimate=Estimate(device.name, moved, floor, device.bandwidth, seconds, source))


def _chosen(problem: Problem, device: Device, force: _Forced, tuned: bool) -> tuple[Plan, str]:
    if problem.operation == "inference":
        force = _Forced()
    if force.choice is not None:
        return check(build(problem, force.choice), device), "a forced choice"
    if force != _Forced():
        return model.best(problem, device, force.path, force.splits), "the model, path or splits forced"
    if tuned and (found := tables.find(problem, device)) is not None:
        try:
            return check(build(problem, found[0]), device), found[1]
        except ValueError:  # measured for a size near this one, which this one exceeds
            pass
    return model.best(problem, device), "the model"
