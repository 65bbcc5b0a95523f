"""The problem that a tensor poses, the device that it is on, and so its plan."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tritonbn import calibration, private, tables, traffic
from tritonbn.choice import Operation, Plan, Problem
from tritonbn.device import Device, described
from tritonbn.plan import make_pair_plan, make_plan


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format of the result for x [N, C, ...], as torch chooses it: channels_last(_3d) is kept, also when gapped."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return last
    return private.memory_format(x)


def plan_for(operation: Operation, x: Tensor, costly: bool = False, device: torch.device | None = None) -> Plan:
    """The plan of `operation` for dense x, see `make_plan`; in deterministic mode nothing measured decides it.

    device: if it is not to be that of x.
    """
    where = device or x.device
    tuned = where.type != "cpu" and not torch.are_deterministic_algorithms_enabled()
    return make_plan(*problem_of(operation, x, costly)[:4], device_of(where), costly, tuned)


def pair_plan_for(operation: Operation, x: Tensor, training: bool = True, device: torch.device | None = None) -> Plan:
    """The plan of `operation` for the sum of two batch norms of tensors like x, see `make_pair_plan` and `plan_for`."""
    where = device or x.device
    tuned = where.type != "cpu" and not torch.are_deterministic_algorithms_enabled()
    return make_pair_plan(*problem_of(operation, x)[:4], device_of(where), training, tuned)


def pair_pays(x: Tensor, device: torch.device | None = None) -> bool:
    """Whether less is moved where two batch norms of tensors like x are computed together, in training."""
    operations: tuple[Operation, Operation] = "forward", "backward"
    forward, backward = (pair_plan_for(operation, x, device=device) for operation in operations)
    alone, gradients = (plan_for(operation, x, device=device) for operation in operations)
    return traffic.pair_pays((forward, backward), (alone, gradients))


def problem_of(operation: Operation, x: Tensor, costly: bool = False) -> Problem:
    """`operation` on dense x, as plans are made for it."""
    N, C = x.shape[0], x.shape[1]
    S = x.numel() // (N * C)
    if S == 1 or memory_format_of(x) is not torch.contiguous_format:
        return Problem(operation, "rows", (N * S, C, 1), x.element_size(), costly)
    return Problem(operation, "planes", (N, C, S), x.element_size(), costly)


def device_of(device: torch.device) -> Device:
    """What the plan knows of it. Beside collectives of other processes nothing waits until all of the GPU is free."""
    return _described(device, alone() and holds_together(device), tables.written())


_refusing: set[torch.device] = set()


def holds_together(device: torch.device) -> bool:
    """Whether the driver of a device never refused to launch programs that wait for each other."""
    return device not in _refusing


def refuse_together(device: torch.device) -> None:
    """Plan no such programs on the device from now on."""
    _refusing.add(device)
    tables.changed()


def forget() -> None:
    """Ask devices again what they are, and let them hold programs that wait for each other."""
    _refusing.clear()
    _described.cache_clear()
    tables.changed()


def alone() -> bool:
    """Whether this process communicates with no other."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


@lru_cache(maxsize=64)
def _described(device: torch.device, is_alone: bool, written: int) -> Device:
    if device.type != "cuda":  # programs of the interpreter run one after another: none can wait for another one
        return Device(cooperative=device.type != "cpu")
    p = torch.cuda.get_device_properties(device)
    data_sheet = 2e3 * getattr(p, "memory_clock_rate", 0) * getattr(p, "memory_bus_width", 0) / 8  # kHz, bits
    l2_bytes = getattr(p, "L2_cache_size", 0)
    cooperative = not torch.version.hip and is_alone
    found = described(p.name, p.multi_processor_count, l2_bytes, data_sheet, cooperative)
    return replace(found, measured=calibration.find(found))
