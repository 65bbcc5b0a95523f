"""What runs for a given problem, and why: layout, path, tile and splits as one frozen value.

Pure Python: no tensors, no CUDA. `print(make_plan("forward", "planes", (256, 64, 3136), 2))` answers on any machine.
"""

from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple, get_args

from tritonbn import cost, model, tables
from tritonbn.choice import GRID_LIMIT, Choice, Estimate, Layout, Operation, Path, Plan, Problem, build
from tritonbn.device import H200, Device
from tritonbn.traffic import Operands, bytes_moved, floor_bytes

__all__ = ["Device", "Layout", "Operation", "Path", "Plan", "fits", "forced", "make_pair_plan", "make_plan"]


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
    from a model, with the constants that were measured on the device if `tuned`. Raises ValueError where a forced path
    cannot run it.
    """
    if not tuned and device.measured is not None:
        device = replace(device, measured=None)
    return _make_plan(Problem(operation, layout, shape, itemsize, costly), device, _forced, tuned, tables.written())


def make_pair_plan(
    operation: Operation,
    layout: Layout,
    shape: tuple[int, int, int],
    itemsize: int,
    device: Device = H200,
    training: bool = True,
    tuned: bool = True,
) -> Plan:
    """The plan for the sum of two batch norms of such tensors, see `kernels/pair.py`.

    Of path single where one tile of each tensor is a program's share and it needs that twice (`training`), and of path
    split else. The backward's tiles are those of a costly one: three tensors are read. Statistics, which read one, take
    plans that were measured.
    """
    if not tuned and device.measured is not None:
        device = replace(device, measured=None)
    problem = Problem(operation, layout, shape, itemsize, operation == "backward")
    return _make_pair_plan(problem, replace(device, cooperative=False), training, _forced, tuned, tables.written())


def independent(problem: Problem, device: Device) -> Plan:
    """The plan of which no program needs another one, whatever is forced or measured: it runs anywhere."""
    return model.best(problem, replace(device, cooperative=False))


@lru_cache(maxsize=4096)
def _make_plan(problem: Problem, device: Device, force: _Forced, tuned: bool, written: int) -> Plan:
    plan, source = _chosen(problem, device, force, tuned)
    return replace(plan, estimator=partial(_estimate, problem, device, source))


@lru_cache(maxsize=4096)
def _make_pair_plan(
    problem: Problem, device: Device, training: bool, force: _Forced, tuned: bool, written: int
) -> Plan:
    path = force.path if force.choice is None else force.choice.path
    path = path if path in ("single", "split") else None
    if force.choice is not None and path == "split":
        return model.check(build(problem, force.choice), device)
    plan = model.best_pair(problem, device, path, force.splits, training)
    if plan.path == "split" and force == _Forced() and tuned and problem.operation == "forward":
        for choice, _ in tables.find(problem, device):
            if choice.path == "split":
                with suppress(ValueError):
                    return model.check(build(problem, choice), device)
    return plan


def _estimate(problem: Problem, device: Device, source: str, plan: Plan) -> Estimate:
    moved, floor = bytes_moved(plan, Operands()), floor_bytes(plan, Operands())
    seconds, bound = cost.seconds(plan, problem, device), cost.bound(plan, problem, device)
    constants = "assumed" if device.measured is None else "calibrated"
    return Estimate(device.name, moved, floor, device.constants.bandwidth, seconds, bound, source, constants)


def _chosen(problem: Problem, device: Device, force: _Forced, tuned: bool) -> tuple[Plan, str]:
    if problem.operation == "inference":
        force = _Forced()
    if force.choice is not None:
        return model.check(build(problem, force.choice), device), "a forced choice"
    if force != _Forced():
        return model.best(problem, device, force.path, force.splits), "the model, path or splits forced"
    for choice, source in tables.find(problem, device) if tuned else ():
        try:
            return model.check(build(problem, choice), device), source
        except ValueError:  # measured for a size near this one, which this one exceeds, or by a process that was alone
            continue
    return model.best(problem, device), "the model"
